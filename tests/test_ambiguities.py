"""One choice changed at a time: what is run, what cannot differ, and what a change does to what LICO adds to
cross-entropy."""
import math

import numpy as np, pandas as pd, pytest, torch

from lico.config import OPTIONS, options_from, preset, root
from lico.evidence.pages import parameters
from lico.evidence.ambiguities import (
    CHOICES, PRESET, beside_ce, by_choice, cannot_differ, changes, draw_effects, effects, effects_sentences, gaps,
    runs_of_changes, state_table)
from lico.evidence.report import comparison_table
from lico.evidence.store import read_results
from lico.experiments import Run
from lico.losses import LossOptions
from lico.model import Temperature

TOP = root()
FOLDERS = [TOP/'figures'/'fidelity', TOP/'figures'/'fidelity-120']
RELEASED_BN = 'batch norm momentum: 0.001'


def parameters_of(profile='smoke', **given):
    return parameters('fidelity', dict(profile=profile, out='', **given))


def test_every_choice_is_of_options_and_every_option_that_presets_differ_on_is_in_a_choice():
    assert len({c.name for c in CHOICES}) == len(CHOICES) == 29
    for c in CHOICES:
        values = [tuple(sorted(o.items(), key=str)) for o in c.values.values()]
        assert len(set(values)) == len(values) > 1 and all(k in OPTIONS for o in values for k, _ in o), c
    single = {k for c in CHOICES[:-1] for o in c.values.values() for k in o}
    every = [preset(name) for name in ('paper', 'released', 'repaired')]
    assert ({k for k in every[0] if len({o[k] for o in every}) > 1} == set(next(iter(CHOICES[-1].values.values())))
            <= single)


@pytest.mark.parametrize('base', ['paper', 'released', 'repaired'])
def test_a_change_is_one_value_that_the_preset_does_not_have(base):
    found = changes(base)
    assert all({**preset(base), **o} != preset(base) for o in found.values())
    for c in CHOICES[:-1]:
        own = [label for label, o in c.values.items() if all(preset(base)[k] == v for k, v in o.items())]
        assert {label for name, label in found if name == c.name} == set(c.values) - set(own) and len(own) < 2
    texts = [Run(options=o).options for o in found.values()]
    assert len(set(texts)) == len(texts), 'two changes of one preset with the same options could not be told apart'


@pytest.mark.parametrize('profile', ['smoke', 'laptop', 'paper'])
def test_every_profile_has_runs(profile):
    runs = runs_of_changes(parameters_of(profile))
    assert ({'CE', 'LICO'} == {r.method for r in runs} and 'repaired' in {r.preset for r in runs}
            and len(set(runs)) == len(runs))


def test_runs_leave_out_what_cannot_differ():
    "40 labels are one batch; 250 are not. Cross-entropy is trained once with each training among the arms."
    given = lambda labels: runs_of_changes(parameters_of(labels=labels, presets='repaired'))
    few, more = given('40'), given('250')
    options = lambda runs, method: [dict(r.options) for r in runs if r.method == method]
    assert not any('ot_value' in o for runs in (few, more) for o in options(runs, 'LICO'))
    assert {'batch_size': 128} not in options(few, 'LICO') + options(few, 'CE')
    assert {'batch_size': 128} in options(more, 'LICO') and {'batch_size': 128} in options(more, 'CE')
    assert len(options(few, 'LICO')) == 1 + len(changes('repaired')) - 2 and len(options(few, 'CE')) == 6
    assert len(options(more, 'LICO')) == len(changes('repaired')) and len(options(more, 'CE')) == 7


@pytest.mark.parametrize('base, options, labels, idle', [
    ('paper', dict(ot_value='regularised'), 'all', True), ('paper', dict(ot_eps=.001), 40, False),
    ('released', dict(ot_eps=.001), 'all', True), ('released', dict(ot_grad='envelope'), 40, False),
    ('paper', dict(ot_value='regularised', tau='fixed'), 40, False),
    ('paper', dict(batch_size=128), 40, True), ('paper', dict(batch_size=128), '64', True),
    ('paper', dict(batch_size=128), 65, False), ('paper', dict(batch_size=128), 'all', False),
    ('released', dict(batch_size=64), 128, False), ('paper', dict(batch_size=128, lr=.1), 40, False)])
def test_what_cannot_differ(base, options, labels, idle):
    assert bool(cannot_differ(base, options, labels)) == idle


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda p: p.name)
def test_stored_runs_of_what_cannot_differ_are_the_presets_own_to_the_last_bit(folder):
    df = read_results(folder).fillna({'options': ''})
    lico, numbers = (df[df.method == 'LICO'],
                     ['accuracy_last', 'accuracy_best', 'ce', 'mm', 'entropy_image', 'entropy_text', 'cosine'])
    for base, part in lico.groupby('preset'):
        own = part[part.options == ''].set_index('seed')[numbers]
        for option in ('batch_size=128', 'ot_value=regularised'):
            pd.testing.assert_frame_equal(part[part.options == option].set_index('seed')[numbers], own,
                                          check_exact=True)
    assert not by_choice(read_results(folder)).arm.str.contains('^batch:|^value of transport').any()


def made_up(options, values, method='LICO', training='as printed', base='repaired', **more):
    lico = method == 'LICO'
    where = dict(dataset='digits', labels='40', backbone='wrn_16_1', steps=pd.array([40]*3, 'Int64'), classes=10)
    arm = dict(arm=method, method=method, preset=base if lico else 'paper', text_encoder='minilm' if lico else None,
               options=options, training=training)
    runs = dict(seed=range(3), split=range(3), accuracy_last=values, accuracy_best=values)
    matching = dict(mm=.1, tau=.1, entropy_image=.6 if lico else math.nan, entropy_text=.7 if lico else math.nan,
                    cosine=.8)
    return pd.DataFrame(where | arm | runs | matching | more)


CE = [made_up(None, [59., 62, 62], 'CE'), made_up('noise=0.1', [49., 52, 52], 'CE', 'noise'),
      made_up('bn_momentum=0.001', [10., 9.8, 10.4], 'CE', 'bn')]
TOY = pd.concat([
    *CE, made_up(None, [60., 62, 64]), made_up('mm_features=maps', [63., 65.1, 66.9]),
    made_up('tau_init=2.6593', [61., 62, 63], entropy_text=.999), made_up('ot_iters=10', [60.5, 62.5, 64.5]),
    made_up('alpha=10.0', [10., 9.9, 10.1]), made_up('mm_normalise=False', [10., 65, 67]),
    made_up('noise=0.1', [50., 52, 54.1], training='noise'), made_up('bn_momentum=0.001', [14., 13, 17], training='bn'),
    made_up('ot_value=regularised', [60., 62, 64])], ignore_index=True)


def test_difference_of_differences():
    "A training that costs ten points with LICO and without is worth nothing; every number by hand."
    c = effects(TOY).set_index('arm')
    d = {'features compared: maps': [3, 3.1, 2.9], 'first temperature: 2.66': [1, 0, -1],
         'Sinkhorn iterations: 10': [.5]*3,
         'unit length before D: no': [-50, 3, 3], 'noise on training images: 0.1': [0, 0, .1]}
    for arm, values in d.items():
        np.testing.assert_allclose(c.differences[arm], values, atol=1e-9)
        half_width = 4.302653*np.std(values, ddof=1)/math.sqrt(3) or math.inf  # nothing to judge by
        np.testing.assert_allclose(c.half_width[arm], half_width, rtol=1e-5, atol=1e-9)
    assert set(c.index) == {*d, 'weight of matching: α = 10', RELEASED_BN} and (c.reference == PRESET).all()
    assert c.baseline.round(9).eq(1).all() and c.inactive.to_dict()['first temperature: 2.66'] == 3
    own = beside_ce(TOY).set_index('arm')
    assert own.difference.round(2).to_dict()['noise on training images: 0.1'] == 1.03 and own.baseline[PRESET] == 61
    np.testing.assert_allclose(gaps(TOY).query('arm == @PRESET').above_ce, [1, 0, 2])


def test_networks_at_chance_are_not_compared():
    "Neither where LICO failed nor where cross-entropy did; a minority that failed stays, and is counted."
    c, table = effects(TOY).set_index('arm'), comparison_table(effects(TOY))
    assert c.loc[[RELEASED_BN, 'weight of matching: α = 10'], ['difference', 'half_width', 'p', 'value']].isna().all(
        axis=None)
    assert c.differences[RELEASED_BN] == () and c.failed[RELEASED_BN] == 3 and c.failed['unit length before D: no'] == 1
    lines = [line for line in table.splitlines() if RELEASED_BN in line or 'α = 10' in line]
    assert (len(lines) == 2
            and all('training failed' in line and '3 of 3' in line and 'nan' not in line for line in lines))
    assert math.isnan(beside_ce(TOY).set_index('arm').difference[RELEASED_BN])
    dead = pd.concat([*CE, made_up(None, [10., 10, 10]), made_up('mm_features=maps', [63., 65.1, 66.9])],
                     ignore_index=True)
    assert math.isnan(effects(dead).difference[0]), 'nor with a preset at chance'
    assert [t.get_text() for t in draw_effects(effects(dead)).texts] == ['nothing to compare: training failed']
    said = effects_sentences(dead)
    assert 'nothing to compare its changes with. Of 1 changes, training failed in most runs of 0.' in said, 'no blame'
    assert comparison_table(effects(dead)).count('the preset as it is failed') == 1
    assert 'The preset as it is fails to train, beside the 61.0 of cross-entropy' in said and '—' not in said


def test_lengths_and_presets_do_not_mix():
    longer = TOY.assign(steps=80, accuracy_last=TOY.accuracy_last + 1)
    other = pd.concat([made_up(None, [60., 62, 63], base='paper'),
                       made_up('mm_features=pooled', [62., 64, 65], base='paper')])
    c = effects(pd.concat([TOY, longer, other], ignore_index=True))
    assert (c.groupby(['steps', 'preset']).size()
            .to_dict() == {(40, 'repaired'): 7, (80, 'repaired'): 7, (40, 'paper'): 1} and (c.n == 3).all())
    assert effects_sentences(pd.concat([TOY, longer])).count('adds +1.00') == 2
    with pytest.raises(ValueError, match='no run of LICO has a run of CE of its seed and training'):
        effects(TOY[TOY.method == 'LICO'])


def test_sentences_state_and_picture():
    said = effects_sentences(TOY)
    for part in ('The preset as it is adds +1.00 ± 2.48 to the 61.0 of cross-entropy, with matching inactive in 0 of 3 '
                 'runs',
                 f'Of 7 changes, training failed in most runs of 2 (weight of matching: α = 10; {RELEASED_BN})',
                 'Matching was inactive in most runs of 1 (first temperature: 2.66)',
                 'The interval leaves 0 out for 1 (features compared: maps); by chance it would for 0.2',
                 'Not run: value of transport: with entropy, since it changes the value of a loss and not its '
                 'gradient; batch: 128',
                 'features compared: maps (repaired) with minilm: accuracy above cross-entropy +3.00 ± 0.25 '
                 'points over 3 pairs'):
        assert part in said, part
    silent = effects_sentences(pd.concat([*CE, made_up(None, [60., 62, 64]),
                                          made_up('tau_init=2.6593', [61., 62, 63], entropy_text=.999)]))
    assert 'inactive in most runs of 1 (first temperature: 2.66)' in silent and '\n\n' not in silent
    assert state_table(TOY).count('\n') == 2 + len(effects(TOY)) and '3 of 3' in state_table(TOY)
    names = [t.get_text() for t in draw_effects(effects(TOY)).subfigs[0].axes[0].get_yticklabels()]
    assert 'first temperature: 2.66 (inactive)' in names and len(names) == 5 and not any('α = 10' in n for n in names)


def test_one_seed_has_no_interval():
    one = effects(TOY[TOY.seed == 0])
    assert ((one.n == 1).all()
            and 'The interval leaves 0 out for 0; by chance it would for 0.0' in effects_sentences(TOY[TOY.seed == 0]))


def test_rounding_is_all_that_tells_the_forms_of_a_fixed_temperature_apart():
    "What the notebook takes as its ruler: another last digit, and nothing that is trained."
    exp, raw = (Temperature(options_from(LossOptions, preset('repaired', tau_form=form))) for form in ('exp', 'raw'))
    assert (exp() != raw() and torch.nextafter(exp(), raw()) == raw() and not exp.value.requires_grad
            and not raw.value.requires_grad)
