"Pairs, intervals and verdicts, against scipy and by properties."
import math

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from lico.evidence.selection import class_rows, names_against_derangements
from lico.evidence.stats import GRADES, METRICS, conditions, interval, holm, paired, pairs, sign_flip, \
    smallest_difference, verdict

RNG = np.random.default_rng(0)
DIFFERENCES = st.lists(st.floats(-50, 50).map(lambda x: round(x, 3)), min_size=5, max_size=20)


def rows(arm, values, metric='accuracy_last', text='minilm', method='LICO', preset='paper', options=None, **more):
    n = len(values)
    return pd.DataFrame(
        dict(dataset='digits', data='d', labels='all', backbone='wrn_16_1', image_size=16, steps=120, training='t',
             preset=preset, method=method, options=options, text_encoder=text, seed=range(n), split=range(n), arm=arm,
             id=[f'{arm}{preset}{options}{i}' for i in range(n)], classes=10, **{metric: values}) | more)


def says(d, grade=GRADES[0], **more): return verdict(e := interval(d), e.p(), .5, grade, **more)


@given(DIFFERENCES)
@settings(deadline=None)
def test_the_interval_is_students(d):
    e, ci = interval(d), stats.ttest_1samp(d, 0).confidence_interval(0.95)
    if np.allclose(d, d[0], rtol=1e-9, atol=1e-12): assert e.half_width == np.inf, 'no spread to judge by'
    else: np.testing.assert_allclose([e.mean - e.half_width, e.mean + e.half_width], [ci.low, ci.high], rtol=1e-6,
                                     atol=1e-6)
    assert interval([-x for x in d]).mean == -e.mean and interval(d, d).mean == pytest.approx(e.mean)


@given(DIFFERENCES)
@settings(deadline=None)
def test_verdicts_turn_round_with_the_sign(d):
    turned = dict(supported='contradicted', contradicted='supported')
    assert says(d) == turned.get(says([-x for x in d]), says([-x for x in d]))
    e = interval(d)
    if says(d) == 'supported': assert e.mean - e.half_width > -1e-9
    if says(d) == 'equivalent': assert abs(e.mean) < .5


def test_settings_count_alike_whatever_their_seeds():
    few, many = RNG.normal(3, 1, 5), RNG.normal(1, 1, 50)
    e = interval(few, many)
    assert e.mean == pytest.approx((few.mean() + many.mean())/2) and e.n == 55 and e.least == 5
    welch = stats.ttest_ind(few, -many, equal_var=False)
    assert e.p() == pytest.approx(welch.pvalue) and e.df == pytest.approx(welch.df)


@pytest.mark.parametrize('n', [8, 12, 25])
def test_sign_flips(n):
    d = RNG.normal(.5, 1, n)
    theirs = stats.permutation_test((d,), np.sum, permutation_type='samples', n_resamples=20_000,
                                    rng=np.random.default_rng(1)).pvalue
    assert sign_flip(d) == pytest.approx(theirs, abs=.01) and math.isnan(sign_flip(d[:7]))


@settings(max_examples=6)  # statsmodels collects garbage in each call
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(p):
    "By the book: the i-th smallest times m - i, never falling, at most 1."
    order, got = np.argsort(p, kind='stable'), holm(p)
    wanted = np.minimum(np.maximum.accumulate([p[k]*(len(p) - i) for i, k in enumerate(order)]), 1)
    np.testing.assert_allclose(got[order], wanted, atol=1e-12)


def test_equivalence_is_two_one_sided_tests():
    for d in (RNG.normal(0, .3, 10), RNG.normal(.3, .3, 10)):
        upper, lower = (stats.ttest_1samp(d, b, alternative=a).pvalue for b, a in ((.5, 'less'), (-.5, 'greater')))
        assert interval(d).p_within(.5) == pytest.approx(max(upper, lower))


def test_no_verdict_where_there_can_be_none():
    good = [1., 1.1, .9, 1.05, .95]
    assert (says(good) == 'supported' and says(good[:4]) == 'too few pairs' and says(good, 'demonstration') == ''
            and says(good, 'natural images') == 'higher')
    assert says(good, failed=.6) == 'training failed (60%)'
    with pytest.raises(ValueError, match='unknown grade of evidence'): says(good, 'digits')


@pytest.mark.parametrize('metric', ['accuracy_last', 'top5', 'insertion', 'deletion', 'overall'])
def test_paired_against_scipy(metric):
    a, b = RNG.normal(50, 1, 6), RNG.normal(51, 1, 6)
    c = paired(pd.concat([rows('CE', a, metric, None, 'CE'), rows('LICO', b, metric)]), [metric]).iloc[0]
    ci = stats.ttest_rel(b, a).confidence_interval(0.95)
    np.testing.assert_allclose([c.difference - c.half_width, c.difference + c.half_width, c.baseline, c.value],
                               [ci.low, ci.high, a.mean(), b.mean()])
    assert ((c.reference, c.arm, c.metric, c.n) == ('CE', 'LICO', metric, 6)
            and METRICS[metric].lower_is_better == (metric == 'deletion'))


def test_what_is_a_pair():
    """Other steps, images, sizes or threads are no partners; a reference that reads text shares preset, options and
    encoder; cross-entropy is every preset's partner."""
    base = rows('CE', [1., 2., 3.], text=None, method='CE')
    for other in (dict(steps=9), dict(data='e'), dict(image_size=32), dict(labels='40'), dict(training='u')):
        assert not pairs(pd.concat([base, rows('LICO', [1., 2., 3.], **other)]), 'CE')
    for k, a, b in (('threads', 1, 2), ('protocol', 1, 2), ('output_stride', None, 16)):
        assert not pairs(pd.concat([base.assign(**{k: a}), rows('LICO', [1., 2., 3.], **{k: b})]), 'CE')
    with pytest.raises(ValueError, match='two rows of one arm, setting and seed and split'):
        pairs(pd.concat([base, base, rows('LICO', [1., 2., 3.])]), 'CE')
    assert len(pairs(pd.concat([base, rows('LICO', [1., 2., 3.]), rows('LICO', [1., 2., 3.], preset='repaired')]),
                     'CE')) == 2
    kinds = [dict(preset=p, options=o, text=t) for p in ('paper', 'repaired') for o in (None, 'alpha=5')
             for t in ('minilm', 'clip')]
    df = pd.concat([rows(arm, np.full(3, 10.*i + j), **k) for i, k in enumerate(kinds)
                    for j, arm in enumerate(('DC on', 'DC off'))])
    c = paired(df, ['accuracy_last'], 'DC on')
    assert len(c) == 8 and (c.difference == 1).all() and set(c.arm) == {'DC off'}


def test_images_are_averaged_before_networks_are_compared():
    "Thousand images of one network are one draw."
    def maps(arm, shift):
        return pd.concat([rows(arm, [10.*s + i + shift*(s + 1) for s in range(3)], 'insertion').assign(image=str(i))
                          for i in range(4)])
    silent = dict(inactive=False, failed=False)
    df = pd.concat([maps('CE', 0).assign(text_encoder=None, **silent),
                    maps('LICO', 1).assign(**silent | dict(inactive=lambda d: d.seed > 0))])
    c = paired(df[(df.arm != 'CE') | (df.image != '3')], ['insertion'], within='image').iloc[0]
    assert (c.inactive, c.failed, c.failed_base) == (2, 0, 0), 'of networks, not of images'
    assert ((c.n, c.images, c.difference) == (3, 3, 2)
            and c.half_width == pytest.approx(interval([1., 2., 3.]).half_width))


def test_conditions():
    df = pd.DataFrame(dict(accuracy_last=[50., 10.9, 60., 70., 70.], classes=10, cosine=[.3, .3, .99, .3, .3],
                           entropy_image=[math.nan, .5, .5, .5, .9999], entropy_text=[math.nan, .5, .5, .5, .5]))
    found = conditions(df)
    assert (found.failed.tolist() == [False, True, True, False, False]
            and found.inactive.tolist() == [False, False, True, False, True]), 'one side is enough'


def test_pairs_of_several_machines_stand_together_and_a_seed_counts_once():
    base = [60., 61, 62, 63, 64]
    df = pd.concat([rows('CE', base, text=None, method='CE'), rows('LICO', [b + 1 + i/10 for i, b in enumerate(base)])])
    df = df.assign(hardware=np.where(df.seed < 2, 'one', 'another'))
    c = paired(df, ['accuracy_last'], 'CE')
    assert len(c) == 1 and c.n.item() == 5 and c.difference.item() == pytest.approx(1.2)
    again = pd.concat([df, df[df.seed == 0].assign(hardware='another', id=lambda d: d.id + 'again')])
    with pytest.raises(ValueError, match='seed and split on several kinds of machine, .*: keep those of one kind'):
        paired(again, ['accuracy_last'], 'CE')


@pytest.mark.parametrize('labels, classes, least', [
    ('40', 10, 1.), (250, 10, 1.), ('251', 10, .5), ('all', 10, .5), ('1-shot', 200, 1.), ('5-shot', 200, .5)])
def test_few_labels_need_a_larger_difference(labels, classes, least):
    assert smallest_difference('accuracy_last', labels, classes) == least


def test_sign_flips_are_never_impossible():
    "Drawn signs count those that were seen: no p value of zero."
    assert sign_flip(np.arange(1., 31)) == pytest.approx(1/100_001)


def test_names_p_counts_the_right_names_themselves():
    vectors = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    confused = class_rows(vectors, .3)
    found = names_against_derangements(confused, vectors)
    assert found.p.min() == pytest.approx(1/201)
    q = class_rows(vectors, .05)
    kl = stats.entropy(confused.numpy(), q.numpy(), axis=1)
    assert found.right[0] == pytest.approx(kl.mean(), rel=1e-4)


def test_which_way_a_score_is_better():
    "What takes pixels away shall fall fast, from whatever baseline; what puts them in shall rise."
    assert all(m.lower_is_better for k, m in METRICS.items() if k.startswith('deletion'))
    assert not any(m.lower_is_better for k, m in METRICS.items() if k.startswith(('insertion', 'pointing', 'accuracy')))
