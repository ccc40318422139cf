import os, signal, subprocess, sys, textwrap, warnings
from dataclasses import replace

import pandas as pd, pytest, torch

from lico.backbones import create_backbone
from lico.data import load
from lico.experiments import Run, build, load_data, read_record, run, run_id, runs_folder
from lico.losses import LossOptions
from lico.model import LICO, CrossEntropy
from lico.text import PromptLearner, load_text_encoder
from lico.training import fit, load_checkpoint
from lico.watch import InactiveMatchingWarning

RUN = Run(labels=250, backbone='wrn_10_1', method='LICO', steps=14, evaluations=3,
          options=dict(ema=0.9, noise=0.1, dropout=0.5, tau_init=0.3))

CHILD = textwrap.dedent('''
    import os, sys, warnings
    from functools import partial
    from lico import experiments, training
    from lico.experiments import Run, run
    warnings.simplefilter('ignore')
    torch = training.torch; torch.set_num_threads(1)
    experiments.fit = partial(training.fit, checkpoint_seconds=0)
    advance = training._advance
    def told(t, *batch):
        print('step', t.step, t.per_epoch, flush=True)
        return advance(t, *batch)
    training._advance = told
    run({run!r}, progress=False)
''')


def child(root, r):
    return subprocess.Popen([sys.executable, '-c', CHILD.format(run=r)], env={**os.environ, 'LICO_ROOT': str(root)},
                            stdout=subprocess.PIPE, text=True)


def outcome(root, monkeypatch):
    monkeypatch.setenv('LICO_ROOT', str(root))
    folder = runs_folder()/run_id(RUN)
    record = read_record(folder)
    weights = {f: load_checkpoint(folder/f)[0] for f in ('model.safetensors', 'predictions.safetensors')}
    log = pd.read_csv(folder/'log.csv').drop(columns='seconds')
    return {k: v for k, v in record.items() if k not in ('seconds', 'finished', 'checksum')}, weights, log


def test_killed_in_mid_epoch_ends_the_same(tmp_path, monkeypatch):
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    whole.mkdir(), killed.mkdir()
    assert child(whole, RUN).communicate()[0].count("step") == RUN.steps
    p = child(killed, RUN)
    for line in p.stdout:
        step, per_epoch = map(int, line.split()[1:])
        if step >= per_epoch and step % per_epoch == 2: break      # the second step of the second epoch
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    monkeypatch.setenv('LICO_ROOT', str(killed))
    assert (load_checkpoint(runs_folder()/run_id(RUN)/'checkpoint.safetensors')[1]['step']
            == per_epoch), 'an epoch was saved, half of the next was lost'
    p = child(killed, RUN)
    assert p.stdout.readline().split() == ['step', str(per_epoch), str(per_epoch)], 'goes on from the checkpoint'
    p.stdout.read(), p.wait()
    (r1, w1, l1), (r2, w2, l2) = outcome(whole, monkeypatch), outcome(killed, monkeypatch)
    assert r1 == r2
    pd.testing.assert_frame_equal(l1, l2, check_exact=True)
    for f in w1:
        assert w1[f].keys() == w2[f].keys()
        for k in w1[f]: assert torch.equal(w1[f][k], w2[f][k]), k


def test_two_processes_do_one_run_once(tmp_path):
    first, second = child(tmp_path, RUN), child(tmp_path, RUN)
    steps = [p.communicate()[0].count('step') for p in (first, second)]
    assert first.returncode == second.returncode == 0 and sorted(steps) == [0, 14]


def test_full_disk_while_training(tmp_path):
    "The last line is one sentence, the exit status is not zero, and the checkpoint from before is whole."
    full = CHILD.replace('run({run!r}', textwrap.dedent('''
        import errno
        from lico import config
        fsync, written = os.fsync, []
        def full(fd):
            written.append(fd)
            if len(written) > 2: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(fd)
        os.fsync = full
        run({run!r}'''))
    p = subprocess.run([sys.executable, '-c', full.format(run=RUN)], env={**os.environ, 'LICO_ROOT': str(tmp_path)},
                       capture_output=True, text=True)
    assert p.returncode != 0
    assert (p.stderr.strip().splitlines()[-1].startswith('OSError: cannot write ')
            and 'make room there and start again' in p.stderr.strip().splitlines()[-1])
    [checkpoint] = tmp_path.glob('data/runs/*/checkpoint.safetensors')
    assert load_checkpoint(checkpoint)[1]['step'] == 4 and not list(tmp_path.rglob('*.tmp'))


def test_damaged_checkpoint_is_set_aside(tmp_path):
    data = load('digits', labels=40)
    model = CrossEntropy(create_backbone('wrn_10_1', num_classes=10, image_size=16))
    (tmp_path/'checkpoint.safetensors').write_bytes(b'not a checkpoint')
    with pytest.warns(RuntimeWarning, match='is damaged'): fit(model, data, steps=1, folder=tmp_path, progress=False)
    assert (len(list(tmp_path.glob('checkpoint.safetensors.damaged-*'))) == 1
            and load_checkpoint(tmp_path/'checkpoint.safetensors')[1]['step'] == 1)


def test_fit_leaves_the_random_state(tmp_path):
    data, model = load('digits', labels=40), CrossEntropy(create_backbone('wrn_10_1', num_classes=10, image_size=16))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(model, data, steps=2, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_pairs_share_weights_and_batches(monkeypatch):
    "CE and LICO of one seed start from the same backbone and see the same crops; another seed does not."
    import lico.training as training
    runs = [replace(RUN, method=m, seed=s) for m, s in (('CE', 0), ('LICO', 0), ('CE', 1))]
    data, encoder = load_data(RUN), load_text_encoder('minilm')
    models = [build(r, data, encoder) for r in runs]
    states = [torch.cat([p.flatten() for p in m.backbone.parameters()]) for m in models]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    seen = []
    def spied(*args):
        for x, y in batches(*args):
            seen.append(x)
            yield x, torch.zeros_like(y)
    batches = training.training_batches
    monkeypatch.setattr(training, 'training_batches', spied)
    for m, r in zip(models, runs): fit(m, data, steps=2, seed=r.seed, progress=False)
    assert torch.equal(seen[1], seen[3]) and not torch.equal(seen[1], seen[5])


def test_learning_on_real_digits():
    "A hundred and twenty updates on 250 real digits: far above chance, and the loss has fallen."
    data = load('digits', labels=250)
    torch.manual_seed(0)
    log = fit(CrossEntropy(create_backbone('wrn_10_1', num_classes=10, image_size=16)), data, steps=120, progress=False)
    assert log[-1]['test_accuracy'] > 60 and log[-1]['ce'] < 0.6*log[0]['ce']


@pytest.mark.parametrize('options, kind', [(dict(tau_init=1e6, tau='fixed'), 'uniform'), (
    dict(tau_init=0.3, tau='fixed', mm_text='raw', mm_rows='class', mm_features='pooled', alpha=1.), None)])
def test_degenerate_warning(options, kind):
    data = load('digits', labels=40)
    torch.manual_seed(0)
    model = LICO(create_backbone('wrn_10_1', num_classes=10, image_size=16),
                 PromptLearner(load_text_encoder('minilm'), data.class_names), LossOptions(**options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', InactiveMatchingWarning)
        log = fit(model, data, steps=3, progress=False)
    caught = [w for w in caught if w.category is InactiveMatchingWarning]
    assert len(caught) == (kind is not None) and all(row.get('inactive') == kind for row in log)


def test_released_preset_trains(lico_root):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        record = run(Run(labels=40, backbone='wrn_10_1', method='LICO', preset='released', steps=3), progress=False)
    assert (record['spec']['train']['batch_size'] == 128 and record['spec']['losses']['ot_grad'] == 'none'
            and record['mm'] > 0)


def test_several_processes(tmp_path):
    "Two processes over gloo end with equal weights and log what one process logs of the first batch."
    code = textwrap.dedent('''
        import sys, torch
        from lico.backbones import create_backbone; from lico.data import load; from lico.model import LICO
        from lico.text import PromptLearner, load_text_encoder; from lico.training import fit
        import warnings; warnings.simplefilter('ignore')
        torch.manual_seed(0); torch.set_num_threads(1)
        data = load('digits', labels=40)
        net = create_backbone('wrn_10_1', num_classes=10, image_size=16)
        model = LICO(net, PromptLearner(load_text_encoder('minilm'), data.class_names))
        fit(model, data, steps=3, folder=sys.argv[1], progress=False)
        rank = torch.distributed.get_rank()
        torch.save({k: v for k, v in model.named_parameters() if v.requires_grad}, f'{sys.argv[1]}/{rank}.pt')
    ''')
    (tmp_path/'child.py').write_text(code)
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone',
                        str(tmp_path/'child.py'), str(tmp_path)],
                       env={**os.environ, 'ACCELERATE_USE_CPU': 'true'}, capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-2000:]
    a, b = (torch.load(tmp_path/f'{i}.pt') for i in (0, 1))
    assert a.keys() == b.keys() and len(a) > 20
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=0)
    assert load_checkpoint(tmp_path/'checkpoint.safetensors')[1]['step'] == 3


def test_nothing_is_left_at_inference():
    from torch.utils.flop_counter import FlopCounterMode
    data = load('digits', labels=40)
    costs = []
    for method in ('CE', 'LICO'):
        net = build(Run(backbone='wrn_10_1', method=method), data, load_text_encoder('minilm')).backbone.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad(): net(data.normalise(data.test.x[:2]))
        costs.append((sum(p.numel() for p in net.parameters()), counter.get_total_flops()))
    assert costs[0] == costs[1] and costs[0][1] > 0
