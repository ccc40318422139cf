"Comparisons against a reference, against scipy; what tables ask for beside accuracy, on small runs; coverage."
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from scipy import stats

from lico import paper
from lico.experiments import Run, load_backbone, load_data, sweep
from lico.paper import compare, collect, coverage, pairs_of, plot_pairs, read_results, save_results
from lico.tables import TABLES, columns_of, grid
from lico.writing import markdown_table, sentences

RNG = np.random.default_rng(0)
def rows(arm, values, metric='accuracy_last', text='minilm', method='LICO', preset='paper', options=None, **more):
    n = len(values)
    return pd.DataFrame(dict(dataset='digits', data='d', labels='all', backbone='wrn_16_1', image_size=16, validation=None, steps=120, training='t', preset=preset, method=method, options=options,
                             text_encoder=text, seed=range(n), split=range(n), paper_dataset='ImageNet-1k', is_stand_in=True, degenerate=None, older_code=False, arm=arm,
                             id=[f'{arm}{preset}{options}{i}' for i in range(n)], **{metric: values}) | more)


@pytest.mark.parametrize('metric, sign', [('accuracy_last', 1), ('top5', 1), ('insertion', 1), ('deletion', -1), ('overall', 1)])
def test_verdicts_against_scipy(metric, sign):
    "The sign of the difference stays, the verdict is about what is better."
    for shift in (-3., 0., 3.):
        a, b = RNG.normal(50, 1, 6), RNG.normal(50 + shift, 1, 6)
        c = compare(pd.concat([rows('12 tokens', a, metric), rows('8 tokens', b, metric)]), 6, metric).iloc[0]
        ci = stats.ttest_rel(b, a).confidence_interval(0.95)
        np.testing.assert_allclose([c.difference - c.half_width, c.difference + c.half_width, c.baseline, c.value], [ci.low, ci.high, a.mean(), b.mean()])
        low, high = sorted((sign*ci.low, sign*ci.high))
        gain = abs(c.printed_value - c.printed_baseline)/2  # not a number for `overall`, which Table 6 does not print
        assert c.verdict == ('supported' if low > 0 else 'contradicted' if high < 0 else 'equivalent' if max(-low, high) < gain else 'inconclusive')
    assert (c.reference, c.arm, c.metric) == ('12 tokens', '8 tokens', metric)


@pytest.mark.parametrize('baseline, says', [(96., 'no difference that matters (less than half the printed difference), of 4.0 that there were to gain'), (90., 'no difference that matters (less than half the printed difference)')])
def test_an_equivalence_near_the_ceiling_says_so(baseline, says):
    "Table 3 prints +4.8 on CIFAR-10 with 250 labels."
    of = dict(labels='250', paper_dataset='CIFAR-10')
    c = compare(pd.concat([rows('CE', [baseline]*3, method='CE', text=None, **of), rows('LICO', [baseline + .1, baseline, baseline - .1], **of)]), 3)
    assert c.verdict.tolist() == ['equivalent'] and says in sentences(c) and ('to gain' in sentences(c)) == (baseline == 96)


def test_a_number_that_is_not_printed_is_a_dash():
    "Table 1 prints LICO's deletion under CGC, and none without LICO."
    of = dict(metric='deletion', saliency='grad-cam', saliency_options=None, images=9)
    c = compare(pd.concat([rows('CGC', [20.] * 2, method='CGC', text=None, **of), rows('LICO+CGC', [19., 21.], method='LICO+CGC', **of)]), 1, 'deletion', 'CGC')
    assert '— → 15.8 ' in markdown_table(c)


def test_pairs_of_an_ablation_share_preset_options_and_encoder():
    kinds = [dict(preset=p, options=o, text=t) for p in ('paper', 'repaired') for o in (None, 'alpha=5') for t in ('minilm', 'clip')]
    df = pd.concat([rows(arm, np.full(3, 10.*i + j), **k) for i, k in enumerate(kinds) for j, arm in enumerate(('DC on', 'DC off'))])
    c = compare(df, 10)
    assert len(c) == 8 and (c.difference == 1).all() and set(c.arm) == {'DC off'}
    with pytest.raises(ValueError, match='no seed at which both DC on and another method were run'): compare(df[df.arm == 'DC off'], 10)
    with pytest.raises(ValueError, match="unknown metric 'f1': choose one of accuracy_last"): compare(df, 10, 'f1')
    with pytest.raises(ValueError, match='the results have no top5'): compare(df, 10, ['accuracy_last', 'top5'])


def test_cross_entropy_is_the_partner_of_every_preset():
    df = pd.concat([rows('CE', [1., 2.], method='CE', text=None), *(rows(m, [2., 3.], method=m, text=None if m == 'CGC' else 'minilm', preset=p) for m in ('CGC', 'LICO') for p in ('paper', 'repaired'))])
    c = compare(df, 4)
    assert len(c) == 4 and (c.difference == 1).all() and len(pairs_of(df)) == 4


def test_maps_are_a_settings_own_and_accuracy_is_counted_once():
    def maps(arm, shift): return pd.concat([rows(arm, [50., 60.], saliency=s, saliency_options=None, images=9, insertion=[30. + shift + k, 31. + shift + k]) for k, s in enumerate(('grad-cam', 'random'))])
    df = pd.concat([maps('Learnable', 0), maps('Random', 2)])
    c = compare(df, 13, ['accuracy_last', 'insertion'])
    assert c.metric.tolist() == ['accuracy_last', 'insertion', 'insertion'] and c.n.tolist() == [2, 2, 2] and c.difference.tolist() == [0, 2, 2]
    assert c.printed_value.tolist()[:2] == [75.88, 53.3] and math.isnan(c.printed_value[2]) and pd.isna(c.printed_backbone[2])
    assert compare(df.assign(images=[9, 9, 9, 9, 8, 8, 9, 9]), 13, 'insertion').saliency.tolist() == ['random'], 'over other images'
    fig = plot_pairs(df, c)
    assert len(fig.axes) == 4 and [len(ax.get_yticks()) for ax in fig.axes] == [1, 1, 2, 2]
    assert len(plot_pairs(df, c, 'insertion').axes) == 2


def test_what_was_not_measured_is_left_out():
    df = pd.concat([rows('CE', [1., 2.], method='CE', text=None, top5=[math.nan]*2), rows('LICO', [2., 3.], top5=[9., math.nan])])
    assert compare(df, 2, ['accuracy_last', 'top5']).metric.tolist() == ['accuracy_last']


def test_rows_of_before_there_were_arms():
    old = pd.concat([rows('x', [1., 2.], method='CE', text=None), rows('x', [2., 3.])]).drop(columns='arm')
    new = rows('LICO', [4., 5.], preset='repaired')
    assert compare(pd.concat([old, new]), 3).difference.tolist() == [1, 3]


def p_of(out, **more): return SimpleNamespace(**dict(
    protocol='smoke', out=out, datasets=['digits'], backbones=['wrn_10_1'], labels=[40], methods=['CE', 'LICO'], arms=None, presets=['paper'], options={}, text_encoder='minilm', seeds=[0, 1], steps=1,
    epochs=None, evaluations=1, image_size=None, workers=1, stored=None, stand_in='ImageNet-1k', saliency=['grad-cam'], test_images=4) | more)


@pytest.mark.filterwarnings('ignore::lico.training.DegenerateLossWarning')
def test_a_table_from_start_to_end(lico_root):
    "Table 13 on digits: arms, their options and those of the user, maps and their images; a second one adds to it."
    p = p_of(lico_root/'out', arms='Learnable, Random', options=dict(alpha=5.))
    df = collect(p, grid(p, 13), 13)
    assert df.arm.tolist() == ['Learnable', 'Learnable', 'Random', 'Random'] and set(df.options) == {'alpha=5.0'} and df.command.str.contains("'trainable', False").tolist() == [False, False, True, True]
    np.testing.assert_allclose(df.overall, df.insertion - df.deletion, atol=1e-3)  # scores are kept with five digits
    assert columns_of(13) == ['accuracy_last', 'probability', 'blurred', 'insertion', 'deletion'] and (compare(df, 13, columns_of(13)).groupby('metric').n.sum() == 2).all()
    images = pd.read_csv(p.out/'scores.csv', dtype=dict(image=str))
    np.testing.assert_allclose(images.groupby('id').insertion.mean()[df.id], df.insertion, rtol=1e-4)
    assert (df.images == 4).all() and len(images) == 16 and (compare(df, 13, ['accuracy_last', 'insertion', 'deletion']).n == 2).all()
    more = collect(q := p_of(lico_root/'out', arms='Fixed', options=dict(alpha=5.), stored='add'), grid(q, 13), 13)
    assert len(more) == 6 and len(pd.read_csv(p.out/'scores.csv')) == 24 and compare(more, 13).arm.tolist() == ['Random', 'Fixed']
    assert collect(p_of(lico_root/'out', stored='only'), [], 13).equals(more) and read_results(p.out).equals(more)


def test_top5_and_shots(lico_root):
    p = p_of(lico_root/'out', methods=['CE', 'GCC'], labels=['1-shot', 'all'])
    del p.arms
    df = collect(p, grid(p, 2), 2)
    assert df.labels.tolist() == ['1-shot']*4 + ['all']*4 and 'insertion' not in df and not (p.out/'scores.csv').exists()
    r = Run(shots=1, backbone='wrn_10_1', seed=1, steps=1)
    record = sweep([r], progress=False)[0]
    data, net = load_data(r), load_backbone(record)
    with torch.no_grad(): order = net(data.normalise(data.test.x)).argsort(1, descending=True)
    rank = (order == data.test.y[:, None]).float().argmax(1)
    mine = df[df.id == record['id']].iloc[0]
    np.testing.assert_allclose([mine.accuracy_last, mine.top5], [100*(rank < k).float().mean() for k in (1, 5)], atol=0.21)  # ties
    c = compare(df, 2, ['accuracy_last', 'top5'])
    assert c.labels.tolist() == ['1-shot', 'all']*2 and set(c.printed_value) == {74.40, 92.12}
    assert compare(save_results(sweep([replace(r, seed=0), replace(r, seed=0, method='GCC')], progress=False), lico_root/'x', 'CUB-200'), 2).printed_for.tolist() == ['CUB-200']


def without(n, *labels): return replace(TABLES[n], arms=tuple(a for a in TABLES[n].arms if a.label not in labels))


def test_coverage_says_what_the_registry_gives(monkeypatch):
    printed = {1: 34, 2: 16, 3: 38, 4: 48, 5: 16, 6: 24, 7: 10, 8: 12, 9: 6, 10: 8, 11: 32, 12: 12, 13: 15}
    c = coverage()
    assert c.printed.to_dict() == printed and c.runnable.to_dict() == printed
    for n, labels, gone in ((6, ('0 tokens', '20 tokens'), 8), (12, ('W2V',), 2), (13, ('Random',), 5), (10, ('DC off',), 4), (7, ('Cosine',), 5)):
        with monkeypatch.context() as m:
            m.setitem(TABLES, n, without(n, *labels))
            assert len(paper._runnable(n)) == printed[n] - gone
    monkeypatch.setitem(TABLES, 5, replace(TABLES[5], metrics=('top1', 'insertion')))
    assert len(paper._runnable(5)) == 8


@pytest.mark.parametrize('n, key, value, left', [(2, 'methods', 'CE, LICO', 8), (4, 'datasets', 'cub200, cars', 24), (12, 'labels', '4000', 6), (1, 'saliency', 'grad-cam, rise', 16), (7, 'backbones', 'parn_18', 0),
                                                 (9, 'datasets', 'digits', 0), (6, 'arms', '12 tokens, 4 tokens', 8)])
def test_coverage_says_what_the_profile_gives(n, key, value, left, monkeypatch):
    "A profile that runs less makes less runnable."
    own = paper.parameters
    monkeypatch.setattr(paper, 'parameters', lambda name, given, declared: own(name, given | {key: value}, (*declared, key)))
    assert len(paper._runnable(n)) == left


def test_coverage_of_what_was_measured(lico_root):
    "Counted on the paper's data only with its network and its encoder; a table without a notebook cannot be run."
    out = lico_root/'figures'/'table3-x'
    out.mkdir(parents=True)
    def store(**more):
        df = pd.concat([rows('CE', [1.], method='CE', text=None), rows('LICO', [1.], text='clip')]).assign(dataset='cifar10', paper_dataset='CIFAR-10', is_stand_in=False, backbone='wrn_28_2', labels='250', profile='paper')
        df.assign(**more).to_csv(out/'results.csv', index=False)
        c = coverage().loc[3]
        return c.runnable, c.measured, c.stand_in
    assert store() == (0, 2, 0) and store(text_encoder='minilm') == (0, 0, 2) and store(backbone='wrn_16_1') == (0, 0, 2) and store(labels='251') == (0, 0, 0)
    assert store(profile='paper with steps=1') == store(profile='laptop') == (0, 0, 2)
    assert store(dataset='digits', is_stand_in=True) == (0, 0, 2) and store(arm='pretrained') == (0, 0, 0) and store(backbone='parn_18') == (0, 2, 0) and store(accuracy_last=math.nan) == (0, 0, 0)
