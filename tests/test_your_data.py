"The practitioner's guide, on what it brings along and on a folder of one's own."
import re

import nbformat, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from scipy import stats

from lico.backbones import create_backbone
from lico.config import options_from, preset, root
from lico.data import load
from lico.evidence.recipe import (accuracy_table, cases_by_answer, decide, fit_last_layer, grid_side, hold_out,
                                  over_seeds, set_temperatures, starting_network)
from lico.losses import LossOptions
from lico.model import LICO
from lico.shipping import load_network
from lico.saliency import explain
from lico.text import PromptLearner, load_text_encoder
from lico.training import fit, predict
from test_notebooks import papermill, run

TOP = root()


def guide(tmp_path, *args):
    return papermill('your_data.ipynb', '-p', 'profile', 'smoke', *args, cwd=tmp_path, lico_root=tmp_path,
                     output='x.ipynb')


def outputs(tmp_path):
    return '\n'.join(str(o.get('text') or [*o.get('data', {}).values()])
                     for c in nbformat.read(tmp_path/'x.ipynb', 4).cells if c.cell_type == 'code' for o in c.outputs)


@pytest.mark.slow
def test_guide_from_start_to_end(tmp_path):
    "Images are cut, halves do not mix, two networks are trained and compared, and one is shipped."
    p = guide(tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    out = tmp_path/'data'/'smoke'/'your_data'
    assert [len(list((out/'patches'/part).glob('*/*.png'))) for part in ('train', 'test')] == [192, 192]
    assert pd.read_csv(out/'log.csv').network.tolist() == ['CE', 'LICO'] and not (tmp_path/'figures').exists()
    shipped = load_network(out/'network')
    assert shipped.class_names[0] == 'brick wall' and shipped.preprocessing['mean'] == [0.5]*3
    assert 'network/s]' not in (text := outputs(tmp_path)) and 'step/s]' not in text, 'bars are gone from the page'


def corners(folder, parts=(('train', 12), ('test', 30))):
    "Three classes, told apart by a colour at the border."
    rng = np.random.default_rng(0)
    for part, n in parts:
        for c, name in enumerate(('red_light', 'green_light', 'blue_light')):
            (folder/part/name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 120, (48, 64, 3), np.uint8)
                image[:, 4:16, c] += 100
                Image.fromarray(image).save(folder/part/name/f'{i:02}.png')


@pytest.mark.slow
@pytest.mark.parametrize('size, seeds', [('32', (0, 1)), ('72', (0,))])
def test_guide_on_a_folder_of_ones_own(tmp_path, size, seeds):
    "From scratch, one seed and two, another place to write to; what is shipped is as good as its table says."
    corners(tmp_path/'mine')
    (tmp_path/'mine'/'boxes.csv').write_text('file,x0,y0,x1,y1\n' + '\n'.join(
        f'{part}/{name}_light/{i:02}.png,4,0,15,47' for part, n in (('train', 12), ('test', 30))
        for name in ('red', 'green', 'blue') for i in range(n)), encoding='utf-8')
    p = guide(tmp_path, '-p', 'folder', str(tmp_path/'mine'), '-p', 'backbone', 'wrn_10_1', '-p', 'seeds',
              ','.join(map(str, seeds)), '-p',
              'epochs', '1', '-p', 'image_size', size, '-p', 'flip', 'no', '-p', 'out', str(tmp_path/'out'))
    assert p.returncode == 0, p.stderr[-3000:]
    text, table = outputs(tmp_path), pd.read_csv(tmp_path/'out'/'accuracy.csv').set_index('network')
    assert 'train 36 images' in text.replace('image files', 'images')
    assert f'on 6 held-out images, {len(seeds)} seed' in text
    assert set(pd.read_csv(tmp_path/'out'/'log.csv').groupby(['network', 'seed']).groups) == {
        (a, s) for a in ('CE', 'LICO') for s in seeds}
    assert pd.read_csv(tmp_path/'out'/'scores.csv').pointing_game.notna().any() and list(table.index) == [
        'probe', 'CE', 'LICO']
    shipped = load_network(tmp_path/'out'/'network')
    exec((tmp_path/'out'/'network'/'preprocess.py').read_text(encoding='utf-8'), theirs := {})
    files = sorted((tmp_path/'mine'/'test').glob('*/*'))
    with torch.no_grad(): found = shipped.net(torch.stack([theirs['preprocess'](Image.open(f)) for f in files]))
    right = [shipped.class_names[i].split()[0] == f.parent.name.split('_')[0]
             for i, f in zip(found.argmax(1).tolist(), files)]
    assert shipped.class_names == ('blue light', 'green light', 'red light')
    told = table.accuracy['LICO' if 'ship LICO' in text else 'CE']
    assert np.mean(right) > .5 if len(seeds) > 1 else abs(100*np.mean(right) - told) < .06
    assert not (tmp_path/'data'/'smoke').exists()


@pytest.mark.slow
def test_guide_refuses_what_it_does_not_know(lico_root):
    with pytest.raises(ValueError, match="unknown parameter of your_data: 'dataset': choose one of profile, out, fold"):
        run('your_data', profile='smoke', dataset='mine')


@pytest.mark.slow
def test_guide_refuses_maps_of_few_positions(lico_root):
    "Before anything is trained."
    corners(lico_root/'mine', (('train', 4), ('test', 2)))
    with pytest.raises(ValueError, match='maps of 2 x 2 places at 64 pixels.*such as -p image_size 128'):
        run('your_data', profile='smoke', folder=str(lico_root/'mine'), image_size='64')
    assert not (lico_root/'data'/'smoke'/'your_data'/'log.csv').exists()


def folder_of(top, counts, parts=('train', 'test'), size=(48, 64), mode='RGB', names=('red', 'green', 'blue')):
    "Classes of so many images in each part, told apart by a colour at the border."
    rng = np.random.default_rng(0)
    for part in parts:
        for c, (name, n) in enumerate(zip(names, counts)):
            (top/part/name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 120, (*size, 3), np.uint8)
                image[:, :size[1]//4, c] += 100
                Image.fromarray(image).convert(mode).save(top/part/name/f'{i:02}.png')
    return f'folder:{top}'


@pytest.mark.slow
@pytest.mark.parametrize('text', [False, True])
def test_what_the_readme_shows_runs(text, tmp_path):
    "Its lines as they stand, for one epoch, and with what the comment says: cross-entropy alone."
    code = re.search(r'```python\n(.*?)```', (TOP/'README.md').read_text(encoding='utf-8'), re.S)[1]
    code = code.replace('folder:/path/to/images', folder_of(tmp_path, (32, 32))).replace('epochs=10', 'epochs=1')
    if not text:
        code, changed = re.subn(r'LICO\(.*#\s*or (.*)', r'\1', code.replace('import LICO', 'import CrossEntropy'))
        assert changed == 1
    names = {}
    exec(code, names)
    assert type(names['model']).__name__ == ('LICO' if text else 'CrossEntropy')
    assert names['maps'].shape == (8, 224, 224) and 0 <= names['maps'].min() and names['maps'].max() <= 1


@pytest.mark.parametrize('made', [
    dict(counts=(40, 3, 3)), dict(counts=(3, 3, 3)), dict(counts=(12, 12, 12), mode='L'),
    dict(counts=(8, 8), mode='LA'),
    dict(counts=(12, 12, 12), size=(16, 16)), dict(counts=(9, 9), names=('my  cat', 'a b c')),
    dict(counts=(9, 5, 4), parts=('',))],
    ids=['unequal', 'three each', 'grey', 'grey and alpha', 'tiny', 'blanks', 'no parts'])
def test_the_recipe_on_awkward_folders(made, tmp_path):
    "From the folder to a decision; each class is trained on twice and held out once at least."
    whole = load(folder_of(tmp_path, **made), image_size=32, flip=False)
    kept, K = hold_out(whole), len(whole.class_names)
    assert kept.train.y.bincount().min() >= 2 and kept.test.y.bincount(minlength=K).min() >= 1
    assert (kept.train.y.bincount() + kept.test.y.bincount()).equal(whole.train.y.bincount())
    net, data = starting_network('wrn_10_1', kept)
    fit_last_layer(net, data)
    model = LICO(net, PromptLearner(load_text_encoder('minilm'), whole.class_names, n_context=2),
                 options_from(LossOptions, preset('transfer')))
    set_temperatures(model, data, 16)
    taus = model.tau.value.clone()
    fit(model, data, steps=3, preset='transfer', progress=False)
    assert taus.isfinite().all() and model.tau.value.equal(taus)
    right = (predict(model.backbone, data, data.test) == data.test.y).numpy()[None]
    assert decide(dict(CE=right, LICO=right)).ship == 'CE' and accuracy_table(
        dict(probe=right, CE=right, LICO=right)).network.tolist() == ['probe', 'CE', 'LICO']


@pytest.mark.parametrize('counts, parts, said', [
    ((8, 1, 8), ('train', 'test'), r'fewer than 3 training images: green \(1\); two are needed to train on and one'),
    ((2, 2, 2), ('train', 'test'), r'images: blue \(2\), green \(2\), red \(2\); two are needed'),
    ((3, 9, 9), ('',), r'images: red \(2\); two are needed'),
    ((8,), ('train', 'test'), 'has only one class'), ((8, 1), ('',), r'fewer images than the 2 they need: green \(1\)'),
    ((8, 8), ('train',), 'has a folder train but none named test'), ((8, 8), ('test',), 'but none named train')])
def test_what_cannot_be_trained_on_is_refused_in_a_sentence(counts, parts, said, tmp_path):
    place = folder_of(tmp_path, counts, parts)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as e: hold_out(load(place))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, size', [('wrn_10_1', 32), ('test_vit', 64), ('swin_tiny_patch4_window7_224', 128)])
def test_a_random_map_is_as_coarse_as_the_cam(name, size):
    "As many places a side: within one, a map is that of a pixel enlarged."
    torch.manual_seed(0)
    net, x = create_backbone(name, 3, size).eval(), torch.randn(1, 3, size, size)
    side = grid_side(net)
    for saliency, options in (('grad-cam', {}), ('random', dict(cells=side))):
        m = explain(net, x, torch.tensor([0]), saliency, **options)[0]
        # a bilinear enlargement of side x side places is linear between the places' centres
        row, step = m[size//2], size//side
        bends = (row[2:] - 2*row[1:-1] + row[:-2]).abs() > 1e-4*max(1e-9, float(row.max() - row.min()))
        at = (bends.nonzero()[:, 0] + 1 + .5) % step
        assert ((at - step/2).abs() <= 1).all() and bends.sum() >= side - 2, name


def test_the_table_and_the_decision_know_a_gain_from_a_loss():
    "A gain that one of three seeds has alone is sure for other images, and not for other seeds."
    ce, lico = np.arange(400)[None] < 200, np.arange(400)[None] < 300
    t = accuracy_table(dict(CE=ce, LICO=lico)).set_index('network').loc['LICO']
    low, high = stats.binomtest(300, 400).proportion_ci(method='wilson')
    assert t['less CE, over images'].startswith(f'{100*100/402:+.1f} ± ')  # Bonett and Price
    assert t.interval == f'{100*low:.1f} to {100*high:.1f}'
    one = np.concatenate([np.arange(400)[None] < 399, ce, ce])
    three = dict(CE=np.repeat(ce, 3, 0), LICO=one)
    e, own = over_seeds(one, three['CE']), stats.ttest_1samp([199/4, 0, 0], 0).confidence_interval()
    assert e.mean - e.half_width == pytest.approx(own.low) and e.mean + e.half_width == pytest.approx(own.high)
    assert decide(three).ship == 'CE' and decide(three).reason.startswith('cannot tell')
    assert decide(dict(CE=three['CE'], LICO=np.repeat(lico, 3, 0))).ship == 'LICO'


def test_a_linear_probe_of_two_classes(tmp_path):
    "Of which scikit-learn tells one: its sign decides which."
    net, data = starting_network('wrn_10_1', load(folder_of(tmp_path, (12, 12)), image_size=32, flip=False))
    fit_last_layer(net, data)
    assert (predict(net, data, data.train) == data.train.y).double().mean() > .9


def test_cases_that_all_networks_get_right():
    data, nets = load('digits', labels=100), {s: create_backbone('wrn_10_1', 10, 16) for s in 'ab'}
    for net in nets.values(): fit_last_layer(net.eval(), data)
    a, b = (predict(net, data, data.test) == data.test.y for net in nets.values())
    found = cases_by_answer(nets, data, images=500)
    for kind, wanted in {'all right': a & b, 'not all right': ~(a & b)}.items():
        assert {int(o) for o in found[kind]['a'].names} == set(wanted.nonzero()[:, 0].tolist())
    assert (a ^ b).any()


def test_what_the_recipe_starts_from():
    "Statistics of few images are not learned, windows show half; what is held out is not what comes first."
    data = load('digits', labels=100, image_size=128)
    net, seen = starting_network('tf_efficientnet_lite0', data)
    assert seen.crop == .5 and not any(m.training for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    first = torch.cat([(data.train.y == c).nonzero()[:2, 0] for c in range(10)]).sort()[0]
    assert not torch.equal(hold_out(data).test.x, data.train.x[first])
