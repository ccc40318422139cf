"The practitioner's guide, on what it brings along and on a folder of one's own."
import os, subprocess, sys
from pathlib import Path

import nbformat, numpy as np, pandas as pd, pytest, torch
from PIL import Image

from lico.config import root
from lico.model import load_network

TOP = root()


def guide(tmp_path, *args):
    env = {**os.environ, 'LICO_ROOT': str(tmp_path), 'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run([Path(sys.executable).with_name('papermill'), TOP/'nbs'/'your_data.ipynb', 'x.ipynb', '-p',
                           'profile', 'smoke', *args], cwd=tmp_path, env=env, capture_output=True, text=True)


def outputs(tmp_path):
    return '\n'.join(str(o.get('text') or [*o.get('data', {}).values()])
                     for c in nbformat.read(tmp_path/'x.ipynb', 4).cells if c.cell_type == 'code' for o in c.outputs)


@pytest.mark.slow  # a network of 224 pixels' kind; the folder below goes the same way in seconds
def test_guide_from_start_to_end(tmp_path):
    "Images are cut, halves do not mix, two networks are trained and compared, and one is shipped."
    p = guide(tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    out = tmp_path/'data'/'your_data'
    assert len(list((out/'images'/'train').glob('*/*.png'))) == len(list((out/'images'/'test').glob('*/*.png'))) == 192
    assert pd.read_csv(out/'log.csv').network.tolist() == ['CE', 'LICO'] and not (tmp_path/'figures').exists()
    shipped = load_network(out/'network')
    assert shipped.class_names[0] == 'brick wall' and shipped.preprocessing['mean'] == [0.5]*3


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


@pytest.mark.parametrize('size', ['32', pytest.param('72', marks=pytest.mark.slow)])
def test_guide_on_a_folder_of_ones_own(tmp_path, size):
    "Two seeds, from scratch, another place to write to; what is shipped is as good as the table says of it."
    corners(tmp_path/'mine')
    (tmp_path/'mine'/'boxes.csv').write_text('file,x0,y0,x1,y1\n' + '\n'.join(
        f'{part}/{name}_light/{i:02}.png,4,0,15,47' for part, n in (('train', 12), ('test', 30))
        for name in ('red', 'green', 'blue') for i in range(n)), encoding='utf-8')
    p = guide(tmp_path, '-p', 'folder', str(tmp_path/'mine'), '-p', 'backbone', 'wrn_10_1', '-p', 'seeds', '0,1', '-p',
              'epochs', '1', '-p', 'image_size', size, '-p', 'flip', 'no', '-p', 'out', str(tmp_path/'out'))
    assert p.returncode == 0, p.stderr[-3000:]
    text, table = outputs(tmp_path), pd.read_csv(tmp_path/'out'/'accuracy.csv').set_index('network')
    assert 'train 36 images' in text.replace('image files', 'images') and 'on 6 held-out images, 2 seeds' in text
    assert set(pd.read_csv(tmp_path/'out'/'log.csv').groupby(['network', 'seed']).groups) == {
        (a, s) for a in ('CE', 'LICO') for s in (0, 1)}
    assert pd.read_csv(tmp_path/'out'/'scores.csv').pointing_game.notna().any() and list(table.index) == [
        'probe', 'CE', 'LICO']
    shipped = load_network(tmp_path/'out'/'network')
    exec((tmp_path/'out'/'network'/'preprocess.py').read_text(encoding='utf-8'), theirs := {})
    files = sorted((tmp_path/'mine'/'test').glob('*/*'))
    with torch.no_grad(): found = shipped.net(torch.stack([theirs['preprocess'](Image.open(f)) for f in files]))
    right = [shipped.class_names[i].split()[0] == f.parent.name.split('_')[0]
             for i, f in zip(found.argmax(1).tolist(), files)]
    assert shipped.class_names == ('blue light', 'green light', 'red light') and np.mean(right) > .5
    assert not (tmp_path/'data'/'your_data').exists()


def test_guide_refuses_what_it_does_not_know(tmp_path):
    p = guide(tmp_path, '-p', 'dataset', 'mine')
    assert p.returncode and "unknown parameter of your_data: 'dataset': choose one of profile, out, folder" in p.stderr


def test_guide_refuses_maps_of_few_positions(tmp_path):
    "Before anything is trained."
    corners(tmp_path/'mine', (('train', 4), ('test', 2)))
    p = guide(tmp_path, '-p', 'folder', str(tmp_path/'mine'), '-p', 'image_size', '64')
    assert (p.returncode and 'maps of 2 x 2 places at 64 pixels' in p.stderr and 'such as -p image_size 128' in p.stderr
            and not (tmp_path/'data'/'your_data'/'log.csv').exists())
