"The way from runs to stored rows: what is run, measured, written, kept and read."
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch

from lico import records
from lico.evidence import store
from lico.evidence.arms import columns_of, compare, grid
from lico.evidence.store import collect, read_results, read_scores, rows_of, write_results
from lico.experiments import Run, load_data, sweep
from lico.records import load_backbone

TINY = Run(labels=40, backbone='wrn_10_1', steps=1)


def p_of(out, **more): return SimpleNamespace(**dict(
    protocol='smoke', out=out, datasets=['digits'], backbones=['wrn_10_1'], labels=[40], methods=['CE', 'LICO'],
    presets=['paper'], options={}, text_encoder='minilm', seeds=[0, 1], steps=1, threads=1,
    epochs=None, evaluations=1, image_size=None, workers=1, stored=None, stand_in=None, saliency=[], metrics=[],
    saliency_options='', test_images=4, batch_size=16) | more)


def test_stored_rows(lico_root, monkeypatch, capsys):
    """`add` keeps the rows of other runs, `only` runs nothing, neither changes a row; without it the file holds
    what was asked for, and says what it held."""
    p = lambda stored: p_of(lico_root/'out', stored=stored)
    with pytest.raises(FileNotFoundError, match='without `stored`'): collect(p('only'), [TINY])
    first = collect(p(None), [TINY])
    both = collect(p('add'), [replace(TINY, seed=1)])
    assert both.seed.tolist() == [0, 1] and both.iloc[0].to_dict() == pytest.approx(first.iloc[0].to_dict(),
        nan_ok=True)
    assert collect(p('add'), [replace(TINY, seed=1)]).equals(both) and 'held' not in capsys.readouterr().err
    monkeypatch.setattr(records, '_train', lambda *a: pytest.fail('trained'))
    assert collect(p('only'), [replace(TINY, seed=7)]).equals(both) and collect(p(None), [TINY]).seed.tolist() == [0]
    said = 'results.csv held 1 other runs, which are no longer in it: -p out FOLDER writes elsewhere'
    assert said in capsys.readouterr().err


def test_that_results_cannot_be_written_is_said_before_anything_runs(lico_root, monkeypatch):
    monkeypatch.setattr(store, 'sweep', lambda *a, **k: pytest.fail('a run was started'))
    (lico_root/'file').write_text('', encoding='utf-8')
    with pytest.raises(OSError, match='cannot write .*file.*: see that it can be written to, or name another place'):
        collect(p_of(lico_root/
        'file'), [TINY])


def test_two_that_add_at_once_lose_nothing(tmp_path):
    rows = [pd.DataFrame(dict(id=[f'{i}'], seed=[i])) for i in range(12)]
    write_results(tmp_path, rows[0])
    with ThreadPoolExecutor(6) as pool: list(pool.map(lambda o: write_results(tmp_path, o, keep=True), rows[1:]))
    assert sorted(read_results(tmp_path).id.astype(int)) == list(range(12))


@pytest.mark.filterwarnings('ignore::lico.watch.InactiveMatchingWarning')
def test_a_table_from_start_to_end(lico_root):
    "Table 13 on digits: arms, their options and those of the user, maps and their images; a second one adds to it."
    p = p_of(lico_root/'out', arms=['Learnable', 'Random'], options=dict(alpha=5.))
    df = collect(p, grid(p, 13), 13)
    assert df.arm.tolist() == ['Learnable', 'Learnable', 'Random', 'Random'] and set(df.options) == {'alpha=5.0'}
    assert df.command.str.contains("'trainable', False").tolist() == [False, False, True,
        True] and (df.protocol == 1).all() and (df.paper_dataset == 'ImageNet-1k').all()
    np.testing.assert_allclose(df.overall, df.insertion - df.deletion, atol=1e-3)  # scores are kept with five digits
    assert (compare(df, 13, columns_of(13)).groupby('metric').n.sum() == 2).all()
    images = read_scores(p.out)
    np.testing.assert_allclose(images.groupby('id').insertion.mean()[df.id], df.insertion, rtol=1e-4)
    assert (df.images == 4).all() and len(images) == 16
    more = collect(q := p_of(lico_root/'out', arms=['Fixed'], options=dict(alpha=5.), stored='add'), grid(q, 13), 13)
    assert len(more) == 6 and len(read_scores(p.out)) == 24 and compare(more, 13).arm.tolist() == ['Random', 'Fixed']
    assert collect(p_of(lico_root/'out', stored='only'), [], 13).equals(more) and read_results(p.out).equals(more)


def test_top5_and_shots(lico_root):
    p = p_of(lico_root/'out', methods=['CE', 'GCC'], labels=['1-shot', 'all'])
    df = collect(p, grid(p, 2), 2)
    assert df.labels.tolist() == ['1-shot']*4 + ['all']*4
    assert 'insertion' not in df and not (p.out/'scores.csv').exists()
    r = Run(shots=1, backbone='wrn_10_1', seed=1, steps=1)
    record = sweep([r], progress=False)[0]
    data, net = load_data(r), load_backbone(record)
    with torch.no_grad(): order = net(data.normalise(data.test.x)).argsort(1, descending=True)
    rank = (order == data.test.y[:, None]).float().argmax(1)
    mine = df[df.id == record['id']].iloc[0]
    np.testing.assert_allclose([mine.accuracy_last, mine.top5], [100*(rank < k).float().mean() for k in (1, 5)],
                               atol=0.21)  # ties
    c = compare(df, 2, ['accuracy_last', 'top5'])
    assert c.labels.tolist() == ['1-shot', 'all']*2 and set(c.printed_value) == {74.40, 92.12}


def test_pairs_share_everything_but_the_method(lico_root):
    """Runs of another length, image size or dataset are no partners, whatever their seeds; nor are images of
    another folder with the same last name."""
    from PIL import Image
    folders, rng = [lico_root/'a'/'pets', lico_root/'b'/'pets'], np.random.default_rng(0)
    for path in (f/part/name/f'{i}.png' for f in folders for part in ('train', 'test') for name in ('cat', 'dog')
                 for i in range(4)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    base = [TINY, replace(TINY, steps=2), replace(TINY, image_size=8),
            *(replace(TINY, dataset=f'folder:{f}', labels=4) for f in folders)]
    df = rows_of(sweep([replace(r, method=m) for r in base for m in ('CE', 'CE+OT')],
                       progress=False), 3)
    c = compare(df, 3)
    assert len(df) == 10 and c.n.tolist() == [1]*5 and c.dataset.tolist() == [
        *['digits']*3, 'folder:a/pets', 'folder:b/pets']


@pytest.mark.parametrize('more, sentences', [
    (dict(saliency=['gradcam'], metrics=['insert'], saliency_options='rise.n_maks=5'),
     ["unknown saliency method 'gradcam'", "unknown metric 'insert'", "rise has no option 'n_maks'"]),
    (dict(saliency=['rise'], metrics=['insertion'], saliency_options='rise.n_masks=0, rise.p=2, smoothgrad.samples=x'),
     ['rise.n_masks = 0: expected a whole number', 'rise.p = 2: expected', "smoothgrad.samples = 'x': expected"]),
    (dict(saliency=['xrai'], metrics=['insertion'], saliency_options='xrai.fast=maybe, edges.steps=3'),
     ["unknown value of xrai.fast: 'maybe'", "edges has no option 'steps': its options are none"]),
    (dict(saliency_options='gradcam.x=1'), ["unknown saliency method 'gradcam'"])])
def test_what_is_asked_of_maps_is_checked_before_anything_runs(lico_root, monkeypatch, more, sentences):
    monkeypatch.setattr(store, 'sweep', lambda *a, **k: pytest.fail('a run was started'))
    with pytest.raises(ValueError) as e: collect(p_of(lico_root/'out', **more), [TINY])
    assert all(s in str(e.value) for s in sentences), e.value


def test_labels_that_cannot_be_shared_are_refused_before_anything_runs(lico_root, monkeypatch):
    monkeypatch.setattr(records, '_train', lambda *a: pytest.fail('trained'))
    with pytest.raises(ValueError, match='labels = 41 cannot be shared evenly'):
        collect(p_of(lico_root/'out'), [TINY, replace(TINY, labels=41)])


def test_a_run_of_two_arms_is_the_first_one_s(lico_root, monkeypatch):
    "Which of two equal runs keeps the row does not depend on what else was asked."
    both = [dict(id='a', of='paper'), dict(id='b', of='paper'), dict(id='a', of='repaired')]
    monkeypatch.setattr(store, 'sweep', lambda runs, executor: both)
    p = SimpleNamespace(out=lico_root/'out', workers=1)
    assert store.train(p, []) == both[:2]
