"Several processes that share a batch do what one does; and none outlives the one that started it."
import json, os, re, signal, subprocess, sys, textwrap, time
from dataclasses import replace
from pathlib import Path

import pandas as pd, pytest, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lico import training, watch
from lico.batches import training_batch
from lico.experiments import Run, load_data, runs_folder, start
from lico.records import read_record, run
from lico.together import Batch, group_size, is_first, share
from lico.training import fit
from lico.shipping import load_checkpoint
from group import in_group, one_layer

BIN = os.path.dirname(sys.executable)
TINY = Run(labels=40, backbone='wrn_10_1', steps=2)
pytestmark = [pytest.mark.filterwarnings('ignore::lico.watch.InactiveMatchingWarning'),
              pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')]


METHODS = [('CE', 'paper'), *(('LICO', preset) for preset in ('paper', 'released', 'repaired', 'semantic')),
           *((method, 'paper') for method in ('CE+MM', 'CE+OT', 'CGC', 'GCC', 'CE+LS', 'CE+SupCon')),
           ('LICO+CGC', 'repaired')]


def step(model, x, y):
    "Loss, diagnostics, gradients and statistics of one batch, of which this process takes its share."
    net = DistributedDataParallel(model, find_unused_parameters=True) if group_size() > 1 else model
    torch.manual_seed(5)
    out = net(x[share()], y[share()])
    out.loss.backward()
    terms = {k: v.detach() for k, v in dict(loss=out.loss, ce=out.ce, mm=out.mm, ot=out.ot, **out.stats).items()}
    return dict(terms=terms, logits=Batch(y[share()]).whole(out.logits.detach()),
                gradients={k: p.grad for k, p in model.named_parameters() if p.grad is not None},
                buffers={k: b for k, b in model.named_buffers() if 'running' in k or k.startswith('tau')})


def compare(expected, found, rtol=1e-9):
    "All terms, and the gradients as one vector."
    for what in ('terms', 'buffers'):
        torch.testing.assert_close(found[what], expected[what], rtol=rtol, atol=rtol, equal_nan=True)
    torch.testing.assert_close(found['logits'], expected['logits'], rtol=rtol, atol=rtol)
    a, b = expected['gradients'], found['gradients']
    assert a.keys() == b.keys()
    distance = sum((a[k] - b[k]).square().sum() for k in a)/sum(g.square().sum() for g in a.values())
    assert distance.sqrt() < rtol


def of_method(method, preset, n, dtype):
    r = replace(TINY, method=method, preset=preset, options=dict(n_context=3))
    data = load_data(r)
    x, y = training_batch(data, torch.arange(n), torch.Generator().manual_seed(0))
    return step(start(r, data, one_layer(dtype)).to(dtype), x.to(dtype), y)


@pytest.mark.parametrize('k, n', [(2, 21), pytest.param(3, 22, marks=pytest.mark.slow)])
def test_several_processes_have_the_gradients_of_one(tmp_path, k, n):
    "Of every method, with batch normalisation and uneven shares; in float64, where no rectifier is at its kink."
    def work(): return [of_method(*m, n, torch.float64) for m in METHODS]
    expected = work()
    for found in in_group(k, work, tmp_path):
        for a, b in zip(expected, found): compare(a, b)


def test_in_float32(tmp_path):
    def work(): return [of_method(*m, 21, torch.float32) for m in METHODS[:1] + METHODS[3:4]]
    expected = work()
    for a, b in zip(expected, in_group(2, work, tmp_path)[1]): compare(a, b, rtol=1e-5)


class Drawing(nn.Module):
    "A network that normalises, drops, and skips."
    num_classes, feature_shape, image_size = 10, (8, 16), 16

    def __init__(self):
        super().__init__()
        from timm.layers import BatchNormAct2d, DropPath
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), BatchNormAct2d(8), nn.Dropout2d(0.3), nn.Conv2d(8, 8, 1))
        self.skip, self.norm = DropPath(0.5), nn.BatchNorm1d(8, affine=False)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 10)

    def forward_features(self, x):
        maps = self.body(x)
        return maps + self.skip(maps.tanh())

    def forward_head(self, maps, pre_logits=False): return self.fc(self.drop(self.norm(maps.mean((2, 3)))))
    def forward(self, x): return self.forward_head(self.forward_features(x))


def test_what_is_drawn_is_drawn_for_the_whole_batch(tmp_path):
    from lico.model import CrossEntropy
    def work():
        torch.manual_seed(0)
        model = CrossEntropy(Drawing()).double()
        return step(model, torch.randn(11, 3, 16, 16, dtype=torch.float64), torch.arange(11) % 10)
    expected = work()
    for found in in_group(3, work, tmp_path): compare(expected, found)


def test_shares_that_are_none_are_refused(tmp_path):
    def work():
        with pytest.raises(ValueError, match='process . of 2 has [13] of 4 images: expected every process to take'):
            Batch(torch.zeros(3 if is_first() else 1))
        assert Batch(torch.zeros(3), training=False).n == 3, 'outside training nobody waits for the others'
    in_group(2, work, tmp_path)


FIT = replace(TINY, labels=100, method='LICO', preset='repaired', steps=8,
              options=dict(batch_size=32, dropout=0.5, n_context=3))


@pytest.fixture
def doubled(monkeypatch):
    "Batches in float64."
    def train(*args, batches=training.training_batches): return ((x.double(), y) for x, y in batches(*args))
    def test(*args, batches=training.test_batches): return (x.double() for x in batches(*args))
    monkeypatch.setattr(training, 'training_batches', train)
    for module in (training, watch): monkeypatch.setattr(module, 'test_batches', test)


def trained(folder):
    data = load_data(FIT)
    data = replace(data, test=data.test[:60])
    model = start(FIT, data, one_layer(torch.float64)).double()
    log = fit(model, data, steps=8, evaluations=2, batch_size=32, ema=0.9, noise=0.1, lr=0.01, folder=folder,
              progress=False)
    return dict(log=[{k: v for k, v in row.items() if k != 'seconds'} for row in log],
                weights={k: v for k, v in model.state_dict().items() if v.is_floating_point()})


def test_fit_in_several_processes(tmp_path, doubled):
    "Weights and the whole log: with noise, averaged weights, a last batch of four images, tests."
    (tmp_path/'one').mkdir(), (tmp_path/'group').mkdir()
    expected = trained(tmp_path/'one')
    for found in in_group(3, lambda: trained(tmp_path/'group'), tmp_path):
        assert [r.keys() for r in found['log']] == [r.keys() for r in expected['log']]
        for a, b in zip(expected['log'], found['log']):
            for key in a: assert a[key] == pytest.approx(b[key], rel=1e-5), key
        for key, w in expected['weights'].items(): torch.testing.assert_close(found['weights'][key], w, rtol=1e-5,
                                                                              atol=1e-6)
    one, group = (load_checkpoint(tmp_path/name/'checkpoint.safetensors') for name in ('one', 'group'))
    assert torch.equal(one[0]['predicted'], group[0]['predicted']) and group[1]['run']['processes'] == 3
    with pytest.raises(ValueError, match=r'differs in processes \(3 there, 1 here\)'): trained(tmp_path/'group')


def test_run_in_several_processes(lico_root):
    "The first holds the lock and writes; the others follow, also where nothing is to do."
    one = run(TINY, progress=False)
    (lico_root/'group').mkdir()
    os.environ['LICO_ROOT'] = str(lico_root/'group')
    def work():
        training.hardware = lambda where: f'machine {share().start or 0}'
        return [run(TINY, progress=False) for _ in range(2)]
    (a, b), (c, d) = in_group(2, work, lico_root)
    assert a == b == c == d and a['stamp']['processes'] == 2 and one['stamp']['processes'] == 1
    assert a['stamp']['hardware'] == 'machine 0 and machine 1'
    assert a['id'] == one['id'] and a['ce'] == pytest.approx(one['ce'], rel=1e-4)
    assert read_record(runs_folder()/a['id']) and not list(lico_root.rglob('*.tmp'))


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    code = f'print(sweep([{TINY!r}, {replace(TINY, seed=1)!r}], progress=False)[1]["stamp"])'
    (tmp_path/'sweep.py').write_text(f'from lico.experiments import *\n{code}', encoding='utf-8')
    p = subprocess.run([f'{BIN}/accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--main_process_port',
                        '0', 'sweep.py'], cwd=tmp_path, env={**os.environ, 'LICO_ROOT': str(tmp_path)},
                       capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    assert p.stdout.count("'processes': 2") == 2 and len(list(tmp_path.glob('data/runs/*/record.json'))) == 2


@pytest.mark.slow
@pytest.mark.parametrize('which', ['accelerate', 'papermill'])
def test_documented_commands_of_the_large_tables(tmp_path, which):
    "As the guide gives them, for two processes on this machine."
    top = Path(__file__).parents[1]
    if which == 'papermill': pytest.importorskip('submitit')
    command = re.search(rf'^{which} .*$', (top/'nbs'/'guide'/'works.md').read_text(encoding='utf-8'), re.M)[0]
    for there, here in (('profile paper', 'profile smoke'),
                        ('num_processes 4', 'num_processes 2 --main_process_port 0'),
                        ('slurm: slurm_partition=gpu, gpus_per_node=4, tasks_per_node=4', 'local: tasks_per_node=2')):
        command = command.replace(there, here)
    p = subprocess.run(['bash', '-c', command], cwd=top, capture_output=True, text=True, timeout=1200, env={
        **os.environ, 'LICO_ROOT': str(tmp_path), 'PATH': f"{BIN}:{os.environ['PATH']}"})
    assert p.returncode == 0, p.stderr[-3000:]
    records = [json.loads(o.read_text(encoding='utf-8')) for o in tmp_path.glob('data/runs/*/record.json')]
    assert [r['stamp']['processes'] for r in records] == [2]*4
    assert len(pd.read_csv(tmp_path/'data'/'smoke'/'table2'/'results.csv')) == 4


def alive(pids): return [p for p in pids if os.path.exists(f'/proc/{p}') and 'Z' not in
                         open(f'/proc/{p}/stat', encoding='utf-8').read().rpartition(')')[2][:3]]


def gone(pids, seconds=20):
    "Whether all of these processes end in time."
    until = time.time() + seconds
    while alive(pids) and time.time() < until: time.sleep(0.2)
    return not alive(pids)


def children(pid):
    "All that a process has started, and what these have."
    found = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()
    return [int(p) for p in found] + [q for p in found for q in children(p)]


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    code = textwrap.dedent('''
        import os, time
        from lico.together import Workers
        if __name__ == '__main__':
            with Workers(2) as pool:
                jobs = [pool.submit(time.sleep, 1) for _ in range(2)]
                for job in jobs: job.result()
                jobs = [pool.submit(time.sleep, 1000) for _ in range(2)]
                print('there', flush=True)
                jobs[0].result()
    ''')
    (tmp_path/'parent.py').write_text(code, encoding='utf-8')
    p = subprocess.Popen([sys.executable, tmp_path/'parent.py'], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'there\n'
    left = children(p.pid)
    assert len(left) >= 2
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert gone(left) and p.stdout.read() == '', 'nobody holds its output open'


@pytest.mark.slow
@pytest.mark.parametrize('which', ['kernel', 'papermill'])
def test_a_killed_notebook_leaves_nothing(tmp_path, which):
    "Neither papermill nor who reads its output waits for ever."
    import nbformat
    code = textwrap.dedent('''
        import os, time
        from lico.evidence.store import processes
        with processes(2) as pool:
            jobs = [pool.submit(os.getpid) for _ in range(4)]
            open('pids', 'w').write(f"{os.getpid()} {[job.result() for job in jobs]}")
            pool.submit(time.sleep, 1000).result()
    ''')
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=dict(
        kernelspec=dict(name='python3', display_name='python3')))
    nbformat.write(notebook, tmp_path/'pool.ipynb')
    p = subprocess.Popen([f'{BIN}/papermill', 'pool.ipynb', 'out.ipynb'], cwd=tmp_path, stderr=subprocess.PIPE,
                         text=True)
    while not (tmp_path/'pids').exists() or not (text := (tmp_path/'pids').read_text(encoding='utf-8')): time.sleep(0.2)
    left = children(p.pid)
    assert int(text.split()[0]) in left and len(left) >= 3
    os.kill(int(text.split()[0]) if which == 'kernel' else p.pid, signal.SIGKILL)
    said = p.communicate(timeout=200)[1]
    assert gone(left) and ('DeadKernelError' in said if which == 'kernel' else p.returncode == -signal.SIGKILL)


# submitit's executor on this machine: jobs outlive who submitted them, and are stopped when their time is up
LONG = replace(TINY, steps=60)
JOB = textwrap.dedent('''
    import functools, os, runpy, sys, time
    from lico import records, training
    records.fit = functools.partial(training.fit, checkpoint_seconds=0)
    advance = training._advance
    def told(t, *batch):
        with open('steps', 'a') as f: f.write(f'{os.getpid()} {t.seed} {t.step}\\n')
        time.sleep(0.3)
        return advance(t, *batch)
    training._advance = told
    sys.argv = ['_submit', sys.argv[-1]]
    runpy.run_module('submitit.core._submit', run_name='__main__', alter_sys=True)
''')
SUBMIT = textwrap.dedent('''
    import sys
    from submitit import LocalExecutor
    from lico.experiments import *
    executor = LocalExecutor('jobs', max_num_timeout=20, python=f'{{sys.executable}} job.py')
    executor.update_parameters(timeout_min=60)
    print(sweep([{run!r}, {run!r}.__class__(**{{**vars({run!r}), 'seed': 1}})], progress=False, executor=executor))
''')


class Cluster:
    "A folder with runs that are submitted there, and every step that was done."
    def __init__(self, folder):
        self.folder = folder
        (folder/'job.py').write_text(JOB, encoding='utf-8')
        (folder/'submit.py').write_text(SUBMIT.format(run=LONG), encoding='utf-8')

    def submit(self):
        return subprocess.Popen([sys.executable, 'submit.py'], cwd=self.folder, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, 'LICO_ROOT': str(self.folder)})

    def steps(self, seed=0):
        path = self.folder/'steps'
        lines = [tuple(map(int, o.split()))
                 for o in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []
        return [(pid, step) for pid, s, step in lines if s == seed]

    def wait(self, n):
        while len(self.steps()) < n: time.sleep(0.2)

    def records(self):
        out = [json.loads(p.read_text(encoding='utf-8')) for p in self.folder.glob('data/runs/*/record.json')]
        return {r['run']['seed']: {k: r[k] for k in ('ce', 'accuracy_last', 'cosine')} for r in out}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp('reference')
    code = f'from lico.experiments import *\nsweep([{LONG!r}, {replace(LONG, seed=1)!r}], progress=False)'
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'LICO_ROOT': str(folder)})
    return Cluster(folder).records()


@pytest.fixture
def cluster(tmp_path):
    pytest.importorskip('submitit')
    return Cluster(tmp_path)


@pytest.mark.slow
def test_a_job_goes_on_after_its_time_limit(cluster, reference):
    "Twice; it gets the signal that submitit sends a little before."
    p = cluster.submit()
    for n in (10, 25):
        cluster.wait(n)
        before = cluster.steps()[-1][0]
        os.kill(before, signal.SIGUSR2)
        while cluster.steps()[-1][0] == before: time.sleep(0.2)
    assert p.communicate(timeout=1200) and p.returncode == 0
    pids, steps = zip(*cluster.steps())
    assert len(set(pids)) == 3 and set(steps) == set(range(60)) and len(steps) <= 62 and steps.count(0) == 1
    assert cluster.records() == reference


@pytest.mark.slow
def test_a_killed_job_is_begun_again(cluster, reference):
    p = cluster.submit()
    cluster.wait(10)
    os.kill(cluster.steps()[-1][0], signal.SIGKILL)
    assert 'begun again, 1 more times at most' in p.communicate(timeout=1200)[1] and p.returncode == 0
    assert len({pid for pid, _ in cluster.steps()}) == 2 and len(cluster.steps()) <= 61
    assert cluster.records() == reference


@pytest.mark.slow
def test_another_submitter_joins_what_is_under_way(cluster, reference):
    p = cluster.submit()
    cluster.wait(10)
    p.send_signal(signal.SIGKILL)
    assert cluster.submit().communicate(timeout=1200)
    for seed in (0, 1): assert [step for _, step in cluster.steps(seed)] == list(range(60)), 'each step once'
    assert cluster.records() == reference
