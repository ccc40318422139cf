"Nothing damaged is trusted: bits turned in every kind of file, two who find it at once, writers killed at each step."
import json, math, os, shutil, signal, subprocess, sys, warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from lico import config, files, records
from lico.files import read_checked, read_sealed, write_atomic, write_sealed
from lico.evidence import divergence, map_scores
from lico.evidence.cases import imagenet_cases, test_images as cases_of_test_images
from lico.evidence.pictures import Shown, read_shown, save_shown
from lico.evidence.store import read_results, read_scores, read_table, top5, write_results, write_table
from lico.experiments import Run, load_data, runs_folder
from lico.records import load_backbone, read_record, run, ship
from lico.shipping import load_checkpoint, load_network, loading_lines, save_checkpoint, save_network

TINY = Run(labels=40, backbone='wrn_10_1', steps=1)


@pytest.fixture(scope='module')
def record(module_root): return run(TINY, progress=False)


def flips(content, n=150):
    "The content with one bit turned, at places spread evenly, and all places of the first kilobyte in turn."
    places = sorted({*range(0, min(1024, len(content)), 7), *range(0, len(content), max(1, len(content)//n))})
    for k, i in enumerate(places):
        yield i, content[:i] + bytes([content[i] ^ 1 << k % 8]) + content[i + 1:]


def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a.equals(b) if isinstance(a, pd.DataFrame) else a == b


def check_flips(path, read, n=150):
    "What is read of each damaged copy is the truth or nothing; what is nothing is set aside under a name of its own."
    path = Path(path)
    true, content, damaged = read(), path.read_bytes(), 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        for i, changed in flips(content, n):
            path.write_bytes(changed)
            found = read()
            assert found is None or same(found, true), f'position {i} of {path.name}'
            damaged += found is None
    aside = list(path.parent.glob(f'{path.name}.damaged-*'))
    assert damaged == len(aside) > 0
    for o in aside: o.unlink()
    path.write_bytes(content)
    assert same(read(), true)


@pytest.mark.parametrize('name', ['model.safetensors', 'predictions.safetensors'])
def test_a_bit_of_a_run_s_tensors(record, name):
    path = runs_folder()/record['id']/name
    check_flips(path, lambda: load_checkpoint(path))


def test_a_bit_of_a_checkpoint(tmp_path):
    "Its state counts as much as its tensors, and so do names, shapes and types."
    path = tmp_path/'checkpoint.safetensors'
    tensors = dict(a=torch.arange(6.).view(2, 3), b=torch.arange(6.).view(3, 2).to(torch.bfloat16), c=torch.tensor(7))
    save_checkpoint(path, tensors, dict(step=512, log=[dict(loss=.25, mm=math.inf)], run=dict(seed=1)))
    check_flips(path, lambda: load_checkpoint(path), 10**6)


def test_a_bit_of_a_record(record):
    folder = runs_folder()/record['id']
    check_flips(folder/'record.json', lambda: read_record(folder))


def test_two_names_of_one_parameter_are_saved(tmp_path):
    w = torch.arange(3.)
    save_checkpoint(tmp_path/'x', dict(a=w, b=w, c=w.view(3)), {})
    assert same(load_checkpoint(tmp_path/'x')[0], dict(a=w, b=w, c=w))


def test_damaged_weights_are_made_again(lico_root):
    first = run(TINY, progress=False)
    path = runs_folder()/first['id']/'model.safetensors'
    weights, content = load_checkpoint(path)[0], path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    with pytest.warns(RuntimeWarning, match='model.safetensors is damaged'): net = load_backbone(first)
    assert same({k: v for k, v in net.state_dict().items()},
                {k.removeprefix('backbone.'): v for k, v in weights.items()})
    again = read_record(path.parent)
    assert again['accuracy_last'] == first['accuracy_last'] and same(load_checkpoint(path)[0], weights)
    path.unlink()
    for o in path.parent.glob('*.damaged-*'): o.unlink()
    with pytest.raises(FileNotFoundError, match='is here without its weights'): load_backbone(first)


def test_whatever_lies_in_a_run_s_folder_does_not_block_it(lico_root):
    "Garbage under the name of every file of a run, also of one that earlier versions wrote."
    first = run(TINY, progress=False)
    folder = runs_folder()/first['id']
    for p in folder.iterdir(): p.unlink()
    for name in ('model.txt', 'spec.json', 'log.csv', 'record.json', 'checkpoint.safetensors', 'model.safetensors',
                 'predictions.safetensors'): (folder/name).write_bytes(b'\xff\x00{')
    with pytest.warns(RuntimeWarning, match='is damaged'): again = run(TINY, progress=False)
    assert again['accuracy_last'] == first['accuracy_last'] and load_backbone(again)


def test_a_bit_of_top5(record):
    path = runs_folder()/record['id']/'top5.json'
    top5(record)
    check_flips(path, lambda: read_sealed(path))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'.', b',') if b'.' in content else content + b'1')
    value = json.loads(content.split(b'\n', 1)[1])
    with pytest.warns(RuntimeWarning, match='top5.json is damaged'): assert top5(record) == value


def test_a_bit_of_the_scores(record, monkeypatch):
    cases = cases_of_test_images(record, 8)
    true = map_scores.scores(cases, 'random', progress=False)
    path = map_scores._file(cases, 'random', ('insertion', 'deletion'), {})
    check_flips(path, lambda: read_sealed(path))
    text = path.read_text(encoding='utf-8')
    for damaged in (text[:-40], text[:40], text.replace('7', '1')):
        path.write_text(damaged, encoding='utf-8')
        with pytest.warns(RuntimeWarning, match='csv is damaged'):
            again = map_scores.scores(cases, 'random', progress=False)
        pd.testing.assert_frame_equal(again.drop(columns='seconds'), true.drop(columns='seconds'))


def test_a_bit_of_the_curves(record, monkeypatch):
    "They are made again where they are damaged."
    made = []
    monkeypatch.setattr(divergence, '_curves', lambda *a: made.append(1) or 'step,kl\n0,1.5\n')
    r = replace(TINY, method='LICO')
    first = divergence.curves(r, 2, 10)
    path = next((config.root()/'data'/'curves').glob('*.csv'))
    assert divergence.curves(r, 2, 10).equals(first) and len(made) == 1
    path.write_text(path.read_text(encoding='utf-8').replace('1.5', '1.6'), encoding='utf-8')
    with pytest.warns(RuntimeWarning, match='is damaged'): assert divergence.curves(r, 2, 10).equals(first)
    assert len(made) == 2


def rows(*ids): return pd.DataFrame(dict(id=ids, seed=range(len(ids)), accuracy_last=12.5))
def images(*ids): return pd.DataFrame(dict(id=ids, image='1', insertion=1.25))


@pytest.mark.parametrize('name, read', [('results.csv', read_results), ('scores.csv', read_scores)])
def test_a_bit_of_the_tables(tmp_path, name, read):
    "Damaged ones are refused; who writes sets them aside and goes on."
    write_results(tmp_path, rows('a', 'b'), images('a', 'b'))
    true, content = read(tmp_path), (tmp_path/name).read_bytes()
    assert subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=tmp_path, capture_output=True).returncode == 0
    for i, changed in flips(content):
        (tmp_path/name).write_bytes(changed)
        with pytest.raises(ValueError, match=f'{name} is damaged, changed or gone'): read(tmp_path)
    with pytest.warns(RuntimeWarning, match=f'{name} is damaged'):
        write_results(tmp_path, rows('a', 'b'), images('a', 'b'))
    assert read(tmp_path).equals(true) and next(tmp_path.glob(f'{name}.damaged-*')).read_bytes() == changed


def test_a_bit_of_the_sums(tmp_path):
    write_results(tmp_path, rows('a', 'b'))
    true, content = read_results(tmp_path), (tmp_path/'SHA256SUMS').read_bytes()
    for i, changed in flips(content):
        (tmp_path/'SHA256SUMS').write_bytes(changed)
        try: assert read_results(tmp_path).equals(true)
        except ValueError as e: assert 'is damaged' in str(e)


@pytest.mark.parametrize('damage', [lambda t: t[:-6], lambda t: t + 'c\n', lambda t: t + 'c,2,1.5,7\n',
                                    lambda t: t.replace(',12.5\nb', '\nb'), lambda t: t.replace('id,seed', 'id'),
                                    lambda t: t.replace('b,1', '"b,1'), lambda t: '\xff' + t[1:]])
def test_tables_without_sums_are_read_strictly(tmp_path, damage):
    "Those of earlier versions: pandas fills what is cut off with blanks."
    write_results(tmp_path, rows('a', 'b'))
    (tmp_path/'SHA256SUMS').unlink()
    assert read_results(tmp_path).id.tolist() == ['a', 'b']
    text = damage((tmp_path/'results.csv').read_text(encoding='utf-8'))
    (tmp_path/'results.csv').write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match='results.csv is damaged'): read_results(tmp_path)


def test_a_bit_of_a_table_or_a_picture_s_maps(tmp_path):
    "Of those that stand beside the results: refused, and set aside by who writes them anew."
    n = np.zeros((1, 2), np.float32)
    table, shown = pd.DataFrame(dict(a=[1.5], differences=['[1, 2]'])), Shown(n, n, n, n, n, n, n, n)
    for name, write, read in (('a b.csv', lambda path: write_table(path, table), read_table),
                              ('maps.npz', lambda path: save_shown(shown, path), read_shown)):
        write(path := tmp_path/name)
        read(path)
        for i, changed in flips(content := path.read_bytes()):
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=f'{name} is damaged, changed or gone'): read(path)
        with pytest.warns(RuntimeWarning, match=f'{name} is damaged'): write(path)
        assert path.read_bytes() == content and next(tmp_path.glob(f'{name}.damaged-*')).read_bytes() == changed
        with pytest.raises(FileNotFoundError, match='run the notebook without `stored`'): read(tmp_path/'none'/name)
    assert read_table(tmp_path/'a b.csv').differences.tolist() == [[1, 2]]


def test_committed_results_are_whole():
    "All that is read again has a checksum, and it fits."
    figures = Path(__file__).parents[1]/'figures'
    for path in [*figures.glob('*/*.csv'), *figures.glob('*/*.npz')]:
        assert path.name in files.read_sums(path.parent), path
        assert files.read_summed(path)
        if path.name == 'results.csv' and path.parent.name != 'paper': assert len(read_results(path.parent))


def test_a_damaged_file_is_set_aside_once(tmp_path):
    "By twenty at once, forty times: none dies, no name is taken twice, and what was mended meanwhile stays."
    for _ in range(40):
        write_sealed(tmp_path/'x', 'whole')
        (tmp_path/'x').write_bytes(b'damaged')
        with warnings.catch_warnings(), ThreadPoolExecutor(20) as pool:
            warnings.simplefilter('ignore')
            assert set(pool.map(lambda _: read_sealed(tmp_path/'x'), range(20))) == {None}
    assert len(list(tmp_path.glob('x.damaged-*'))) == 40
    write_atomic(tmp_path/'y', 'damaged')
    def mended(content):
        write_atomic(tmp_path/'y', 'mended')
        raise ValueError('damaged')
    assert read_checked(tmp_path/'y', mended) is None and (tmp_path/'y').read_text(encoding='utf-8') == 'mended'


@pytest.mark.skipif(sys.platform != 'linux', reason='looks at /proc')
def test_what_a_killed_writer_left_is_swept_before_its_parent_has_missed_it(tmp_path):
    if not (pid := os.fork()): os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the list of processes
    (left := tmp_path/f'.x.{files._host}.{pid}.0.tmp').touch()
    (under_way := tmp_path/f'.x.{files._host}.{os.getpid()}.0.tmp').touch()
    files.sweep_temporaries(tmp_path)
    os.waitpid(pid, 0)
    assert not left.exists() and under_way.exists()


def elsewhere(code, **more):
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **more)


KILLED = """
import os, signal, sys
from pathlib import Path
from lico import config
from lico.evidence import store
import pandas as pd
n, replace, fsync, left = [0], os.replace, os.fsync, int(sys.argv[2])
def step(do):
    def wrapped(*a):
        for after in (False, True):
            if after: out = do(*a)
            if n[0] == left: os.kill(os.getpid(), signal.SIGKILL)
            n[0] += 1
        return out
    return wrapped
os.replace, os.fsync = step(replace), step(fsync)
rows = pd.DataFrame(dict(id=['a', 'b'], seed=[0, 1], accuracy_last=20.))
store.write_results(sys.argv[1], rows, pd.DataFrame(dict(id=['a', 'b'], image='1', insertion=2.)))
print(n[0])
"""


def test_results_and_scores_change_together_or_not_at_all(tmp_path):
    "A writer killed before and after each flush and each rename; in children that import once."
    first, images_first = (rows('a'), images('a'))
    state = lambda folder: (read_results(folder).accuracy_last.tolist(), read_scores(folder).insertion.tolist())
    old, new, seen = ([12.5], [1.25]), ([20., 20.], [2., 2.]), []
    for left in range(30):
        folder = tmp_path/str(left)
        write_results(folder, first, images_first)
        pid = os.fork()
        if not pid:
            sys.argv = ['', str(folder), str(left)]
            try: exec(KILLED, dict(__name__='killed'))
            finally: os._exit(0)
        killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
        seen.append(state(folder))
        assert seen[-1] in (old, new), left
        write_results(folder, rows('c'), images('c'), keep=True)
        found = {p.name for p in folder.iterdir()} - {'.lock'}
        assert found == {'results.csv', 'scores.csv', 'SHA256SUMS'}, 'nothing is left over'
        assert len(read_results(folder)) == len(seen[-1][0]) + 1 == len(read_scores(folder))
        if not killed: break
    assert left >= 16 and seen[0] == old and seen[-1] == new and seen == sorted(seen)


def test_synchronised_writers_lose_nothing(tmp_path):
    "Six processes that add at the same moment, and a reader that always sees whole tables."
    write_results(tmp_path, rows('start'), images('start'))
    go, children = tmp_path/'go', []
    for k in range(6):
        if not (pid := os.fork()):
            status = 1
            try:
                while not go.exists(): pass
                for i in range(4): write_results(tmp_path, rows(f'{k}-{i}'), images(f'{k}-{i}'), keep=True)
                status = 0
            finally: os._exit(status)
        children.append(pid)
    go.touch()
    for _ in range(50): assert 'start' in set(read_results(tmp_path).id) & set(read_scores(tmp_path).id)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0]*6
    assert len(read_results(tmp_path)) == len(read_scores(tmp_path)) == 25


def test_a_lock_without_flock(tmp_path, monkeypatch):
    "Some network drives and phones have none; filelock takes a file's existence instead, from 3.24 on."
    import errno, fcntl, re
    def missing(*a): raise OSError(errno.ENOSYS, 'Function not implemented')
    monkeypatch.setattr(fcntl, 'flock', missing)
    with pytest.warns(UserWarning, match='flock not supported'): write_results(tmp_path, rows('a'))
    assert read_results(tmp_path).id.tolist() == ['a']
    told = (Path(__file__).parents[1]/'pyproject.toml').read_text(encoding='utf-8')
    assert tuple(map(int, re.search(r'"filelock>=(\d+)\.(\d+)"', told).groups())) >= (3, 24)


@pytest.mark.parametrize('name', ['../outside.png', '/etc/passwd', 'a/../../x.png', r'..\x.png', r'C:\x.png'])
def test_labels_stay_below_their_folder(tmp_path, name):
    (tmp_path/'images').mkdir()
    pd.DataFrame(dict(file=['ok.png', name], class_index=[1, 2])).to_csv(tmp_path/'labels.csv', index=False)
    with pytest.raises(ValueError, match='leads out of its folder'): imagenet_cases(str(tmp_path), 1)


def test_no_record_of_what_is_not_finite(lico_root, monkeypatch):
    with pytest.raises(ValueError, match='option lr = inf'): replace(TINY, options=dict(lr=math.inf))
    fit = records.fit
    def breaks(model, *a, **k):
        log = fit(model, *a, **k)
        with torch.no_grad(): next(model.backbone.parameters()).fill_(math.nan)
        return log
    monkeypatch.setattr(records, 'fit', breaks)
    with pytest.raises(FloatingPointError, match='not finite after training .*no record is written'):
        run(TINY, progress=False)
    assert not list(runs_folder().glob('*/record.json')) and not list(runs_folder().glob('*/model.safetensors'))


@pytest.mark.parametrize('name', ['a b', "it's", 'say "hi"', '`touch executed`', '$(touch executed)', '$HOME', 'a\\b',
                                  '!!', "'\"`$(touch executed)`\"'", 'ä\n$(touch executed)'])
def test_commands_survive_a_shell(tmp_path, name):
    r = Run(dataset=f'folder:/x/{name}', labels=40)
    command = files.python_command(f'from lico.experiments import *; run({r!r})')
    (tmp_path/'python').write_text('#!/bin/sh\nprintf "%s\\n" "$@" > called\n', encoding='utf-8')
    (tmp_path/'python').chmod(0o755)
    env = dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}")
    subprocess.run(['bash', '-c', command], cwd=tmp_path, env=env, check=True)
    assert not (tmp_path/'executed').exists()
    option, code = os.fsdecode((tmp_path/'called').read_bytes()).rstrip('\n').split('\n', 1)
    assert option == '-c' and eval(code.split('run(', 1)[1][:-1]) == r


def test_a_record_stands_alone(tmp_path, lico_root):
    "The network, its class names and what its input must look like, with the images gone."
    import numpy as np
    from PIL import Image
    rng, folder = np.random.default_rng(0), tmp_path/'pets'
    for path in (folder/part/os.fsdecode(name.encode())/f'{i}.png' for part in ('train', 'test')
                 for name in ('cat', 'dög') for i in range(3)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 16, 3), np.uint8)).save(path)
    r = replace(TINY, dataset=f'folder:{folder}', labels=4, image_size=16)
    record, data = run(r, progress=False), load_data(r)
    net, picture = load_backbone(record), tmp_path/'picture.png'
    shutil.copy(folder/'test'/'cat'/'0.png', picture)
    with torch.no_grad(): expected = net(data.normalise(data.test.x[:1])).softmax(1)[0]
    shutil.rmtree(folder)
    assert same(load_backbone(record).state_dict(), net.state_dict())
    assert record['class_names'] == ['cat', 'dög'] and record['preprocessing']['mean'] == list(data.mean)
    ship(record, tmp_path/'shipped')
    shipped = load_network(tmp_path/'shipped')
    assert shipped.class_names == ('cat', 'dög') and shipped.preprocessing == record['preprocessing']
    with torch.no_grad(): found = shipped.net(shipped.prepare(Image.open(picture))[None]).softmax(1)[0]
    assert torch.equal(found, expected), 'also of an image that is not square'


def test_a_shipped_network_needs_no_lico(tmp_path):
    "Ten lines, in a process that cannot import lico; `torch.export` agrees; for everyone to read; no bit is trusted."
    from lico.backbones import create_backbone
    from lico.data import load
    from lico.shipping import preprocessing_of
    data, folder = load('digits'), tmp_path/"it's shipped"
    net = create_backbone('wrn_10_1', 10, 16).eval()
    old = os.umask(0o077)
    try: save_network(net.train(), folder, data.class_names, preprocessing_of(data), 'wrn_10_1')
    finally: os.umask(old)
    assert net.training and folder.stat().st_mode & 0o777 == 0o755
    assert {p.name for p in folder.iterdir()} == {
        'network.json', 'network.safetensors', 'network.pt2', 'preprocess.py', 'SHA256SUMS'}
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in folder.iterdir())
    net.eval()
    for n in (1, 3):
        x = data.normalise(data.test.x[:n])
        torch.testing.assert_close(torch.export.load(folder/'network.pt2').module()(x), net(x))
    assert same(load_network(folder).net.state_dict(), net.state_dict())
    from PIL import Image
    Image.fromarray(data.test.x[5].movedim(0, 2).numpy()).save(tmp_path/'five.png')
    lines = loading_lines(folder)
    assert len(lines.strip().splitlines()) == 10
    code = f"import sys; sys.modules['lico'] = None\n{lines}"
    code += f"print(json.dumps(classify({str(tmp_path/'five.png')!r})))"
    run_ = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run_.returncode == 0, run_.stderr
    with torch.no_grad(): p = net(data.normalise(data.test.x[5:6])).softmax(1)[0]
    torch.testing.assert_close(torch.tensor(list(json.loads(run_.stdout).values())), p)
    for name in ('network.json', 'network.safetensors', 'network.pt2', 'preprocess.py'):
        content = (folder/name).read_bytes()
        for i, changed in flips(content, 20):
            if i % 5: continue
            (folder/name).write_bytes(changed)
            with pytest.raises(ValueError, match=f'{name} is damaged'): load_network(folder)
        (folder/name).write_bytes(content)
    assert load_network(folder)


class Small(torch.nn.Module):
    "A classifier of images of 8 pixels that `torch.export` takes in a second."
    def __init__(self, give=lambda logits, x: logits):
        super().__init__()
        self.conv, self.fc, self.give = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 3), give

    def forward(self, x): return self.give(self.fc(self.conv(x).relu().mean((2, 3))), x)


def about(mean=0.5): return dict(window='whole_square', resize=8, interpolation='bicubic', crop=8, image_size=8,
                                 mean=[mean]*3, std=[0.25]*3)


def test_each_shipped_network_has_its_own_preprocessing(tmp_path, monkeypatch):
    "Also beside another one, in one and the same script, and beside somebody's own module of that name."
    from PIL import Image
    Image.new('RGB', (8, 8), 'red').save(tmp_path/'red.png')
    (tmp_path/'preprocess.py').write_text('preprocess = None', encoding='utf-8')
    monkeypatch.syspath_prepend(str(tmp_path))
    script, path = {}, list(sys.path)
    for mean in (0.1, 0.9):
        save_network(Small(), tmp_path/f'{mean}', ['a', 'b', str(mean)], about(mean))
        exec(loading_lines(tmp_path/f'{mean}'), script)
        script[mean] = script['classify']
    assert sys.path == path and 'preprocess' not in sys.modules
    for mean in (0.1, 0.9):
        shipped = load_network(tmp_path/f'{mean}')
        p = shipped.net(shipped.prepare(Image.open(tmp_path/'red.png'))[None]).softmax(1)[0].tolist()
        assert script[mean](tmp_path/'red.png') == pytest.approx(dict(zip(['a', 'b', str(mean)], p)), abs=1e-6)


def _partly_compiled(net):
    net.conv = torch.compile(net.conv)
    return net

def _compiled_in_place(net):
    net.compile()
    return net

def _adapted(net):
    from lico.backbones import adapt
    return adapt(net, 'conv', 3, 8)


@pytest.mark.parametrize('wrap', [_adapted, torch.nn.DataParallel, torch.compile, _compiled_in_place, _partly_compiled,
                                  lambda net: torch.compile(_adapted(net)), torch.nn.Module.half],
                         ids=['adapted', 'DataParallel', 'compiled', 'in place', 'partly', 'both', 'half'])
def test_a_network_is_shipped_however_it_is_wrapped(tmp_path, wrap):
    "For any number of images; the one that was given is left as it was."
    net = Small()
    save_network(wrap(net), tmp_path/'x', list('abc'), about())
    half, shipped, net = next(net.parameters()).dtype == torch.half, load_network(tmp_path/'x').net, net.float().eval()
    assert half == (wrap is torch.nn.Module.half)
    with torch.no_grad(), torch.compiler.set_stance('force_eager'):
        for n in (1, 3): torch.testing.assert_close(shipped(x := torch.rand(n, 3, 8, 8)), net(x))


def test_what_timm_builds_is_shipped_by_name_however_it_is_wrapped(tmp_path, monkeypatch):
    from lico import shipping
    from lico.backbones import create_backbone
    monkeypatch.setattr(shipping, '_exported', lambda *args: b'')
    net = create_backbone('resnet18', 3, 32, output_stride=16)
    state = net.state_dict()
    net.layer1 = torch.compile(net.layer1)
    save_network(torch.nn.DataParallel(net), tmp_path, list('abc'), about() | dict(image_size=32), 'resnet18')
    shipped = load_network(tmp_path)
    assert same(shipped.net.state_dict(), state) and shipped.net.feature_shape == net.feature_shape
    assert hasattr(net.layer1, '_orig_mod'), 'left as it was'


@pytest.mark.parametrize('fault', ['network', 'window', 'full'])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, fault):
    folder, good = tmp_path/'x', Small()
    save_network(good, folder, list('abc'), about())
    held = {p.name: p.read_bytes() for p in folder.iterdir()}
    bad, what = Small(), about()
    if fault == 'network': bad = Small(lambda logits, x: logits if x.mean().item() > 0 else -logits)
    if fault == 'window': what |= dict(window='none')
    if fault == 'full':
        write = files.write_atomic
        def full(path, data):
            if path.name.startswith('.preprocess'): raise OSError('full')
            write(path, data)
        monkeypatch.setattr(files, 'write_atomic', full)
    with pytest.raises((ValueError, AttributeError, OSError)): save_network(bad, folder, list('abc'), what)
    assert {k: (folder/k).read_bytes() for k in held} == held
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(load_network(folder).net(x), good(x))
    monkeypatch.undo()
    save_network(Small(), folder, list('abc'), about())
    assert {p.name for p in folder.iterdir()} == held.keys()


@pytest.mark.parametrize('names, give, found', [
    ('ab', lambda logits, x: logits, r'\[2, 3\] for 2 images, and 2 different class names need \[2, 2\]'),
    ('abcd', lambda logits, x: logits, r'\[2, 3\] for 2 images, and 4 different'),
    ('aba', lambda logits, x: logits, r'\[2, 3\] for 2 images, and 2 different'),
    ('abc', lambda logits, x: logits[0], r'\[3\] for 2 images'),
    ('abc', lambda logits, x: dict(l=logits), 'gives dict')])
def test_each_output_has_a_class_name(tmp_path, names, give, found):
    with pytest.raises(ValueError, match=f'Small gives {found}' if found[0] != 'g' else f'Small {found}'):
        save_network(Small(give), tmp_path/'x', list(names), about())
    assert not (tmp_path/'x').exists(), 'nothing was written'


@pytest.mark.parametrize('mode', [0o2775, 0o700])
def test_a_folder_that_was_there_keeps_its_mode(tmp_path, mode):
    "Its files are for everyone to read, and for the group to write where the umask says so."
    tmp_path.chmod(mode)
    old = os.umask(0o002)
    try: save_network(Small(), tmp_path, list('abc'), about())
    finally: os.umask(old)
    assert tmp_path.stat().st_mode & 0o7777 == mode
    assert {p.stat().st_mode & 0o7777 for p in tmp_path.iterdir()} == {0o664}


@pytest.mark.parametrize('renamed', range(4))
def test_a_network_is_whole_after_a_kill_while_it_was_replaced(tmp_path, monkeypatch, renamed):
    "What was decided on is read, wherever the renaming had got to; the next one to ship puts all in place."
    save_network(Small(), tmp_path, list('abc'), about())
    rename, left = os.replace, [renamed]
    def killed(a, b):
        if str(a).endswith('.new') and not left[0]: raise KeyboardInterrupt
        left[0] -= str(a).endswith('.new')
        rename(a, b)
    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt): save_network(Small(), tmp_path, list('abd'), about())
    monkeypatch.undo()
    assert load_network(tmp_path).class_names == tuple('abd')
    save_network(Small(), tmp_path, list('xyz'), about())
    assert load_network(tmp_path).class_names == tuple('xyz') and not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('more, says', [
    (dict(mean=torch.tensor([.5]*3)), 'preprocessing holds what JSON cannot'),
    (dict(window='reason'), 'preprocessing lacks')])
def test_preprocessing_that_nobody_could_read_again_is_refused(tmp_path, more, says):
    with pytest.raises(ValueError, match=says): save_network(Small(), tmp_path/'x', list('abc'), about() | more)
    assert not (tmp_path/'x').exists()
    (tmp_path/'file').touch()
    with pytest.raises(OSError, match='cannot write .*file/sub'):
        save_network(Small(), tmp_path/'file'/'sub', list('abc'), about())
