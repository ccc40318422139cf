import math, os, signal, subprocess, sys, textwrap, warnings
from dataclasses import replace
from multiprocessing import get_context

import pandas as pd, pytest, torch

from lico import copies, batches, training
from lico.backbones import create_backbone
from lico.data import load
from lico.experiments import Run, build, load_data, run_id, runs_folder, spec
from lico.records import read_record, run
from lico.losses import LossOptions
from lico.model import LICO, CrossEntropy
from lico.text import PromptLearner, load_text_encoder
from lico.training import fit
from lico.shipping import load_checkpoint
from lico.watch import InactiveMatchingWarning

RUN = Run(labels=250, backbone='wrn_10_1', method='LICO', steps=14, evaluations=3,
          options=dict(ema=0.9, noise=0.1, dropout=0.5, tau_init=0.3))

CHILD = textwrap.dedent('''
    import os, sys, warnings
    from functools import partial
    from lico import records, training
    from lico.experiments import Run, run
    warnings.simplefilter('ignore')
    torch = training.torch; torch.set_num_threads(1)
    records.fit = partial(training.fit, checkpoint_seconds=0)
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


@pytest.mark.slow
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


def counted(queue):
    "A run in a process of its own, and how many steps it trained there."
    steps, advance = [], training._advance
    training._advance = lambda t, *batch: (steps.append(t.step), advance(t, *batch))[1]
    run(replace(RUN, method='CE'), progress=False)
    queue.put(len(steps))
    queue.close(), queue.join_thread()
    os._exit(0)


@pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')
def test_two_processes_do_one_run_once(lico_root):
    fork = get_context('fork')
    queue = fork.Queue()
    both = [fork.Process(target=counted, args=(queue,)) for _ in range(2)]
    for p in both: p.start()
    steps = sorted(queue.get(timeout=100) for _ in both)
    for p in both: p.join(100)
    assert [p.exitcode for p in both] == [0, 0] and steps == [0, 14]


@pytest.mark.slow
def test_full_disk_while_training(tmp_path):
    "The last line is one sentence, the exit status is not zero, and the checkpoint from before is whole."
    full = CHILD.replace('run({run!r}', textwrap.dedent('''
        import errno
        from lico import config
        fsync, written = os.fsync, []
        def full(fd):
            written.append(fd)
            if len(written) > 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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


def test_fit_leaves_the_random_state(tmp_path):
    data, model = load('digits', labels=40), CrossEntropy(create_backbone('wrn_10_1', num_classes=10, image_size=16))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(model, data, steps=2, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_pairs_share_weights_and_batches(monkeypatch):
    "CE and LICO of one seed start from the same backbone and see the same crops; another seed does not."
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


def network(): return create_backbone('wrn_10_1', num_classes=10, image_size=16)


@pytest.mark.parametrize('order', [torch.contiguous_format, torch.channels_last])
def test_images_and_weights_lie_as_the_device_likes(monkeypatch, order):
    "In training, and in the copy that is tested: a convolution whose two sides differ turns one round at each call."
    for m in (copies, batches, training): monkeypatch.setattr(m, 'memory_format', lambda *where: order)
    seen, convolution = [], torch.nn.Conv2d.forward
    def forward(self, x):
        seen.append([self.training, *(t.is_contiguous(memory_format=order) for t in (x, self.weight))])
        return convolution(self, x)
    monkeypatch.setattr(torch.nn.Conv2d, 'forward', forward)
    fit(CrossEntropy(network()), load('digits', labels=40, image_size=32), steps=2, progress=False)
    trained, tested = ([o[1:] for o in seen if o[0] == mode] for mode in (True, False))
    assert len(trained) == 18 and all(map(all, trained)) and all(map(all, tested[-9:]))


@pytest.mark.parametrize('n, sizes', [(40, [20, 20]), (41, [20, 21]), (42, [20, 20, 2]), (1, [1]), (21, [21])])
def test_no_batch_of_one_image(monkeypatch, n, sizes):
    "The last one joins its neighbour; every epoch has all images once, and ends where the log says."
    data, seen = load('digits', labels=60), []
    data = replace(data, train=data.train[:n])
    advance = training._advance
    monkeypatch.setattr(training, '_advance', lambda t, x, y: (seen.append(len(x)), advance(t, x, y))[1])
    log = fit(CrossEntropy(network()), data, epochs=2, batch_size=20, progress=False)
    assert seen == 2*sizes and [row['step'] for row in log] == [len(sizes), 2*len(sizes)]
    r = Run(labels=60, backbone='wrn_10_1', epochs=2, options=dict(batch_size=20))
    assert spec(r, data)['steps'] == 2*len(sizes), 'a run counts its steps alike'


def test_a_step_without_a_value_does_not_empty_the_log(monkeypatch):
    "A row is the mean over the images of those that have one; here what each step says is replaced."
    said, advance = iter([1., 2., 6.]), training._advance
    def told(t, x, y):
        row, n = advance(t, x, y)
        return dict(row, ce=next(said), cosine=math.nan if len(x) == 8 else 0.5), n
    monkeypatch.setattr(training, '_advance', told)
    data = load('digits', labels=60)
    data = replace(data, train=data.train[:48])
    [row] = fit(CrossEntropy(network()), data, epochs=1, batch_size=20, progress=False)
    assert row['ce'] == pytest.approx((20*1 + 20*2 + 8*6)/48) and row['cosine'] == 0.5


@pytest.mark.parametrize('batch_size', [7, 8, 20, 46, 48])
def test_every_image_of_a_pass_counts_once_in_its_row(monkeypatch, batch_size):
    "Against the sum over images; the share of right answers is a whole number of images."
    steps, advance = [], training._advance
    def told(t, x, y):
        row, n = advance(t, x, y)
        steps.append((len(x), row))
        return row, n
    monkeypatch.setattr(training, '_advance', told)
    data = load('digits', labels=60)
    [row] = fit(CrossEntropy(network()), replace(data, train=data.train[:48]), epochs=1, batch_size=batch_size,
                progress=False)
    assert sum(n for n, _ in steps) == 48 and row['train_accuracy']*48/100 == pytest.approx(
        round(row['train_accuracy']*48/100), abs=1e-6)
    for k in ('loss', 'ce', 'cosine', 'grad_norm', 'train_accuracy'):
        assert row[k] == pytest.approx(sum(n*o[k] for n, o in steps)/48, rel=1e-12), k


@pytest.mark.parametrize('n', [40, 41, 42])
def test_the_alarm_does_not_depend_on_the_number_of_images(n):
    "Images that are all alike are said to have collapsed, also where one is left over."
    data = load('digits', labels=60)
    data = replace(data, train=data.train[:n])
    data.train.x[:] = 128
    model = LICO(network(), PromptLearner(load_text_encoder('minilm'), data.class_names, n_context=2))
    with pytest.warns(InactiveMatchingWarning, match='the features have collapsed'):
        log = fit(model, data, epochs=1, batch_size=20, lr=1e-9, progress=False)
    assert log[0]['inactive'] == 'collapsed'


def test_nothing_to_train_is_refused(tmp_path):
    data, net = load('digits', labels=40), network().requires_grad_(False)
    prompts = PromptLearner(load_text_encoder('minilm'), data.class_names, n_context=2)
    for model in (CrossEntropy(net), LICO(net, prompts)):
        with pytest.raises(ValueError, match='PreActResNet has nothing to train: none of its parameters has'):
            fit(model, data, steps=1, folder=tmp_path/'x', progress=False)
    assert not (tmp_path/'x').exists()
    net.fc.requires_grad_(True)
    fit(CrossEntropy(net), data, steps=1, progress=False)


@pytest.mark.parametrize('how', ['mode', 'weights', 'both'])
def test_frozen_batch_norm_stays_frozen(how):
    "By its mode or its weights, over epochs and tests; the others learn."
    data, net = load('digits', labels=40), network()
    frozen, other = net.blocks[0].bn1, net.blocks[1].bn1
    if how != 'mode': frozen.requires_grad_(False)
    if how != 'weights': frozen.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fit(CrossEntropy(net), data, epochs=3, batch_size=20, evaluations=2, progress=False)
    after, learned = net.state_dict(), how == 'mode'
    assert torch.equal(frozen.running_mean, before['blocks.0.bn1.running_mean']) and not frozen.training
    assert frozen.num_batches_tracked == 0 and other.num_batches_tracked == 6 and other.training
    assert learned != torch.equal(after['blocks.0.bn1.bias'], before['blocks.0.bn1.bias'])


def test_a_network_left_in_evaluation_mode_is_trained():
    "Whoever has just tested a network does not mean to freeze it."
    data, net = load('digits', labels=40), network().eval()
    fit(CrossEntropy(net), data, steps=2, progress=False)
    assert all(m.num_batches_tracked == 2 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_shared_parameters_are_saved(tmp_path):
    "Two names of one tensor: a checkpoint holds both, and a run goes on from it."
    data = load('digits', labels=40)
    def tied():
        torch.manual_seed(0)
        net = network()
        net.blocks[0].conv2.weight = net.blocks[0].conv1.weight = torch.nn.Parameter(net.blocks[0].conv2.weight[:, :16])
        return net
    whole, parts, again = tied(), tied(), tied()
    fit(CrossEntropy(whole), data, steps=4, progress=False, folder=tmp_path/'whole')
    advance = training._advance
    def killed(t, x, y):
        if t.step == 2: raise KeyboardInterrupt
        return advance(t, x, y)
    go = lambda net: fit(CrossEntropy(net), data, steps=4, progress=False, folder=tmp_path, checkpoint_seconds=0)
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training, '_advance', killed)
        go(parts)
    go(again)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


class Precise(torch.nn.Module):
    "Writes down how precise convolutions and products are while it is used."
    num_classes, image_size, feature_shape = 10, 16, (3, 256)

    def __init__(self): super().__init__(); self.fc, self.seen = torch.nn.Linear(3, 10), []
    def forward_features(self, x): return x

    def forward_head(self, maps, pre_logits=False):
        b = torch.backends
        self.seen.append((torch.get_float32_matmul_precision(), b.cudnn.allow_tf32, b.cuda.matmul.allow_tf32,
                          *(kind.fp32_precision for kind in (b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul))))
        return self.fc(maps.mean((2, 3)))

    def forward(self, x): return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('before', [('highest', True), ('high', True), ('medium', False)])
def test_float32_is_float32(before, fails):
    "While it trains and tests, whatever was allowed before; afterwards, also after an error, that is allowed again."
    b, net = torch.backends, Precise()
    def now(): return torch.get_float32_matmul_precision(), b.cudnn.allow_tf32
    default = now()
    try:
        torch.set_float32_matmul_precision(before[0]); b.cudnn.allow_tf32 = before[1]
        kinds = [k.fp32_precision for k in (b.cudnn.conv, b.cuda.matmul, b.mkldnn.matmul, b.mkldnn.conv)]
        try: fit(CrossEntropy(net), load('digits', labels=40), steps=2, progress=False, lr=1e38 if fails else 0.1)
        except FloatingPointError: assert fails
        assert len(net.seen) >= 2 and set(net.seen) == {('highest', False, False, 'ieee', 'ieee', 'ieee')}
        assert now() == before
        assert kinds == [k.fp32_precision for k in (b.cudnn.conv, b.cuda.matmul, b.mkldnn.matmul, b.mkldnn.conv)]
    finally: torch.set_float32_matmul_precision(default[0]); b.cudnn.allow_tf32 = default[1]


def test_the_gpu_that_was_named(monkeypatch):
    "LICO_DEVICE=cuda:1: accelerate takes the current GPU, so that is made the current one."
    class Named(Exception): pass
    def chosen(self, where): raise Named(where)
    monkeypatch.setattr(torch.cuda.device, '__init__', chosen)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LICO_DEVICE', 'cuda:1')
    with pytest.raises(Named, match='cuda:1'): fit(CrossEntropy(network()), load('digits', labels=40), steps=1)


def test_nothing_is_left_at_inference():
    from torch.utils.flop_counter import FlopCounterMode
    data = load('digits', labels=40)
    costs = []
    for method in ('CE', 'LICO'):
        net = build(Run(backbone='wrn_10_1', method=method), data, load_text_encoder('minilm')).backbone.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad(): net(data.normalise(data.test.x[:2]))
        costs.append((sum(p.numel() for p in net.parameters()), counter.get_total_flops()))
    assert costs[0] == costs[1] and costs[0][1] > 0


def small(seed=0):
    torch.manual_seed(seed)
    return CrossEntropy(create_backbone('wrn_10_1', num_classes=10, image_size=16))


def same(a, b): return all(torch.equal(o, p) for o, p in zip(a.state_dict().values(), b.state_dict().values()))


def test_each_row_is_told_when_it_is_in_the_files(tmp_path):
    "And a callback that draws random numbers, changes modes and the row it is given changes no result."
    data, seen, model, alone = load('digits', labels=100), [], small(), small()
    def told(row):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'log.csv'), pd.DataFrame([*seen, row]), check_exact=True)
        assert load_checkpoint(tmp_path/'checkpoint.safetensors')[1]['log'] == [*seen, row]
        seen.append(dict(row))
        row.clear(), model.eval(), torch.manual_seed(99), torch.rand(5)
    log = fit(model, data, steps=7, evaluations=2, folder=tmp_path, checkpoint_seconds=0, on_epoch=told, progress=False)
    assert log == seen and len(log) == 4 and [('test_accuracy' in r) for r in log] == [False, True, False, True]
    fit(alone, data, steps=7, evaluations=2, progress=False)
    assert same(model, alone)


def test_a_log_goes_on_without_the_rows_that_a_kill_took(tmp_path):
    "Three epochs are in the log, the checkpoint is of none; and a line cut short by a full disk does not stay."
    data, whole = load('digits', labels=100), small()
    def stop(row):
        if row['epoch'] == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(small(), data, epochs=5, folder=tmp_path, on_epoch=stop, progress=False)
    assert pd.read_csv(tmp_path/'log.csv').epoch.tolist() == [1, 2, 3] and not (
        tmp_path/'checkpoint.safetensors').exists()
    with open(tmp_path/'log.csv', 'a', encoding='utf-8') as f: f.write('4,8,0.0')
    log = fit(whole, data, epochs=5, folder=tmp_path, progress=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'log.csv'), pd.DataFrame(log), check_exact=True)
    (tmp_path/'log.csv').unlink()
    assert fit(small(), data, epochs=5, folder=tmp_path, progress=False) == log
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'log.csv'), pd.DataFrame(log), check_exact=True)


def test_a_log_grows_row_by_row(tmp_path, monkeypatch):
    "Not written anew for every row: thousands of epochs of one step are usual with few labels."
    written, write = [], training.LogFile.write
    monkeypatch.setattr(training.LogFile, 'write', lambda self: (written.append(len(self.log)), write(self)))
    fit(small(), load('digits', labels=40), steps=8, folder=tmp_path, progress=False)
    assert written == [1, 8]


@pytest.mark.parametrize('schedule, ema', [('constant', 0.), ('constant', .9), ('cos7/16', .9), ('cosine', 0.)])
@pytest.mark.parametrize('new', [False, True])  # another object with the same initial weights, or the trained model
def test_more_epochs_extend_a_run(schedule, ema, new, tmp_path, recwarn):
    "With a constant learning rate to the longer run's weights; else it is said and logged."
    data, more, model, straight = load('digits', labels=100), dict(schedule=schedule, ema=ema), small(), small()
    fit(model, data, epochs=2, folder=tmp_path, progress=False, **more)
    if new: model = small()
    log = fit(model, data, epochs=5, folder=tmp_path, progress=False, **more)
    other = fit(straight, data, epochs=5, progress=False, **more)
    table = pd.read_csv(tmp_path/'log.csv')
    assert table.epoch.tolist() == [1, 2, 3, 4, 5]
    told = [str(w.message) for w in recwarn if 'goes on from step 4 of 4 up to step 10' in str(w.message)]
    if schedule == 'constant':
        assert same(model, straight) and [r['ce'] for r in log] == [r['ce'] for r in other] and not told
        assert 'extended_at' not in table
    else:
        assert not same(model, straight) and len(told) == 1 and table.extended_at.tolist()[2:] == [4, 4, 4]
        assert table.extended_at.isna().tolist()[:2] == [True, True] and log[2]['lr'] > log[1]['lr']


def test_an_extended_run_goes_on_as_itself(tmp_path):
    "Killed, extended again, asked for once more; not as a shorter run, and not as another one."
    data = load('digits', labels=100)
    def stop(row):
        if row['epoch'] == 4: raise KeyboardInterrupt
    fit(small(), data, epochs=2, folder=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match='goes on from step 4 of 4 up to step 12'):
        fit(small(), data, epochs=6, folder=tmp_path, checkpoint_seconds=0, on_epoch=stop, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        log = fit(small(), data, epochs=6, folder=tmp_path, progress=False)
        assert fit(small(), data, epochs=6, folder=tmp_path, progress=False) == log
    assert [r.get('extended_at') for r in log] == [None, None, 4, 4, 4, 4]
    with pytest.raises(ValueError, match=r'differs in steps \(12 there, 4 here\)'):
        fit(small(), data, epochs=2, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r'differs in lr \(0.03 there, 0.1 here\)'):
        fit(small(), data, epochs=9, lr=.1, folder=tmp_path, progress=False)
    with pytest.warns(UserWarning, match='goes on from step 12 of 12 up to step 14'):
        log = fit(small(), data, epochs=7, folder=tmp_path, progress=False)
    assert [r.get('extended_at') for r in log] == [None, None, 4, 4, 4, 4, 12]


def test_the_bar_shows_accuracy(capsys):
    "Of the batches of the epoch, and of the last test."
    fit(small(), load('digits', labels=100), epochs=3, evaluations=3)
    shown = capsys.readouterr().err
    assert 'ce=' in shown and 'train=' in shown and 'test=' in shown and '%' in shown.split('test=')[-1][:6]


def test_what_is_shown_costs_nothing_where_nothing_is_shown(monkeypatch):
    "And else the last test is looked at once an epoch, and no earlier step again."
    called, shown = [], []
    monkeypatch.setattr(training, 'accuracy', lambda *a: called.append(a) or 50.)
    monkeypatch.setattr(training, '_shown', lambda row, *a: shown.append((row['train_accuracy'], *a)) or {})
    for progress in (False, True): fit(small(), load('digits', labels=100), epochs=3, evaluations=3, progress=progress)
    assert len(called) == 2*(3 + 2), 'three tests, and each epoch behind one'
    assert len(shown) == 6, 'two steps an epoch, of one of the two'
    assert shown[1][1] == (shown[0][0] + shown[1][0])/2 and [o[2] for o in shown] == [{}]*2 + [dict(test='50.0%')]*4


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(training, '_advance', lambda *a: pytest.fail('a step was done'))
    (tmp_path/'file').write_text('', encoding='utf-8')
    for folder in (tmp_path/'file', tmp_path/'file'/'below', '/proc/lico'):
        with pytest.raises(OSError, match=f'cannot write {folder} .*see that it can be written to, or name another'):
            fit(small(), load('digits', labels=40), steps=1, folder=folder, progress=False)


@pytest.mark.parametrize('error', [FloatingPointError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize('at', [0, 2])
def test_a_step_that_fails_leaves_all_as_it_was(monkeypatch, at, error):
    "Weights, and also what no optimiser changes: statistics of batch normalisation, temperatures of the first batch."
    data, before, advance = load('digits', labels=40), {}, training._advance
    r = Run(labels=40, backbone='wrn_10_1', method='LICO', options=dict(tau='calibrated', mm_features='pooled'))
    model = build(r, load_data(r), load_text_encoder('minilm'))
    def told(t, x, y):
        before.update({k: v.clone() for k, v in model.state_dict().items()})
        return advance(t, x, y)
    def fails(row, step, largest):
        if step == at: raise error('of a step')
    monkeypatch.setattr(training, '_advance', told)
    monkeypatch.setattr(training, 'check_finite', fails)
    with pytest.raises(error, match='of a step'): fit(model, data, steps=3, progress=False)
    assert any('running_var' in k for k in before) and 'tau.value' in before
    for k, v in model.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0, equal_nan=True)


def test_a_run_that_diverges_leaves_a_network_that_is_finite():
    "Of these steps, the running variances overflow before the loss does."
    model = small()
    with pytest.raises(FloatingPointError, match='a statistic .* the network and .* are from before it'):
        fit(model, load('digits', labels=40), steps=60, lr=1e6, progress=False)
    assert all(t.isfinite().all() for t in model.state_dict().values())
