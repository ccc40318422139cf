"""lico.data and lico.batches against PIL, torchvision and scikit-learn themselves; other processes, damaged trees, and
every refusal."""
import contextlib, dataclasses, hashlib, inspect, io, itertools, os, re, shutil, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFile
from lico import batches as batches_module, data as data_module
from lico.config import derive_seed
from lico.data import Files, Images, load
from lico.batches import augment, test_batches as plain_batches, training_batch, training_batches
from lico.datasets import READERS

seeded = lambda seed=0: torch.Generator().manual_seed(seed)

def write_tree(folder, classes=('cat', 'dog', 'old_owl'), n=6, parts=('train/', 'test/'), size=8):
    "Images whose red channel is the position of their class in `classes`, whose green channel is their number."
    for part in parts:
        for c, name in enumerate(classes):
            (folder/part/name).mkdir(parents=True)
            for i in range(n):
                Image.new('RGB', (size, size), (10*c, i, 200*part.startswith('te'))).save(folder/part/name/f'{i}.png')
    return folder

@pytest.fixture
def tree(tmp_path): return write_tree(tmp_path/'tree')

@pytest.fixture
def bare(tmp_path): return write_tree(tmp_path/'bare', parts=('',), n=10)

def refusal(*args, **kwargs):
    "What `load` says when it refuses: one sentence on one line."
    with pytest.raises((ValueError, FileNotFoundError)) as e: load(*args, **kwargs)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400
    return str(e.value)

# digits

def test_digits_are_scikit_learns_with_its_labels():
    from sklearn.datasets import load_digits
    known = load_digits()
    label_of = {(image*255/16).round().astype(np.uint8).tobytes(): y for image, y in zip(known.images, known.target)}
    d = load('digits', image_size=8)
    assert (len(d.train), len(d.test), d.image_size, d.flip) == (1297, 500, 8, False)
    x, y = torch.cat([d.train.x, d.test.x]), torch.cat([d.train.y, d.test.y])
    assert (x[:, :1] == x).all() and sorted(label_of) == sorted({o.numpy().tobytes() for o in x[:, 0]})
    assert [label_of[o.numpy().tobytes()] for o in x[:, 0]] == y.tolist()
    assert d.class_names == tuple(str(n) for n in known.target_names)

def test_digits_split_is_stratified_and_fixed():
    d = load('digits')
    assert (d.image_size == 16 and d.train.x.shape == (1297, 3, 16, 16) and d.train.x.dtype == torch.uint8
            and d.train.y.dtype == torch.int64)
    total = d.train.y.bincount() + d.test.y.bincount()
    assert ((d.test.y.bincount() - total*500/1797).abs() <= 1).all()
    assert torch.equal(d.test.x, load('digits', labels=40, seed=5).test.x)

# labelled subsets

@settings(deadline=None, max_examples=25)
@given(k=st.integers(1, 120), seed=st.integers(-3, 2**40), more=st.integers(0, 6))
def test_subsets_are_balanced_nested_and_whole_in_test(k, seed, more):
    small, large, whole = (load('digits', labels=10*k, seed=seed), load('digits', shots=k + more, seed=seed),
                           load('digits'))
    keys = lambda part: {x.numpy().tobytes() for x in part.x}
    assert small.train.y.bincount().tolist() == [k]*10 and large.train.y.bincount().tolist() == [k + more]*10
    assert keys(small.train) <= keys(large.train) <= keys(whole.train) and len(keys(small.train)) == 10*k
    assert torch.equal(small.test.x, whole.test.x)
    assert (small.digest, small.mean, small.std) == (whole.digest, whole.mean, whole.std)

def test_subset_depends_on_the_seed_and_all_means_all():
    assert not torch.equal(load('digits', labels=40, seed=0).train.x, load('digits', labels=40, seed=1).train.x)
    assert len(load('digits', labels='all').train) == len(load('digits', labels='all', shots=None).train) == 1297
    assert torch.equal(load('digits', labels=40).train.x, load('digits', shots=4).train.x)
    position = {x.numpy().tobytes(): i for i, x in enumerate(load('digits').train.x)}
    order = [position[x.numpy().tobytes()] for x in load('digits', labels=250).train.x]
    assert order == sorted(order)

def test_every_image_is_drawn_about_equally_often():
    train, drawn = load('digits').train, torch.zeros(1297)
    position = {x.numpy().tobytes(): i for i, x in enumerate(train.x)}
    for seed in range(200):
        for x in load('digits', shots=60, seed=seed).train.x: drawn[position[x.numpy().tobytes()]] += 1
    share = 60/train.y.bincount()[train.y]
    z = (drawn - 200*share)/(200*share*(1 - share)).sqrt()
    assert z.abs().max() < 5 and 0.8 < z.std() < 1.2

# independence of process and listing order

def fingerprints(names):
    "Per dataset: digest, hash of the labelled subset, names."
    found = (load(name, shots=3, seed=11) for name in names)
    return '\n'.join(f'{d.digest} {hashlib.sha256(d.train.x.numpy()).hexdigest()} {d.class_names}' for d in found)

def test_another_process_finds_the_same(tree, bare):
    names = ['digits', f'folder:{tree}', f'folder:{bare}']
    code = f"""import hashlib; from lico.data import load
{inspect.getsource(fingerprints)}
print(fingerprints({names}))"""
    env = {**os.environ, 'PYTHONHASHSEED': '1', 'OMP_NUM_THREADS': '1'}
    there = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
    assert there == f'{fingerprints(names)}\n'

@pytest.mark.parametrize('order', [lambda o: o[::-1], lambda o: o[1:] + o[:1]])
def test_listing_order_does_not_matter(tree, bare, monkeypatch, order):
    scandir = os.scandir
    before = [load(f'folder:{f}', shots=3) for f in (tree, bare)]
    @contextlib.contextmanager
    def reordered(path):
        with scandir(path) as entries: yield iter(order(sorted(entries, key=lambda e: e.name)))
    monkeypatch.setattr(os, 'scandir', reordered)
    data_module._whole.cache_clear()
    for old, new in zip(before, [load(f'folder:{f}', shots=3) for f in (tree, bare)]):
        assert (old.train.x is not new.train.x and torch.equal(old.train.x, new.train.x)
                and torch.equal(old.train.y, new.train.y))
        assert old.digest == new.digest and old.class_names == new.class_names == ('cat', 'dog', 'old owl')

# folders

def test_labels_follow_folders(tree):
    d = load(f'folder:{tree}')
    assert d.class_names == ('cat', 'dog', 'old owl') and d.flip and d.image_size == 8 and d.name == f'folder:{tree}'
    for part, blue in ((d.train, 0), (d.test, 200)):
        assert (torch.equal(part.x[:, 0, 0, 0].long(), 10*part.y) and (part.x[:, 2] == blue).all()
                and part.y.bincount().tolist() == [6]*3)

def test_bare_tree_is_split_four_to_one_in_each_class(bare):
    d = load(f'folder:{bare}')
    assert d.train.y.bincount().tolist() == [8]*3 and d.test.y.bincount().tolist() == [2]*3
    assert (torch.equal(d.train.x[:, 0, 0, 0].long(), 10*d.train.y)
            and torch.equal(d.test.x[:, 0, 0, 0].long(), 10*d.test.y))
    numbers = [[int(x[1, 0, 0]) for x, y in zip(torch.cat([d.train.x, d.test.x]), torch.cat([d.train.y, d.test.y]))
                if y == c] for c in range(3)]
    # chosen by hash, not by position
    assert [sorted(o) for o in numbers] == [list(range(10))]*3 and len({tuple(o) for o in numbers}) > 1

def test_digest_is_of_content_only(tree, tmp_path):
    digest = lambda folder=tree: load(f'folder:{folder}').digest
    first = digest()
    assert re.fullmatch('[0-9a-f]{64}', first) and load(f'folder:{tree}', shots=2, seed=3).digest == first
    assert digest(shutil.copytree(tree, tmp_path/'elsewhere')) == first

    for part in ('train', 'test'):
        changed = shutil.copytree(tree, tmp_path/f'pixel_{part}')
        image = Image.open(path := changed/part/'dog'/'3.png')
        image.putpixel((7, 0), (10, 3, 201 if part == 'test' else 1)); image.save(path)
        assert digest(changed) != first
    renamed = shutil.copytree(tree, tmp_path/'name')
    for part in ('train', 'test'): (renamed/part/'dog').rename(renamed/part/'doh')
    assert digest(renamed) != first

def test_digest_sees_one_label():
    d = load('digits')
    other = Images(d.train.x, d.train.y.clone()); other.y[5] = (other.y[5] + 1) % 10
    whole = lambda train, test: data_module._data('digits', train, test, d.class_names, False).digest
    assert whole(d.train, d.test) == d.digest != whole(other, d.test) and whole(d.test, d.train) != d.digest

def test_replaced_file_is_seen_and_an_unchanged_tree_is_read_once(tree):
    first = load(f'folder:{tree}')
    read = data_module._whole.cache_info().misses
    assert torch.equal(load(f'folder:{tree}', labels=3).test.x, first.test.x)
    assert data_module._whole.cache_info().misses == read
    Image.new('RGB', (8, 8), (10, 250, 0)).save(tree/'train'/'dog'/'0.png')
    assert load(f'folder:{tree}').digest != first.digest

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'RGB'])
def test_modes_become_rgb(tree, mode):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3), np.uint8)).convert(mode)
    path = tree/'train'/'cat'/('0.tif' if mode == 'CMYK' else '0.png')
    (tree/'train'/'cat'/'0.png').unlink(); noise.save(path)
    assert np.array_equal(load(f'folder:{tree}').train.x[0].permute(1, 2, 0),
                          np.asarray(Image.open(path).convert('RGB')))

def test_sizes(tree):
    with_one = lambda *size: Image.new('RGB', size).save(tree/'test'/'cat'/'5.png')
    assert load(f'folder:{tree}', image_size=5).train.x.shape == (18, 3, 5, 5)
    with_one(8, 10); assert load(f'folder:{tree}').image_size == 224
    with_one(300, 300); assert load(f'folder:{tree}').image_size == 224
    with_one(8, 8); assert load(f'folder:{tree}').image_size == 8

def test_short_side_is_resized_and_the_centre_cut_out(tree):
    wide = np.zeros((16, 48, 3), np.uint8); wide[:, 16:32] = np.random.RandomState(0).randint(0, 256, (16, 16, 3))
    Image.fromarray(wide).save(tree/'train'/'cat'/'0.png')
    assert np.array_equal(load(f'folder:{tree}', image_size=16).train.x[0].permute(1, 2, 0), wide[:, 16:32])
    smaller = np.asarray(Image.fromarray(wide).resize((36, 12), Image.Resampling.BICUBIC))[:, 12:24]
    assert np.array_equal(load(f'folder:{tree}', image_size=12).train.x[0].permute(1, 2, 0), smaller)

def test_stray_files_hidden_files_and_deeper_images(tree):
    first = load(f'folder:{tree}').digest
    (tree/'train'/'cat'/'Thumbs.db').write_text('x', encoding='utf-8'); (tree/'train'/'cat'/'._0.png').write_text('x',
        encoding='utf-8')
    (tree/'train'/'.cache').mkdir(); (tree/'train'/'.cache'/'0.png').write_text('x', encoding='utf-8')
    (tree/'train'/'0.png').write_text('x', encoding='utf-8')
    (tree/'train'/'dog'/'6').mkdir(); (tree/'train'/'dog'/'5.png').rename(tree/'train'/'dog'/'6'/'0.PNG')
    assert load(f'folder:{tree}').digest == first

# refusals

def test_labels_and_names_are_refused_by_number():
    assert refusal('/my/images') == "dataset '/my/images' looks like a path: a folder of images is folder:/my/images"
    assert refusal('digits', labels=39) == 'labels = 39 cannot be shared evenly by 10 classes: ask for 30 or 40'
    assert refusal('digits', labels=4) == 'labels = 4 cannot be shared evenly by 10 classes: ask for 10'
    assert refusal('digits', labels=40, shots=4) == 'labels = 40 and shots = 4 were both given: give one of them'
    smallest = load('digits').train.y.bincount()
    message = refusal('digits', shots=500)
    assert f"class '{smallest.argmin()}' has {smallest.min()} training images and 500 " in message
    assert f'ask for at most {10*smallest.min()} labels or {smallest.min()} shots' in message
    assert len(load('digits', labels=10*int(smallest.min())).train) == 10*smallest.min()
    for bad in (0, -10, 2.5, True, '40'): assert 'expected a whole number' in refusal('digits', labels=bad)
    for bad in (0, -1, 1.5): assert f'shots = {bad}: expected a whole number' in refusal('digits', shots=bad)
    for bad in (0, 16.0, '16'):
        assert f'image_size = {bad!r}: expected a whole number' in refusal('digits', image_size=bad)
    known = ', '.join([*READERS, 'folder:PATH'])
    assert refusal('cifar') == f"unknown dataset 'cifar': choose one of {known}; did you mean cifar10?"

def test_trees_are_refused_by_name(tree, bare, tmp_path):
    assert f'no folder {tmp_path}/nowhere' in refusal(f'folder:{tmp_path}/nowhere')
    (tmp_path/'empty').mkdir(); assert f'no images found in {tmp_path}/empty' in refusal(f'folder:{tmp_path}/empty')
    (bare/'fox').mkdir(); Image.new('RGB', (8, 8)).save(bare/'fox'/'0.png')
    assert 'fewer images than the 2 they need: fox (1);' in refusal(f'folder:{bare}')
    (tree/'train'/'fox').mkdir(); assert 'only in train: fox:' in refusal(f'folder:{tree}')
    (tree/'test'/'emu').mkdir(); assert 'only in train: fox; only in test: emu:' in refusal(f'folder:{tree}')
    (tree/'train'/'emu').mkdir(); (tree/'test'/'fox').mkdir()
    assert 'they need: train/emu (0), train/fox (0), test/emu (0) and 1 more;' in refusal(f'folder:{tree}')
    shutil.rmtree(tree/'test'); assert 'has a folder train but none named test' in refusal(f'folder:{tree}')
    (tree/'train').rename(tree/'test'); assert 'has a folder test but none named train' in refusal(f'folder:{tree}')
    assert "has only one class, 'cat'" in refusal(f"folder:{write_tree(tmp_path/'one', ('cat',))}")
    assert "without what nobody sees: 'a b', 'a_b';" in refusal(
        f"folder:{write_tree(tmp_path/'twice', ('a b', 'a_b', 'c'))}")

@pytest.mark.parametrize('tolerant', [False, True])
def test_damaged_images_are_named_and_counted(tree, monkeypatch, tolerant):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', tolerant)
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3), np.uint8))
    for name, part in (('a.jpg', 0.7), ('b.png', 0.5), ('c.jpg', 0.), ('d.bmp', 0.9)):
        noise.save(buffer := io.BytesIO(), 'jpeg' if name.endswith('jpg') else name[2:])
        (tree/'train'/'dog'/name).write_bytes(buffer.getvalue()[:int(part*buffer.tell())])
    message = refusal(f'folder:{tree}')
    assert re.search(r'4 of 40 images in .*train/dog/a.jpg \(.*train/dog/b.png \(.*train/dog/c.jpg \(.* and 1 more; '
                     r'replace or remove them$', message)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant

def test_thirty_two_bits_are_refused(tree):
    Image.fromarray(np.full((8, 8), .5, np.float32)).save(tree/'train'/'cat'/'a.tif')
    assert ('1 of 37 images' in (message := refusal(f'folder:{tree}'))
            and 'train/cat/a.tif (mode F has 32 bits a pixel, of which nobody knows what is white' in message)

# boxes

def test_boxes_come_in_the_order_of_the_test_images(tree):
    paths = sorted(tree.glob('test/*/*'), key=lambda p: p.name)
    box = lambda p: (int(p.stem) % 8, 1, 7, len(p.parent.name))
    rows = [','.join(map(str, (*box(p)[::-1], 'any', p.relative_to(tree).as_posix()))) for p in paths]
    (tree/'boxes.csv').write_text('\n'.join(['y1,x1,y0,x0,wnid,file', *rows]), encoding='utf-8')
    found, d = data_module.test_boxes(f'folder:{tree}'), load(f'folder:{tree}')
    assert found.dtype == torch.int64 and found[:, 0].tolist() == (d.test.x[:, 1, 0, 0] % 8).tolist()
    assert (found[:, 3].tolist() == [len(d.class_names[y]) for y in d.test.y]
            and set(found[:, 2].tolist()) == {7})

def test_boxes_are_refused_by_name(tree):
    def said(kind):
        with pytest.raises(kind) as e: data_module.test_boxes(f'folder:{tree}')
        return str(e.value)
    assert 'has no boxes.csv: expected one there' in said(FileNotFoundError)
    with pytest.raises(FileNotFoundError, match='digits has no boxes.csv'): data_module.test_boxes('digits')
    for content, sentence in (
            ('file,x0,y0,x1,y1\ntest/cat/0.png,1,2,3,4', 'has no box for every test image ('),
            ('', 'has no column file and no x0 and no x1'), ('file,x0,y0,x1\n', 'has no column y1: expected file, x0'),
            ('path,x0,y0,x1,y1\ntest/cat/0.png,1,2,3,4', 'has no column file: '),
            ('file,x0,y0,x1,y1\n../cat/0.png,1,2,3,4', "names the file '../cat/0.png', which leads out of its folder"),
            ('file,x0,y0,x1,y1\na.png,1,2,3,4\na.png,1,2,3,5', "names the file 'a.png' twice")):
        (tree/'boxes.csv').write_text(content, encoding='utf-8')
        assert sentence in said(ValueError)
    (tree/'boxes.csv').write_text('\n'.join(
        ['file,x0,y0,x1,y1', *(f'{p.relative_to(tree).as_posix()},1,2,3,x' for p in tree.glob('test/*/*'))]),
        encoding='utf-8')
    assert "'x'" in said(ValueError)

@pytest.mark.parametrize('box', ['1,2,8,3', '1,2,3,8', '-1,2,3,4', '4,2,3,4', '1,4,3,3'])
def test_boxes_outside_of_their_image_are_refused(tree, box):
    (tree/'boxes.csv').write_text('\n'.join(
        ['file,x0,y0,x1,y1', *(f'{p.relative_to(tree).as_posix()},{box}' for p in tree.glob('test/*/*'))]),
        encoding='utf-8')
    with pytest.raises(ValueError, match='which has 8 x 8 pixels: expected 0 <= x0 <= x1 < width') as e:
        data_module.box_masks(f'folder:{tree}', load(f'folder:{tree}'), [0])
    assert '\n' not in str(e.value)

# augmentation

batches = st.tuples(st.integers(1, 5), st.integers(2, 7), st.booleans(), st.integers(0, 2**32)).flatmap(
    lambda o: st.tuples(*map(st.just, o), st.integers(0, o[1] - 1)))

@settings(deadline=None, max_examples=40)
@given(batches)
def test_crops_are_windows_of_the_reflected_image(batch):
    B, S, flip, seed, pad = batch
    x = torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8, generator=seeded(seed))
    out = augment(x, seeded(seed), pad, flip)
    assert (out.shape == x.shape and out.dtype == torch.uint8 and out.is_contiguous()
            and torch.equal(out, augment(x, seeded(seed), pad, flip)))
    for image, crop in zip(x.numpy(), out.numpy()):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), 'reflect')
        windows = [padded[:, t:t + S, l:l + S] for t in range(2*pad + 1) for l in range(2*pad + 1)]
        assert any(np.array_equal(crop, w) or flip and np.array_equal(crop, w[..., ::-1]) for w in windows)

def test_every_window_and_both_directions_are_equally_likely():
    S, pad, n = 9, 2, 20_000
    x = torch.arange(S*S, dtype=torch.uint8).view(1, 1, S, S).expand(n, 3, S, S)  # every pixel tells where it stood
    out = augment(x, seeded(), pad, flip=True)[:, 0]
    mirrored = out[:, 4, 5] < out[:, 4, 4]
    where = (out[:, 4, 4].long() - 4*S - 4)
    top, left = (where + 2) // S, (where + 2) % S - 2
    assert abs(mirrored.float().mean() - 0.5) < 5*0.5/n**0.5
    counts = torch.bincount(((top + 2)*5 + left + 2)*2 + mirrored, minlength=50)
    # chi-squared, 49 degrees of freedom
    assert len(counts) == 50 and ((counts - n/50)**2/(n/50)).sum() < 49 + 6*98**0.5

def test_augment_defaults_and_refusals():
    x = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=seeded())
    assert (torch.equal(augment(x, seeded(1)), augment(x, seeded(1), pad=2))
            and torch.equal(augment(x, seeded(1), pad=0), x))
    assert not torch.equal(augment(x, seeded(1)), augment(x, seeded(2)))
    for pad in (-1, 16):
        with pytest.raises(ValueError, match=f'pad = {pad} for images of 16 pixels: expected a number from 0 to 15'):
            augment(x, seeded(), pad)

def test_normalise_is_torchvisions():
    from torchvision.transforms.v2 import functional as F
    d = load('digits')
    assert torch.allclose(d.normalise(d.test.x),
                          F.normalize(F.to_dtype(d.test.x, torch.float32, scale=True), d.mean, d.std), atol=1e-6)
    whole = d.train.x.double()/255
    assert np.allclose(d.mean, whole.mean((0, 2, 3))) and np.allclose(d.std, whole.std((0, 2, 3), correction=0))

def test_training_batch_composes():
    d, index = load('digits', labels=250), torch.tensor([3, 7, 7, 249])
    x, y = training_batch(d, index, seeded(5))
    assert torch.equal(x, d.normalise(augment(d.train.x[index], seeded(5)))) and torch.equal(y, d.train.y[index])
    noisy, _ = training_batch(d, torch.arange(250), seeded(5), noise=0.3)
    noise = noisy - training_batch(d, torch.arange(250), seeded(5))[0]
    assert abs(noise.std() - 0.3) < 0.003 and abs(noise.mean()) < 0.003

def test_mirrors_only_where_allowed(tree):
    arrow = np.zeros((8, 8, 3), np.uint8); arrow[:, :4] = 255
    for name in ('cat', 'dog', 'old_owl'):
        for i in range(6): Image.fromarray(arrow).save(tree/'train'/name/f'{i}.png')
    d, index = load(f'folder:{tree}'), torch.arange(18).repeat(5)
    # the upper left pixel, which no shift by one pixel makes dark
    light = lambda d: training_batch(d, index, seeded())[0][:, 0, 0, 0] > 0
    assert 0.2 < light(d).float().mean() < 0.8 and light(dataclasses.replace(d, flip=False)).all()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_sees_the_same_batch():
    d, index = load('digits'), torch.arange(100)
    here, there = (training_batch(d, index, seeded(), noise=0.1, device=o) for o in ('cpu', 'cuda'))
    assert (there[0].is_cuda and torch.allclose(here[0], there[0].cpu(), atol=1e-5)
            and torch.equal(here[1], there[1].cpu()))
    x = d.train.x[:100]
    assert torch.equal(augment(x, seeded(), flip=True), augment(x.cuda(), seeded(), flip=True).cpu())

# validation

@settings(deadline=None, max_examples=15)
@given(k=st.integers(1, 60), labels=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_validation_images_are_held_out_whatever_the_seed(k, labels, seed):
    d, whole = load('digits', labels=10*labels, seed=seed, validation=10*k), load('digits')
    keys = lambda part: {x.numpy().tobytes() for x in part.x}
    assert d.test.y.bincount().tolist() == [k]*10 and d.train.y.bincount().tolist() == [labels]*10
    assert (keys(d.test) <= keys(whole.train) and not keys(d.test) & keys(d.train)
            and not keys(d.test) & keys(whole.test))
    assert torch.equal(d.test.x, load('digits', seed=seed + 1, validation=10*k).test.x)
    assert ((d.digest, d.mean, d.std) == (whole.digest, whole.mean, whole.std)
            and len(load('digits', validation=10*k).train) == 1297 - 10*k)

def test_validation_is_refused():
    assert refusal('digits', validation=39) == 'validation = 39 cannot be shared evenly by 10 classes: ask for 30 or 40'
    smallest = int(load('digits').train.y.bincount().min())
    assert f'ask for at most {10*(smallest - 1)}' in refusal('digits', validation=10*smallest)
    assert load('digits', validation=10*(smallest - 1)).train.y.bincount().min() == 1
    for bad in (0, -10, 10.0, 'all'):
        assert f'validation = {bad!r}: expected a whole number' in refusal('digits', validation=bad)
    assert 'has 26 training images and 30 of each class' in refusal('digits', validation=1000, shots=30)

# images on disk

@pytest.fixture
def photos(tmp_path):
    "Noise of several sizes, as JPEG, in three classes of train and test."
    rng = np.random.RandomState(0)
    for part, n in (('train', 5), ('test', 3)):
        for name in ('cat', 'dog', 'old_owl'):
            (tmp_path/'photos'/part/name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.randint(0, 256, (9, 12, 3),
                                                    np.uint8)).resize((100 + 30*i, 120), Image.Resampling.BICUBIC)
                image.save(tmp_path/'photos'/part/name/f'{i}.jpg')
    return tmp_path/'photos'

def with_workers(monkeypatch, n): monkeypatch.setattr(batches_module, '_workers', lambda _: n)

def test_large_images_stay_on_disk(photos):
    d = load(f'folder:{photos}')
    assert (isinstance(d.train, Files) and isinstance(d.test, Files) and d.image_size == 224
            and d.class_names == ('cat', 'dog', 'old owl'))
    assert (len(d.train), len(d.test)) == (15, 9) and d.train.y.tolist() == sum(([c]*5 for c in range(3)), [])
    assert [os.fsdecode(p) for p in d.train.paths[:6]] == [*(f'train/cat/{i}.jpg' for i in range(5)), 'train/dog/0.jpg']
    assert str(d.train) == '15 image files' and d.mean == (0.485, 0.456, 0.406) and d.std == (0.229, 0.224, 0.225)
    for index in (torch.tensor([3, 7]), slice(3, 8, 4), torch.arange(15) % 4 == 3):
        part = d.train[index]
        assert len(part) == len(part.paths) == len(part.y) and part.paths[0] == b'train/cat/3.jpg' and part.y[0] == 0
    few, held = load(f'folder:{photos}', shots=2, seed=1), load(f'folder:{photos}', validation=3)
    assert few.train.y.tolist() == [0, 0, 1, 1, 2, 2] and few.digest == d.digest and np.array_equal(
        few.test.paths, d.test.paths)
    assert (len(held.train) == 12 and held.test.y.tolist() == [0, 1, 2] and not {*held.test.paths} & {*held.train.paths}
            and {*held.test.paths} < {*d.train.paths})
    assert (isinstance(load(f'folder:{photos}', image_size=64).train, Images)
            and isinstance(load(f'folder:{photos}', image_size=65).train, Files))

def test_size_of_large_squares_is_kept(photos):
    for path in photos.rglob('*.jpg'): Image.new('RGB', (80, 80)).save(path)
    assert load(f'folder:{photos}').image_size == 80
    Image.new('RGB', (80, 81)).save(photos/'test'/'dog'/'0.jpg')
    assert load(f'folder:{photos}').image_size == 224 and load(f'folder:{photos}', image_size=100).image_size == 100

def test_testing_is_what_torchvisions_weights_ask_for(photos, monkeypatch):
    from torchvision.models import ResNet50_Weights
    d, transform = load(f'folder:{photos}'), ResNet50_Weights.IMAGENET1K_V1.transforms()
    want = torch.stack([transform(Image.open(photos/os.fsdecode(p))) for p in d.test.paths])
    for n in (0, 2):
        with_workers(monkeypatch, n)
        got = list(plain_batches(d, d.test, 4))
        assert [len(x) for x in got] == [4, 4, 1] and got[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(torch.cat(got), want, atol=1e-5)

def test_batches_do_not_depend_on_workers(photos, monkeypatch):
    d = load(f'folder:{photos}', image_size=72)
    schedule = [(torch.randperm(15, generator=seeded(k))[:6], 100 + k % 3) for k in range(5)]
    def batches(n, **kwargs):
        with_workers(monkeypatch, n)
        return list(training_batches(d, iter(schedule), **kwargs))
    state = torch.get_rng_state()
    for noise in (0., 0.2):
        here, there = batches(0, noise=noise), batches(2, noise=noise)
        assert len(here) == 5 and torch.equal(torch.get_rng_state(), state)
        for (x, y), (a, b), (index, _) in zip(here, there, schedule):
            assert (torch.equal(x, a) and torch.equal(y, b) and torch.equal(y, d.train.y[index])
                    and y.dtype == torch.int64)
            assert (x.shape == (6, 3, 72, 72) and x.dtype == torch.float32
                    and x.is_contiguous(memory_format=torch.channels_last))
        for k, n in ((0, 0), (1, 2)):
            for (x, y), (a, b) in zip(here, batches(n, noise=noise, share=slice(k, None, 2))):
                assert torch.equal(x[k::2], a) and torch.equal(y[k::2], b)
    noise = here[0][0] - batches(0)[0][0]
    assert abs(noise.std() - 0.2) < 0.002 and abs(noise.mean()) < 0.002
    repeated = list(training_batches(d,
                                     [(torch.tensor([4, 4]), 7), (torch.tensor([4, 4]), 8), (torch.tensor([4, 4]), 7)]))
    assert torch.equal(repeated[0][0], repeated[2][0])
    # another place or another seed is another window
    assert len({x.numpy().tobytes() for batch, _ in repeated[:2] for x in batch}) == 4

def test_training_is_torchvisions_recipe(photos):
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F
    d, index = load(f'folder:{photos}', image_size=72), torch.tensor([8, 2, 14])
    for flip in (True, False):
        x, _ = next(training_batches(dataclasses.replace(d, flip=flip), [(index, 31)]))
        for k, i in enumerate(index):
            torch.manual_seed(derive_seed(31, 'image', k))
            image = v2.RandomResizedCrop(72)(Image.open(photos/os.fsdecode(d.train.paths[i])))
            if flip: image = v2.RandomHorizontalFlip()(image)
            want = F.normalize(F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), d.mean, d.std)
            assert torch.allclose(x[k], want, atol=1e-5)

@pytest.mark.parametrize('workers', [0, 2])
def test_schedule_is_taken_lazily_and_its_errors_come_through(photos, monkeypatch, workers):
    with_workers(monkeypatch, workers)
    d, taken = load(f'folder:{photos}', image_size=72), []
    endless = ((taken.append(k) or torch.tensor([k % 15]), k) for k in itertools.count())
    assert [int(y) for _, y in itertools.islice(training_batches(d, endless), 8)] == [0]*5 + [1]*3 and len(taken) < 16
    def broken():
        yield torch.tensor([0]), 0
        raise ValueError('a batch of 1 images cannot be shared')
    with pytest.raises(ValueError, match='^a batch of 1 images cannot be shared$'): list(training_batches(d, broken()))

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('tolerant', [False, True])
def test_a_damaged_file_is_named_at_once_or_when_it_is_met(photos, monkeypatch, workers, tolerant):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', tolerant)
    with_workers(monkeypatch, workers)
    path = photos/'train'/'dog'/'1.jpg'
    path.write_bytes(path.read_bytes()[:-500])
    assert re.search(r'^1 of 24 images in .* cannot be read: train/dog/1.jpg \(.*\); replace or remove them$',
                     refusal(f'folder:{photos}'))
    monkeypatch.setattr(data_module, '_most_to_check', 5)
    d = load(f'folder:{photos}')
    assert len(list(training_batches(d, [(torch.tensor([5]), 0)]))) == 1
    with pytest.raises(ValueError) as e: list(training_batches(d, [(torch.tensor([5, 6]), 0)]))
    assert (re.fullmatch(rf'train/dog/1.jpg in {photos} cannot be read \(.*\): replace or remove it', str(e.value))
            and ImageFile.LOAD_TRUNCATED_IMAGES is tolerant)
    with pytest.raises(ValueError, match='train/dog/1.jpg in '): list(plain_batches(d, d.train, 4))

def test_digest_of_files_is_of_their_bytes_in_order_labels_and_names(photos, tmp_path):
    digest = lambda folder: load(f'folder:{folder}').digest
    first, copies = digest(photos), iter(range(9))
    copy = lambda: shutil.copytree(photos, tmp_path/f'copy{next(copies)}', copy_function=shutil.copyfile)
    assert re.fullmatch('[0-9a-f]{64}', first) and digest(copy()) == first
    renamed = copy()
    for path in sorted(renamed.rglob('*.jpg')): path.rename(path.with_name(f'photo {path.name}'))
    assert digest(renamed) == first  # other names, the same order: the same images are drawn
    (swapped := copy()/'test'/'cat'/'0.jpg').rename(swapped.with_name('9.jpg'))
    bit = bytearray((flipped := copy()/'test'/'cat'/'0.jpg').read_bytes()); bit[-3] ^= 1
    flipped.write_bytes(bit)  # as many bytes as before
    (moved := copy()); (moved/'train'/'cat'/'0.jpg').rename(moved/'train'/'dog'/'9.jpg')
    for part in ('train', 'test'): (photos/part/'dog').rename(photos/part/'doh')
    assert len({first, digest(swapped.parents[2]), digest(flipped.parents[2]), digest(moved), digest(photos)}) == 5

def test_images_in_memory_go_through_training_batch():
    d = load('digits', labels=250)
    schedule = [(torch.arange(k, k + 9), k) for k in range(4)]
    for (x, y), (index, seed) in zip(training_batches(d, iter(schedule), noise=0.1, share=slice(1, None, 3)), schedule,
                                     strict=True):
        a, b = training_batch(d, index, seeded(seed), noise=0.1)
        assert (torch.equal(x, a[1::3]) and torch.equal(y, b[1::3])
                and x.is_contiguous(memory_format=torch.channels_last))
    got = list(plain_batches(d, d.test[:100], 64))
    assert ([len(x) for x in got] == [64, 36] and torch.equal(torch.cat(got), d.normalise(d.test.x[:100]))
            and got[1].is_contiguous(memory_format=torch.channels_last))

def test_process_ends_with_workers_at_work(photos):
    code = f"""import itertools, torch
from lico import batches, data
batches._workers = lambda n: 2
d = data.load('folder:{photos}', image_size=72)
found = batches.training_batches(d, ((torch.arange(15), k) for k in itertools.count()))
print(next(found)[0].shape)"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert (p.returncode, p.stdout, p.stderr) == (0, 'torch.Size([15, 3, 72, 72])\n', '')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_sees_the_same_files(photos, monkeypatch):
    d, schedule = load(f'folder:{photos}', image_size=72), [(torch.arange(15), k) for k in range(3)]
    here = list(training_batches(d, schedule, noise=0.1))
    with_workers(monkeypatch, 2)
    for (x, y), (a, b) in zip(here, training_batches(d, schedule, noise=0.1, device='cuda'), strict=True):
        assert a.is_cuda and b.is_cuda and torch.allclose(x, a.cpu(), atol=1e-5) and torch.equal(y, b.cpu())
        assert a.is_contiguous(memory_format=torch.channels_last)
