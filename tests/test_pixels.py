"""lico.pixels against what was drawn, PIL and torchvision: every kind of file is one picture; windows, strips,
bombs; and threads."""
import io, os, subprocess, sys, threading
import numpy as np, pytest, torch
from PIL import Image, ImageDraw, ImageFile
from torchvision.transforms import v2
from lico import batches as batches_module
from lico.batches import preprocessing, test_batches as batches_of, training_batches
from lico.data import Files, load
from lico.pixels import as_rgb, central_window, no_truncated_images, open_image, random_window, read_ahead, whole_square

rng = np.random.default_rng(0)
SMOOTH = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60), Image.Resampling.BICUBIC)

def through_a_file(image, kind, **more):
    image.save(file := io.BytesIO(), kind, **more)
    return as_rgb(open_image(file))

def far(a, b): return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()

# from a file to pixels

UPRIGHT = {1: None, 2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_270',
           7: 'TRANSVERSE',
           8: 'ROTATE_90'}

@pytest.mark.parametrize('kind', ['png', 'jpeg', 'webp', 'tiff'])
@pytest.mark.parametrize('orientation', UPRIGHT)
def test_a_picture_is_turned_as_its_file_says(kind, orientation):
    exif = Image.Exif(); exif[274] = orientation
    lossless = dict(webp=dict(lossless=True), jpeg=dict(quality=100, subsampling=0)).get(kind, {})
    got = through_a_file(SMOOTH, kind, exif=exif, **lossless)
    how = UPRIGHT[orientation]
    want = SMOOTH.transpose(getattr(Image.Transpose, how)) if how else SMOOTH
    assert got.size == want.size and far(got, want) <= (8 if kind == 'jpeg' else 0)

def test_damaged_exif_turns_nothing():
    SMOOTH.save(file := io.BytesIO(), 'jpeg', exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x05' + b'\xff'*20)
    assert as_rgb(open_image(file)).size == (80, 60)

@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'PA', 'L', 'RGB'])
def test_what_is_transparent_is_on_white(mode):
    "A black glyph on transparent black, however it is stored; half transparent is halfway to white."
    letter = Image.new('RGBA', (20, 20)); letter.paste((0, 0, 0, 255), (5, 5, 15, 15)); letter.paste((0, 0, 0, 128),
        (0, 0, 20, 3))
    want = Image.alpha_composite(Image.new('RGBA', (20, 20), 'white'), letter).convert('RGB')
    if mode in ('L', 'RGB'):  # one colour that counts as transparent
        hard = Image.new(mode, (20, 20), 'white' if mode == 'L' else (1, 2, 3)); hard.paste('black', (5, 5, 15, 15))
        got = through_a_file(hard, 'png', transparency=255 if mode == 'L' else (1, 2, 3))
        want = Image.new('RGB', (20, 20), 'white'); want.paste('black', (5, 5, 15, 15))
    elif mode == 'P': got = through_a_file(letter.quantize(8), 'png')
    elif mode == 'PA': got = as_rgb(letter.convert('PA'))
    else: got = through_a_file(letter.convert(mode), 'png')
    assert got.mode == 'RGB' and far(got, want) <= 1
    assert np.asarray(got)[18, 18].tolist() == [255]*3 and np.asarray(got)[10, 10].tolist() == [0]*3

@pytest.mark.parametrize('kind, dtype', [('png', '<u2'), ('tiff', '<u2'), ('tiff', '>u2'), ('ppm', '<u2')])
def test_of_sixteen_bits_the_highest_eight_are_seen(kind, dtype):
    ramp = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    got = np.asarray(through_a_file(Image.fromarray(ramp.astype(dtype)), kind))
    assert np.array_equal(got, np.repeat((ramp >> 8)[..., None], 3, 2))
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)  # 8 bits stretched to 16 come back
    assert np.array_equal(np.asarray(through_a_file(Image.fromarray(grey*np.uint16(257)), 'png'))[..., 0], grey)

def test_sixteen_bits_of_colour_are_treated_like_those_of_grey():
    "Pillow cannot write such a PNG: zlib can."
    import struct, zlib
    x = rng.integers(0, 65536, (5, 7, 3)).astype('>u2')
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + row.tobytes() for row in x)
    file = io.BytesIO(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 7, 5, 16, 2, 0, 0, 0))
                      + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    assert np.array_equal(np.asarray(as_rgb(open_image(file))), x >> 8)

@pytest.mark.parametrize('image', [np.full((4, 4), .5, np.float32), np.full((4, 4), 70_000, np.int32)])
def test_thirty_two_bits_are_refused(image):
    Image.fromarray(image).save(file := io.BytesIO(), 'tiff')
    with pytest.raises(OSError, match='mode [IF] has 32 bits a pixel, of which nobody knows what is white'):
        open_image(file)

def test_cmyk_is_right():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (255, 255, 0)]
    for kind in ('jpeg', 'tiff'):
        for colour in colours:
            got = through_a_file(Image.new('RGB', (8, 8), colour).convert('CMYK'), kind)
            assert far(got, Image.new('RGB', (8, 8), colour)) <= 3, (kind, colour)

@pytest.mark.parametrize('kind', ['gif', 'png', 'webp', 'tiff'])
def test_of_many_frames_the_first_is_seen(kind):
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    assert far(through_a_file(frames[0], kind, save_all=True, append_images=frames[1:]), frames[0]) <= 2

def test_plain_files_are_what_pil_reads():
    for kind in ('png', 'bmp', 'jpeg'):
        SMOOTH.save(file := io.BytesIO(), kind)
        assert np.array_equal(np.asarray(as_rgb(open_image(file))), np.asarray(Image.open(file).convert('RGB')))

# everybody's way

@pytest.fixture
def odd(tmp_path):
    "Twelve pictures of all kinds, and what each looks like."
    exif, want = Image.Exif(), {}
    exif[274] = 6
    glyph = Image.new('RGBA', (90, 70)); ImageDraw.Draw(glyph).ellipse((20, 20, 60, 60), fill=(0, 0, 0, 255))
    deep = (np.asarray(SMOOTH.resize((90, 70)).convert('L')).astype(np.uint16)*257)
    for part in ('train', 'test'):
        for c in ('cat', 'dog'):
            (folder := tmp_path/'odd'/part/c).mkdir(parents=True)
            SMOOTH.resize((90, 70)).rotate(90, expand=True).save(folder/'turned.png', exif=exif)
            glyph.save(folder/'glyph.png'); Image.fromarray(deep).save(folder/'deep.png')
            SMOOTH.resize((90, 70)).convert('CMYK').save(folder/'ink.tif')
    on_white = Image.alpha_composite(Image.new('RGBA', glyph.size, 'white'), glyph).convert('RGB')
    want = {'deep.png': SMOOTH.resize((90, 70)).convert('L').convert('RGB'), 'glyph.png': on_white,
            'ink.tif': SMOOTH.resize((90, 70)).convert('CMYK').convert('RGB'), 'turned.png': SMOOTH.resize((90, 70))}
    return tmp_path/'odd', want

@pytest.mark.parametrize('size', [32, 64, 80])
def test_data_sees_what_is_to_be_seen(odd, size, capsys):
    folder, want = odd
    d = load(f'folder:{folder}', image_size=size)
    got = torch.cat(list(batches_of(d, d.test, 3)))
    for i, (name, picture) in enumerate([*sorted(want.items())]*2):
        window = np.array((central_window if size > 64 else whole_square)(picture, size))
        assert torch.equal(got[i], d.normalise(torch.tensor(window).permute(2, 0, 1))), name

@pytest.mark.parametrize('size', [32, 64, 65, 224])
def test_what_is_shipped_reproduces_what_was_tested(odd, size):
    "The printed code, run with nothing of this package, on the files: the same numbers, so the same accuracy."
    folder, want = odd
    d = load(f'folder:{folder}', image_size=size)
    (folder/'ship.py').write_text(preprocessing(d) + f"""
import sys, torch
from PIL import Image
files = [f'test/{{c}}/{{n}}' for c in ('cat', 'dog') for n in {sorted(want)}]
torch.save(torch.stack([preprocess(Image.open(f)) for f in files]), 'x.pt')
assert not [m for m in sys.modules if m.startswith(('lico', 'torchvision'))]""", encoding='utf-8')
    subprocess.run([sys.executable, 'ship.py'], cwd=folder, check=True, env={**os.environ, 'PYTHONPATH': ''})
    assert torch.equal(torch.load(folder/'x.pt'), torch.cat(list(batches_of(d, d.test, 3))))

# windows

def test_a_strip_takes_no_gigabyte(tmp_path):
    "In a process that may have half a gigabyte more than it takes to start."
    for part in ('train', 'test'):
        for c in ('cat', 'dog'):
            (tmp_path/part/c).mkdir(parents=True)
            for i, size in enumerate(((3, 20_000), (20_000, 3))):
                Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(tmp_path/part/c/f'{i}.png')
    code = f"""import resource, torch
from lico.batches import test_batches, training_batches
from lico.data import load
import torchvision, PIL.Image
small = load('folder:{tmp_path}', image_size=32)
d = load('folder:{tmp_path}', image_size=224)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert [x.shape for x in test_batches(d, d.test, 4)] == [(4, 3, 224, 224)]
assert next(training_batches(d, [(torch.arange(4), 0)]))[0].shape == (4, 3, 224, 224)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    grown = int(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)
    assert grown < 200_000  # kB; 256 x 1,706,666 pixels of four bytes would be 1,700,000

def test_the_middle_of_a_strip_is_the_middle():
    for size in ((300, 60), (60, 300)):
        strip = SMOOTH.resize(size)
        whole = v2.Compose([v2.Resize(round(48*256/224)), v2.CenterCrop(48)])(strip)
        assert central_window(strip, 48).size == (48, 48) and far(central_window(strip, 48), whole) <= 8

@pytest.mark.parametrize('S', [1, 7, 64, 224])
def test_windows_are_torchvisions(S):
    for size in ((80, 60), (61, 200), (33, 33), (5, 17), (224, 224)):
        image = SMOOTH.resize(size)
        theirs = v2.Compose([v2.Resize(round(S*256/224)), v2.CenterCrop(S)])(image)
        assert np.array_equal(np.asarray(central_window(image, S)), np.asarray(theirs))
        for seed in range(5):
            torch.manual_seed(seed)
            theirs = v2.Compose([v2.RandomResizedCrop(S), v2.RandomHorizontalFlip()])(image)
            ours = random_window(image, S, torch.Generator().manual_seed(seed), True)
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))

def test_a_bomb_is_one_sentence(tmp_path, monkeypatch):
    for c in ('cat', 'dog'):
        (tmp_path/c).mkdir()
        for i in range(3): SMOOTH.save(tmp_path/c/f'{i}.png')
    Image.new('1', (2000, 2000)).save(tmp_path/'cat'/'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1_000_000)
    with pytest.raises(ValueError) as e: load(f'folder:{tmp_path}')
    assert '1 of 7 images' in str(e.value) and 'cat/bomb.png (Image size (4000000 pixels) exceeds limit' in str(e.value)
    assert '\n' not in str(e.value)

# threads

@pytest.fixture
def photos(tmp_path):
    for c in ('cat', 'dog'):
        (tmp_path/c).mkdir()
        for i in range(40):
            Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((120, 90)).save(tmp_path/c/f'{i:02}.jpg')
    return load(f'folder:{tmp_path}', image_size=72)

def test_reading_ahead_needs_no_shared_memory_and_no_process(photos, monkeypatch):
    "Docker gives 64 MB of /dev/shm; nothing is put there, and no process is started."
    import multiprocessing.process
    assert isinstance(photos.train, Files)
    monkeypatch.setattr(batches_module, '_workers', lambda n: 3)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, 'start', lambda self: 1/0)
    monkeypatch.setattr(os, 'fork', lambda: 1/0)
    def segments(): return {*os.listdir('/dev/shm')} if os.path.isdir('/dev/shm') else set()
    before, seen, names = segments(), set(), set()
    schedule = [(torch.randperm(64)[:16], k) for k in range(12)]
    for x, y in training_batches(photos, iter(schedule)):
        seen |= segments(); names |= {t.name.split('_')[0] for t in threading.enumerate()}
        assert not x.is_shared()
    assert not {o for o in seen - before if o.startswith(('torch_', 'psm_', 'sem.'))} and 'reading' in names
    assert not [t for t in threading.enumerate() if t.name.startswith('reading')]

def test_threads_stop_when_nobody_takes_the_batches_any_more(photos, monkeypatch):
    monkeypatch.setattr(batches_module, '_workers', lambda n: 3)
    batches = training_batches(photos, ((torch.arange(16), k) for k in range(1000)))
    next(batches); batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith('reading')]

def test_an_error_comes_where_its_job_stands_and_stops_the_rest():
    done, lock = [], threading.Lock()
    def read(i):
        if i == 5: raise ValueError('five')
        with lock: done.append(i)
        return i
    got = read_ahead(read, range(1000), 2)
    assert [next(got) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match='^five$'): next(got)
    assert len(done) < 20

@pytest.mark.parametrize('before', [False, True])
def test_truncated_images_are_refused_in_every_thread_and_pil_is_left_as_it_was(monkeypatch, before):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', before)
    barrier, seen = threading.Barrier(4), []
    def inside(k):
        with no_truncated_images():
            barrier.wait()
            for _ in range(k):
                with no_truncated_images(): pass
            seen.append(ImageFile.LOAD_TRUNCATED_IMAGES)
    threads = [threading.Thread(target=inside, args=(10*k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert seen == [False]*4 and ImageFile.LOAD_TRUNCATED_IMAGES is before
