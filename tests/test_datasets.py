"""lico.readers and lico.datasets: every dataset in a small copy of its layout; Fashion-MNIST where Debian put it,
CIFAR-10 where LICO_DATA says; every refusal."""
import gzip, hashlib, io, os, pickle, re, shutil, socket, struct, tarfile, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from lico import data as data_module, datasets, pixels, readers
from lico.config import dataset_settings
from lico.data import Files, dataset_name, load
from lico.datasets import file_bytes, find, image_hashes, pixel_bytes
from lico.listing import look_into
from lico.readers import imagenet_names

def refusal(name):
    "What `find` says when it refuses: one sentence on one line."
    with pytest.raises((ValueError, FileNotFoundError)) as e: find(name)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)

@pytest.fixture
def offline(tmp_path, monkeypatch):
    import urllib.error, urllib.request
    def no(*a, **k): raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', no); monkeypatch.setenv('LICO_ROOT', str(tmp_path))
    monkeypatch.setattr(readers, 'debian', tmp_path/'debian')
    data_module._whole.cache_clear()
    return tmp_path/'data'

def trust(monkeypatch):
    "Let torchvision take the tiny files that a test wrote for the real ones."
    import torchvision.datasets as datasets
    for module in (datasets.cifar, datasets.svhn, datasets.flowers102, datasets.imagenet):
        monkeypatch.setattr(module, 'check_integrity', lambda path, md5=None: os.path.isfile(path))
    monkeypatch.setattr(datasets.svhn, 'download_url', lambda *a, **k: None)

# refusals

DATASETS = dict(cifar10=('', 'could not download it (', 'cifar-10-python.tar.gz'),
                cifar100=('', 'could not download it (', 'cifar-100-python.tar.gz'),
                svhn=('', 'could not download it (', 'extra_32x32.mat'),
                fashion_mnist=('', 'could not download it (', 'dataset-fashion-mnist'),
                imagenet=('imagenet', 'may not download it (', 'ILSVRC2012_img_train.tar'),
                imagenette=('', 'could not download it (', 'imagenette2.tgz'),
                cub200=('CUB_200_2011', 'downloads it (', 'CUB_200_2011.tgz'),
                cars=('', 'can no longer download it (', 'stanford_cars/'),
                aircraft=('', 'could not download it (', 'fgvc-aircraft-2013b.tar.gz'),
                flowers102=('', 'could not download it (', 'flowers-102/jpg'))

def test_every_dataset_is_here(): assert {*DATASETS, 'digits'} == {*readers.READERS}

@pytest.mark.parametrize('name', DATASETS)
def test_no_network_no_file(offline, name):
    inside, deed, put = DATASETS[name]
    start, message = time.time(), refusal(name)
    library = 'no library' if name == 'cub200' else 'torchvision'
    assert (message.startswith(f'{name} is not in {(offline/inside)} and {library} {deed}') and put in message
            and time.time() - start < 10)
    assert ('no network' in message) == (name not in ('imagenet', 'cub200', 'cars'))

def test_a_silent_network_does_not_hang(offline, monkeypatch):
    silent = socket.create_server(('127.0.0.1', 0))  # takes connections and says nothing
    monkeypatch.undo(); monkeypatch.setenv('LICO_ROOT', str(offline.parent))
    monkeypatch.setattr(readers, 'patience', 1)
    from torchvision.datasets import CIFAR10
    monkeypatch.setattr(CIFAR10, 'url', f'http://127.0.0.1:{silent.getsockname()[1]}/x.tar.gz')
    start, before = time.time(), socket.getdefaulttimeout()
    assert 'timed out' in refusal('cifar10') and time.time() - start < 20 and socket.getdefaulttimeout() == before
    silent.close()

def test_broken_text_files_of_birds(offline):
    write_birds(offline/'CUB_200_2011')
    (offline/'CUB_200_2011'/'image_class_labels.txt').write_text('1 x\n', encoding='utf-8')
    assert 'cub200 is not in' in refusal('cub200')
    (offline/'CUB_200_2011'/'image_class_labels.txt').write_text('1 1\n', encoding='utf-8')
    assert 'cub200 is not in' in refusal('cub200')

# small images

@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_names_are_in_label_order(offline, monkeypatch, name):
    trust(monkeypatch)
    fine = name == 'cifar100'
    folder, files = (offline/'cifar-100-python', ['train', 'test']) if fine else (
        offline/'cifar-10-batches-py', [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch'])
    folder.mkdir(parents=True)
    names = ['zebra', 'apple', 'fire_truck']  # not alphabetical on purpose
    x = lambda k: np.stack([np.r_[np.full(1024, label), np.full(1024, k), np.arange(1024) % 32]
                            for label in (2, 0, 1)]).astype(np.uint8)
    for k, f in enumerate(files):
        (folder/f).write_bytes(pickle.dumps({'data': x(k), 'fine_labels' if fine else 'labels': [2, 0, 1]}))
    (folder/('meta' if fine else 'batches.meta')).write_bytes(pickle.dumps(
        {'fine_label_names' if fine else 'label_names': names}))
    d = load(name)
    assert d.class_names == ('zebra', 'apple', 'fire truck') and d.flip and d.image_size == 32
    assert (torch.equal(d.train.x[:, 0, 0, 0].long(), d.train.y) and (d.test.x[:, 1] == len(files) - 1).all()
            and len(d.test) == 3)
    assert torch.equal(d.train.x[0, 2], torch.arange(32, dtype=torch.uint8).expand(32, 32))  # rows and columns in place
    assert load(name, image_size=16).train.x.shape == (len(d.train), 3, 16, 16)

def test_svhn_ten_is_zero_and_extra_is_training_data(offline, monkeypatch):
    from scipy.io import savemat
    trust(monkeypatch)
    offline.mkdir()
    for k, part in enumerate(('train', 'extra', 'test')):
        y = np.array([10, 1, 9])
        x = np.stack([np.stack([np.full((32, 32), v), np.full((32, 32), k), np.tile(np.arange(32), (32, 1))], -1)
                      for v in y], -1).astype(np.uint8)
        savemat(offline/f'{part}_32x32.mat', {'X': x, 'y': y[:, None]})
    d = load('svhn')
    assert d.class_names == tuple('0123456789') and not d.flip and (len(d.train), len(d.test)) == (6, 3)
    assert (d.train.y.tolist() == [0, 1, 9]*2 and d.train.x[:, 0, 0, 0].tolist() == [10, 1, 9]*2
            and d.train.x[:, 1, 0, 0].tolist() == [0]*3 + [1]*3)
    assert ((d.test.x[:, 1] == 2).all()
            and torch.equal(d.train.x[0, 2], torch.arange(32, dtype=torch.uint8).expand(32, 32)))

def write_idx(folder, zipped):
    """Fashion-MNIST's four files: label 9, 0, 4, … in turn, pixel (0, 0) is the label, pixel (0, 1) the part, the
    rest counts columns."""
    folder.mkdir(parents=True)
    for k, part in enumerate(('train', 't10k')):
        y = np.array([9, 0, 4, 5], np.uint8)
        x = np.tile(np.arange(28, dtype=np.uint8), (4, 28, 1)); x[:, 0, 0], x[:, 0, 1] = y, k
        files = {f'{part}-images-idx3-ubyte': struct.pack('>4i', 2051, 4, 28, 28) + x.tobytes(),
                 f'{part}-labels-idx1-ubyte': struct.pack('>2i', 2049, 4) + y.tobytes()}
        for name, content in files.items():
            (folder/(name + '.gz'*zipped)).write_bytes(gzip.compress(content) if zipped else content)

@pytest.mark.parametrize('of_debian', [False, True])
def test_fashion_mnist(offline, of_debian):
    write_idx(readers.debian if of_debian else offline/'FashionMNIST'/'raw', of_debian)
    d = load('fashion_mnist')
    assert (d.class_names[9] == 'Ankle boot' and d.class_names[0] == 'T-shirt/top' and d.class_names[4] == 'Coat'
            and len(d.class_names) == 10 and d.flip)
    for k, part in enumerate((d.train, d.test)):
        assert part.y.tolist() == [9, 0, 4, 5] == part.x[:, 2, 0, 0].tolist() and (part.x[:, 0, 0, 1] == k).all()
        assert torch.equal(part.x[2, 1, 5], torch.arange(28, dtype=torch.uint8))

def test_debians_package_helps_after_a_download_that_failed(offline):
    refusal('fashion_mnist')  # torchvision leaves an empty folder behind
    write_idx(readers.debian, True)
    assert find('fashion_mnist').train.labels == [9, 0, 4, 5]

@pytest.mark.skipif(not readers.debian.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_fashion_mnist_is_what_torchvision_reads(tmp_path, lico_root, monkeypatch):
    debians, raw = find('fashion_mnist'), tmp_path/'data'/'FashionMNIST'/'raw'
    raw.mkdir(parents=True)
    for path in readers.debian.glob('*.gz'): (raw/path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    monkeypatch.setattr(readers, 'debian', tmp_path/'nowhere')
    torchvisions = find('fashion_mnist')
    for a, b, n in ((debians.train, torchvisions.train, 6000), (debians.test, torchvisions.test, 1000)):
        assert np.array_equal(a.images, b.images) and a.labels == b.labels and np.bincount(a.labels).tolist() == [n]*10
    # trousers are taller than sandals, bags fill more than trousers: names and pictures agree
    lit = {name: (debians.train.images[np.array(debians.train.labels) == c] > 30)
           for c, name in enumerate(debians.class_names)}
    assert (lit['Trouser'][:, 2].any(1).mean() > 0.9 > 0.2 > lit['Sandal'][:, 2].any(1).mean()
            and lit['Bag'].mean() > lit['Trouser'].mean() + 0.1)

# photographs: red is ten times the label, green is 0 for training and 200 for testing

def photo(path, label, test=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 30), (10*label, 200*test, 7)).save(path, 'png')  # whatever its name says; PIL looks inside

def check(name, class_names, n_train, n_test):
    "Names by label, pictures by label, parts; the same on disk and in memory."
    d, large = load(name, image_size=8), load(name)
    assert (d.class_names == large.class_names == tuple(class_names) and d.flip
            and (len(d.train), len(d.test)) == (n_train, n_test))
    for part, files, green in ((d.train, large.train, 0), (d.test, large.test, 200)):
        assert (torch.equal(part.x[:, 0, 4, 4].long(), 10*part.y) and (part.x[:, 1] == green).all()
                and torch.equal(part.y, files.y))
    assert (isinstance(large.train, Files) and large.image_size == 224
            and all((large.train.folder/os.fsdecode(p)).is_file() for p in large.train.paths))
    return large

def write_birds(folder):
    folder.mkdir(parents=True)
    rows = [(11, 2, 1), (4, 1, 0), (7, 3, 1), (9, 1, 1), (2, 2, 0), (3, 3, 0)]  # id, class from 1, for training?
    names = {1: '001.Black_footed_Albatross', 2: '002.Laysan_Albatross', 3: '010.Red_winged_Blackbird'}
    write = lambda name, lines: (folder/f'{name}.txt').write_text(''.join(f'{a} {b}\n' for a, b in lines),
                                                                  encoding='utf-8')
    write('classes', names.items()); write('images', [(i, f'{names[c]}/{i}.jpg') for i, c, _ in rows])
    write('image_class_labels', [(i, c) for i, c, _ in rows[::-1]])
    write('train_test_split', [(i, t) for i, _, t in sorted(rows)])
    for i, c, t in rows: photo(folder/'images'/names[c]/f'{i}.jpg', c - 1, not t)

def test_cub200(offline):
    write_birds(offline/'CUB_200_2011')
    d = check('cub200', ('Black footed Albatross', 'Laysan Albatross', 'Red winged Blackbird'), 3, 3)
    assert d.train.y.tolist() == [1, 2, 0] and d.train.paths[0] == b'images/002.Laysan_Albatross/11.jpg'
    (offline/'CUB_200_2011'/'images'/'002.Laysan_Albatross'/'2.jpg').unlink()
    data_module._whole.cache_clear()
    with pytest.raises(ValueError,
                       match='1 of 6 images in .*CUB_200_2011 cannot be read: images/002.Laysan_Albatross/2.jpg '):
        load('cub200')

def test_cars(offline):
    from scipy.io import savemat
    base, names = offline/'stanford_cars', ['AM General Hummer SUV 2000', 'Acura TL Sedan 2012', 'Volvo 240 Sedan 1993']
    (base/'devkit').mkdir(parents=True)
    savemat(base/'devkit'/'cars_meta.mat', {'class_names': np.array(names, object)[None]})
    kinds = [(o, 'O') for o in ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'fname')]
    for file, part, classes in (('devkit/cars_train_annos', 'cars_train', (3, 1, 2, 2)),
                                ('cars_test_annos_withlabels', 'cars_test', (2, 3, 1))):
        savemat(base/f'{file}.mat',
                {'annotations': np.array([(1, 1, 9, 9, c, f'{i:05}.jpg') for i, c in enumerate(classes)], kinds)[None]})
        for i, c in enumerate(classes): photo(base/part/f'{i:05}.jpg', c - 1, part == 'cars_test')
    assert check('cars', names, 4, 3).train.y.tolist() == [2, 0, 1, 1]

def test_aircraft(offline):
    base, names = offline/'fgvc-aircraft-2013b'/'data', ['707-320', 'F/A-18', 'Boeing 717', 'DC-3']  # not sorted
    base.mkdir(parents=True)
    (base/'variants.txt').write_text('\n'.join(names) + '\n', encoding='utf-8')
    for part, first in (('trainval', 0), ('test', 4)):
        (base/f'images_variant_{part}.txt').write_text(''.join(f'{first + k:07} {names[c]}\n'
                                                               for k, c in enumerate((3, 1, 0, 2))), encoding='utf-8')
        for k, c in enumerate((3, 1, 0, 2)): photo(base/'images'/f'{first + k:07}.jpg', c, part == 'test')
    assert check('aircraft', names, 4, 4).train.y.tolist() == [3, 1, 0, 2]

def test_flowers102(offline, monkeypatch):
    from scipy.io import savemat
    trust(monkeypatch)
    base, labels = offline/'flowers-102', [3, 1, 2, 3, 1, 2, 1, 2, 3]  # from 1, of images 1 to 9
    base.mkdir(parents=True)
    savemat(base/'imagelabels.mat', {'labels': np.array([labels])})
    savemat(base/'setid.mat',
            {'trnid': np.array([[2, 3, 4]]), 'valid': np.array([[1, 7, 6]]), 'tstid': np.array([[8, 9, 5]])})
    for i, c in enumerate(labels, 1): photo(base/'jpg'/f'image_{i:05}.jpg', c - 1, i in (8, 9, 5))
    from torchvision.datasets import Flowers102
    d = check('flowers102', Flowers102.classes, 6, 3)
    assert (d.class_names[:3] == ('pink primrose', 'hard-leaved pocket orchid', 'canterbury bells')
            and len(d.class_names) == 102)
    assert d.train.y.tolist() == [0, 1, 2, 2, 0, 1]

def test_imagenette(offline):
    names = dict(n01440764='tench', n02102040='English springer', n02979186='cassette player', n03000684='chain saw',
                 n03028079='church',
                 n03394916='French horn', n03417042='garbage truck', n03425413='gas pump', n03445777='golf ball',
                 n03888257='parachute')
    for label, wnid in enumerate(sorted(names)):
        for part in ('train', 'val'): photo(offline/'imagenette2'/part/wnid/f'{wnid}_1.JPEG', label, part == 'val')
    check('imagenette', [names[i] for i in sorted(names)], 10, 10)
    assert all(imagenet_names()[i] == name for i, name in names.items())  # torchvision and timm agree
    shutil.rmtree(offline/'imagenette2'/'val')
    assert 'imagenette2 has a folder train but none named val' in refusal('imagenette')

def png(label, test):
    Image.new('RGB', (8, 8), (label % 250, label//250, 200*test)).save(buffer := io.BytesIO(), 'png')
    return buffer.getvalue()

def pack(path, members):
    with tarfile.open(path, 'w:gz' if path.name.endswith('gz') else 'w') as tar:
        for name, content in members:
            (info := tarfile.TarInfo(name)).size = len(content); tar.addfile(info, io.BytesIO(content))
    return path

@pytest.mark.slow
def test_imagenet_from_its_archives(offline, monkeypatch, tmp_path):
    "torchvision unpacks them; 1,000 classes, two training images and one for validation in all but a mixed-up order."
    from scipy.io import savemat
    trust(monkeypatch)
    folder, wnids = offline/'imagenet', list(imagenet_names())
    folder.mkdir(parents=True)
    # ILSVRC's own ids are in another order than the sorted WordNet ids
    order = np.random.RandomState(0).permutation(1000)
    kinds = [(o, 'O') for o in ('ILSVRC2012_ID', 'WNID', 'words', 'gloss', 'num_children')]
    savemat(tmp_path/'meta.mat',
            {'synsets': np.array([(k + 1, wnids[o], 'a word, another', 'gloss', 0)
                                  for k, o in enumerate(order)] + [(1001, 'n00001740', 'entity', 'gloss', 2)], kinds)})
    truth = np.random.RandomState(1).permutation(1000)
    pack(folder/'ILSVRC2012_devkit_t12.tar.gz',
         [('ILSVRC2012_devkit_t12/data/meta.mat', (tmp_path/'meta.mat').read_bytes()),
          ('ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt',
           ''.join(f'{k + 1}\n' for k in truth).encode())])
    pack(folder/'ILSVRC2012_img_val.tar',
         [(f'ILSVRC2012_val_{i:08}.JPEG', png(order[k], True)) for i, k in enumerate(truth, 1)])
    inner = [(f'{w}.tar', pack(tmp_path/f'{w}.tar', [(f'{w}_{i}.JPEG', png(c, False)) for i in range(2)]).read_bytes())
             for c, w in enumerate(wnids)]
    pack(folder/'ILSVRC2012_img_train.tar', inner)
    d = load('imagenet', image_size=8)
    value = lambda part: part.x[:, 0, 0, 0].long() + 250*part.x[:, 1, 0, 0].long()
    assert (torch.equal(value(d.train), d.train.y) and torch.equal(value(d.test), d.test.y)
            and (len(d.train), len(d.test)) == (2000, 1000))
    assert ((d.train.x[:, 2] == 0).all() and (d.test.x[:, 2] == 200).all()
            and d.class_names[:2] == ('tench', 'goldfish') and d.class_names[134] == 'crane bird')
    large = load('imagenet')
    assert (isinstance(large.test, Files) and torch.equal(large.train.y, d.train.y) and large.image_size == 224
            and large.class_names == d.class_names)
    for part in ('train', 'val'): shutil.rmtree(folder/part/wnids[5])
    assert 'has 999 class folders, not the 1,000 WordNet ids' in refusal('imagenet')

def test_imagenet_names_are_readable_and_unique():
    from timm.data import ImageNetInfo
    names, info = imagenet_names(), ImageNetInfo('imagenet-1k')
    assert list(names) == sorted(names) == info.label_names() and len({name.lower() for name in names.values()}) == 1000
    changed = {i for i, name in names.items() if name != info.label_name_to_description(i).split(',')[0]}
    # crane and maillot, twice each, and the Cardigan that is a dog
    assert changed == {'n02012849', 'n02113186', 'n03126707', 'n03710637', 'n03710721'}
    assert not any('_' in name or name != name.strip() for name in names.values())

# known by their pixels

NAMES = ('apple', 'fire_truck', 'zebra')

def tiny(seed=0, n=7, size=32):
    "Noise in three classes: {part: (images, labels)}, in an order of no meaning."
    rng = np.random.RandomState(seed)
    return {part: (rng.randint(0, 256, (3*n, size, size, 3), np.uint8), rng.permutation(3*n) % 3)
            for part in ('train', 'test')}

def write_archive(folder, parts, names=NAMES):
    "The images as CIFAR-10's archive holds them: 1,024 reds, greens and blues each; the training images in five files."
    folder.mkdir(parents=True)
    (folder/'batches.meta').write_bytes(pickle.dumps({'label_names': list(names)}))
    rows = {part: x.transpose(0, 3, 1, 2).reshape(len(x), -1) for part, (x, _) in parts.items()}
    write = lambda f, part, which: (folder/f).write_bytes(pickle.dumps({'data': rows[part][which],
                                                                        'labels': parts[part][1][which].tolist()}))
    for i, which in enumerate(np.array_split(np.arange(len(rows['train'])), 5), 1):
        write(f'data_batch_{i}', 'train', which)
    write('test_batch', 'test', slice(None))

def write_folder(folder, parts, seed=0, ending='png', names=NAMES):
    "The images as an image tree, under names drawn at random."
    rng = np.random.RandomState(seed)
    for part, (x, y) in parts.items():
        for name in names: (folder/part/name).mkdir(parents=True)
        for image, label, name in zip(x, y, rng.permutation(10*len(x))):
            Image.fromarray(image).save(folder/part/names[label]/f'{name}.{ending}')
    return folder

def by_loop(folder):
    "The content of an image tree by a plain loop over its files."
    sha = lambda path: hashlib.sha256(np.asarray(Image.open(path).convert('RGB')).tobytes()).hexdigest()
    rows = [f"{p.parts[-3]}/{p.parts[-2].replace('_', ' ')}/{sha(p)}" for p in folder.glob('*/*/*')]
    return hashlib.sha256('\n'.join(sorted(rows)).encode()).hexdigest()

@pytest.fixture
def known(offline, monkeypatch):
    "A project whose `cifar10` is tiny: its archive and two folders of other names, order and format."
    trust(monkeypatch)
    mine = write_folder(offline.parent/'mine', tiny(), 1)
    ini = (Path(__file__).parents[1]/'settings.ini').read_text(encoding='utf-8')
    change = lambda key, value, text: re.sub(rf'(\[dataset\.cifar10\][^\[]*\n{key} = ).*', rf'\g<1>{value}', text)
    (offline.parent/'settings.ini').write_text(change('images', '21, 21', change('content', by_loop(mine), ini)),
                                               encoding='utf-8')
    write_archive(offline/'cifar-10-batches-py', tiny())
    return mine, write_folder(offline.parent/'cats and dogs', tiny(), 2, 'bmp')

@pytest.mark.parametrize('asked', [dict(), dict(labels=6, seed=3), dict(labels=6, seed=4), dict(shots=2, validation=6),
                                   dict(image_size=16)])
def test_a_folder_of_a_known_datasets_pixels_is_that_dataset(known, asked):
    archive, *folders = load('cifar10', **asked), *(load(f'folder:{f}', **asked) for f in known)
    for d in folders:
        assert (d.name, d.digest, d.class_names, d.flip, d.image_size, d.mean, d.std) == (
            'cifar10', archive.digest, ('apple', 'fire truck', 'zebra'), True, archive.image_size, archive.mean,
            archive.std)
        for part in ('train', 'test'):
            a, b = getattr(d, part), getattr(archive, part)
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert dataset_settings(d.name)['paper_name'] == 'CIFAR-10'
    assert [dataset_name(f'folder:{f}') for f in known] == ['cifar10']*2

def test_by_their_names_the_files_would_give_others(known):
    by_name = [[f.split('/')[-1].split('.')[0] for f, _ in look_into(o).images] for o in known]
    assert by_name[0] != by_name[1]
    kinds = [readers.read_folder(o, look_into(o)) for o in known]
    first = [np.asarray(Image.open(o/s.train.images[0])) for o, s in zip(known, kinds)]
    assert not np.array_equal(*first)  # so the test above is one

def test_nearly_a_known_dataset_is_a_folder(known):
    mine, n = known[0], iter(range(99))
    copy = lambda: shutil.copytree(mine, mine.parent/f'copy{next(n)}')
    image = next(iter(sorted((pixel := copy()).glob('train/zebra/*'))))
    other = np.array(Image.open(image)); other[5, 7, 1] ^= 1; Image.fromarray(other).save(image)
    for part in ('train', 'test'): ((renamed := mine.parent/'renamed')/part).mkdir(parents=True)
    for o in mine.glob('*/*'): shutil.copytree(o, renamed/o.parent.name/o.name.replace('zebra', 'zebras'))
    label = copy(); a, b = (sorted(label.glob(f'train/{name}/*'))[0] for name in ('apple', 'zebra'))
    a.rename(b.parent/'new.png'); b.rename(a.parent/'new.png')
    parts = copy(); a, b = (sorted(parts.glob(f'{part}/zebra/*'))[0] for part in ('train', 'test'))
    a.rename(b.parent/'new.png'); b.rename(a.parent/'new.png')
    fewer = copy(); sorted(fewer.glob('test/zebra/*'))[0].unlink()
    for name in (f'folder:{folder}' for folder in (pixel, renamed, label, parts, fewer)):
        assert load(name).name == dataset_name(name) == name
    assert load(f'folder:{copy()}').name == 'cifar10'

def test_a_known_dataset_on_disk_keeps_its_order_too(known):
    large = [load(f'folder:{f}', image_size=100, labels=6) for f in known]
    assert all(isinstance(d.train, Files) and d.name == 'cifar10' for d in large) and large[0].digest == large[1].digest
    for part in ('train', 'test'):
        one, other = (getattr(d, part) for d in large)
        a, b = ([np.asarray(Image.open(o.folder/os.fsdecode(p))) for p in o.paths] for o in (one, other))
        assert (len(a) == (6 if part == 'train' else 21) and all(map(np.array_equal, a, b))
                and torch.equal(one.y, other.y))

def test_only_folders_of_the_right_size_are_decoded_to_be_known(known, monkeypatch):
    other = write_folder(known[0].parent/'other', tiny(n=6))
    monkeypatch.setattr(datasets, 'image_hashes', lambda *a, **k: 1/0)
    assert dataset_name(f'folder:{other}') == f'folder:{other}' and dataset_name('cifar10') == 'cifar10'
    with pytest.raises(ZeroDivisionError): dataset_name(f'folder:{known[0]}')

def test_content_of_settings_is_of_64_digits_and_each_has_its_images():
    sections = {k: dataset_settings(k) for k in ('cifar10', 'cifar100-part', 'tiny-imagenet-100')}
    for o in sections.values():
        assert re.fullmatch('[0-9a-f]{64}', o['content']) and re.fullmatch(r'\d+, \d+', o['images'])
    part = sections['cifar100-part']
    assert ('paper_name' not in part and part['stand_in'] == 'CIFAR-100'
            and 'content' not in dataset_settings('cifar100'))

# hashes that are kept

@pytest.fixture
def counted(offline, monkeypatch):
    "A folder of 12 images, and the files that were opened since the last look."
    opened, read = [], pixels.open_image
    monkeypatch.setattr(datasets, '_enough', 5)
    monkeypatch.setattr(pixels, 'open_image',
                        lambda path: (opened.append(os.path.basename(path).decode()), read(path))[1])
    (folder := offline.parent/'images').mkdir()
    for i in range(12): Image.new('RGB', (8, 8), (i, 0, 0)).save(folder/f'{i}.png')
    files = [f'{i}.png' for i in range(12)]
    def look(of=pixel_bytes):
        opened.clear()
        return image_hashes(folder, files, of), sorted(opened)
    return folder, look, offline/'hashes'

def test_an_unchanged_file_is_read_once(counted):
    folder, look, kept = counted
    want = [hashlib.sha256(np.asarray(Image.open(folder/f'{i}.png')).tobytes()).hexdigest() for i in range(12)]
    assert (look() == (want, sorted(f'{i}.png' for i in range(12))) and look() == (want, [])
            and len(list(kept.iterdir())) == 1)
    os.utime(folder/'3.png', (1, 1)); assert look() == (want, ['3.png'])
    Image.new('RGB', (8, 8), (200, 0, 0)).save(folder/'4.png')
    changed, opened = look()
    assert changed[4] != want[4] and changed[:4] + changed[5:] == want[:4] + want[5:] and '4.png' in opened
    (folder/'5.png').unlink()
    with pytest.raises(ValueError, match='1 of 3 images in .* cannot be read: 5.png'): look()

def test_bytes_are_another_matter_than_pixels(counted):
    folder, look, kept = counted
    assert (look(file_bytes)[0] == [hashlib.sha256((folder/f'{i}.png').read_bytes()).hexdigest() for i in range(12)]
            != look()[0])
    assert len(list(kept.iterdir())) == 2 and look(file_bytes)[1] == look()[1] == []

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'\xff' + b,
                                    lambda b: b.replace(b'a', b'b', 70)])
def test_a_damaged_store_of_hashes_is_set_aside(counted, damage):
    _, look, kept = counted
    want, (file,) = look()[0], kept.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(RuntimeWarning, match='is damaged .* computing again'):
        assert look() == (want, sorted(f'{i}.png' for i in range(12)))
    assert look() == (want, [])

def test_where_nothing_may_be_written_nothing_is_kept(counted):
    _, look, kept = counted
    kept.parent.mkdir(exist_ok=True); kept.write_text('a file where the folder should be', encoding='utf-8')
    assert look() == look() and len(look()[1]) == 12

def test_few_hashes_are_not_kept(counted, monkeypatch):
    _, look, kept = counted
    monkeypatch.setattr(datasets, '_enough', 13)
    assert look()[0] == look()[0] and not kept.exists()

# CIFAR-10 itself

CIFAR10 = Path(os.environ.get('LICO_DATA', '.'))/'cifar10'

@pytest.mark.skipif(not (CIFAR10/'train').is_dir(), reason='needs CIFAR-10 as images in LICO_DATA/cifar10')
def test_cifar10_itself_in_a_folder_is_the_archives(offline, monkeypatch):
    "The archive is written from the folder's pixels in another order."
    trust(monkeypatch)
    d = load(f'folder:{CIFAR10}', labels=40, seed=7)
    assert d.name == 'cifar10' and d.train.y.bincount().tolist() == [4]*10 and d.test.y.bincount().tolist() == [1000]*10
    assert np.allclose(d.mean, (0.49139968, 0.48215841, 0.44653091), rtol=0, atol=5.1e-9)
    assert np.allclose(d.std, (0.24703223, 0.24348513, 0.26158784), rtol=0, atol=5.1e-9)
    whole, parts = load(f'folder:{CIFAR10}'), {}
    for part in ('train', 'test'):
        o = getattr(whole, part)
        order = torch.randperm(len(o), generator=torch.Generator().manual_seed(0))
        parts[part] = o.x[order].permute(0, 2, 3, 1).numpy(), o.y[order].numpy()
    write_archive(offline/'cifar-10-batches-py', parts, whole.class_names)
    archive = load('cifar10', labels=40, seed=7)
    assert (archive.digest == d.digest and torch.equal(archive.train.x, d.train.x)
            and torch.equal(archive.test.x, d.test.x))
