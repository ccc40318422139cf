"""lico.listing and lico.folders: what people, cameras, archives and systems leave in a folder of images; every way to
write a split, every link, every name; and what is said of it."""
import os, socket, subprocess, sys, unicodedata
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from lico import data as data_module
from lico.config import dataset_settings
from lico.data import load
from lico.listing import image_endings, look_into, stamp_of
from lico.folders import image_tree, part_of

def utf8(name): return os.fsdecode(name.encode())  # as it is called here, whatever the locale

def fill(folder, *paths, n=3, red=0):
    "Images of which no two are alike, but for those of two calls with the same `red`."
    for k, path in enumerate(map(utf8, paths)):
        (folder/path).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.new('RGB', (8, 8), (red + k, i, 7)).save(folder/path/f'{i}.png')
    return folder

def parts(*names): return [f'{name}/{c}' for name in names for c in ('cat', 'dog')]

@pytest.fixture
def bare(tmp_path): return fill(tmp_path/'bare', 'cat', 'dog', n=10)

@pytest.fixture
def said(capsys):
    "A function that gives what `load` says of a folder, and its data."
    def of(folder, **kwargs):
        capsys.readouterr()
        data_module._whole.cache_clear()
        d = load(f'folder:{folder}', **kwargs)
        return capsys.readouterr().err.replace(f'folder:{folder}: ', '').splitlines(), d
    return of

def refusal(folder):
    with pytest.raises((ValueError, FileNotFoundError)) as e: load(f'folder:{folder}')
    message = str(e.value)
    assert '\n' not in message and len(message) < 500 and message.encode('utf-8')
    return message.replace(str(folder), 'FOLDER')

# hidden things

@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '@eaDir', '__MACOSX', '.Trashes', '$RECYCLE.BIN', 'lost+found',
                                  'System Volume Information', '.git', '#recycle', '__pycache__', '.cat'])
@pytest.mark.parametrize('where', ['', 'cat', 'cat/more'])
def test_hidden_and_system_folders_are_not_read(bare, said, name, where):
    fill(bare, 'cat/more', red=50)
    want = said(bare)[1]
    fill(bare, str(Path(where)/name), red=100)
    notes, d = said(bare)
    assert notes == [] and d.digest == want.digest and d.class_names == ('cat', 'dog')

@pytest.mark.parametrize('name', ['._0.png', 'Thumbs.db', '.DS_Store', 'desktop.ini', '.hidden.jpg', 'ehthumbs.db',
                                  'Icon\r'])
def test_hidden_and_system_files_are_not_read_and_not_counted(bare, said, name):
    want = said(bare)[1]
    (bare/'cat'/name).write_bytes((bare/'cat'/'0.png').read_bytes())
    notes, d = said(bare)
    assert notes == [] and d.digest == want.digest

# links

def test_each_real_folder_is_read_once_whatever_links_there_are(bare, said):
    want = said(bare)[1]
    (bare/'cat'/'all').symlink_to(bare); (bare/'cat'/'dogs').symlink_to(bare/'dog'); (bare/'dog'/'me').symlink_to('.')
    notes, d = said(bare)
    assert d.digest == want.digest and len(d.train) + len(d.test) == 20
    assert notes == ['folders that links lead to again are read once: cat/all is the whole, cat/dogs is dog, dog/me '
                     'is dog']

def test_of_many_links_to_a_folder_the_first_in_order_counts(tmp_path):
    "Not the first that the disk happens to list."
    fill(tmp_path/'store', 'x')
    mine = fill(tmp_path/'mine', 'cat', 'cow', 'dog')
    for name in ('dog', 'cat', 'cow'): (mine/name/'more').symlink_to(tmp_path/'store'/'x')
    assert {p.rpartition('/')[0] for p, _ in look_into(mine).images} == {'cat', 'cat/more', 'cow', 'dog'}

def test_names_like_parts_are_classes_where_none_is_for_training(tmp_path, said):
    assert said(fill(tmp_path, 'beta_test', 'beta_val', 'gamma', n=6))[1].class_names == (
        'beta test', 'beta val', 'gamma')

def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path, said):
    fill(tmp_path/'store', 'a', 'b', n=10)
    (tmp_path/'mine'/'dog').mkdir(parents=True)
    (tmp_path/'mine'/'cat').symlink_to(tmp_path/'store'/'a')
    for f in (tmp_path/'store'/'b').iterdir(): (tmp_path/'mine'/'dog'/f.name).symlink_to(f)
    notes, d = said(tmp_path/'mine')
    assert notes == [] and len(d.train) + len(d.test) == 20 and d.class_names == ('cat', 'dog')

def test_a_class_that_is_another_class_by_a_link_is_refused(tmp_path):
    fill(tmp_path/'a', 'cat', 'dog')
    (tmp_path/'a'/'pup').symlink_to(tmp_path/'a'/'dog')
    assert refusal(tmp_path/'a').startswith('class folder pup of FOLDER is the same folder as dog, by a link')
    fill(tmp_path/'store', 'x')
    for name in ('cow', 'ox'): (tmp_path/'a'/name).symlink_to(tmp_path/'store'/'x')
    (tmp_path/'a'/'pup').unlink()
    assert 'class folder ox of FOLDER is the same folder as cow' in refusal(tmp_path/'a')

def test_a_part_that_is_the_other_part_by_a_link_is_refused(tmp_path):
    fill(tmp_path/'a', *parts('train'))
    (tmp_path/'a'/'test').symlink_to('train')
    assert 'is the same folder as train' in refusal(tmp_path/'a')

@pytest.mark.parametrize('kind', ['pipe', 'socket', 'device'])
def test_what_is_no_file_is_refused_and_not_waited_for(bare, kind, monkeypatch):
    if kind == 'pipe': os.mkfifo(bare/'cat'/'x.jpg')
    if kind == 'device': (bare/'cat'/'x.jpg').symlink_to('/dev/null')
    if kind == 'socket':
        monkeypatch.chdir(bare/'cat')  # a socket's path has to be short
        socket.socket(socket.AF_UNIX).bind('x.jpg')
    assert refusal(bare) == f'cat/x.jpg in FOLDER is no file but a {kind}: remove it'

def test_a_link_to_nowhere_and_one_to_itself_are_named(bare):
    (bare/'cat'/'a.jpg').symlink_to('nowhere'); (bare/'dog'/'b.jpg').symlink_to('b.jpg')
    message = refusal(bare)
    assert message.startswith('2 of 22 images in FOLDER cannot be read: cat/a.jpg (') and 'dog/b.jpg (' in message

def test_a_folder_that_may_not_be_looked_into_is_named(bare, monkeypatch):
    scandir = os.scandir
    def no(path):
        if str(path).endswith('dog'): raise PermissionError(13, 'Permission denied', path)
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', no)
    assert refusal(bare) == 'cannot look into the folder FOLDER/dog (Permission denied): make it readable or remove it'

# parts

@pytest.mark.parametrize('train, test', [('Train', 'TEST'), ('training', 'testing'), ('train', 'val'),
                                         ('TRAIN', 'Valid'),
                                         ('train', 'validation'), ('train', 'dev'), ('Training', 'eval'),
                                         ('train_set', 'test_set'), ('seg_train', 'seg_test'), ('train2017', 'val2017'),
                                         ('images/train', 'images/test'), ('data/Train', 'data/Test'),
                                         ('pets-main/train', 'pets-main/test'), ('train/images', 'test/images'),
                                         ('seg_train/seg_train', 'seg_test/seg_test'), ('trainset', 'testset')])
def test_parts_by_their_usual_names(tmp_path, said, train, test):
    fill(tmp_path/'a', *parts(train), n=3); fill(tmp_path/'a', *parts(test), n=2, red=100)
    fill(tmp_path/'a', '__MACOSX/cat')
    notes, d = said(tmp_path/'a')
    assert (len(d.train), len(d.test), d.class_names) == (6, 4, ('cat', 'dog')) and d.test.x[:, 0].min() == 100
    assert notes == ([] if 'test' in test.lower() else [f'trains on {train}, tests on {test}'])

def test_of_three_parts_validation_is_not_used_and_that_is_said(tmp_path, said):
    for k, (name, n) in enumerate((('train', 3), ('Valid', 2), ('test', 4))): fill(tmp_path/'a', *parts(name), n=n,
        red=60*k)
    notes, d = said(tmp_path/'a')
    assert (len(d.train), len(d.test)) == (6, 8) and notes == [
        'trains on train, tests on test; Valid is not used']
    fill(tmp_path/'a', 'extra/cat', red=200)
    assert said(tmp_path/'a')[0][1:] == ['3 images lie in no class folder and are not used, such as extra/cat/0.png']

@pytest.mark.parametrize('paths, says', [
    (parts('train'), 'has a folder train but none named test'),
    (parts('Test'), 'has a folder Test but none named train'),
    (parts('val', 'test'), 'has a folder test, val but none named train'),
    (parts('train', 'Training', 'test'), 'has Training, train for one purpose: keep one of them'),
    (['cat', 'dog', 'test'], 'has a folder test but none named train'),
    (['cat', 'dog', 'images'], 'has images beside cat, dog: a folder of that name is no class'),
    (['cat', 'dog', 'images/cow', 'images/ox'], 'has images beside cat, dog'),
    (['cat/train', 'cat/test', 'dog/train', 'dog/test'], 'has parts of its own, cat/test, cat/train'),
    ([*parts('train', 'test'), 'train/val'], 'only in train: val'),
    (['images/train', 'images/test'], 'no images found in FOLDER')])
def test_what_is_neither_part_nor_class_is_refused(tmp_path, paths, says):
    assert says in refusal(fill(tmp_path/'a', *paths))

@pytest.mark.parametrize('wrapper', ['images', 'my birds', 'data/images'])
def test_a_folder_around_it_all_changes_nothing(bare, tmp_path, said, wrapper):
    want = said(bare)[1]
    (tmp_path/'other'/wrapper).parent.mkdir(parents=True)
    bare.rename(tmp_path/'other'/wrapper)
    if wrapper == 'images': (tmp_path/'other'/'annotations').mkdir(); (tmp_path/'other'/'annotations'/'a.xml').touch()
    notes, d = said(tmp_path/'other')
    assert d.digest == want.digest and notes == []

def test_classes_that_sound_like_parts_stay_classes(tmp_path, said):
    d = said(fill(tmp_path/'a', 'bullet train', 'test tube', n=5))[1]
    assert d.class_names == ('bullet train', 'test tube')
    d = said(fill(tmp_path/'b', *(f'{p}/{c}' for p in ('train', 'test') for c in ('bus', 'train'))))[1]
    assert d.class_names == ('bus', 'train')  # as CIFAR-100 has it
    assert part_of('strain') == part_of('latest') == part_of('trained') == (None, ())

# endings

def test_what_pillow_reads_is_read(bare, said, tmp_path):
    names = [f'x{e}' for e in ('.jfif', '.webp', '.tif', '.bmp', '.gif', '.JPG', '.ppm', '.avif')
             if e.lower() in image_endings()]
    assert len(names) >= 7
    for k, name in enumerate(names): Image.new('RGB', (8, 8), (30*k, 0, 200)).save(bare/'cat'/name)
    notes, d = said(bare)
    assert notes == [] and len(d.train) + len(d.test) == 20 + len(names)

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_every_ending_that_counts_as_an_image_can_be_read_back():
    "Of the formats that Pillow writes, too."
    import io
    Image.init()
    kinds = {Image.registered_extensions()[e] for e in image_endings()} & set(Image.SAVE)
    assert {'JPEG', 'PNG', 'WEBP', 'TIFF', 'GIF', 'BMP', 'PPM'} <= kinds and not kinds & {'PDF', 'EPS', 'HDF5', 'GRIB'}
    for kind in kinds:
        for mode in ('RGB', 'L', '1', 'P', 'RGBA'):
            try: Image.new(mode, (16, 16)).save(file := io.BytesIO(), kind)
            except (OSError, ValueError, KeyError): continue
            Image.open(file).load()
            break

def test_files_that_are_not_read_are_counted_and_named(bare, said):
    for name in ('a.heic', 'b.HEIC', 'more/c.heic', 'd.txt', 'labels.h5', 'README'):
        (bare/'cat'/name).parent.mkdir(exist_ok=True); (bare/'cat'/name).write_text('x', encoding='utf-8')
    (bare/'labels.csv').write_text('beside the classes: nobody misses it', encoding='utf-8')
    fill(bare, '', n=2)
    notes, d = said(bare)
    assert notes == ['6 files are no images that Pillow reads: 3 .heic, 1 without an ending, 1 .txt, 1 .h5',
                     '2 images lie in no class folder and are not used, such as 0.png']
    assert len(d.train) + len(d.test) == 20

def test_a_folder_of_nothing_but_heic_says_so(tmp_path):
    for c in ('cat', 'dog'):
        (tmp_path/'a'/c).mkdir(parents=True)
        for i in range(3): (tmp_path/'a'/c/f'{i}.heic').touch()
    assert refusal(tmp_path/'a').endswith('; 6 files are no images that Pillow reads: 6 .heic')

# names

NFC, NFD = (unicodedata.normalize(o, 'Äpfel') for o in ('NFC', 'NFD'))

def test_names_in_any_unicode_form_are_one_name(tmp_path, said):
    assert NFC != NFD
    a = said(fill(tmp_path/'a', NFC, 'Birnen', n=10))[1]
    b = said(fill(tmp_path/'b', 'Birnen', n=10, red=1) and fill(tmp_path/'b', NFD, n=10))[1]
    assert a.class_names == b.class_names == ('Birnen', NFC) and a.digest == b.digest
    fill(tmp_path/'c', f'train/{NFC}', 'train/x'); fill(tmp_path/'c', f'test/{NFD}', 'test/x', red=9)
    assert said(tmp_path/'c')[1].class_names == ('x', NFC)
    message = refusal(fill(tmp_path/'d', NFC, NFD, 'x'))
    assert 'the same name in two forms of Unicode' in message
    assert r"'A\u0308pfel'" in message and r"'\xc4pfel'" in message

def test_a_class_whose_name_is_no_text_is_refused_readably_and_a_file_is_read(bare, said):
    os.rename(os.fsencode(bare/'cat'/'0.png'), os.fsencode(bare/'cat') + b'/caf\xe9.png')
    want = said(bare)[1]
    assert len(want.train) + len(want.test) == 20
    large = said(bare, image_size=70)[1]
    assert b'cat/caf\xe9.png' in {*large.train.paths.tolist(), *large.test.paths.tolist()}
    from lico.batches import test_batches
    assert sum(len(x) for part in (large.train, large.test) for x in test_batches(large, part, 7)) == 20
    (Path(os.fsdecode(os.fsencode(bare/'cat') + b'/caf\xe9.png'))).write_bytes(b'damaged')
    assert r'cannot be read: cat/caf\xe9.png (' in refusal(bare)
    os.rename(os.fsencode(bare/'dog'), os.fsencode(bare) + b'/hund\xe9')
    assert refusal(bare) == r'class folder hund\xe9 of FOLDER has a name that is no UTF-8: rename it'

@pytest.mark.parametrize('name', ['$', '|', 'None', 'NA', 'nan', '_', '*', '<b>', 'a$b$c', '🐸', ' x', '#', '@home',
                                  '%s', '{x}'])
def test_class_names_are_plain_text(tmp_path, said, name):
    d = said(fill(tmp_path/'a', name, 'dog', n=5))[1]
    assert name in d.class_names

# UTF-8 whatever the locale

IN_C = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'OMP_NUM_THREADS': '1'}

def test_another_locale_reads_the_same(tmp_path):
    """Class names, the folder itself, a known dataset's files, and a file whose name is no text; `settings.ini` on
    the way."""
    here = fill(tmp_path/utf8('Obst für alle'), 'Äpfel', '梨', n=10)
    os.rename(os.fsencode(here/utf8('梨')/'0.png'), os.fsencode(here/utf8('梨')) + b'/caf\xe9.png')
    (here/'boxes.csv').write_text('file,x0,y0,x1,y1\n' + ''.join(f'{p},0,0,1,1\n' for p, _ in look_into(here).images
                                                                 if '\udce9' not in p), encoding='utf-8')
    code = """import os, sys
from lico.data import load
from lico.config import dataset_settings
from lico.files import write_atomic
d = load(f'folder:{sys.argv[1]}')
l = load(f'folder:{sys.argv[1]}', image_size=70)
write_atomic('out.txt', d.name)
print(ascii([sys.getfilesystemencoding(), d.class_names, d.digest, l.digest, d.train.y.tolist(),
             l.test.paths.tolist()]))
try: load(f'folder:{sys.argv[1]}/Äpfel')
except FileNotFoundError as e: print(e, file=sys.stderr)"""
    (tmp_path/'code.py').write_text(code, encoding='utf-8')
    def there(env):
        p = subprocess.run([sys.executable, 'code.py', here], env={**env, 'LICO_ROOT': str(tmp_path)}, cwd=tmp_path,
                           capture_output=True)
        assert p.returncode == 0, p.stderr.decode()
        return p.stdout, p.stderr, (tmp_path/'out.txt').read_bytes()
    (ours, _, name), (theirs, said, same) = there({**os.environ, 'PYTHONUTF8': '1'}), there(IN_C)
    assert b"'ascii'" in theirs and ours.split(b',', 1)[1].splitlines()[0] == theirs.split(b',', 1)[1].splitlines()[0]
    assert name == same == b'folder:' + os.fsencode(here) and b'lle/\\xc4pfel: expected' in said

# the same image twice

def test_the_same_file_in_both_parts_or_in_two_classes_is_said(tmp_path, said):
    here = fill(tmp_path/'a', *parts('train')); fill(here, *parts('test'), red=50)
    assert said(here)[0] == []
    (here/'test'/'cat'/'copy.png').write_bytes((here/'train'/'cat'/'1.png').read_bytes())
    leak = '1 image is in training and in testing, which is then no test: such as train/cat/1.png and test/cat/copy.png'
    assert said(here)[0] == [leak] == said(here, image_size=70)[0]
    for i in range(2): (here/'train'/'dog'/f'c{i}.png').write_bytes((here/'train'/'cat'/f'{2*i}.png').read_bytes())
    two = '2 images are in two classes, so that one label is wrong: such as train/cat/0.png and train/dog/c0.png'
    assert said(here)[0] == [leak, two] == said(here, image_size=70)[0]

def test_images_that_only_look_alike_when_small_are_not_the_same(tmp_path, said):
    for k, path in enumerate(parts('train', 'test')):
        (tmp_path/'a'/path).mkdir(parents=True)
        for i in range(3):
            image = np.full((64, 64, 3), 128, np.uint8); image[0, 0] = 128 + k*3 + i
            Image.fromarray(image).save(tmp_path/'a'/path/f'{i}.png')
    assert said(tmp_path/'a', image_size=2)[0] == []

# what changed

def test_content_that_changed_under_the_same_size_and_time_is_noticed(bare, said, monkeypatch):
    path = bare/'cat'/'0.png'
    before, first, s = path.read_bytes(), load(f'folder:{bare}'), path.stat()
    Image.new('RGB', (8, 8), (0, 0, 8)).save(path)
    assert len(path.read_bytes()) == len(before) and path.read_bytes() != before
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))
    assert path.stat().st_mtime_ns == s.st_mtime_ns and load(f'folder:{bare}').digest != first.digest
    assert stamp_of(path)[0] == s.st_mtime_ns and stamp_of(bare/'nowhere') is None

def test_a_folder_of_a_datasets_name_is_not_that_dataset(tmp_path):
    for name in ('digits', 'cifar10', 'tiny-imagenet-100', 'imagenette', 'fashion_mnist'):
        assert dataset_settings(name) and dataset_settings(f'folder:{tmp_path}/{name}') == {}
    assert dataset_settings('folder:/x/digit-scenes')['stand_in'] == 'ImageNet-1k'

# mirroring

def test_flip_is_a_parameter(bare):
    assert load(f'folder:{bare}').flip is True and load(f'folder:{bare}', flip=False).flip is False
    assert load('digits').flip is False and load('digits', flip=True).flip is True
    with pytest.raises(ValueError, match="flip = 'no': expected True, False or None"): load('digits', flip='no')


def touched(folder, *paths):
    "Empty files: names are all that the walker goes by."
    for path in map(utf8, paths):
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/path).touch()


@pytest.mark.parametrize('twins', [('cat', 'cat '), ('cat', 'ca\u200bt'), ('a cat', 'a  cat'), ('a\nb', 'a b')])
def test_classes_that_look_alike_are_refused(tmp_path, twins):
    "They would be one prompt, and one row of a table."
    touched(tmp_path, *(f'{c}/{i}.png' for c in twins for i in range(3)))
    with pytest.raises(ValueError, match='would have the same name .*; rename them') as e:
        image_tree(tmp_path, look_into(tmp_path))
    assert '\n' not in str(e.value)


def test_parts_of_unknown_names_are_told(tmp_path):
    "Folders that hold the same folders may be parts; whoever means classes is only told."
    touched(tmp_path, *(f'{p}/{c}/{i}.png' for p in ('trn', 'tst') for c in ('cat', 'dog') for i in range(3)))
    *_, said = image_tree(tmp_path, look_into(tmp_path))
    assert said == ['each of the class folders trn, tst holds the folders cat, dog: if these are the classes, call the '
                    'outer ones train and test']
    touched(tmp_path, 'trn/9.png')
    assert image_tree(tmp_path, look_into(tmp_path))[2] == []


@pytest.mark.parametrize('name', ['@__thumb', '@SHAREBIN', '@eaDir', '$RECYCLE.BIN', '.AppleDouble', '#snapshot'])
def test_folders_of_systems_are_no_classes(tmp_path, name):
    touched(tmp_path, *(f'{c}/{i}.png' for c in ('cat', 'dog', name, f'cat/{name}') for i in range(3)))
    train, test, said = image_tree(tmp_path, look_into(tmp_path))
    assert list(train) == ['cat', 'dog'] and sum(map(len, [*train.values(), *test.values()])) == 6 and said == []
