"Training in bfloat16. The check for it, `schedule.has_bfloat16`, is what these tests replace."
import math
from pathlib import Path

import pytest, torch
import torch.nn.functional as F

from lico import model as models, rivals, schedule, training
from lico.backbones import create_backbone
from lico.data import load
from lico.experiments import TRAINING_METHODS, Run, frame, load_data, run_id, runs_folder, spec, start, sweep
from lico.records import read_record, run
from lico.losses import ot_alignment
from lico.model import CrossEntropy, exact
from lico.schedule import has_bfloat16
from lico.training import fit
from group import one_layer

BF16 = dict(precision='bf16')


@pytest.fixture
def able(monkeypatch): monkeypatch.setattr(schedule, 'has_bfloat16', lambda where: True)


def started(method):
    r = Run(labels=40, backbone='wrn_10_1', method=method, preset='repaired')
    return start(r, load_data(r), one_layer())


def test_refused_before_any_work(lico_root, tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, 'has_bfloat16', lambda where: False)
    monkeypatch.setattr(training, '_Trainer', lambda *a: pytest.fail('began'))
    data, model = load('digits', labels=40), CrossEntropy(create_backbone('wrn_10_1', num_classes=10, image_size=16))
    refusal = pytest.raises(ValueError, match='bf16 is slower than fp32 on this cpu.*use precision = fp32')
    with refusal: fit(model, data, steps=1, folder=tmp_path/'fit', progress=False, **BF16)
    assert not (tmp_path/'fit').exists()
    half = Run(labels=40, backbone='wrn_10_1', steps=1, options=BF16)
    with refusal: run(half, progress=False)
    with refusal: sweep([Run(labels=40, backbone='wrn_10_1', steps=1), half], progress=False)  # not after the first
    assert not list(lico_root.rglob('checkpoint*')) and not list(lico_root.rglob('record*'))
    wrong = "unknown value of option precision: 'fp16': choose one of fp32, bf16"
    with pytest.raises(ValueError, match=wrong): Run(options=dict(precision='fp16'))


@pytest.mark.parametrize('flags, expected', [
    ('fpu avx512f amx_tile amx_bf16', True), ('fpu avx512_bf16', True), ('fpu avx2 avx512f', False), (None, False)])
def test_what_a_processor_has(flags, expected, monkeypatch):
    monkeypatch.setattr(Path, 'exists', lambda self: flags is not None)
    monkeypatch.setattr(Path, 'read_text', lambda self,
                        encoding: f'model name\t: some\nflags\t\t: {flags}\nbugs\t\t:\n')
    assert has_bfloat16(torch.device('cpu')) == expected and not has_bfloat16(torch.device('mps'))


def test_a_gpu_that_imitates_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert has_bfloat16(torch.device('cuda')) is False


def test_exact():
    a, b, n = torch.randn(4, 4), torch.randn(4, 4).bfloat16(), torch.arange(4)
    seen = []
    @exact
    def product(*args, scale):
        "Its own name and words."
        seen.append([x.dtype if torch.is_tensor(x) else type(x) for x in args])
        return scale*args[0] @ args[1]
    with torch.autocast('cpu', torch.bfloat16):
        inside = product(a, b, n, 'text', scale=2)
        assert (a @ a).dtype == torch.bfloat16, 'and on again afterwards'
    assert torch.equal(inside, 2*a @ b.float()) and seen == [[torch.float32, torch.float32, torch.int64, str]]
    assert product(a.double(), a.double(), scale=1).dtype == torch.float64
    assert product.__doc__ == "Its own name and words."


def spied(monkeypatch, module, name, seen):
    "Notes the types of what a function is given, and whether autocast is on when it is."
    function = getattr(module, name)
    def spy(*args, **options):
        tensors = [a for a in args if torch.is_tensor(a) and a.is_floating_point()]
        seen.setdefault(name, []).extend((a.dtype, torch.is_autocast_enabled('cpu')) for a in tensors)
        return function(*args, **options)
    monkeypatch.setattr(module, name, spy)


MM, OT = {'log_adjacency', 'kl_rows'}, {'ot_alignment'}
BESIDE_CE = {'CE': set(), 'CE+LS': set(), 'CE+SupCon': {'log_adjacency'}, 'CGC': set(), 'GCC': {'_shares'},
             'CE+MM': MM, 'CE+OT': OT, 'LICO': MM | OT, 'LICO+CGC': MM | OT}


@pytest.mark.parametrize('method', TRAINING_METHODS)
def test_networks_in_bfloat16_losses_not(method, able, monkeypatch):
    seen, networks, gradients, rows, data = {}, {}, {}, {}, load('digits', labels=40)
    watched = {F: ('cross_entropy',), models: ('mean_cosine', 'log_adjacency', 'kl_rows', 'ot_alignment'),
               rivals: ('log_adjacency', '_shares')}
    for module, names in watched.items():
        for name in names: spied(monkeypatch, module, name, seen)
    for precision in ('fp32', 'bf16'):
        seen.clear(), networks.clear()
        m = started(method)
        def note(name):
            return lambda module, args, out: networks.setdefault((name, module.training), set()).add(out.dtype)
        m.backbone.stem.register_forward_hook(note('stem'))
        if text := TRAINING_METHODS[method] is not None:
            linear = next(k for k in m.prompts.enc.modules() if isinstance(k, torch.nn.Linear))
            linear.register_forward_hook(note('text'))
            m.mapping.register_forward_hook(note('mapping'))
        same = dict(steps=1, momentum=0., weight_decay=0., progress=False)
        rows[precision] = fit(m, data, precision=precision, **same)[0]
        gradients[precision] = torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        expected = torch.float32 if precision == 'fp32' else torch.bfloat16
        assert networks['stem', True] == {expected}
        assert networks['stem', False] == {torch.float32}, 'tests are in float32'
        if text: assert networks['text', False] == {expected} and networks['mapping', True] == {torch.float32}
        assert seen.keys() - {'mean_cosine'} == {'cross_entropy'} | BESIDE_CE[method]
        assert {kind for calls in seen.values() for kind in calls} == {(torch.float32, False)}
        assert {p.dtype for p in m.parameters()} == {torch.float32}
    a, b = gradients['fp32'], gradients['bf16']
    assert a.shape == b.shape and b.isfinite().all() and not torch.equal(a, b)
    assert F.cosine_similarity(a, b, 0) > 0.9
    for k in ('loss', 'ce', 'grad_norm'): assert math.isclose(rows['bf16'][k], rows['fp32'][k], rel_tol=0.03), k


def test_in_anyones_own_autocast():
    data, m = load('digits', labels=40), started('LICO').eval()
    x, y = data.normalise(data.train.x), data.train.y
    with torch.autocast('cpu', torch.bfloat16):
        out, maps = m(x, y), m.backbone.forward_features(x)
        raw, mapped = m.text(y)
    given = (out.logits, out.loss, out.ce, out.mm, out.ot, mapped)
    assert maps.dtype == torch.bfloat16 and {t.dtype for t in given} == {torch.float32}
    rows = maps.float().flatten(2)
    assert torch.equal(out.ce, F.cross_entropy(out.logits, y)) and torch.equal(out.ot, ot_alignment(rows, mapped))
    assert torch.equal(out.mm, m.matching(m.pooled(maps), rows, raw, mapped)[0])


@pytest.mark.parametrize('name, value', [('MIXED_PRECISION', 'bf16'), ('GRADIENT_ACCUMULATION_STEPS', '4'),
                                         ('DYNAMO_BACKEND', 'EAGER')])
def test_other_peoples_settings_do_not_count(monkeypatch, name, value):
    "What `accelerate config` wrote down would change what is trained, and the record would not know."
    from accelerate.state import AcceleratorState
    logs, weights, compiled = [], [], []
    monkeypatch.setattr(torch, 'compile', lambda net, *args, **options: compiled.append(net) or net)
    for set_ in (False, True):
        AcceleratorState._reset_state(True)
        if set_: monkeypatch.setenv(f'ACCELERATE_{name}', value)
        m = started('CE')
        logs.append(fit(m, load('digits', labels=40), steps=1, progress=False)[0]['grad_norm'])
        weights.append(m.backbone.fc.weight)
    AcceleratorState._reset_state(True)
    assert torch.equal(*weights) and logs[0] == logs[1] and not compiled


def test_a_run_says_its_precision(lico_root, able):
    half = Run(labels=40, backbone='wrn_10_1', steps=1, method='CE+SupCon', options=BF16)
    full = Run(labels=40, backbone='wrn_10_1', steps=1, method='CE+SupCon', options=dict(precision='fp32'))
    data = load_data(full)
    assert spec(half, data)['train']['precision'] == 'bf16' and run_id(half) != run_id(full)
    assert 'precision' not in spec(full, data)['train'], 'older runs keep their identity'
    records = [run(r, progress=False) for r in (full, half)]
    assert [r['precision'] for r in records] == ['fp32', 'bf16'] == frame(records).precision.tolist()
    assert frame(records).training.nunique() == 2
    assert read_record(runs_folder()/run_id(half))['ce'] != records[0]['ce']
