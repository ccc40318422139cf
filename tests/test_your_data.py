"The practitioner's guide, on what it brings along and on a folder of one's own."
import json, os, subprocess, sys
from pathlib import Path

import nbformat, numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from safetensors import safe_open

from lico.backbones import create_backbone
from lico.config import root

TOP = root()


def guide(tmp_path, *args):
    env = {**os.environ, 'LICO_ROOT': str(tmp_path), 'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run([Path(sys.executable).with_name('papermill'), TOP/'nbs'/'your_data.ipynb', 'x.ipynb', '-p',
                           'profile', 'smoke', *args], cwd=tmp_path, env=env, capture_output=True, text=True)


def outputs(tmp_path):
    return '\n'.join(str(o.get('text') or [*o.get('data', {}).values()])
                     for c in nbformat.read(tmp_path/'x.ipynb', 4).cells if c.cell_type == 'code' for o in c.outputs)


def test_guide_from_start_to_end(tmp_path):
    """Images are cut, halves do not mix, three networks are trained, and what is shipped gives its logits with timm
    alone."""
    p = guide(tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    out = tmp_path/'data'/'your_data'
    assert (not (tmp_path/'figures').exists()
            and {'images', 'results.csv', 'classifier.safetensors'} <= {f.name for f in out.iterdir()})
    assert len(list((out/'images'/'train').glob('*/*.png'))) == len(list((out/'images'/'test').glob('*/*.png'))) == 96
    df = pd.read_csv(out/'results.csv')
    assert df.method.tolist() == ['CE', 'paper', 'repaired'] and df.tau.notna().sum() == 2
    with safe_open(out/'classifier.safetensors', 'pt') as f:
        weights, about = {k: f.get_tensor(k) for k in f.keys()}, {k: json.loads(v) for k, v in f.metadata().items()}
    net = timm.create_model(about['architecture'], num_classes=len(about['class_names'])).eval()
    net.load_state_dict(weights)
    with torch.no_grad():
        np.testing.assert_allclose(net(torch.from_numpy(np.load(out/'x.npy'))), np.load(out/'logits.npy'), rtol=1e-3,
                                   atol=1e-3)
    assert ('lico imported: False' in outputs(tmp_path) and about['class_names'][0] == 'brick wall'
            and about['mean'] == [0.5]*3)


def squares(folder):
    "Images of 32 pixels, three classes."
    rng = np.random.default_rng(0)
    for c, name in enumerate(('red_square', 'green_square', 'blue_square')):
        (folder/name).mkdir(parents=True)
        for i in range(10):
            image = rng.integers(0, 60, (32, 32, 3), np.uint8)
            image[8:24, 8:24, c] = 220
            Image.fromarray(image).save(folder/name/f'{i}.png')


def test_guide_on_a_folder_of_ones_own(tmp_path):
    "Other images, classes with underscores, another network, two seeds, another place to write to."
    squares(tmp_path/'mine')
    p = guide(tmp_path, '-p', 'folder', str(tmp_path/'mine'), '-p', 'backbone', 'wrn_10_1', '-p', 'seeds', '0,1', '-p',
              'epochs', '1', '-p', 'out', str(tmp_path/'out'))
    assert p.returncode == 0, p.stderr[-3000:]
    df, text = pd.read_csv(tmp_path/'out'/'results.csv'), outputs(tmp_path)
    assert (sorted(df.seed) == [0, 0, 0, 1, 1, 1] and (df.step == 2).all() and 'train 24 images' in text
            and 'points in 2 pairs' in text)
    with safe_open(tmp_path/'out'/'classifier.safetensors', 'pt') as f:
        assert json.loads(f.metadata()['class_names']) == ['blue square', 'green square', 'red square']
    assert not (tmp_path/'data').exists()


@pytest.mark.slow  # tests/test_pixels.py has the same in seconds, without the notebook
@pytest.mark.parametrize('size', ['32', '72'])
def test_what_is_shipped_has_the_accuracy_of_the_log(tmp_path, size):
    "At sizes at which images are kept in memory and at which they stay on disk; mirroring is off if asked for."
    rng = np.random.default_rng(0)
    for part, n in (('train', 8), ('test', 30)):
        for c, name in enumerate(('red', 'green', 'blue')):
            (tmp_path/'mine'/part/name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 120, (48, 64, 3), np.uint8); image[:, 4:9, c] += 100  # at the border
                Image.fromarray(image).save(tmp_path/'mine'/part/name/f'{i:02}.png')
    p = guide(tmp_path, '-p', 'folder', str(tmp_path/'mine'), '-p', 'backbone', 'wrn_10_1', '-p', 'steps', '3',
              '-p', 'image_size', size, '-p', 'flip', 'no', '-p', 'out', str(tmp_path/'out'))
    assert p.returncode == 0, p.stderr[-3000:]
    with safe_open(tmp_path/'out'/'classifier.safetensors', 'pt') as f: weights = {k: f.get_tensor(k) for k in f.keys()}
    net = create_backbone('wrn_10_1', 3, int(size)).eval(); net.load_state_dict(weights)
    exec((tmp_path/'out'/'preprocess.py').read_text(encoding='utf-8'), shipped := {})
    names, files = ('blue', 'green', 'red'), sorted((tmp_path/'mine'/'test').glob('*/*'))
    with torch.no_grad(): found = net(torch.stack([shipped['preprocess'](Image.open(f))
                                                   for f in files])).argmax(1).tolist()
    right = 100*np.mean([names[i] == f.parent.name for i, f in zip(found, files)])
    logged = pd.read_csv(tmp_path/'out'/'results.csv').set_index('method').test_accuracy['repaired']
    assert abs(right - logged) < 1e-4 and 'def preprocess(image)' in outputs(tmp_path)


def test_guide_refuses_what_it_does_not_know(tmp_path):
    p = guide(tmp_path, '-p', 'dataset', 'mine')
    assert p.returncode and "unknown parameter of your_data: 'dataset': choose one of profile, out, folder" in p.stderr


def test_guide_refuses_maps_of_one_position(tmp_path):
    "Before anything is trained; the remedy it names was tried."
    squares(tmp_path/'mine')
    p = guide(tmp_path, '-p', 'folder', str(tmp_path/'mine'))
    assert (p.returncode and 'one position at 32 pixels' in p.stderr and 'such as -p image_size 128' in p.stderr
            and not (tmp_path/'data'/'your_data'/'results.csv').exists())
