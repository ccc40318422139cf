"Pictures of maps: what is shown is what was measured, files come back as they were, and differences are paired."
import dataclasses
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from scipy.stats import ttest_rel
from torchvision.transforms.v2.functional import gaussian_blur

from lico.backbones import create_backbone
from lico.evidence.cases import Network, on_scenes
from lico.evidence.pictures import (Shown, collect_pictures, compare_maps, compare_methods, draw, draw_compared,
                                    original,
                                    read_shown, row_per_method, save_shown, scene_runs, show)
from lico.evidence.store import read_scores, write_results
from lico.experiments import run_id
from lico.metrics import deletion, insertion
from lico.saliency import explain
from lico.scenes import digit_scenes

SEED = 1


@pytest.fixture(scope='module')
def cases():
    torch.manual_seed(0)
    network = Network('x', create_backbone('wrn_10_1', 10, 48).eval(), lambda i: i.float()/127.5 - 1,
                      tuple('0123456789'), 48)
    return on_scenes(network, digit_scenes(4, 48, (1, 2), (18, 24), 'same', seed=SEED), kind='same')


def scene_of(cases, k): return digit_scenes(4, 48, (1, 2), (18, 24), 'same', seed=SEED)[int(cases.names[k].split()[0])]


def test_what_is_shown_is_what_the_metrics_give(cases, tmp_path):
    s = show({'a': cases}, ['grad-cam', 'random'], images=3)
    net, x, y = cases.network.net, cases.x[:3], cases.target[:3]
    assert s.columns.tolist() == ['a\ngrad-cam', 'a\nrandom'] and s.rows.tolist() == [f'"{c}"' for c in y.tolist()]
    for j, method in enumerate(('grad-cam', 'random')):
        maps = explain(net, x, y, method)
        assert np.abs(s.maps[:, j]/255 - maps.numpy()).max() <= .5/255 + 1e-6
        for own, metric, baseline in ((s.insertion, insertion, gaussian_blur(x, 11, 5.)), (s.deletion, deletion, 0.)):
            assert np.allclose(own[:, j], metric(net, x, maps, y, baseline=baseline).curve, atol=1e-5)
    for k in range(3):
        scene = scene_of(cases, k)
        assert np.array_equal(s.images[k], scene.image) and np.array_equal(s.boxes[k][:len(scene.boxes)], scene.boxes)
        assert np.isnan(s.boxes[k][len(scene.boxes):]).all()
    save_shown(s, tmp_path/'m.npz')
    again = read_shown(tmp_path/'m.npz')
    for k in vars(s): assert np.array_equal(getattr(s, k), getattr(again, k), equal_nan=k == 'boxes'), k
    half = show({'': cases}, ['grad-cam'], 1, size=24)
    assert half.images.shape == (1, 3, 24, 24) and half.maps.shape == (1, 1, 24, 24) and np.allclose(half.boxes[0],
        s.boxes[0][:1]/2)


def test_originals_whatever_the_normalisation(cases):
    "Each channel with a mean and a spread of its own."
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((.1, .5, .9), (.2, .3, .4)))
    network = dataclasses.replace(cases.network, normalise=lambda i: (i.float()/255 - mean)/std)
    other = on_scenes(network, digit_scenes(4, 48, (1, 2), (18, 24), 'same', seed=SEED))
    torch.testing.assert_close(original(other), original(cases), atol=1e-6, rtol=0)
    torch.testing.assert_close(original(other)[0], scene_of(cases, 0).image/255, atol=1e-6, rtol=0)


def rows(seeds=(0, 1, 2), gap=np.nan):
    "Made-up scores: two arms, three images; one of them without a score."
    rng, out = np.random.default_rng(0), []
    for arm in ('CE', 'LICO'):
        for seed in seeds:
            for image in 'abc': out.append(dict(id=f'{arm}{seed}', kind='one', saliency='rise', image=image,
                                                sch=rng.normal(), mosu=rng.normal(), constant=False))
    df = pd.DataFrame(out)
    df.loc[(df.id == 'LICO1') & (df.image == 'b'), 'sch'] = gap
    return df


def write(df, folder):
    runs = df.drop_duplicates(['id', 'saliency'])[['id', 'kind', 'saliency']]
    runs = runs.assign(arm=runs.id.str[:-1], method=runs.id.str[:-1], seed=runs.id.str[-1].astype(int),
                       preset='paper', dataset='digits', backbone='wrn_10_1',
                       text_encoder=[None if i.startswith('CE') else 'minilm' for i in runs.id], sch=0., mosu=0.)
    write_results(folder, runs, df)


def test_differences_are_paired_on_images_and_then_on_seeds(tmp_path):
    "Against scipy's paired t-test over the means of each seed, of the images that both have."
    df = rows()
    write(df, tmp_path)
    df = df.assign(arm=df.id.str[:-1], seed=df.id.str[-1])
    kept = df[~((df.seed == '1') & (df.image == 'b'))]
    for metric, part in (('sch', kept), ('mosu', df)):
        means = part.groupby(['arm', 'seed'])[metric].mean().unstack('arm')
        low, high = ttest_rel(means.LICO, means.CE).confidence_interval()
        r = compare_maps(tmp_path, ['sch', 'mosu']).set_index('metric').loc[metric]
        assert np.allclose([r.difference, r.half_width], [(low + high)/2, (high - low)/2], rtol=1e-3) and (r.n,
            r.images) == (3, 3)
        assert np.allclose([r.baseline, r.value], [means.CE.mean(), means.LICO.mean()], rtol=1e-3)


def test_networks_of_another_architecture_are_no_partners(tmp_path):
    df = rows(gap=0.)
    write(df, tmp_path)
    results = pd.read_csv(tmp_path/'results.csv')
    results.loc[results.arm == 'LICO', 'backbone'] = 'wrn_16_1'
    results.to_csv(tmp_path/'results.csv', index=False)
    (tmp_path/'SHA256SUMS').unlink()  # the change was meant
    assert compare_maps(tmp_path, ['sch']).empty


def test_a_pretrained_network_beside_random_maps_is_scipys_paired_t(tmp_path):
    rng = np.random.default_rng(0)
    df = pd.DataFrame([dict(id='net', saliency=s, saliency_options=o, image=str(i), deletion=rng.normal()) for s,
                       o in (('random', None), ('rise', 'n_masks=9')) for i in range(9)])
    runs = df.drop_duplicates('saliency').assign(arm='pretrained', method='pretrained', dataset='toys', seed=None)
    write_results(tmp_path, runs.drop(columns='image'), df)
    c = compare_methods(tmp_path, ['insertion', 'deletion'])
    stored = read_scores(tmp_path)
    a, b = (stored[stored.saliency == s].deletion.to_numpy() for s in ('rise', 'random'))
    low, high = ttest_rel(a, b).confidence_interval()
    assert len(c) == 1 and np.allclose([c.difference[0] - c.half_width[0], c.difference[0] + c.half_width[0]],
                                       [low, high]) and c.saliency_options[0] == 'n_masks=9'
    write(rows(), tmp_path/'runs')
    assert compare_methods(tmp_path/'runs', ['sch']).empty, 'networks of ours have partners'


def test_pictures_show_what_they_are_given(cases, tmp_path):
    """Curves and their areas, the class's probability, boxes, and the difference with its interval, read back from
    the axes."""
    s = show({'a': cases, 'b': cases}, ['edges'], images=1)
    apart = np.float32([[0], [.1]])  # the same network twice would not be told apart
    s = dataclasses.replace(s, deletion=s.deletion*0 + np.float32([[.37], [.62]]), insertion=s.insertion + apart)
    axes = draw(s).axes
    rising = axes[3].lines[1]
    area = f'{np.trapezoid(s.insertion[0, 1], s.fraction):.0%}'
    assert np.array_equal(rising.get_ydata(), s.insertion[0, 1]) and rising.get_label() == f'{area} b edges'
    assert [ax.get_xlabel() for ax in axes[1:3]] == ['p = 37%', 'p = 62%']
    assert axes[0].get_ylabel() == s.rows[0] and axes[2].images[1].get_clim() == (0, 1)
    boxes = [(x0 - .5, y0 - .5, x1 - x0, y1 - y0) for x0, y0, x1, y1 in s.boxes[0] if not np.isnan(x0)]
    assert [o.get_bbox().bounds for o in axes[0].patches] == boxes
    write(rows(), tmp_path)
    c = compare_maps(tmp_path, ['sch'])
    (line, _, bars), = draw_compared(s, c).axes[-1].containers
    assert np.isclose(line.get_xdata()[0], c.difference[0])
    assert np.allclose(bars[0].get_segments()[0][:, 0], [c.difference[0] - c.half_width[0],
                                                         c.difference[0] + c.half_width[0]])


def parameters(root, **more):
    return SimpleNamespace(**dict(
        profile='smoke', protocol='smoke', datasets=['digit-scenes'], backbones=['wrn_10_1'], labels=[40],
        methods=['CE'], presets=['paper'], seeds=[0, 1], steps=1, epochs=None, evaluations=3,
        image_size=None, text_encoder='minilm', options={}, stand_in=None, saliency=['grad-cam', 'random'],
        saliency_options=None, images=2, shown=1, batch_size=16, workers=1, stored=None,
        out=root/'out') | more)


def test_networks_are_shared(lico_root):
    "Figures and Table 8 ask for the same runs; a baseline is trained once for both presets."
    p = parameters(lico_root, methods=['CE', 'LICO'], presets=['paper', 'repaired'], seeds=[0], steps=2)
    of_table = SimpleNamespace(**vars(p) | dict(labels=['all'], evaluations=1))
    runs = scene_runs(p)
    assert len(runs) == 4 and len({run_id(r) for r in runs}) == 3 and all(r.labels is None and r.evaluations == 1
        and r.steps == 2 for r in runs)
    assert runs[0].dataset == f'folder:{lico_root}/data/digit-scenes-200' and scene_runs(of_table, 8) == runs
    assert scene_runs(parameters(lico_root, stored='only')) == scene_runs(parameters(lico_root, datasets=[None])) == []


def test_a_figure_is_measured_once_and_read_again(lico_root):
    p = parameters(lico_root)
    df, maps = collect_pictures(p, ['one', 'same'])
    assert len(df) == 2*2*2 and set(df.kind) == {'one',
                                                 'same'} and (df.images == 2).all() and len(read_scores(p.out)) == 16
    assert list(maps.columns) == ['CE\ngrad-cam'] and len(maps.images) == 1
    assert df.id.nunique() == 2 and (df.dataset == 'folder:digit-scenes-200').all() and (df.command
        + df.measured_by).str.count('scene_dataset\\(200\\)').eq(2).all()
    p.stored = 'only'
    again, stored = collect_pictures(p, ['one', 'same'])
    assert again.equals(df) and np.array_equal(stored.maps, maps.maps)


def test_a_row_for_each_method():
    "Two pictures, networks a and b, methods x and y: each map, curve and picture is found again in its own row."
    maps = np.arange(8, dtype=np.uint8).reshape(2, 4, 1, 1)
    images, columns = np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1), np.array(['a\nx', 'b\nx', 'a\ny', 'b\ny'])
    s = Shown(images, np.zeros((2, 1, 4), np.float32), maps, maps[..., 0]/1., maps[..., 0]/2., np.zeros(1),
              np.array(['p', 'q']), columns)
    r = row_per_method(s)
    assert r.columns.tolist() == ['a', 'b'] and r.rows.tolist() == ['p\nx', 'p\ny', 'q\nx',
        'q\ny'] and r.images.flatten().tolist() == [0, 0, 1, 1]
    assert r.maps[..., 0, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and (r.insertion[..., 0]
        == r.maps[..., 0, 0]).all() and (2*r.deletion == r.insertion).all()
