import json
from dataclasses import replace

import numpy as np, pytest
from hypothesis import given, strategies as st
from scipy import stats

from lico import experiments
from lico.experiments import Run, find_record, frame, load_data, read_record, run, run_id, runs_folder, spec, sweep
from lico.paper import compare, interval, printed_table, read_results, results, save_results, verdict

TINY = Run(labels=40, backbone='wrn_10_1', steps=1)


def test_identity_is_what_the_method_reads():
    data = load_data(TINY)
    same = [replace(TINY, text_encoder='clip'), replace(TINY, options=dict(tau='fixed')), replace(TINY, split_seed=0), replace(TINY, image_size=16)]
    other = [replace(TINY, seed=1), replace(TINY, split_seed=1), replace(TINY, labels=50), replace(TINY, steps=2), replace(TINY, evaluations=2),
             replace(TINY, options=dict(lr=0.1)), replace(TINY, backbone='wrn_16_1'), replace(TINY, method='LICO'), replace(TINY, preset='released')]
    key = lambda r: json.dumps(spec(r, load_data(r)), sort_keys=True)
    assert {key(r) for r in same} == {key(TINY)}
    assert len({key(r) for r in [TINY, *other]}) == len(other) + 1
    lico = replace(TINY, method='LICO')
    assert len({key(r) for r in (lico, replace(lico, text_encoder='clip'), replace(lico, options=dict(tau='fixed')), replace(lico, method='CE+MM'))}) == 4
    assert data.digest == spec(TINY, data)['data']


def test_repr_is_the_command():
    r = Run(labels=40, method='LICO', seed=3, options=dict(tau='fixed', tau_init=0.3))
    assert eval(repr(r)) == r and hash(r)


def test_sweep_says_what_is_missing_before_training(lico_root, monkeypatch):
    monkeypatch.setattr(experiments, '_train', lambda *a: pytest.fail('trained'))
    with pytest.raises(ValueError, match='unknown dataset'): sweep([TINY, replace(TINY, dataset='digit')], progress=False)
    with pytest.raises(ValueError, match='unknown text encoder'): sweep([TINY, replace(TINY, method='LICO', text_encoder='minlm')], progress=False)
    with pytest.raises(ValueError, match='unknown backbone'): sweep([TINY, replace(TINY, backbone='wrn_28')], progress=False)


def test_finished_runs_are_not_done_again(lico_root, monkeypatch):
    first = sweep([TINY, replace(TINY, seed=1)], progress=False)
    monkeypatch.setattr(experiments, '_train', lambda *a: pytest.fail('trained'))
    assert sweep([TINY, replace(TINY, seed=1)], progress=False) == first
    assert [r['run']['seed'] for r in first] == [0, 1]


def test_record_of_older_code(lico_root, monkeypatch):
    first = run(TINY, progress=False)
    monkeypatch.setattr(experiments, 'code_hash', lambda: 'f'*8)
    with pytest.warns(RuntimeWarning, match='1 of 1 records are of older training code'): [old] = sweep([TINY], progress=False)
    assert old['older_code'] and old['id'] == first['id']
    new = run(TINY, again=True, progress=False)
    assert not new['older_code'] and new['id'].endswith('f'*8) and new['accuracy_last'] == first['accuracy_last']


@pytest.mark.parametrize('damage', [lambda t: t[:len(t)//2], lambda t: t.replace('"accuracy_last": ', '"accuracy_last": 1'), lambda t: '[]', lambda t: ''])
def test_damaged_record(lico_root, damage):
    first = run(TINY, progress=False)
    path = runs_folder()/first['id']/'record.json'
    path.write_text(damage(path.read_text()))
    with pytest.warns(RuntimeWarning, match='record.json is damaged'): assert read_record(path.parent) is None
    assert list(path.parent.glob('record.json.damaged-*')) and run(TINY, progress=False)['accuracy_last'] == first['accuracy_last']


def test_table_from_stored_rows(lico_root):
    runs = [replace(TINY, method=m, seed=s, split_seed=s) for m in ('CE', 'CE+OT') for s in (0, 1, 2)]
    df = save_results(sweep(runs, progress=False), lico_root/'out', profile='smoke')
    assert len(df) == 6 and {'command', 'seed', 'hardware', 'code', 'torch'} <= set(df.columns) and df.command.notna().all()
    c = compare(read_results(lico_root/'out'), 3).iloc[0]
    a = {m: df[df.method == m].set_index('seed').accuracy_last for m in ('CE', 'CE+OT')}
    ci = stats.ttest_rel(a['CE+OT'], a['CE']).confidence_interval(0.95)
    np.testing.assert_allclose([c.difference - c.half_width, c.difference + c.half_width], [ci.low, ci.high])
    assert (c.n, c.is_stand_in, c.printed_for) == (3, True, 'CIFAR-10')


def test_printed_numbers():
    "The 271 numbers, and cells typed here from the paper's text."
    assert len(results()) == 271 and results().groupby('table').size().to_dict() == {1: 34, 2: 16, 3: 38, 4: 48, 5: 16, 6: 24, 7: 10, 8: 12, 9: 6, 10: 8, 11: 32, 12: 12, 13: 15}
    t = results(3).set_index(['dataset', 'setting', 'backbone', 'method'])
    assert t.loc[('CIFAR-10', '250', 'WRN', 'LICO'), ['value', 'std']].tolist() == [41.7, 0.91]
    assert '**41.7 ± 0.91**' in printed_table(3)
    with pytest.raises(ValueError, match='no table 14'): results(14)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=20), st.floats(0.1, 5))
def test_verdict_properties(d, gain):
    mean, half = interval(d)
    v = verdict(d, gain)
    assert v == {'supported': 'contradicted', 'contradicted': 'supported'}.get(w := verdict([-x for x in d], gain), w), 'symmetric'
    assert (v == 'supported') == (mean - half > 0) and (v == 'contradicted') == (mean + half < 0)
    if v == 'equivalent': assert abs(mean) < gain/2
