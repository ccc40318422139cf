"Networks and the images that they are asked about: labelled pictures, test images, scenes, COCO."
import json, os

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

from lico.copies import folded
from lico.cams import imagenet_classifier
from lico.evidence.cases import coco, coco_in, imagenet_cases, of_kind, scene_cases
from lico.evidence.cases import test_images as cases_of_test_images
from lico.evidence.map_scores import score
from lico.experiments import Run
from lico.records import run
from lico.scenes import coco_scenes, coco_to_imagenet, digit_scenes


@pytest.fixture(scope='module')
def record(module_root): return run(Run(labels=40, backbone='wrn_10_1', steps=2), progress=False)


def test_folding_changes_nothing():
    net = imagenet_classifier()[0]
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): before = net(x)
    def norms(net): return sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert norms(net) > 40
    with torch.no_grad(): torch.testing.assert_close(folded(net, x[:1])(x), before, atol=1e-4, rtol=1e-4)
    assert norms(net) == 0


def test_pictures_with_labels(tmp_path, lico_root):
    from skimage import data
    (tmp_path/'sample'/'images').mkdir(parents=True)
    for name in ('chelsea', 'coffee'): Image.fromarray(getattr(data,
        name)()).save(tmp_path/'sample'/'images'/f'{name}.png')
    pd.DataFrame(dict(file=['chelsea.png', 'coffee.png'],
                      class_index=[285, 967])).to_csv(tmp_path/'sample'/'labels.csv', index=False)
    cases = imagenet_cases(str(tmp_path/'sample'), 2)
    assert dict(zip(cases.names, cases.target.tolist())) == {'chelsea.png': 285, 'coffee.png': 967}
    assert imagenet_cases(str(tmp_path/'sample'), 1).names == cases.names[:1]
    with pytest.raises(ValueError, match='images = 3: .* has 2 pictures'): imagenet_cases(str(tmp_path/'sample'), 3)
    with pytest.raises(FileNotFoundError, match='no .*labels.csv: expected a table with the columns file and class_'):
        imagenet_cases(str(tmp_path), 1)
    with torch.no_grad(): assert (cases.network.net(cases.x).topk(5).indices
                                  == cases.target[:, None]).any(1).all(), 'it knows a cat and a cup of coffee'


def test_more_test_images_than_there_are(record):
    with pytest.raises(ValueError, match='images = 501: digits has 500 test images'): cases_of_test_images(record, 501)


def test_kinds_of_scenes():
    scenes = digit_scenes(40, objects=(1, 3))
    for kind, fits in (('one', lambda l: len(l) == 1), ('same', lambda l: len(l) > 1 and len(set(l)) == 1),
                       ('different', lambda l: len(set(l)) > 1)):
        found = of_kind(scenes, kind)
        assert [s.name for s in found] == [s.name for s in scenes
                                           if fits(s.labels.tolist())] and found.names == tuple(s.name for s in found)
    assert of_kind(scenes, '') is scenes


def coco_like(folder):
    "Three pictures with a cat, a dog and a zebra each, in COCO's own layout."
    (folder/'annotations').mkdir(parents=True); (folder/'val2017').mkdir()
    names, rng = {17: 'cat', 18: 'dog', 24: 'zebra'}, np.random.default_rng(0)
    def annotation(i, k, c): return dict(id=10*i + k, image_id=i, category_id=c, iscrowd=0,
                                         segmentation=[[20*k, 10, 20*k + 15, 10, 20*k + 15, 30, 20*k, 30]])
    content = dict(images=[dict(id=i, file_name=f'{i}.jpg', height=64, width=64) for i in range(3)],
                   categories=[dict(id=k, name=v) for k, v in names.items()],
                   annotations=[annotation(i, k, c) for i in range(3) for k, c in enumerate(names)])
    for i in range(3): Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder/'val2017'/f'{i}.jpg')
    (folder/'annotations'/'instances_val2017.json').write_text(json.dumps(content), encoding='utf-8')
    return folder


def test_a_network_of_a_thousand_classes_on_coco(record, tmp_path):
    """Table 8 on the paper's data: trained pairs are explained for the ImageNet class of the category that they
    find most probable."""
    for part in ('train', 'test'):
        for c in range(1000):
            (tmp_path/'thousand'/part/f'{c:03}').mkdir(parents=True)
            Image.new('RGB', (32, 32), (c % 256, c//4, 9)).save(tmp_path/'thousand'/part/f'{c:03}'/'x.png')
    thousand = run(Run(dataset=f"folder:{tmp_path/'thousand'}", backbone='wrn_10_1', steps=1, evaluations=1),
                   progress=False)
    folder = coco_like(tmp_path/'coco')
    cases = scene_cases(thousand, folder=folder)
    assert len(cases) == 9 and len(scene_cases(thousand, 4, folder=folder)) == 4 and cases.network.id == thousand['id']
    known = coco_to_imagenet()
    with torch.no_grad(): logits = cases.network.net(cases.x)
    for name, target, row, region in zip(cases.names, cases.target, logits, cases.regions):
        category = name.split(' ', 1)[1]
        assert target in known[category] and row[target] == row[list(known[category])].max() and region.shape == (1,
            32, 32)
        columns = region[0].any(0).nonzero()[0]
        assert columns.min() >= 10*['cat', 'dog', 'zebra'].index(category) - 1 and columns.max() <= 10*['cat', 'dog',
            'zebra'].index(category) + 9
    rows, _ = score([cases], ['grad-cam'], ('pointing_game',), progress=False)
    assert 0 <= rows.pointing_game[0] <= 100
    assert len(scene_cases(thousand, kind='different', folder=folder)) == 9 and coco_in(folder, 32,
        'different') is coco_in(folder, 32, 'different'), 'read once for all networks'
    with pytest.raises(ValueError, match="none of the 0 scenes of kind 'one' has an object of a class that the "
                                         "network knows"): scene_cases(thousand, kind='one', folder=folder)
    with pytest.raises(ValueError, match="digits has 10 classes: COCO's categories are found among ImageNet's 1,000"):
        scene_cases(record, folder=folder)


def labelled(folder, rows, pictures=(), header='file,class_index', encoding='utf-8'):
    (folder/'images').mkdir(parents=True)
    for name, colour in pictures:
        name = os.fsdecode(name.encode())  # as it is called here, whatever the locale
        (folder/'images'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (9, 9), colour).save(folder/'images'/name)
    (folder/'labels.csv').write_bytes('\n'.join([header, *rows]).encode(encoding))
    return str(folder)


def test_two_pictures_of_one_name_stay_two(tmp_path, lico_root):
    "In folders below one, and in two folders of one last name, of which a copy elsewhere is the same."
    both = labelled(tmp_path/'a'/'mine', ['x/1.png,3', 'y/1.png,4'], [('x/1.png', 'red'), ('y/1.png', 'blue')])
    cases = imagenet_cases(both, 2)
    assert dict(zip(cases.names, cases.target.tolist())) == {'x/1.png': 3, 'y/1.png': 4}
    assert imagenet_cases(both, 1).network.id == cases.network.id
    other = labelled(tmp_path/'b'/'mine', ['x/1.png,3', 'y/1.png,4'], [('x/1.png', 'red'), ('y/1.png', 'lime')])
    ids = [imagenet_cases(o, 2).network.id for o in (both, other, labelled(
        tmp_path/'c'/'mine', ['y/1.png,4', 'x/1.png,3'], [('x/1.png', 'red'), ('y/1.png', 'blue')]))]
    assert ids[0] == ids[2] != ids[1] and cases.network.about['dataset'] == 'mine'
    a, b = coco_like(tmp_path/'a'/'coco'), coco_like(tmp_path/'b'/'coco')
    assert coco(str(a)).network.id == coco(str(b)).network.id
    Image.new('RGB', (64, 64)).save(b/'val2017'/'0.jpg')
    assert coco(str(a)).network.id != coco(str(b)).network.id
    file = a/'annotations'/'instances_val2017.json'
    content = json.loads(file.read_text(encoding='utf-8'))
    for i in (0, 1):
        (a/'val2017'/f'{i}').mkdir()
        (a/'val2017'/f'{i}.jpg').rename(a/'val2017'/f'{i}'/'same.jpg')
        content['images'][i]['file_name'] = f'{i}/same.jpg'
    file.write_text(json.dumps(content), encoding='utf-8')
    names = [s.name for s in coco_scenes(a, 32, 'annotations/instances_val2017.json', 'val2017')]
    assert names == ['0/same.jpg', '1/same.jpg', '2.jpg']


@pytest.mark.parametrize('name', ['../../outside.jpg', '/etc/passwd', 'a/../../x.jpg', r'..\x.jpg', r'C:\x.jpg', '',
                                  '.',
                                  None, 3])
def test_annotations_stay_below_their_folder(tmp_path, name):
    folder = coco_like(tmp_path/'coco')
    Image.new('RGB', (64, 64)).save(tmp_path/'outside.jpg')
    file = folder/'annotations'/'instances_val2017.json'
    content = json.loads(file.read_text(encoding='utf-8'))
    content['images'][1]['file_name'] = name
    file.write_text(json.dumps(content), encoding='utf-8')
    with pytest.raises(ValueError, match='leads out of its folder or is none: expected names of files below it') as e:
        coco_scenes(folder, 32, 'annotations/instances_val2017.json', 'val2017')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('rows, header, encoding, sentence', [
    (['a.png,3', 'a.png,4'], 'file,class_index', 'utf-8', "names the file 'a.png' twice"),
    (['a.png,3.7'], 'file,class_index', 'utf-8',
     "has class_index '3.7' for a.png: expected a class of ImageNet-1k, 0 to"),
    (['a.png,1000'], 'file,class_index', 'utf-8', "has class_index '1000' for a.png"),
    (['a.png,-1'], 'file,class_index', 'utf-8', "has class_index '-1' for a.png"),
    (['a.png'], 'file,class_index', 'utf-8', 'has class_index None for a.png'),
    (['a.png;3'], 'file;class_index', 'utf-8', 'has no column class_index and no file: .* commas between'),
    (['ä.png,3'], 'file,class_index', 'cp1252', 'is not in UTF-8: save it as CSV in UTF-8'),
    (['b.png,3'], 'file,class_index', 'utf-8', 'cannot be read: b.png .*No such file')])
def test_labels_that_mean_nothing_are_refused(tmp_path, rows, header, encoding, sentence):
    folder = labelled(tmp_path/'mine', rows, [('a.png', 'red')], header, encoding)
    with pytest.raises(ValueError, match=sentence) as e: imagenet_cases(folder, 1)
    assert '\n' not in str(e.value)


def test_labels_as_excel_and_a_mac_write_them(tmp_path):
    "With a byte order mark, and letters in another form than the file's."
    folder = labelled(tmp_path/'mine', ['A\u0308.png,3'], [('\u00c4.png', 'red')], encoding='utf-8-sig')
    assert imagenet_cases(folder, 1).target.tolist() == [3]
