"Claims and coverage from stored results, and that what is kept in figures/paper is not stale."
import itertools, math, re
from dataclasses import replace

import numpy as np, pandas as pd, pytest
from scipy import stats

from lico.evidence.pages import parameters
from lico.config import root
from lico.evidence import claims, extent
from lico.evidence.arms import TABLES
from lico.evidence.claims import CLAIMS, claim_rows, claims_table, printed_gains
from lico.evidence.extent import coverage
from lico.evidence.findings import block_table, done_again, findings, with_those
from lico.evidence.map_gains import by_another, map_differences, map_rows, maps_sentence
from lico.evidence.programme import (ARMS, BLOCKS, LOUDER, PRIMARY, SECONDARY, above_random, arm_name, asked_of_block,
                                     block_runs, contrast_rows, map_table, maps_of_block)
from lico.evidence.stats import holm
from lico.runs import options_of
from test_stats import rows

BASE = np.array([60., 61., 62., 63., 64.])
NOISE = np.array([.1, -.1, .05, 0., .02])


def store(folder, *frames, **more):
    path = root()/'figures'/folder/'results.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(frames).assign(**dict(dataset='cifar10', paper_dataset='CIFAR-10', is_stand_in=False, backbone='wrn_28_2',
                                    labels='40', profile='paper') | more).to_csv(path, index=False)


def test_a_loss_that_is_claimed_is_supported_by_a_loss(lico_root):
    "Table 10 on CIFAR-10: the arm must lose for the claim to hold."
    for shift, says in ((-3., 'supported'), (3., 'contradicted')):
        store('table10-x', rows('DC on', BASE), rows('DC off', BASE + shift + NOISE), labels='all')
        r = claim_rows().set_index('claim').loc['without the dynamic context accuracy is lost']
        assert ((r['where'], r.verdict, r.n) == ("the paper's data", says, 5)
                and r.difference == pytest.approx(-shift - NOISE.mean()) and r.printed == pytest.approx(.35))
    assert (claim_rows()['where'] == 'not testable here').sum() == len(CLAIMS) - 1


def test_settings_are_pooled_and_corrected_for_their_number(lico_root):
    for labels, gain in (('40', 1.), ('250', 3.)):
        store(f'table3-{labels}', rows('CE', BASE, text=None, method='CE'), rows('LICO', BASE + gain + 10*NOISE),
              labels=labels)
    store('table10', rows('DC on', BASE), rows('DC off', BASE + 20*NOISE), labels='all')
    df = claim_rows().set_index('claim')
    r = df.loc['LICO gains accuracy, with few labels']
    assert ((r.settings, r.seeds, r.n) == (2, 5, 10) and r.difference == pytest.approx(2 + 10*NOISE.mean())
            and r.p_holm == pytest.approx(2*r.p) and r.verdict == 'supported')
    assert ('5 + 5' in claims_table(claim_rows(), "the paper's data")
            and '+2.14' in claims_table(claim_rows(), "the paper's data"))


def test_a_mean_over_settings_says_the_least_seeds_and_the_mean_share_of_failures(lico_root):
    for labels, n in (('40', 6), ('250', 5)):
        base = np.resize(BASE, n) + np.arange(n)
        dead = np.where(np.arange(n) < 3*(n == 6), 10., base + 1 + np.resize(NOISE, n))  # half of one setting
        store(f'table3-{labels}', rows('CE', base, text=None, method='CE'), rows('LICO', dead), labels=labels)
    r = claim_rows().set_index('claim').loc['LICO gains accuracy, with few labels']
    assert (r.seeds, r.n, r.pairs) == (5, 11, '5 + 6') and r.failed == pytest.approx(.25)


def test_of_two_blocks_of_one_setting_the_first_declared_stands(lico_root):
    "E and G have the same images; with as many seeds E says what the maps do, and the table says that it does."
    images = dict(dataset='tiny-imagenet-100', paper_dataset='ImageNet', is_stand_in=True, labels='all')
    for k, points in (('G', 4), ('E', 2)):
        df = programme(k).assign(saliency='grad-cam', saliency_options='{}', images=50)
        df['pointing_game'] = 60 + points*(df.arm == 'semantic') + df.seed/10
        store(f'language-{k}', df, backbone='tf_efficientnet_lite0', **images)
    found = claim_rows()
    r = found.set_index(['claim', 'preset']).loc[("LICO's Grad-CAM maps point at the object more often", 'semantic')]
    assert r.difference == pytest.approx(2) and r.folders == 'language-E' in claims_table(found, r['where'])


def test_digits_give_no_verdict(lico_root):
    store('table3', rows('CE', BASE, text=None, method='CE'), rows('LICO', BASE + 3 + NOISE), dataset='digits',
          is_stand_in=True, backbone='wrn_16_1')
    assert (claim_rows()['where'] == 'not testable here').all() and claim_rows().verdict.eq('').all()
    store('table3', rows('CE', BASE, text=None, method='CE'), rows('LICO', BASE + 3 + NOISE), dataset='folder:mine',
          is_stand_in=True, backbone='wrn_16_1')
    r = claim_rows().set_index('claim').loc['LICO gains accuracy, with few labels']
    assert (r['where'], r.verdict) == ('natural images', '') and r.difference == pytest.approx(3 + NOISE.mean())


def test_the_programmes_runs_know_their_arms():
    for name, b in BLOCKS.items():
        runs = block_runs(name, b.dataset)
        assert len(runs) == b.seeds*len(b.arms) and [arm_name(r) for r in runs[:len(b.arms)]] == list(b.arms)
        assert all(r.labels == b.labels for r in runs)
    assert {c.arm for c in PRIMARY} | {c.reference for c in PRIMARY} <= set(ARMS)


@pytest.mark.parametrize('profile', ['laptop', 'paper'])
def test_the_maps_of_a_block_are_the_declared_ones(profile, lico_root):
    "Where nothing is named, every method and image that the block declares; what is named replaces that."
    def asked(block, **given):
        p = parameters('language', dict(profile=profile, out=str(lico_root), block=block, saliency='', test_images='',
                                        seeds='') | given)
        return maps_of_block(p)
    for name, b in BLOCKS.items():
        m = asked(name)
        assert (tuple(m['saliency']), m['test_images'], m['also']) == (b.saliency, b.images, b.also)
        assert m['metrics'] == (b.metrics if b.saliency else ())
    assert asked('B', saliency='none')['metrics'] == ()
    few = asked('E', saliency='grad-cam, edges', test_images='7')
    assert few['saliency'] == ['grad-cam', 'edges'] and few['test_images'] == 7 and 'energy' in few['metrics']


def programme(block, **gains):
    base = 50 + np.random.default_rng(1).normal(0, 3, BLOCKS[block].seeds)
    noise = lambda a: np.random.default_rng(sum(map(ord, a))).normal(0, 1, len(base))
    make = lambda a: rows(a, base + gains.get(a.replace('-', '_'), 0) + noise(a),
                          text='minilm' if ARMS[a].method == 'LICO' else None, method=ARMS[a].method,
                          preset=ARMS[a].preset)
    return pd.concat(map(make, BLOCKS[block].arms))


def test_contrasts():
    """Names that give two points over wrong names, which give one over cross-entropy: each is found, pooled over
    blocks, corrected for five."""
    made = {k: programme(k, repaired=3, repaired_shuffled=1) for k in ('A', 'B')}
    df = contrast_rows(made)
    whole = df[df.block == 'all'].set_index('contrast')
    names = whole.loc[PRIMARY[0].says]
    assert (names.verdict == 'supported' and names.n == 30 and names.settings == 2 and abs(names.difference - 2) < 1
            and names.p <= names.p_holm)
    assert (len(df) == 3*len(PRIMARY) and contrast_rows({'A': made['A']}).block.tolist() == ['A']*5
            and contrast_rows({}).empty)
    dead = contrast_rows({'A': made['A'].assign(accuracy_last=lambda d: d.accuracy_last.where(
        d.arm != 'paper', 10.))}).set_index('contrast')
    assert dead.verdict['LICO as printed beats cross-entropy'] == 'training failed (100%)'


def test_a_block_beside_the_means():
    "E and F have rows of their own; they change no pooled mean and no verdict."
    made = {k: programme(k, repaired=3) for k in 'ABF'}
    df, without = contrast_rows(made), contrast_rows({k: made[k] for k in 'AB'})
    assert df[df.block != 'F'].reset_index(drop=True).equals(without)
    assert df[df.block == 'F'].n.tolist() == [10]*3


def test_a_block_of_few_seeds_stands_beside():
    "Three whole seeds of C change no pooled mean and no verdict, and are told."
    made = {k: programme(k, repaired=3) for k in 'ABC'}
    made['C'] = made['C'][made['C'].seed < 3]
    df, without = contrast_rows(made), contrast_rows({k: made[k] for k in 'AB'})
    assert df[df.block != 'C'].reset_index(drop=True).equals(without) and not df[df.block == 'C'].pooled.any()
    every = pd.concat([df, contrast_rows(made, SECONDARY, family=False)])
    said = findings(every, 'Nobody looked.')
    assert re.search(r'Transport alone gains \S+ ± \S+, supervised', said)
    assert 'C: cifar100-part, 400 labels (3 of 10)' in said
    assert 'D, E, F, G, A16, R, L are not run' in said
    assert block_table(df).splitlines()[0].split('|')[3].strip() == 'A, B', 'below five seeds C is not told by itself'


def cells(table): return {r[0]: r[1:] for r in ([c.strip() for c in line.split('|')[1:-1]]
                                                for line in table.splitlines()[2:])}


def test_the_blocks_of_the_readme():
    "A line a contrast: what is pooled, each block of it, where these differ, and photographs from their first seed on."
    made = {k: programme(k, repaired=g) for k, g in dict(A=0, B=5, C=1).items()}
    made['C'] = made['C'][made['C'].arm != 'paper']
    df = contrast_rows(dict(made, E=programme('E', repaired=-12).query('seed < 1'), G=programme('G'), F=programme('F')))
    table, one = cells(block_table(df)), lambda of, k: f'{df[(df.of == of) & (df.block == k)].difference.iloc[0]:+.2f}'
    minus = lambda text: text.replace('-', '−')
    pooled, blocks, photographs = table['repaired − CE']
    assert blocks == minus(', '.join(one('repaired − CE', k) for k in 'ABC')) + '†'
    assert photographs == f"E {minus(one('repaired − CE', 'E'))} (n = 1)", 'F has the images of A'
    assert pooled.startswith(minus(one('repaired − CE', 'all')) + ' ± ')
    assert table['paper − CE'][1] == minus(', '.join(one('paper − CE', k) for k in 'AB')) + ', —'
    assert re.fullmatch(r'E \S+ \(n = 1\), G \S+', table['semantic − CE'][2]) and len(table) == len(PRIMARY)


def test_what_one_block_decides():
    "Louder names have verdicts of their own: of block L alone, whatever else was run, corrected for the two of them."
    made = {k: programme(k, loud=2) for k in 'AL'}
    df = contrast_rows(made, LOUDER).set_index('contrast')
    loud, transport = (df.loc[c.says] for c in LOUDER)
    assert (loud.verdict, loud.block, loud.n) == ('supported', 'L', 10) and transport.verdict != 'supported'
    assert df.p_holm.tolist() == pytest.approx(holm([loud.p, transport.p]))
    assert contrast_rows(made).equals(contrast_rows({'A': made['A']}))  # and the five know nothing of it
    few = {'L': made['L'][made['L'].seed < 4]}
    assert contrast_rows(few, LOUDER).verdict.isna().all()
    every = pd.concat([contrast_rows(made), contrast_rows(made, SECONDARY, family=False), contrast_rows(made, LOUDER)])
    said = findings(every, 'Nobody looked.')
    assert re.search(r'same with louder names \+\S+ ± \S+ \(supported\), in transport alone \S+ ± \S+ \(L\) '
                     r'\((equivalent within 1 point|inconclusive)\)\.', said)


@pytest.mark.parametrize('gain, invented, says', [
    (3, 0, 'repeated, and language has a part; +'), (3, 3, 'repeated, but not by language; +'), (0, 0, 'refuted; '),
    (-3, 0, 'open; −')])
def test_a_finding_made_again(gain, invented, says):
    "Block R by its declared rule, whatever the others say."
    assert f'B with fresh seeds (R): {says}' in said_of({'A': programme('A'), 'R': programme(
        'R', repaired=gain, repaired_random=invented)})


def said_of(made):
    return findings(pd.concat([contrast_rows(made), contrast_rows(made, SECONDARY, family=False)]), 'Nobody looked.')


def test_few_seeds_of_a_block_repeat_nothing():
    "No word from fewer than 5 of R's seeds, and no other block's mean changes by them."
    made = {'A': programme('A'), 'R': programme('R', repaired=3).query('seed < 4')}
    said = said_of(made)
    assert 'with fresh seeds' not in said
    assert "R: B's names again (4 of 15)" in said
    without = contrast_rows({'A': made['A']})
    assert contrast_rows(made).query("block != 'R'").reset_index(drop=True).equals(without)


def test_what_speaks_against_a_verdict_is_said():
    """Names that give five points in B and none in A; the same two points in both, over invented words too or not."""
    def said(a, b, invented=0):
        made = dict(A=programme('A', repaired=a, repaired_random=a*invented),
                    B=programme('B', repaired=b, repaired_random=b*invented))
        rows = pd.concat([contrast_rows(made), contrast_rows(made, SECONDARY, family=False)])
        assert rows.verdict[rows.contrast == PRIMARY[0].says].iloc[0] == 'supported'
        return findings(rows, 'Nobody looked.', {'A': 1.5})
    differ = said(0, 5)
    assert re.search(r'part in it\?\*\* Not shown\. .*: by the declared rule yes, but owed to B alone', differ)
    no_better = said(2, 2, invented=1)
    assert re.search(r': by the declared rule yes, but right minus invented words is \S+ ± \S+;', no_better)
    assert re.search(r'it\?\*\* In part\. .* minus shuffled: `repaired` \S+ ± \S+: yes; `semantic` ', said(2, 2))
    assert re.search(r'literally, work\?\*\* .* \S+ ± \S+, \S+% of what is printed\. Its matching', differ)


def test_pairs_as_they_came_out_elsewhere():
    "Both arms of a seed are replaced, in the contrast that is theirs; an arm without the other stays."
    made = {k: programme(k).assign(id=lambda d, k=k: k + d.arm + d.seed.astype(str)) for k in 'AB'}
    own = made['B'][made['B'].arm.isin(['repaired', 'repaired-shuffled', 'semantic']) & (made['B'].seed < 2)]
    other = own.assign(accuracy_last=own.accuracy_last + 6*(own.arm != 'repaired-shuffled'))
    df = with_those(other, made).set_index(['contrast', 'runs'])
    one, two = (df.loc[c.says] for c in PRIMARY[:2])
    assert one.replaced.to_dict() == {'without': 0, 'with them': 2} and two.replaced['with them'] == 0
    assert one.difference['with them'] - one.difference['without'] == pytest.approx(6*2/10/2)
    assert two.difference.nunique() == 1


def test_what_doing_runs_again_adds():
    "Pairs of one arm and seed: a shift is found, the spread is that of the differences, and no pair is made up."
    full = programme('A')
    half = full[full.arm.isin(BLOCKS['A16'].arms)].assign(id=lambda d: d.id + 'h')
    cost = lambda d: half.assign(accuracy_last=half.accuracy_last + d*(half.arm == 'repaired') + .1*(-1.)**half.seed)
    same, worse = done_again(full, cost(0)), done_again(full, cost(-.6))
    assert same.equivalent.all() and same.n.tolist() == [20, 20] and same.arm.tolist() == ['CE', 'repaired']
    assert same.difference.tolist() == pytest.approx([0, 0]) and same.sd[0] == pytest.approx(.1*(20/19)**.5)
    assert worse.equivalent.tolist() == [True, False] and worse.difference[1] == pytest.approx(-.6)
    few = done_again(full, half[half.seed < 2])
    assert few.arm.tolist() == ['all'] and few.n.tolist() == [4]


def test_one_comparison_has_one_verdict(lico_root):
    "A claim that is a primary contrast has that contrast's correction, for five, and not one of its own."
    store('language-A', programme('A', repaired=.6).assign(profile='paper'))
    whose = 'LICO gains accuracy, with few labels', 'repaired'
    claim = claim_rows().set_index(['claim', 'preset']).loc[whose]
    assert printed_gains() == pytest.approx(dict(A=24.9 - 23.4, B=41.7 - 36.9, D=81.5 - 80.8))  # C is a part
    primary = contrast_rows(claims.blocks()).set_index('contrast').loc['LICO repaired beats cross-entropy']
    assert claim.p == pytest.approx(primary.p) and claim.p_holm == primary.p_holm > claim.p
    assert claim.verdict == primary.verdict
    store('table10', rows('DC on', BASE), rows('DC off', BASE + 20*NOISE), labels='all')
    other = claim_rows().set_index('claim').loc['without the dynamic context accuracy is lost']
    six = holm([other.p, *contrast_rows(claims.blocks()).p])
    assert other.p_holm == pytest.approx(six[0]) and other.p_holm > other.p


def test_a_block_in_bfloat16_is_refused_where_there_is_none(monkeypatch, lico_root):
    monkeypatch.setattr('lico.evidence.programme.has_bfloat16', lambda where: False)
    ask = lambda block: asked_of_block(parameters('language', dict(profile='smoke', out=str(lico_root), block=block)))
    with pytest.raises(ValueError, match='block A16 trains in bfloat16, .* block A, which is the same in float32'):
        ask('A16')
    with pytest.raises(ValueError, match="unknown block 'Z': choose one of A, B, "): ask('Z')
    assert ask('A')


def test_runs_on_different_machines_are_no_pairs():
    df = programme('A').assign(hardware=lambda d: np.where(d.arm == 'CE', 'one', 'another'))
    with pytest.warns(UserWarning, match='20 pairs are left out, .* on different kinds of machine'):
        found = set(contrast_rows({'A': df}).contrast)
    assert 'LICO repaired beats cross-entropy' not in found and 'right names beat shuffled names (repaired)' in found


def test_seeds_on_another_machine_count_where_all_their_arms_were_there():
    df = programme('A').assign(hardware=lambda d: np.where(d.seed < 3, 'one', 'another'))
    assert contrast_rows({'A': df}).n.tolist() == [20]*5
    shown = ['contrast', 'difference', 'half_width', 'verdict']
    pd.testing.assert_frame_equal(contrast_rows({'A': df})[shown], contrast_rows({'A': programme('A')})[shown])


def test_maps_of_a_block_are_evidence_for_table_1(lico_root):
    "LICO's own names only, and beside the rows of Table 1."
    df = programme('F').assign(saliency='grad-cam', saliency_options='{}', images=50,
                               insertion=lambda d: 30 + 2*(d.arm == 'repaired') + d.seed/10)
    store('language-F', df.assign(insertion=df.insertion.where(df.arm != 'repaired-shuffled', 0)))
    r = claim_rows().set_index(['claim', 'preset']).loc[("LICO's Grad-CAM maps are better at insertion", 'repaired')]
    assert r.seeds == 10 and r.difference == pytest.approx(2) and r['where'] == 'natural images'


def test_the_sentence_on_maps():
    "Two points that the random map has too are none of the map."
    def maps(block, metric, **own):
        df = programme(block).assign(id=lambda d: d.arm + d.seed.astype(str), images=50)
        df = df[df.arm.isin(list(own))]
        return pd.concat([df.assign(saliency=s, **{metric: 30 + df.seed + df.arm.map(own) +
                                                (20 + df.arm.map(own))*(s == 'grad-cam')})
                          for s in ('grad-cam', 'random')])
    def on_photographs(block, **own):
        df = maps(block, 'pointing_game', **own).assign(overall=maps(block, 'overall', **own).overall)
        return df.assign(alike=.5, pointing_others=60 + 2*(df.arm == 'semantic'), energy=df.pointing_game/2)
    made = dict(G=on_photographs('G', **{'CE': 0, 'CE+OT': 1, 'semantic': 3, 'semantic-shuffled': 2}))
    own = {'paper': 1, 'repaired': 2, 'repaired-shuffled': 7, 'semantic': 4, 'semantic-shuffled': 5, 'CGC': 0}
    made['E'] = on_photographs('E', CE=0, **own)
    own = {'CE': 0, 'CE+LS': 0, 'paper': 3, 'repaired': 4, 'semantic': 5}
    small = maps('B', 'overall', **own)
    bare = small[small.seed < 3].drop(columns=['saliency', 'overall']).drop_duplicates('id')  # no maps
    made['B'] = pd.concat([bare, small[small.seed >= 3]])
    made['F'] = maps('F', 'overall', CE=0, paper=-1, repaired=1)
    full = lambda df: df.assign(blurred=20., probability=60. - 6*(df.arm == 'CE+LS'))
    made = {k: full(df) for k, df in made.items()}
    rows = map_rows(made)
    def said(**other):
        fresh = map_rows(other)
        return maps_sentence(pd.concat([rows[~rows.block.isin(list(other))], fresh]))
    plain = maps_sentence(rows)
    assert plain.startswith('Cannot tell. ')
    for gain, transport, cgc, says in ((0, 0, 0, '. '), (4, 0, 0, ', with any names. '), (
            0, 1, 0, ', with transport alone. '), (4, 1, 2, ', with any names, transport alone, CGC (no text). ')):
        energy = lambda df: ((4 + .1*df.seed)*(df.arm == 'semantic') + gain*(df.arm == 'semantic-shuffled')
                             + transport*(1 + .1*df.seed)*(df.arm == 'CE+OT') + cgc*(1 + .1*df.seed)*(df.arm == 'CGC'))
        o = said(E=made['E'].assign(energy=energy), G=made['G'].assign(energy=energy))
        assert o.startswith(f'Cannot tell; on photographs more in boxes{says}')
    assert ('in B (7 seeds) and E (5): `paper` +3.00 and +1.00; `repaired` +4.00 and +2.00; `semantic` +5.00 and '
            '+4.00. In E') in plain
    assert ('gains +4.00 of energy in boxes (right minus shuffled −1.00). It points there in 60.0% (right minus '
            'shuffled −2.00, in G +2.00), the mean map of *other* photographs in 62.0%.') in plain
    plus = made['E'][made['E'].saliency == 'grad-cam'].assign(  # another method: two points more for `semantic`
        saliency='grad-cam++', overall=lambda df: df.overall + 2*(df.arm == 'semantic'))
    other = map_rows(dict(made, E=pd.concat([made['E'], plus])), 'grad-cam++')
    assert set(other.block) == {'E'} and maps_sentence(map_rows(dict(made, E=pd.concat([made['E'], plus])))) == plain
    assert by_another(other, rows).endswith("at most: 2.0 in insertion − deletion, less random, 0.0 in pointing game, "
                                            "0.0 in energy inside the boxes.")
    table = map_differences(rows)
    assert re.search(r'B +\| CE\+LS − CE +\| 7 +\| \+0.00 +\| -6.00', table), 'a random map has the rest; less room'
    assert re.search(r'F +\| paper − CE +\| 10 +\| -1.00', table) and not re.search(r'F +\| CE\+', table)
    lost = lambda df, points: (points + .1*df.seed)*(df.arm == 'paper')*(df.saliency == 'grad-cam')
    def less(df): return df.overall - lost(df, 5)
    for room, why in ((lambda df: 0, '; '), (lambda df: lost(df, 9), ' (E: perhaps lower confidence); '),
                      (lambda df: 40*(df.arm == 'paper')*(-1)**df.seed, '; ')):  # which may have fallen, or not
        other = made['E'].assign(overall=less, probability=lambda df: df.probability - room(df))
        assert re.search(rf'`paper` \+3.00 and −4\.\d\d ± \S+{re.escape(why)}`repaired` \+4.00 and \+2.00;',
                         said(E=other))
    up = made['F'].assign(overall=lambda df: df.overall + 4*(df.arm == 'paper')*(df.saliency == 'grad-cam'))
    assert said(F=up).startswith('Better on CIFAR-10, if anything')
    turned = {k: made[k].assign(overall=-df.overall) for k, df in dict(B=made['B'], F=up).items()}
    assert said(**turned).startswith('No: worse on CIFAR-10, if anything')


def test_networks_without_maps_stand_beside_those_with_some():
    df = programme('B').assign(id=lambda d: d.arm + d.seed.astype(str))
    made = pd.concat([df[df.seed > 5].assign(saliency=s, insertion=30. + (s == 'grad-cam'))
                      for s in ('grad-cam', 'random')])
    both = pd.concat([df[df.seed <= 5].assign(saliency=np.nan), made])
    assert above_random(both).insertion.tolist() == [1]*len(df[df.seed > 5])
    assert map_table(above_random(both)) == map_table(above_random(made))


def test_wrong_names_are_no_evidence_for_a_claim(lico_root):
    store('language-A', programme('A', repaired=3, repaired_shuffled=-30))
    r = claim_rows().set_index(['claim', 'preset']).loc[('LICO gains accuracy, with few labels',
                                                         'repaired')]
    assert r.seeds == 20 and abs(r.difference - 3) < 1 and r.folders == 'language-A'


def without(n, *labels): return replace(TABLES[n], arms=tuple(a for a in TABLES[n].arms if a.label not in labels))


def test_coverage_says_what_the_registry_gives(monkeypatch):
    printed = {1: 34, 2: 16, 3: 38, 4: 48, 5: 16, 6: 24, 7: 10, 8: 12, 9: 6, 10: 8, 11: 32, 12: 12, 13: 15}
    c = coverage()
    assert c.printed.to_dict() == printed and c.runnable.to_dict() == printed
    for n, labels, gone in ((6, ('0 tokens', '20 tokens'), 8), (12, ('W2V',), 2), (13, ('Random',), 5),
                            (10, ('DC off',), 4), (7, ('Cosine',), 5)):
        with monkeypatch.context() as m:
            m.setitem(TABLES, n, without(n, *labels))
            assert len(extent._runnable(n)) == printed[n] - gone


@pytest.mark.parametrize('n, key, value, left',
                         [(2, 'methods', 'CE, LICO', 8), (4, 'datasets', 'cub200, cars', 24), (12, 'labels', '4000', 6),
                          (1, 'saliency', 'grad-cam, rise', 16), (7, 'backbones', 'parn_18', 0),
                          (9, 'datasets', 'digits', 0), (6, 'arms', '12 tokens, 4 tokens', 8)])
def test_coverage_says_what_the_profile_gives(n, key, value, left, monkeypatch):
    "A profile that runs less makes less runnable."
    own = extent.parameters
    monkeypatch.setattr(extent, 'parameters', lambda name, given: own(name, given | {key: value}))
    assert len(extent._runnable(n)) == left


@pytest.mark.slow
def test_coverage_of_what_was_measured(lico_root):
    "Counted on the paper's data only with its network and its encoder."
    def counts(**more):
        store('table3-x', rows('CE', [1.], text=None, method='CE'), rows('LICO', [1.], text='clip'),
              **dict(labels='250') | more)
        c = coverage().loc[3]
        return c.measured, c.stand_in
    assert (counts() == (2, 0) and counts(text_encoder='minilm') == (0, 2) and counts(backbone='wrn_16_1') == (0, 2)
            and counts(labels='251') == (0, 0))
    assert counts(profile='paper with steps=1') == counts(profile='laptop') == (0, 2)
    assert (counts(dataset='digits', is_stand_in=True) == (0, 2) and counts(arm='pretrained') == (0, 0)
            and counts(backbone='parn_18') == (2, 0) and counts(accuracy_last=math.nan) == (0, 0))


@pytest.mark.slow
def test_what_is_kept_is_not_stale():
    "figures/paper is what the results below figures say."
    kept = pd.read_csv(root()/'figures'/'paper'/'results.csv')
    now = claim_rows()
    assert kept.claim.tolist() == now.claim.tolist() and kept.verdict.fillna('').tolist() == now.verdict.tolist()
    np.testing.assert_allclose(kept.difference, now.difference.astype(float), equal_nan=True)
    pd.testing.assert_frame_equal(pd.read_csv(root()/'figures'/'paper'/'coverage.csv', index_col='table'), coverage())


def test_an_encoder_that_is_an_arm_is_compared_with_another_s(lico_root):
    "CLIP against BERT: their rows differ in the text encoder, which is what is claimed to matter."
    store('table12', rows('BERT', BASE, text='bert'), rows('CLIP', BASE + 3 + NOISE, text='clip'), labels='all')
    r = claim_rows().set_index('claim').loc['CLIP gains more than BERT']
    assert r.n == 5 and r.difference == pytest.approx(3 + NOISE.mean()) and r.verdict == 'supported'


def test_a_block_is_the_folder_of_its_name(lico_root):
    for name, more in {'language': 2, 'language-B-again': 1, 'language-B': 0}.items():
        store(name, rows('CE', BASE + more))
    assert list(claims.blocks()) == ['B'] and claims.blocks()['B'].accuracy_last.tolist() == BASE.tolist()


def test_a_block_without_images_for_maps_is_refused(lico_root):
    p = parameters('language', dict(profile='laptop', out='', block='A', saliency='grad-cam', test_images=''))
    with pytest.raises(ValueError, match='block A declares no maps, .* say how many with -p test_images'):
        maps_of_block(p)


def test_what_is_pooled_weighs_blocks_alike():
    "Six pairs and five: every sign that they can have, the smaller margin, and Holm over the five that were declared."
    a, c = (programme(k, repaired=1).query('arm != "semantic-shuffled"') for k in 'AC')
    df = contrast_rows(dict(A=a[a.seed < 6], C=c[c.seed < 5].assign(accuracy_last=lambda d: d.accuracy_last + 7)))
    whole, apart = df[df.block == 'all'].set_index('contrast'), df[df.block != 'all'].groupby('contrast')
    for says, r in whole.iterrows():
        x, y = (np.array(o) for o in apart.get_group(says).differences)
        by = [abs((x*s[:6]).mean() + (y*s[6:]).mean()) for s in itertools.product((1, -1), repeat=11)]
        assert r.p_flip == pytest.approx(np.mean([o > by[0] - 1e-9 for o in by])) and r.margin == .5
        assert r.p_same == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue)
        assert r.base == pytest.approx(apart.get_group(says).base.mean())
    first = df[df.pooled].drop_duplicates('contrast')
    assert len(whole) == 3 and whole.n.tolist() == [11]*3 and len(first) == 4
    assert first.p_holm.tolist() == pytest.approx(holm([*first.p, math.nan])[:4].tolist())


def test_seeds_of_blocks():
    seeds = {k: {r.seed for r in block_runs(k, b.dataset)} for k, b in BLOCKS.items()}
    assert all(seeds[k] == set(range(b.first, b.first + b.seeds)) for k, b in BLOCKS.items())
    assert not seeds['R'] & seeds['B'], 'fresh'


def test_what_doing_again_is_beside():
    full = programme('A')
    half = full.assign(id=full.id + 'h', accuracy_last=2*full.accuracy_last)
    o, own = done_again(full, half).set_index('arm').loc['CE'], full[full.arm == 'CE'].accuracy_last
    assert o.base == pytest.approx(own.mean()) and o.sd_seeds == pytest.approx(2*own.std())


def test_a_small_loss_elsewhere_is_no_exception():
    made = {k: programme(k, repaired=3) for k in 'AB'} | {'E': programme('E', repaired=-1)}
    assert 'but `repaired`' not in said_of(made)


def test_the_papers_data_is_of_the_papers_schedule(lico_root):
    for profile, where in dict(paper="the paper's data", laptop='natural images').items():
        store('table3', rows('CE', BASE, text=None, method='CE'), rows('LICO', BASE + 3 + NOISE), profile=profile)
        r = claim_rows().set_index('claim').loc['LICO gains accuracy, with few labels']
        assert r['where'] == where
    for labels in ('40', '4000'):
        both = rows('CE', BASE, text=None, method='CE'), rows('LICO', BASE + 3 + NOISE)
        store(f'table3-{labels}', *both, labels=labels)
    assert claim_rows().set_index('claim').loc['LICO gains accuracy, with few labels'].margin == .5


def test_stored_rows_of_a_block_are_of_its_declared_runs():
    assert set(claims.blocks()) >= set('ABCE')
    for k, df in claims.blocks().items():
        said = lambda r: ', '.join(f'{n}={v}' for n, v in r.options if n != 'class_text')
        declared = {(arm_name(r), r.method, r.seed, said(r), options_of(r)['precision'])
                    for r in block_runs(k, BLOCKS[k].dataset)}
        df = df.assign(options=df.options.fillna(''), precision=df.get('precision', pd.Series('fp32', df.index)))
        found = set(df[['arm', 'method', 'seed', 'options', 'precision']].itertuples(index=False, name=None))
        assert found <= declared, (k, sorted(found - declared)[:3])


def test_what_contrasts_are_kept_is_not_stale():
    kept = pd.read_csv(root()/'figures'/'paper'/'contrasts.csv').drop(columns='differences')
    families = {PRIMARY: True, SECONDARY: False, LOUDER: True}
    now = pd.concat([contrast_rows(claims.blocks(), *o) for o in families.items()], ignore_index=True)
    pd.testing.assert_frame_equal(kept, now[list(kept)], check_dtype=False, rtol=1e-6)
