"""Scenes: composed ones are what their annotation says; COCO's polygons and run lengths against counting by hand;
the mapping to ImageNet name by name."""
import csv, importlib.resources, json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from timm.data import ImageNetInfo
from lico.data import load
from lico.metrics import pointing_game
from lico.scenes import coco_scenes, coco_to_imagenet, digit_scenes, scene_dataset, unseen_scenes

# digits on photographs

def check(s, image_size):
    K = len(s.labels)
    assert (s.image.shape == (3, image_size, image_size) and s.image.dtype == torch.uint8
            and s.labels.dtype == torch.int64)
    assert (s.boxes.shape == (K, 4) and s.boxes.dtype == torch.float32 and s.masks.shape == (K, image_size, image_size)
            and s.masks.dtype == torch.bool)
    assert s.crowd.shape == (K,)
    for mask, box in zip(s.masks.numpy(), s.boxes.int().tolist()):
        rows, columns = np.nonzero(mask)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box

@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(32, 90), st.integers(8, 16), st.sampled_from(('any', 'different', 'same')),
       st.sampled_from(('train', 'test')))
def test_properties_of_digit_scenes(seed, image_size, digit_size, kind, part):
    few = 1 + seed % 3
    s = digit_scenes(2, image_size, (few, 4), (8, digit_size), kind, part, seed)[1]
    check(s, image_size)
    assert few <= len(s.labels) <= 4 and s.masks.sum(0).max() == 1 and not s.crowd.any()
    assert (s.boxes[:, 2:] - s.boxes[:, :2] <= digit_size).all()
    different = len(set(s.labels.tolist()))
    assert different == {'same': 1, 'different': len(s.labels)}.get(kind, different)

def test_scenes_are_a_sequence_decided_by_seed_and_position():
    a, b = digit_scenes(5), digit_scenes(9)
    assert (len(a) == 5 and len(list(a)) == 5 and repr(a) == '5 scenes, 10 classes'
            and a.class_names == load('digits').class_names)
    assert (all(torch.equal(p.image, q.image) and torch.equal(p.masks, q.masks) for p, q in zip(a, b))
            and torch.equal(a[-1].image, a[4].image))
    for other in (digit_scenes(5, seed=1), digit_scenes(5, part='train')):
        assert not torch.equal(a[0].image, other[0].image)
    assert [s.labels.tolist() for s in a] != [
        s.labels.tolist() for s in digit_scenes(5, part='train')], 'the parts have scenes of their own'
    with pytest.raises(IndexError): a[5]

def test_outside_the_masks_is_the_photograph_and_inside_is_ink():
    """Where no digit reaches, the picture is its background; the commonest colour of a digit is light on a dark
    ground and dark on a light one."""
    import lico.scenes as module
    for i in range(12):
        s = digit_scenes(12, objects=2)[i]
        ground = module._background(np.random.default_rng(module.derive_seed(0, 'scene', 'test', i)), 64).round()
        # no window of 24 pixels with a digit reaches there
        far = torch.nn.functional.max_pool2d(s.masks.any(0)[None].float(), 25, 1, 12)[0] == 0
        assert far.any() and torch.equal(s.image.float()[:, far], ground[:, far])
        for mask, (x0, y0, x1, y1) in zip(s.masks, s.boxes.int().tolist()):
            colours, counts = s.image[:, mask].unique(dim=1, return_counts=True)
            ink, under = colours[:, counts.argmax()], ground[:, y0:y1, x0:x1].mean()
            assert counts.max() > 0.2*mask.sum()
            assert abs(under - 120) < 25 or (0 < ink.max() <= 60 if under > 120 else ink.min() >= 195), (i, ink, under)

def test_the_digits_are_those_of_their_label_and_part():
    """A scene's mask, cut out and shrunk to 8 x 8, is nearest to a digit of its own class, and to one of its own
    part, nearly always."""
    area, data = (lambda m: torch.nn.functional.interpolate(m[None, None].float(), (8, 8), mode='area')[0, 0],
                  load('digits', image_size=8))
    known = [torch.stack([area(i[r.min():r.max() + 1, c.min():c.max() + 1]) for i in part.x[:, 0] > 68
                          for r, c in [i.nonzero(as_tuple=True)]]) for part in (data.test, data.train)]
    right = own = 0
    for s in digit_scenes(60, objects=1, digit_size=24):
        x0, y0, x1, y1 = s.boxes[0].int().tolist()
        near, far = ((k - area(s.masks[0, y0:y1, x0:x1])).pow(2).sum((1, 2)) for k in known)
        right += data.test.y[near.argmin()] == s.labels[0]; own += near.min() < far.min()
    assert right >= 55 and own >= 32, (right, own)

def test_numbers_sizes_and_classes_use_their_whole_range():
    many = list(digit_scenes(80, objects=(1, 3), digit_size=(16, 24)))
    assert {len(s.labels) for s in many} == {1, 2, 3} and {int(o) for s in many for o in s.labels} == set(range(10))
    height = torch.cat([s.boxes[:, 3] - s.boxes[:, 1] for s in many])
    assert height.min() < 18 and height.max() > 22

def test_of_selects_a_class():
    s = digit_scenes(1, objects=4, kind='same', digit_size=16)[0]
    assert s.of(s.labels[0]).shape == (4, 64, 64) and len(s.of((int(s.labels[0]) + 1) % 10)) == 0
    x0, y0, x1, y1 = s.boxes[2].int().tolist()
    saliency = torch.zeros(1, 64, 64); saliency[0][tuple(s.masks[2].nonzero()[5])] = 1
    assert pointing_game(saliency, [s.of(int(s.labels[0]))], 0).tolist() == [1]

@pytest.mark.parametrize('change, message', [
    (dict(objects=5), "5 digits of 24 pixels do not fit into 64 x 64: at most 4 do"),
    (dict(objects=(3, 2)), r"objects = \(3, 2\): expected a whole number of at least 1, or a pair"),
    (dict(objects=0), "objects = 0"), (dict(digit_size=3), "digit_size = 3: expected a whole number of at least 4"),
    (dict(digit_size=65), "1 digits of 65 pixels do not fit|3 digits of 65"),
    (dict(kind='all'), "unknown kind 'all': choose one of any, different, same"),
    (dict(part='validation'), "unknown part 'validation': choose one of train, test"),
    (dict(objects=11, digit_size=8, kind='different'), "there are 10 different digits")])
def test_refusals_of_digit_scenes(change, message):
    with pytest.raises(ValueError, match=message): digit_scenes(3, **change)

# scenes to train on

def test_the_dataset_is_the_same_everywhere(lico_root):
    """What `Run` would train on has this digest: pixels, labels and names. A change here makes all records of
    Figures 3 to 8 records of other data."""
    name = scene_dataset(200)
    assert name == f'folder:{lico_root}/data/digit-scenes-200' == scene_dataset(200)
    data = load(name)
    assert (data.digest[:12] == '5ac6fbcec5a5' and (len(data.train), len(data.test), data.image_size) == (160, 40, 32)
            and data.class_names == tuple('0123456789'))
    train, test = digit_scenes(160, 32, 1, (24, 28), part='train'), digit_scenes(40, 32, 1, (24, 28))
    for part, scenes in ((data.train, train), (data.test, test)):
        assert sorted(part.x.flatten(1).tolist()) == sorted(s.image.flatten().tolist() for s in scenes)
        by_image = {tuple(s.image.flatten().tolist()): int(s.labels[0]) for s in scenes}
        assert [by_image[tuple(x.flatten().tolist())] for x in part.x] == part.y.tolist()

def test_half_of_a_dataset_is_never_taken_for_the_whole(lico_root, monkeypatch):
    "A process that dies while writing leaves no dataset behind; the next one writes all of it."
    import lico.scenes as module
    def dies(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, '_write', lambda folder, n: ((folder/'train'/'0').mkdir(parents=True), dies()))
        with pytest.raises(KeyboardInterrupt): scene_dataset(60)
    assert (not (lico_root/'data'/'digit-scenes-60').exists()
            and [f.name for f in (lico_root/'data').iterdir()] in ([], ['digit-scenes-60.lock']))
    scene_dataset(60)
    assert len(list((lico_root/'data'/'digit-scenes-60').rglob('*.png'))) == 60

def test_unseen_scenes_are_of_test_digits_in_the_trained_size():
    for kind, most in (('one', 1), ('different', 4), ('same', 4)):
        scenes = unseen_scenes(40, kind)
        numbers = {len(s.labels) for s in scenes}
        assert numbers == ({1} if kind == 'one' else {2, 3, 4}) and all(s.image.shape == (3, 56, 56) for s in scenes)
        if kind != 'one': assert all(len(s.labels.unique()) == (1 if kind == 'same' else len(s.labels)) for s in scenes)
        height = torch.cat([s.boxes[:, 3] - s.boxes[:, 1] for s in scenes])
        assert 20 < height.min() < height.max() <= 28
    assert (torch.equal(unseen_scenes(3)[1].image, digit_scenes(9, 56, 1, (24, 28), seed=1)[1].image)
            and unseen_scenes(2, image_size=64)[0].image.shape == (3, 64, 64))
    with pytest.raises(ValueError, match="unknown kind of scenes 'many': choose one of one, different, same"):
        unseen_scenes(2, 'many')

# COCO

def compressed(mask):
    from pycocotools import mask as coco
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=rle['size'], counts=rle['counts'].decode())

@pytest.fixture
def folder(tmp_path):
    """Two images, ids out of order: a polygon of 6 x 8 pixels with a second part, run lengths in both forms, a
    crowd, an object outside the square."""
    pytest.importorskip('pycocotools')
    (tmp_path/'images').mkdir(); (tmp_path/'annotations').mkdir()
    pixels = np.arange(20*40*3).reshape(20, 40, 3).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path/'images'/'wide.png')
    Image.fromarray(pixels[:10, :10]).save(tmp_path/'images'/'small.png')
    far, blob = np.zeros((20, 40), bool), np.zeros((20, 40), bool)
    far[2:9, 1:5], blob[5:15, 12:15] = True, True
    note = lambda id, image, category, segmentation, crowd=0: dict(id=id, image_id=image, category_id=category,
                                                                   segmentation=segmentation, iscrowd=crowd)
    content = dict(images=[dict(id=9, file_name='wide.png', height=20, width=40),
                           dict(id=4, file_name='small.png', height=10, width=10)],
                   categories=[dict(id=90, name='toothbrush'), dict(id=1, name='person'), dict(id=17, name='cat')],
                   annotations=[note(1, 9, 17, [[14, 4, 20, 4, 20, 12, 14, 12], [25, 15, 28, 15, 28, 18, 25, 18]]),
                                note(2, 9, 90, compressed(blob)), note(3, 9, 1, compressed(far)),
                                note(4, 4, 17, dict(size=[10, 10], counts=[12, 3, 85]), 1),
                                note(5, 4, 17, [[0, 8, 10, 8, 10, 10, 0, 10]])])
    (tmp_path/'annotations'/'instances.json').write_text(json.dumps(content), encoding='utf-8')
    return tmp_path

def edit(folder, change):
    file = folder/'annotations'/'instances.json'
    content = json.loads(file.read_text(encoding='utf-8'))
    change(content)
    file.write_text(json.dumps(content), encoding='utf-8')

def test_a_small_coco_folder(folder):
    scenes = coco_scenes(folder, image_size=20)
    assert scenes.class_names == ('person', 'cat', 'toothbrush') and scenes.names == ('small.png', 'wide.png')
    s = scenes[1]
    check(s, 20)
    assert (s.labels.tolist() == [1, 2]
            and s.crowd.tolist() == [False, False]), 'the person is outside the square, columns 10 to 29'
    expected = torch.zeros(2, 20, 20, dtype=torch.bool)
    expected[0, 4:12, 4:10] = expected[0, 15:18, 15:18] = expected[1, 5:15, 2:5] = True
    assert torch.equal(s.masks, expected) and s.boxes.tolist() == [[4, 4, 18, 18], [2, 5, 5, 15]]
    assert torch.equal(
        s.image, torch.from_numpy(np.array(Image.open(folder/'images'/'wide.png'))[:, 10:30].copy()).permute(2, 0, 1))

def test_scaling_and_crowds(folder):
    s = coco_scenes(folder, image_size=20)[0]
    check(s, 20)
    expected = torch.zeros(2, 20, 20, dtype=torch.bool)
    # run lengths go down the columns: rows 2 to 4 of column 1, twice as large
    expected[0, 4:10, 2:4], expected[1, 16:, :] = True, True
    assert torch.equal(s.masks, expected) and s.labels.tolist() == [1, 1] and s.crowd.tolist() == [True, False]
    assert (torch.equal(s.of(1), expected) and torch.equal(s.of(1, crowd=False), expected[1:])
            and s.of(0).shape == (0, 20, 20))

def test_an_image_without_objects(folder):
    edit(folder, lambda c: c['annotations'].clear())
    s = coco_scenes(folder, image_size=16)[0]
    assert s.labels.shape == (0,) and s.boxes.shape == (0, 4) and s.masks.shape == (0, 16, 16) and s.crowd.shape == (0,)

def test_names_of_files_are_parameters(folder):
    (folder/'images').rename(folder/'val2017')
    (folder/'annotations'/'instances.json').rename(folder/'annotations'/'instances_val2017.json')
    assert len(coco_scenes(folder, 20, 'annotations/instances_val2017.json', 'val2017')) == 2
    with pytest.raises(FileNotFoundError, match="no annotations at .*instances.json: expected COCO's, "
                                                "annotations/instances_val2017.json beside val2017/"):
        coco_scenes(folder)

@pytest.mark.parametrize('change, message', [
    (lambda c: c.pop('categories'), "has no categories: expected COCO's instance annotations"),
    (lambda c: c['annotations'][0].update(category_id=2), "annotation 1 names category 2 and image 9, "
                                                          "of which one is not in the file"),
    (lambda c: c['annotations'][1].update(image_id=5), "annotation 2 names category 90 and image 5"),
    (lambda c: c['annotations'][2].pop('segmentation'), "annotation 3 has no segmentation: "
                                                        "expected polygons or run lengths")])
def test_damaged_annotations(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message): coco_scenes(folder)

def test_missing_and_foreign_images(folder):
    edit(folder, lambda c: c['images'][1].update(height=11))
    with pytest.raises(ValueError, match="small.png has 10 x 10 pixels and its annotation says 10 x 11: "
                                         "they do not belong together"):
        coco_scenes(folder)[0]
    (folder/'images'/'wide.png').unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images are not in .*images, first wide.png: put them there, "
                                                "or name the folder with images="):
        coco_scenes(folder)
    (folder/'annotations'/'instances.json').write_text('{"images": [', encoding='utf-8')
    with pytest.raises(ValueError, match="instances.json is not JSON .*: fetch it again"): coco_scenes(folder)

# COCO's categories as ImageNet's classes

COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, \
parking meter, bench, bird, cat, dog,
horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, \
snowboard, sports ball, kite, baseball
bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, \
apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, \
mouse, remote, keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
COCO = COCO.replace('\n', ' ').split(', ')

def pairs():
    with (importlib.resources.files('lico')/'coco_imagenet.csv').open(encoding='utf-8', newline='') as f:
        return list(csv.DictReader(f))

def test_every_pair_names_the_class_it_means():
    info, rows = ImageNetInfo(), pairs()
    assert len(COCO) == 80 and {r['category'] for r in rows} <= set(COCO)
    for r in rows:
        assert (r['wnid'], r['name']) == (info.index_to_label_name(int(r['index'])),
                                          info.index_to_description(int(r['index']))), r
    indices = [int(r['index']) for r in rows]
    assert len(set(indices)) == len(indices) == 302, 'no class stands for two categories'
    assert coco_to_imagenet() == {c: tuple(int(r['index']) for r in rows if r['category'] == c)
                                  for c in dict.fromkeys(r['category'] for r in rows)}

KEYS = {  # what ImageNet's name or definition of every class of a category must say
    'bicycle': 'bicycle', 'car': 'car|vehicle|automobile|cab|van', 'motorcycle': 'motorbike|scooter',
    'airplane': 'airplane|aircraft', 'bus': 'bus',
    'train': 'train|locomotive',
    'truck': 'truck|van', 'boat': 'boat|ship|vessel', 'traffic light': 'traffic light',
    'parking meter': 'parking meter', 'bench': 'bench', 'cat': 'cat',
    'horse': 'horse', 'sheep': 'sheep',
    'cow': 'bos', 'elephant': 'elephant', 'bear': 'bear', 'zebra': 'zebra', 'backpack': 'backpack',
    'umbrella': 'umbrella', 'handbag': 'bag', 'tie': 'tie',
    'skis': 'ski', 'sports ball': 'ball',
    'tennis racket': 'racket', 'bottle': 'bottle|jug', 'wine glass': 'drinking glass', 'cup': 'mug|cup',
    'knife': 'knife', 'spoon': 'spoon', 'bowl': 'bowl',
    'banana': 'banana', 'apple': 'apple',
    'sandwich': 'hamburger', 'orange': 'orange', 'broccoli': 'broccoli', 'hot dog': 'hot dog', 'pizza': 'pizza',
    'chair': 'chair', 'couch': 'couch',
    'bed': 'bed', 'dining table': 'dining table',
    'toilet': 'toilet', 'tv': 'television|monitor', 'laptop': 'portable computer', 'mouse': 'computer mouse',
    'remote': 'remote control',
    'keyboard': 'computer', 'cell phone': 'mobile phone',
    'microwave': 'microwave', 'oven': 'oven', 'toaster': 'toaster', 'sink': 'basin', 'refrigerator': 'refrigerator',
    'clock': 'clock', 'vase': 'vase',
    'teddy bear': 'toy bear',
    'hair drier': 'hair drier'}

def test_every_class_is_of_its_category_by_definition():
    info, classes = ImageNetInfo(), coco_to_imagenet()
    assert set(classes) == {*KEYS, 'dog', 'bird'}
    for category, keys in KEYS.items():
        for i in classes[category]:
            assert any(k in info.index_to_description(i, detailed=True).lower() for k in keys.split('|')), (category, i)

def test_families_are_whole():
    """ImageNet lists an animal family's kinds one after the other: ours are runs without gaps, and what stands
    before and after them is another animal."""
    info, classes = ImageNetInfo(), coco_to_imagenet()
    families = dict(dog=[(151, 268, 'sea lion', 'timber wolf')], cat=[(281, 285, 'grey fox', 'cougar')],
                    bear=[(294, 297, 'cheetah', 'mongoose')],
                    elephant=[(385, 386, 'indri', 'lesser panda')],
                    bird=[(7, 24, 'stingray', 'European fire salamander'), (80, 100, 'centipede', 'tusker'),
                          (127, 146, 'isopod', 'grey whale')])
    for category, runs in families.items():
        assert sorted(classes[category]) == [i for first, last, _, _ in runs for i in range(first, last + 1)]
        for first, last, before, after in runs:
            assert [info.index_to_description(i).split(',')[0] for i in (first - 1, last + 1)] == [before, after]

def test_words_that_mislead():
    info, classes = ImageNetInfo(), coco_to_imagenet()
    of = {i: c for c, indices in classes.items() for i in indices}
    named = lambda word: [i for i in range(1000) if info.index_to_description(i).split(',')[0] == word]
    assert [of.get(i) for i in named('kite')] == ['bird'] and [of.get(i) for i in named('crane')] == ['bird', None]
    assert [of.get(i) for i in named('mouse')] == ['mouse']
    for word in ('Dutch oven', 'street sign', 'hot pot', 'tiger', 'sea lion', 'toilet tissue', 'bearskin', 'car wheel',
                 'birdhouse', 'dogsled', 'catamaran',
                 'scuba diver'):
        assert [of.get(i) for i in named(word)] == ['boat' if word == 'catamaran' else None], word
