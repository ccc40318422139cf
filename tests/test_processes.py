"Several processes that share a batch do what one does; and none outlives the one that started it."
import json, os, signal, socket, subprocess, sys, textwrap, time, traceback
from dataclasses import replace
from multiprocessing import get_context

import pandas as pd, pytest, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lico.data import training_batch
from lico.experiments import Run, load_data, read_record, run, runs_folder, start
from lico.text import load_text_encoder
from lico.together import Batch, group_size, is_first, join_group, share
from lico.training import fit, load_checkpoint

BIN = os.path.dirname(sys.executable)
TINY = Run(labels=40, backbone='wrn_10_1', steps=2)
pytestmark = [pytest.mark.filterwarnings('ignore::lico.watch.InactiveMatchingWarning'),
              pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _member(rank, k, port, work, out):
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(True)  # of the process that was forked
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(k), LOCAL_WORLD_SIZE=str(k),
                       MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    try:
        join_group()
        torch.save(work(), f'{out}/{rank}.pt')
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_group(k, work, out):
    "What `work` gives in each of k processes."
    members = [get_context('fork').Process(target=_member, args=(i, k, port, work, out)) for port in [free_port()]
               for i in range(k)]
    for p in members: p.start()
    for p in members: p.join(200)
    assert [p.exitcode for p in members] == [0]*k
    return [torch.load(f'{out}/{i}.pt') for i in range(k)]


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
    r = replace(TINY, labels=100, method=method, preset=preset)
    data = load_data(r)
    x, y = training_batch(data, torch.arange(n), torch.Generator().manual_seed(0))
    return step(start(r, data, load_text_encoder('minilm')).to(dtype), x.to(dtype), y)


@pytest.mark.parametrize('k, n', [(2, 31), (3, 32)])
def test_several_processes_have_the_gradients_of_one(tmp_path, k, n):
    "Of every method, with batch normalisation and uneven shares; in float64, where no rectifier is at its kink."
    def work(): return [of_method(*m, n, torch.float64) for m in METHODS]
    expected = work()
    for found in in_group(k, work, tmp_path):
        for a, b in zip(expected, found): compare(a, b)


def test_in_float32(tmp_path):
    def work(): return [of_method(*m, 31, torch.float32) for m in METHODS[:1] + METHODS[3:4]]
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


FIT = replace(TINY, labels=100, method='LICO', preset='repaired', steps=8, options=dict(batch_size=32, alpha=0.3))


def trained(folder):
    data = load_data(FIT)
    model = start(FIT, data, load_text_encoder('minilm')).double()
    data.mean, data.std = data.mean.double(), data.std.double()
    log = fit(model, data, steps=8, evaluations=2, batch_size=32, ema=0.9, noise=0.1, lr=0.01, folder=folder,
              progress=False)
    return dict(log=[{k: v for k, v in row.items() if k != 'seconds'} for row in log],
                weights={k: v for k, v in model.state_dict().items() if v.is_floating_point()})


@pytest.mark.parametrize('k', [2, 3])
def test_fit_in_several_processes(tmp_path, k):
    "Weights and the whole log: with noise, averaged weights, a last batch of four images, tests."
    (tmp_path/'one').mkdir(), (tmp_path/'group').mkdir()
    expected = trained(tmp_path/'one')
    for found in in_group(k, lambda: trained(tmp_path/'group'), tmp_path):
        assert [r.keys() for r in found['log']] == [r.keys() for r in expected['log']]
        for a, b in zip(expected['log'], found['log']):
            for key in a: assert a[key] == pytest.approx(b[key], rel=1e-5), key
        for key, w in expected['weights'].items(): torch.testing.assert_close(found['weights'][key], w, rtol=1e-5,
                                                                              atol=1e-6)
    one, group = (load_checkpoint(tmp_path/name/'checkpoint.safetensors') for name in ('one', 'group'))
    assert torch.equal(one[0]['predicted'], group[0]['predicted']) and group[1]['run']['processes'] == k
    with pytest.raises(ValueError, match=fr'differs in processes \({k} there, 1 here\)'): trained(tmp_path/'group')


def test_run_in_several_processes(lico_root):
    "The first holds the lock and writes; the others follow, also where nothing is to do."
    one = run(TINY, progress=False)
    (lico_root/'group').mkdir()
    os.environ['LICO_ROOT'] = str(lico_root/'group')
    def work(): return [run(TINY, progress=False) for _ in range(2)]
    (a, b), (c, d) = in_group(2, work, lico_root)
    assert a == b == c == d and a['stamp']['processes'] == 2 and one['stamp']['processes'] == 1
    assert a['id'] == one['id'] and a['ce'] == pytest.approx(one['ce'], rel=1e-4)
    assert read_record(runs_folder()/a['id']) and not list(lico_root.rglob('*.tmp'))


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    (tmp_path/'sweep.py').write_text(f'from lico.experiments import *\n'
                                     f'print(sweep([{TINY!r}, {replace(TINY, seed=1)!r}], progress=False)[1]["stamp"])')
    p = subprocess.run([f'{BIN}/accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--main_process_port', '0',
                        'sweep.py'], cwd=tmp_path, env={**os.environ, 'LICO_ROOT': str(tmp_path)}, capture_output=True,
                       text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    assert p.stdout.count("'processes': 2") == 2 and len(list(tmp_path.glob('data/runs/*/record.json'))) == 2
