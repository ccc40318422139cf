"""Golden numbers: short runs of every method and option, maps and scores of every saliency method and metric."""
# `golden.csv` holds a row a number, with a tolerance of ten times its spread over instruction sets and threads.
# A new case gets its rows from `python tests/test_golden.py`; once a protocol has been raised,
# `python tests/test_golden.py --accept CASE` measures a case anew. All other rows stay as they are.
import argparse, csv, functools, json, math, os, subprocess, sys, tempfile, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest

GOLDEN = Path(__file__).with_name('golden.csv')


def named(case, changes): return ', '.join([case, *(f'{k}={v}' for k, v in changes.items())])


# runs: case -> fields of a `Run`, and what is changed of some. Most train a transformer, which is smooth:
# at a rectifier's kink rounding becomes 1 % of a gradient.
SMALL = dict(dataset='shapes', labels=24, backbone='test_vit', options=dict(batch_size=12, epochs=2))
CNN = dict(SMALL, backbone='wrn_10_1', image_size=16)
TEXT = dict(epochs=1, batch_size=8, n_context=3)
BASES = {'CE paper': dict(CNN, dataset='digits', labels=40, steps=5, options=dict(batch_size=16)),
         'LICO paper': dict(CNN, dataset='digits', labels=40, steps=3, method='LICO', options={}),
         **{f'LICO {name}': dict(CNN, steps=2, method='LICO', preset=name, options={})
            for name in ('released', 'repaired', 'semantic')},
         'CE CNN': CNN,
         **{method: dict(CNN, steps=1, method=method) for method in ('CGC', 'GCC', 'LICO+CGC')},
         'CE': SMALL,
         'LICO': dict(SMALL, method='LICO', options=dict(TEXT, alpha=1, tau_init=0.3)),
         'CE+MM': dict(SMALL, method='CE+MM', options=dict(TEXT, tau_init=0.3)),
         'CE+OT': dict(SMALL, method='CE+OT', options=TEXT),
         **{f'{method} ViT': dict(SMALL, steps=1, method=method) for method in ('CGC', 'GCC')},
         **{method: dict(SMALL, method=method) for method in ('CE+LS', 'CE+SupCon')}}
FIELDS = dict(seed=1, split_seed=1, labels=16, shots=4, image_size=48, validation=8, dataset='photographs')  # of `Run`
VARIANTS = [  # a case, and what another one changes of its fields or options
    *(('CE', {field: value}) for field, value in FIELDS.items()),
    *(('CE', {option: value}) for option, value in (
        ('epochs', 1), ('batch_size', 8), ('lr', 0.3), ('momentum', 0.5), ('weight_decay', 0.01),
        ('schedule', 'cosine'), ('schedule', 'constant'), ('noise', 0.1))),
    ('CE, lr=0.3', dict(ema=0.9)), ('CE, dataset=photographs', dict(noise=0.1)), ('CE CNN', dict(bn_momentum=0.3)),
    *(('LICO', {option: value}) for option, value in (
        ('alpha', 3), ('beta', 3), ('mm_features', 'pooled'), ('mm_rows', 'class'), ('mm_text', 'raw'),
        ('mm_sign', 'plus'), ('mm_normalise', False), ('distance', 'cosine'), ('tau', 'fixed'), ('tau_init', 0.5),
        ('tau_form', 'raw'), ('detach_text', True), ('ot_eps', 0.02), ('ot_iters', 2), ('ot_tol', 0.05),
        ('ot_grad', 'unrolled'), ('ot_grad', 'none'), ('ot_value', 'regularised'), ('hidden', 16), ('dropout', 0.5),
        ('n_context', 2), ('prompt', 'rolled'), ('context', 'class'), ('class_position', 'front'), ('dynamic', False),
        ('init', 'a photo of'), ('trainable', False))),
    ('CGC', dict(cgc_weight=2)), ('CGC', dict(cgc_temperature=0.1)), ('GCC', dict(gcc_weight=5)),
    ('LICO+CGC', dict(cgc_weight=2)), ('LICO+CGC', dict(alpha=3)),
    *(('LICO', {option: value}) for option, value in (
        ('mm_diagonal', 'out'), ('mm_centre', True), ('tau', 'calibrated'), ('class_text', 'shuffled'),
        ('class_text', 'random'))),
    ('LICO, tau=calibrated', dict(tau_share=0.5)), ('CE+LS', dict(label_smoothing=0.3)),
    ('CE+SupCon', dict(supcon_weight=3)), ('CE+SupCon', dict(supcon_temperature=0.5))]


def varied(fields, changes):
    "A run's fields after changes of them, or of its options."
    own = {k: v for k, v in changes.items() if k in FIELDS}
    if 'shots' in own: own['labels'] = None
    return {**fields, **own, 'options': {**fields['options'], **{k: v for k, v in changes.items() if k not in FIELDS}}}


RUNS = dict(BASES)
for case, changes in VARIANTS: RUNS[named(case, changes)] = varied(RUNS[case], changes)
for run in RUNS.values():  # which has a length once
    if 'steps' in run: run['options'] = {k: v for k, v in run['options'].items() if k != 'epochs'}
LOGGED = ('loss', 'ce', 'mm', 'ot', 'cgc', 'gcc', 'supcon', 'tau', 'tau_image', 'entropy_image', 'entropy_text',
          'cosine', 'grad_norm',
          'train_accuracy', 'test_accuracy')

# parts that no run has or shows: case -> options of `PromptLearner`, `None` for what takes none
PROMPTS = dict(), dict(class_position='front'), dict(prompt='rolled'), dict(context='class')
PARTS = {'parn_18': None, 'test images of shapes': None, 'test images of photographs': None,
         **{named(encoder, options): options for encoder in ('CLIP', 'GloVe') for options in PROMPTS}}

# maps: case -> arguments of `explain`, and what is changed of some
MAPS_OF = ('grad-cam', 'grad-cam++', 'score-cam', 'rise', 'group-cam', 'xrai', 'guided-backprop', 'smoothgrad',
           'integrated-gradients', 'guided-ig', 'random', 'edges')
MAP_VARIANTS = [
    ('grad-cam', dict(target=None)), ('group-cam', dict(groups=8)), ('group-cam', dict(denoise=0.2)),
    *(('rise', dict(n_masks=50, **o)) for o in (dict(), dict(cells=4), dict(p=0.3), dict(seed=1))),
    ('xrai', dict(steps=5)), ('xrai', dict(fast=True)), ('integrated-gradients', dict(steps=3)),
    ('smoothgrad', dict(samples=5)), ('smoothgrad', dict(noise=0.5)), ('smoothgrad', dict(seed=1)),
    *(('guided-ig', dict(steps=42, **o)) for o in (dict(), dict(fraction=0.5), dict(anchors=2))),
    ('random', dict(seed=1)),
    *((method, dict(net='test_vit')) for method in ('grad-cam', 'grad-cam++', 'score-cam', 'group-cam'))]
MAPS = {**{f'map {m}': dict(method=m) for m in MAPS_OF},
        **{named(f'map {m}', o): dict(method=m, **o) for m, o in MAP_VARIANTS}}

# scores: case -> (metric, its arguments), and what is changed of some
METRICS = ('blur', 'insertion', 'deletion', 'overall', 'pointing_game', 'energy_pointing_game', 'mosu',
           'rank_correlation', 'ssim', 'sanity_check', 'random_affine', 'ses')
SCORE_VARIANTS = [
    ('blur', dict(sigma=1.)), ('blur', dict(kernel=9)),
    *((m, o) for m in ('insertion', 'deletion') for o in (dict(step=40), dict(baseline=1.), dict(score='logit'))),
    ('pointing_game', dict(tolerance=2)),
    *((m, dict(masks=True)) for m in ('pointing_game', 'energy_pointing_game', 'mosu')),
    ('sanity_check', dict(scheme='independent')), ('sanity_check', dict(seed=1)),
    *(('random_affine', dict([o])) for o in dict(seed=1, area=(0.5, 0.6), degrees=30, flip=False).items())]
SCORES = {**{f'score {m}': (m, {}) for m in METRICS}, **{named(f'score {m}', o): (m, o) for m, o in SCORE_VARIANTS}}

CASES = [*RUNS, *PARTS, *MAPS, *SCORES]
PAIRS = [(kind + case, named(kind + case, changes))
         for kind, variants in (('', VARIANTS), ('map ', MAP_VARIANTS), ('score ', SCORE_VARIANTS))
         for case, changes in variants]


# measuring

def picture(rng, size):
    "Blocks of colour under noise, uint8 [3, size, size]; integers only, so that it is the same everywhere."
    blocks = rng.randint(0, 200, (3, 4, 4)).repeat(size//4, 1).repeat(size//4, 2)
    return (blocks + rng.randint(0, 56, (3, size, size))).astype(np.uint8)


def make_root(root):
    "Images in `shapes`, small enough for memory, and in `photographs`, which are read from disk; and the presets."
    from PIL import Image
    from lico.config import settings
    # every run reads it a dozen times, and all of it takes long
    with (root/'settings.ini').open('w', encoding='utf-8') as f:
        presets = {name: values for name, values in settings().items() if name.startswith(('preset.', 'text_encoder'))}
        for name, values in presets.items(): f.writelines([f'[{name}]\n', *(f'{k} = {v}\n' for k, v in values.items())])
        f.write('[profile.laptop]\n')
    for name, size, counts in (('shapes', 32, dict(train=8, test=25)), ('photographs', 80, dict(train=6, test=5))):
        rng = np.random.RandomState(0)
        for folder in (root/name/part/label for part in counts for label in ('cat', 'lake', 'red car', 'wolf')):
            folder.mkdir(parents=True)
            for i in range(counts[folder.parent.name]):
                Image.fromarray(picture(rng, size).transpose(1, 2, 0)).save(folder/f'{i}.png')


@functools.cache
def text_encoder():
    from lico.text import load_text_encoder
    return load_text_encoder('minilm')


def moments(x):
    "Mean, mean under a ramp along either of the last two axes, and root of the mean square."
    x = x.detach().double().numpy()
    down, right = np.linspace(0, 1, x.shape[-2])[:, None], np.linspace(0, 1, x.shape[-1])
    return dict(mean=x.mean(), down=(x*down).mean(), right=(x*right).mean(), square=np.sqrt((x*x).mean()))


def run_numbers(case, root):
    "The last line of a run's log, what it predicts, and how far it moved the weights."
    import pandas as pd, torch
    from safetensors.torch import load_file
    from lico.experiments import Run, load_data, runs_folder, start
    from lico.records import run
    fields = dict(RUNS[case])
    if fields['dataset'] != 'digits': fields['dataset'] = f"folder:{root/fields['dataset']}"
    r = Run(**fields)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # losses that train nothing are part of it
        folder = runs_folder()/run(r, progress=False)['id']
    with torch.random.fork_rng(): before = start(r, load_data(r), text_encoder()).state_dict()
    squares = {}
    for name, after in load_file(folder/'model.safetensors').items():
        part = 'statistics' if 'running_' in name else 'backbone' if name.startswith('backbone.') else 'text'
        if after.is_floating_point():
            moved = after - before[name].nan_to_num()  # temperatures that are not known before
            squares[part] = squares.get(part, 0) + moved.double().square().sum().item()
    log = pd.read_csv(folder/'log.csv').iloc[-1]
    logged = {name: float(log[name]) for name in LOGGED if not math.isnan(log.get(name, math.nan))}
    logged['predicted'] = load_file(folder/'predictions.safetensors')['predicted'].double().mean().item()
    return {**logged, **{f'moved {part}': math.sqrt(s) for part, s in squares.items()}}


def part_numbers(case, root):
    "Test images, what a network makes of images, or the prompt rows of a small random CLIP or of word vectors."
    import open_clip, torch
    from lico.backbones import create_backbone
    from lico.data import load
    from lico.batches import test_batches
    from lico.text import CLIPText, GloVeText, PromptLearner
    torch.manual_seed(0)
    if case.startswith('test images'):
        data = load(f'folder:{root/case.split()[-1]}')
        return moments(torch.cat(list(test_batches(data, data.test, 8))))
    if case == 'parn_18': return moments(create_backbone(case, 7, 16)(torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)))
    if case.startswith('CLIP'):
        vision = dict(layers=1, width=32, head_width=16, image_size=32, patch_size=32)
        clip = open_clip.model.CLIP(24, vision, dict(width=32, heads=2, layers=2))
        encoder = CLIPText(clip, open_clip.get_tokenizer('ViT-B-32'))
    else: encoder = GloVeText(['cat', 'red', 'car'], torch.rand(3, 24))
    return moments(PromptLearner(encoder, ['cat', 'red car'], n_context=3, **PARTS[case])(torch.tensor([1, 0])))


@functools.cache
def fixed(name='wrn_10_1'):
    "A small network with statistics and opinions of its own, two images, their targets, and two pairs of maps."
    import torch
    from lico.backbones import create_backbone
    size = 32 if name == 'test_vit' else 12
    torch.manual_seed(0)
    net = create_backbone(name, 7, size).eval()
    with torch.no_grad():
        net.get_classifier().weight.mul_(2)
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.uniform_(-.3, .3); m.running_var.uniform_(.5, 2)
    rng = np.random.RandomState(1)
    x = torch.from_numpy(np.stack([picture(rng, size) for _ in range(2)])).float()/64 - 2
    maps = torch.from_numpy(np.stack([rng.permutation(size**2).reshape(size, size) for _ in range(4)])).float()/size**2
    return SimpleNamespace(net=net, x=x, target=torch.tensor([4, 0]), maps=maps[:2], others=(maps[:2] + maps[2:])/2)


def map_numbers(case, root):
    "Where the maps of two images are bright."
    from saliency.core import xrai
    from lico.saliency import explain
    options = dict(MAPS[case])
    f = fixed(options.pop('net', 'wrn_10_1'))
    with pytest.MonkeyPatch.context() as patch:  # `--accept` has no conftest
        patch.setattr(xrai, '_FELZENSZWALB_IM_RESIZE', (48, 48))  # it cuts pictures of 224 pixels, which takes seconds
        return moments(explain(f.net, f.x, **{'target': f.target, **options}))


def regions(masks):
    "Two instances in each of two images of 64 pixels, as boxes or as masks."
    boxes = np.array([[[5, 8, 20, 30], [40, 10, 60, 20]], [[0, 0, 9, 9], [30, 30, 50, 60]]])
    y, x = np.mgrid[:64, :64]
    return [np.stack([(x - x0)**2 + (y - y0)**2 < x1*y1/8 for x0, y0, x1, y1 in b]) if masks else b for b in boxes]


def score_numbers(case, root):
    "What a metric gives for two images."
    import torch
    from lico import metrics, sensitivity
    from lico.saliency import explain
    (name, options), f, rng = SCORES[case], fixed(), np.random.RandomState(2)
    metric = getattr(metrics, name, None) or getattr(sensitivity, name)
    each = lambda scores: dict(zip(('first', 'second'), scores.tolist()))
    if name == 'blur': return moments(metric(torch.from_numpy(picture(rng, 80)[None]).float(), **options))
    if name in ('insertion', 'deletion'):
        found = metric(f.net, f.x, f.maps, f.target, **options)
        return {**each(found.auc), 'points': len(found.fraction)}
    if name == 'overall':
        return each(metric(*(curve(f.net, f.x, f.maps, f.target) for curve in (metrics.insertion, metrics.deletion))))
    if name in ('pointing_game', 'energy_pointing_game', 'mosu'):
        maps = torch.from_numpy(rng.permutation(8192).reshape(2, 64, 64)).float().clamp(max=8162)  # many maxima
        return each(metric(maps, regions('masks' in options), **{k: v for k, v in options.items() if k != 'masks'}))
    if name in ('rank_correlation', 'ssim'): return each(metric(f.maps/8, f.others/8))
    if name == 'random_affine': return moments(metric(6, **options))
    if name == 'ses':
        return each(metric(lambda x: x.abs().mean(1), f.x, sensitivity.random_affine(2, seed=7, degrees=45)))
    entries = metric(lambda net: explain(net, f.x, f.target), f.net, **options)[::5]
    return {f'{of} {e.layer}': getattr(e, of)[1].item() for e in entries for of in ('spearman', 'ssim')}


def numbers(case, root):
    "The numbers of a case; `root` is LICO_ROOT, from `make_root`."
    kinds = ((RUNS, run_numbers), (PARTS, part_numbers), (MAPS, map_numbers), (SCORES, score_numbers))
    return next(measure for cases, measure in kinds if case in cases)(case, root)


# testing

def read():
    "The stored numbers: case -> quantity -> (value, tolerance)."
    stored = {}
    for row in csv.DictReader(GOLDEN.open(encoding='utf-8')):
        stored.setdefault(row['case'], {})[row['quantity']] = float(row['value']), float(row['tolerance'])
    return stored


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    "A root for all runs, with their images."
    root = tmp_path_factory.mktemp('golden')
    make_root(root)
    return root


@pytest.mark.parametrize('case', CASES)
def test_numbers_are_those_of_the_protocol(case, place, monkeypatch):
    monkeypatch.setenv('LICO_ROOT', str(place))
    stored, now, wrong = read().get(case), numbers(case, place), []
    assert stored, f"{case} has no numbers yet: run python tests/test_golden.py"
    protocol = 'TRAINING_PROTOCOL' if case in {**RUNS, **PARTS} else 'MEASURING_PROTOCOL'
    for quantity, (value, tolerance) in stored.items():
        found = now.get(quantity, math.nan)
        if abs(found - value) <= tolerance: continue
        was = f"{found:.8g}, was {value:.8g} ± {tolerance:.2g}"
        wrong.append(f"{case} {quantity} is {was}: mend this, or raise {protocol}")
    assert not wrong, '\n'.join(wrong)


def test_the_file_has_no_other_cases(): assert set(read()) == set(CASES)


@pytest.mark.parametrize('case, variant', PAIRS)
def test_a_change_shows(case, variant):
    "Else the variant would guard nothing."
    a, b = read()[case], read()[variant]
    assert set(a) != set(b) or any(abs(a[q][0] - b[q][0]) > a[q][1] + b[q][1] for q in a)


def test_every_value_of_every_option_is_in_a_case(place, monkeypatch):
    monkeypatch.setenv('LICO_ROOT', str(place))
    from lico.config import OPTIONS, preset
    for option, allowed in OPTIONS.items():
        # bf16 needs a processor that has it, and is no reference for one that has not
        if option == 'precision': continue
        pairs = [(RUNS[case], RUNS[named(case, changes)]) for case, changes in VARIANTS if option in changes]
        values = {preset(r.get('preset', 'paper'), **r['options'])[option] for pair in pairs for r in pair}
        if allowed is bool: assert values == {True, False}, option
        elif isinstance(allowed, tuple) and isinstance(allowed[0], str): assert values == set(allowed), option
        else: assert len(values) >= 2, option


def test_every_method_and_metric_is_in_a_case():
    from lico import experiments, metrics, saliency, sensitivity
    assert {fields.get('method', 'CE') for fields in RUNS.values()} == set(experiments.TRAINING_METHODS)
    assert set(MAPS_OF) == set(saliency.METHODS)
    parts = {'Curve', 'finite_maps', 'parameter_layers', 'randomised'}
    assert set(METRICS) == {*metrics.__all__, *sensitivity.__all__} - parts


# accepting

TWO = dict(OMP_NUM_THREADS='2', OMP_WAIT_POLICY='passive')
PROCESSORS = [{}, TWO, dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2'),
              dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41', MKL_CBWR='COMPATIBLE'),
              dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='AVX', **TWO)]


def measured(cases):
    "The numbers of cases, measured in this process."
    with tempfile.TemporaryDirectory() as root:
        os.environ['LICO_ROOT'] = root
        make_root(Path(root))
        return {case: numbers(case, Path(root)) for case in cases}


IMAGE = dict(train_accuracy=9, test_accuracy=1.1, predicted=0.04)  # what one image makes


def least(case, quantity, value):
    "The smallest tolerance: an image for an accuracy, and for a gradient what a rectifier's kink makes of rounding."
    if quantity in IMAGE: return IMAGE[quantity]
    kinks = quantity in ('grad_norm', 'moved backbone', 'moved text') and RUNS[case]['backbone'].startswith('wrn')
    return max((2e-2 if kinks else 1e-4)*abs(value), 1e-6)


def rows(case, found):
    "Rows of the file for a case, from the numbers that each processor found."
    for quantity in found[0]:
        low, high = (end(o[quantity] for o in found) for end in (min, max))
        value = (low + high)/2
        yield case, quantity, f'{value:.8g}', f'{max(10*(high - low), least(case, quantity, value)):.2g}'


def accept(cases):
    "Measure cases as every kind of processor that this one can be, and write their rows."
    path = os.pathsep.join([str(GOLDEN.parents[1]), os.environ.get('PYTHONPATH', '')])
    environment = dict(os.environ, LICO_DEVICE='cpu', OMP_NUM_THREADS='1', PYTHONPATH=path)
    command, found = [sys.executable, __file__, '--print', *cases], []
    for processor in PROCESSORS:
        said = subprocess.run(command, env={**environment, **processor}, stdout=subprocess.PIPE, check=True).stdout
        found.append(json.loads(said))
    head, *kept = [row for row in csv.reader(GOLDEN.open(encoding='utf-8')) if row[0] not in cases]
    new = [row for case in cases for row in rows(case, [o[case] for o in found])]
    with GOLDEN.open('w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerows([head, *sorted(kept + new, key=lambda row: CASES.index(row[0]))])


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--accept', nargs='*', default=[], metavar='CASE', choices=CASES)
    parser.add_argument('--print', nargs='*', metavar='CASE')
    arguments = parser.parse_args()
    if arguments.print is not None: print(json.dumps(measured(arguments.print)))
    elif cases := [case for case in CASES if case in arguments.accept or case not in read()]: accept(cases)
