"""Sanity checks of networks: the rows are those of `lico.sensitivity.sanity_check`, and what is said of them is what
they hold."""
from types import SimpleNamespace

import numpy as np, pandas as pd

from lico.evidence.pictures import cases_of_kind, draw, scene_runs
from lico.evidence.sanity import SCHEMES, collect_sanity, compare_sanity, sanity_sentences, sanity_table
from lico.evidence.store import read_scores, write_results
from lico.experiments import sweep
from lico.sensitivity import sanity_check
from lico.saliency import explain


def parameters(root):
    return SimpleNamespace(profile='smoke', protocol='smoke', datasets=['digit-scenes'], backbones=['wrn_10_1'],
                           methods=['CE'], presets=['paper'], seeds=[0, 1], steps=1, epochs=None,
                           image_size=None, text_encoder='minilm', options={}, stand_in=None, saliency=['grad-cam'],
                           images=2, layers='fc, stem', batch_size=16, workers=1, stored=None, out=root/'out')


def test_networks_are_checked_as_the_metric_says(lico_root):
    p = parameters(lico_root)
    df, maps = collect_sanity(p)
    assert df.groupby('id').size().tolist() == [4, 4] and (df.images == 2).all() and len(read_scores(p.out)) == 16
    record = sweep(scene_runs(p), progress=False)[1]
    cases = cases_of_kind(record, 'one', 2)
    see = lambda net: explain(net, cases.x, cases.target, 'grad-cam')
    own = df[df.id == record['id']].set_index(['scheme', 'layer'])
    for scheme in SCHEMES:
        for e in sanity_check(see, cases.network.net, ['fc', 'stem'], scheme, seed=1):
            np.testing.assert_allclose(own.loc[scheme, e.layer].spearman, np.nanmean(e.spearman), rtol=1e-4)
            np.testing.assert_allclose(own.loc[scheme, e.layer].ssim, np.nanmean(e.ssim), rtol=1e-4)
    assert maps.rows.tolist() == ['CE\ncascading', 'CE\nindependent'] and maps.columns.tolist() == ['trained', 'fc',
        'stem']
    first = cases_of_kind(sweep(scene_runs(p), progress=False)[0], 'one', 2)
    trained = explain(first.network.net, first.x, first.target, 'grad-cam')[0]
    assert np.abs(maps.maps[0, 0]/255 - trained.numpy()).max() <= .5/255 + 1e-6
    assert sum(bool(ax.images) for ax in draw(maps).axes) == 2*(1 + 3), 'the picture and a map a column, twice'


def test_sentences_count_intervals(tmp_path):
    "Cascading: LICO's maps change more, for certain, at one of two layers; independent: nothing."
    rng, rows, images = np.random.default_rng(0), [], []
    for arm in ('CE', 'LICO'):
        for seed in range(4):
            for scheme in SCHEMES:
                for layer in ('fc', 'stem'):
                    likeness = .5 - .3*(arm == 'LICO' and scheme == 'cascading' and layer == 'stem') + rng.normal(0,
                        .01)
                    key = dict(id=f'{arm}{seed}', scheme=scheme, layer=layer, saliency='rise')
                    rows.append(dict(key, arm=arm, method=arm, seed=seed, preset='paper', dataset='digits',
                                     backbone='wrn_10_1', text_encoder=None if arm == 'CE' else 'minilm',
                                     spearman=likeness, ssim=.5))
                    images.append(dict(key, image='1', spearman=likeness, ssim=.5))
    df = write_results(tmp_path, pd.DataFrame(rows), pd.DataFrame(images))
    said = sanity_sentences(df, compare_sanity(tmp_path))
    means = df.query("layer == 'stem' and scheme == 'cascading'").groupby('arm').spearman.mean()
    assert f"against CE over 4 pairs of networks: the correlation changes by {means.LICO - means.CE:+.2f} to" in said
    cascading, independent = [line for line in said.split('\n') if 'LICO (paper) against CE' in line]
    assert cascading.startswith('* cascading') and cascading.endswith("change more): 1 of 2; above: 0.")
    assert independent.startswith('* independent') and independent.endswith("change more): 0 of 2; above: 0.")
    assert "CE: the whole cascade leaves a rank correlation of 0.5" in said
    assert '| cascading   | LICO (paper) |' in sanity_table(df)
