"Scores of maps: kept, nested, redone only where something changed, and equal to what the metrics give."
import json, math
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur

from lico.cams import imagenet_classifier
from lico.cases import Cases, coco, folded, on_coco, on_digits, pretrained
from lico.experiments import Run, run
from lico.metrics import blur, deletion, insertion, pointing_game
from lico.saliency import explain
from lico.scenes import coco_to_imagenet, scene_dataset
from lico.scores import (against, against_sentences, against_table, blurred, measured, read_scores, saliency_options,
                         save_scores, score_all, scores, top5, trained)


@pytest.fixture(scope='module')
def record(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv('LICO_ROOT', str(tmp_path_factory.mktemp('root')))
    yield run(Run(labels=40, backbone='wrn_10_1', steps=5), progress=False)
    patch.undo()


def test_scores_are_those_of_the_metrics(record):
    cases = trained(record, 12)
    df = scores(cases, 'grad-cam++', progress=False)
    maps = explain(cases.net, cases.x, cases.target, 'grad-cam++')
    start = gaussian_blur(cases.x, 11, 5.)
    for name, curve in dict(insertion=insertion(cases.net, cases.x, maps, cases.target, baseline=start), deletion=deletion(cases.net, cases.x, maps, cases.target)).items():
        np.testing.assert_allclose(df[name], 100*curve.auc, rtol=2e-4)
    np.testing.assert_allclose(df.overall, df.insertion - df.deletion, atol=2e-2)
    for name, x in dict(probability=cases.x, blurred=start).items():
        with torch.no_grad(): score = cases.net(x).softmax(1)[torch.arange(12), cases.target]
        np.testing.assert_allclose(df[name], 100*score, rtol=1e-3)


def test_the_blur_does_not_shrink_with_the_image():
    small, usual, large = (torch.rand(1, 3, s, s, generator=torch.Generator().manual_seed(s)) for s in (16, 224, 448))
    assert torch.equal(blurred(small), gaussian_blur(small, 11, 5.)) and torch.equal(blurred(usual), blur(usual)) and torch.equal(blurred(large), blur(large))
    assert blurred(small).std() < .3*blur(small).std(), 'scaled with the size, a blur of 16 pixels is almost none'


def test_what_is_kept_is_not_measured_again(record, monkeypatch):
    import lico.scores as module
    few = scores(trained(record, 10), 'random', progress=False)
    calls, chunk = [], module._chunk
    monkeypatch.setattr(module, '_chunk', lambda cases, index, *args: calls.append(index) or chunk(cases, index, *args))
    more = scores(trained(record, 20), 'random', progress=False)
    assert sum(map(len, calls)) == 10 and more[:10].equals(few), 'only the ten that were missing'
    assert scores(trained(record, 15), 'random', progress=False).equals(more[:15]) and sum(map(len, calls)) == 10
    scores(trained(record, 10), 'random', batch_size=3, progress=False)
    assert sum(map(len, calls)) == 10, 'the size of a batch changes no score'
    scores(trained(record, 10), 'rise', n_masks=3, progress=False); scores(trained(record, 10), 'rise', n_masks=4, progress=False)
    assert sum(map(len, calls)) == 30, 'an option does'


def test_a_killed_measurement_goes_on(record, monkeypatch):
    import lico.scores as module
    calls, chunk = [], module._chunk
    def dies(cases, index, *args):
        if len(calls) == 1: raise KeyboardInterrupt
        return calls.append(index) or chunk(cases, index, *args)
    monkeypatch.setattr(module, '_chunk', dies)
    with pytest.raises(KeyboardInterrupt): scores(trained(record, 20), 'edges', progress=False)
    monkeypatch.setattr(module, '_chunk', lambda cases, index, *args: calls.append(index) or chunk(cases, index, *args))
    assert len(scores(trained(record, 20), 'edges', progress=False)) == 20 and sum(map(len, calls)) == 20, 'the first eight are not measured twice'


def test_pointing_games_on_digits(record):
    dataset = scene_dataset(200)
    r = run(Run(dataset=dataset, backbone='wrn_10_1', steps=2), progress=False)
    cases = on_digits(r, 20)
    assert all((m.shape[1:] == cases.x.shape[2:]) and m.any() for m in cases.regions)
    df = scores(cases, 'random', ('pointing_game', 'energy', 'sch'), progress=False)
    maps = explain(cases.net, cases.x, cases.target, 'random')
    boxes = [None]*len(maps)
    for i, m in enumerate(cases.regions):
        rows, columns = np.flatnonzero(m.any((0, 2))), np.flatnonzero(m.any((0, 1)))
        boxes[i] = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], float)
        inside = maps[i].numpy()[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].sum()/maps[i].numpy().sum()
        assert math.isclose(df.energy[i], 100*inside, rel_tol=1e-3)
    np.testing.assert_allclose(df.pointing_game, 100*pointing_game(maps, boxes, 15*cases.x.shape[-1]/224))
    assert (df.sch <= df.energy + 1e-6).all(), 'a mask is inside its box'


def test_a_constant_map_points_nowhere(record, monkeypatch):
    import lico.scores as module
    cases = on_digits(run(Run(dataset=scene_dataset(200), backbone='wrn_10_1', steps=2), progress=False), 4)
    def some_constant(net, x, target, saliency, **options):
        maps = explain(net, x, target, saliency, **options)
        maps[1] = 0
        return maps
    monkeypatch.setattr(module, 'explain', some_constant)
    df = scores(cases, 'edges', ('pointing_game', 'sch'), progress=False)
    assert df.pointing_game.isna().tolist() == [False, True, False, False] == df.sch.isna().tolist() and df.constant.tolist() == [False, True, False, False]


def test_folding_changes_nothing():
    net = imagenet_classifier()[0]
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): before = net(x)
    def norms(net): return sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert norms(net) > 40
    with torch.no_grad(): torch.testing.assert_close(folded(net)(x), before, atol=1e-4, rtol=1e-4)
    assert norms(net) == 0


def test_pictures_with_labels(tmp_path, monkeypatch):
    monkeypatch.setenv('LICO_ROOT', str(tmp_path))
    from skimage import data
    (tmp_path/'sample'/'images').mkdir(parents=True)
    for name in ('chelsea', 'coffee'): Image.fromarray(getattr(data, name)()).save(tmp_path/'sample'/'images'/f'{name}.png')
    pd.DataFrame(dict(file=['chelsea.png', 'coffee.png'], class_index=[285, 967])).to_csv(tmp_path/'sample'/'labels.csv', index=False)
    cases = pretrained(str(tmp_path/'sample'), 2)
    assert dict(zip(cases.names, cases.target.tolist())) == {'chelsea.png': 285, 'coffee.png': 967} and pretrained(str(tmp_path/'sample'), 1).names == cases.names[:1]
    with pytest.raises(ValueError, match='images = 3: .* has 2 pictures'): pretrained(str(tmp_path/'sample'), 3)
    with pytest.raises(FileNotFoundError, match='no .*labels.csv: expected a table with the columns file and class_index'): pretrained(str(tmp_path), 1)
    with torch.no_grad(): assert (cases.net(cases.x).topk(5).indices == cases.target[:, None]).any(1).all(), 'it knows a cat and a cup of coffee'


def test_files_keep_or_replace(record, tmp_path):
    rows, per_image = measured([record], ['random', 'edges'], images=10, progress=False)
    save_scores(rows[:1], per_image[per_image.saliency == 'random'], tmp_path)
    a, b = save_scores(rows[1:], per_image[per_image.saliency == 'edges'], tmp_path, keep=True)
    assert a.saliency.tolist() == ['random', 'edges'] and len(b) == 20
    a, b = save_scores(rows[1:], per_image[per_image.saliency == 'edges'], tmp_path)
    assert a.saliency.tolist() == ['edges'] and len(b) == 10
    np.testing.assert_allclose(a.insertion, b.insertion.mean(), rtol=1e-4)
    with pytest.raises(FileNotFoundError, match='run the notebook without `stored`'): read_scores(tmp_path/'none')


def test_against_random_is_scipys_paired_t(record):
    from scipy.stats import ttest_rel
    rows, per_image = measured([record], ['random', 'edges'], images=20, progress=False)
    row = against(per_image, 'insertion').set_index('saliency').loc['edges']
    a, b = (per_image[per_image.saliency == s].insertion.to_numpy() for s in ('edges', 'random'))
    interval = ttest_rel(a, b).confidence_interval()
    np.testing.assert_allclose([row.difference - row.half_width, row.difference + row.half_width], [interval.low, interval.high])
    made = pd.DataFrame(dict(image=[str(i) for i in range(9)]*3, saliency=['random']*9 + ['good']*9 + ['bad']*9, id='net', probability=50., deletion=[*np.arange(9.), *(np.arange(9) - 5 + np.arange(9)/9), *(np.arange(9) + 5 + np.arange(9)/9)]))
    rows = pd.DataFrame(dict(id='net', dataset='toys', saliency=['random', 'good', 'bad'], saliency_options=None))
    said = against_sentences(rows, made)
    assert 'Better: good (-4.6); worse: bad (+5.4)' in said and 'confidence' not in said, 'a smaller area is a better deletion; confidence is not of maps'
    assert '| toys       | good       | 9   | -0.6' in against_table(rows, made)
    few = rows[rows.saliency != 'random']
    assert against_table(few, made) == against_sentences(few, made) == '', 'nothing to compare with'


@pytest.mark.parametrize('call, sentence', [
    (lambda cases: scores(cases, 'gradcam'), "unknown saliency method 'gradcam'"),
    (lambda cases: scores(cases, metrics=['insert']), "unknown metric 'insert'"),
    (lambda cases: scores(cases, metrics=['sch']), 'sch needs images with known objects'),
    (lambda cases: saliency_options('rise=3'), 'expected METHOD.NAME=VALUE'),
    (lambda cases: saliency_options('gradcam.x=3'), "unknown saliency method 'gradcam'")])
def test_refusals(record, call, sentence):
    with pytest.raises(ValueError, match=sentence): call(trained(record, 2))


def test_more_test_images_than_there_are(record):
    with pytest.raises(ValueError, match='images = 501: digits has 500 test images'): trained(record, 501)


def test_top5_is_sklearns(record):
    from sklearn.metrics import top_k_accuracy_score
    cases = trained(record, 500)
    with torch.no_grad(): logits = cases.net(cases.x)
    assert math.isclose(top5(record), 100*top_k_accuracy_score(cases.target, logits, k=5, labels=range(10)))


def coco_like(folder):
    "Three pictures with a cat, a dog and a zebra each, in COCO's own layout."
    (folder/'annotations').mkdir(parents=True); (folder/'val2017').mkdir()
    names, rng = {17: 'cat', 18: 'dog', 24: 'zebra'}, np.random.default_rng(0)
    content = dict(images=[dict(id=i, file_name=f'{i}.jpg', height=64, width=64) for i in range(3)], categories=[dict(id=k, name=v) for k, v in names.items()],
                   annotations=[dict(id=10*i + k, image_id=i, category_id=c, iscrowd=0, segmentation=[[20*k, 10, 20*k + 15, 10, 20*k + 15, 30, 20*k, 30]]) for i in range(3) for k, c in enumerate(names)])
    for i in range(3): Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder/'val2017'/f'{i}.jpg')
    (folder/'annotations'/'instances_val2017.json').write_text(json.dumps(content))
    return folder


def test_a_network_of_a_thousand_classes_on_coco(record, tmp_path):
    "Table 8 on the paper's data: trained pairs are explained for the ImageNet class of the category that they find most probable."
    for part in ('train', 'test'):
        for c in range(1000):
            (tmp_path/'thousand'/part/f'{c:03}').mkdir(parents=True)
            Image.new('RGB', (32, 32), (c % 256, c//4, 9)).save(tmp_path/'thousand'/part/f'{c:03}'/'x.png')
    thousand = run(Run(dataset=f"folder:{tmp_path/'thousand'}", backbone='wrn_10_1', steps=1, evaluations=1), progress=False)
    cases = on_coco(thousand, folder=coco_like(tmp_path/'coco'))
    assert len(cases) == 9 and len(on_coco(thousand, 4, tmp_path/'coco')) == 4 and cases.id == thousand['id']
    known = coco_to_imagenet()
    with torch.no_grad(): logits = cases.net(cases.x)
    for name, target, row, region in zip(cases.names, cases.target, logits, cases.regions):
        category = name.split(' ', 1)[1]
        assert target in known[category] and row[target] == row[list(known[category])].max() and region.shape == (1, 32, 32)
        columns = region[0].any(0).nonzero()[0]
        assert columns.min() >= 10*['cat', 'dog', 'zebra'].index(category) - 1 and columns.max() <= 10*['cat', 'dog', 'zebra'].index(category) + 9
    rows, _ = score_all([cases], ['grad-cam'], ('pointing_game',), progress=False)
    assert rows.method[0] == 'CE' and 0 <= rows.pointing_game[0] <= 100
    with pytest.raises(ValueError, match="digits has 10 classes: COCO's categories are found among ImageNet's 1,000"): on_coco(record, folder=tmp_path/'coco')


def test_results_of_another_notebook_are_said_to_go(tmp_path, capsys):
    "A folder may hold a results.csv and no scores.csv: what was measured is written all the same."
    rows, per_image = read_scores(Path(__file__).parents[1]/"figures"/"table1-cgc")
    rows.assign(id='x').to_csv(tmp_path/'results.csv', index=False)
    assert save_scores(rows, per_image, tmp_path)[0].id.tolist() == rows.id.tolist()
    assert 'held 1 other runs' in capsys.readouterr().err
