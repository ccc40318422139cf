"Scores of maps: kept, nested, redone only where something changed, and equal to what the metrics give."
import dataclasses, math

import numpy as np, pytest, torch
from scipy import stats
from torchvision.transforms.v2.functional import gaussian_blur

from lico.backbones import create_backbone
from lico.data import load
from lico.evidence import map_scores
from lico.evidence.cases import Network, on_scenes, scene_cases, test_images as cases_of_test_images
from lico.evidence.map_scores import blurred, noise_like, saliency_options, score, scores
from lico.experiments import Run
from lico.records import run
from lico.metrics import blur, deletion, insertion, pointing_game
from lico.saliency import explain
from lico.scenes import digit_scenes, scene_dataset


@pytest.fixture(scope='module')
def record(module_root): return run(Run(labels=40, backbone='wrn_10_1', steps=5), progress=False)


@pytest.fixture(scope='module')
def scenes(record):
    "Scenes of two digits at most, and a network that knows nothing."
    torch.manual_seed(0)
    network = Network('toy', create_backbone('wrn_10_1', 10, 48).eval(), lambda i: i.float()/127.5 - 1,
                      tuple('0123456789'), 48)
    return on_scenes(network, digit_scenes(4, 48, (1, 2), (18, 24), 'same', seed=1))


def test_scores_are_those_of_the_metrics(record):
    cases = cases_of_test_images(record, 12)
    df, net = scores(cases, 'grad-cam++', progress=False), cases.network.net
    maps = explain(net, cases.x, cases.target, 'grad-cam++')
    start = gaussian_blur(cases.x, 11, 5.)
    curves = dict(insertion=insertion(net, cases.x, maps, cases.target, baseline=start),
                  deletion=deletion(net, cases.x, maps, cases.target))
    for name, curve in curves.items(): np.testing.assert_allclose(df[name], 100*curve.auc, rtol=2e-4)
    np.testing.assert_allclose(df.overall, df.insertion - df.deletion, atol=2e-2)
    for name, x in dict(probability=cases.x, blurred=start).items():
        with torch.no_grad(): p = net(x).softmax(1)[torch.arange(12), cases.target]
        np.testing.assert_allclose(df[name], 100*p, rtol=1e-3)


def test_the_blur_does_not_shrink_with_the_image():
    small, usual, large = (torch.rand(1, 3, s, s, generator=torch.Generator().manual_seed(s)) for s in (16, 224, 448))
    assert torch.equal(blurred(small), gaussian_blur(small, 11, 5.)) and torch.equal(blurred(usual),
        blur(usual)) and torch.equal(blurred(large), blur(large))
    assert blurred(small).std() < .3*blur(small).std(), 'scaled with the size, a blur of 16 pixels is almost none'


@pytest.fixture
def measured(monkeypatch):
    "The numbers of images that are measured, a number a chunk."
    sizes, chunk = [], map_scores._chunk
    monkeypatch.setattr(map_scores, '_chunk', lambda cases, index, *args: sizes.append(len(index))
                        or chunk(cases, index, *args))
    return sizes


def test_what_is_kept_is_not_measured_again(record, measured):
    few = scores(cases_of_test_images(record, 8), 'random', progress=False)
    more = scores(cases_of_test_images(record, 20), 'random', progress=False)
    assert measured == [8, 8, 4] and more[:8].equals(few), 'only what was missing'
    assert scores(cases_of_test_images(record, 15), 'random', progress=False).equals(more[:15])
    scores(cases_of_test_images(record, 8), 'random', batch_size=3, progress=False)
    assert measured == [8, 8, 4], 'the size of a batch changes no score'
    for n in (3, 4): scores(cases_of_test_images(record, 8), 'rise', n_masks=n, progress=False)
    assert measured[3:] == [8, 8], 'an option does'


def test_it_is_the_content_that_counts(record, measured):
    "Another class, image, region or network, under the names of before."
    cases = dataclasses.replace(cases_of_test_images(record, 2), regions=(np.ones((1, 16, 16), bool),)*2)
    scores(cases, 'edges', progress=False)
    changed = [dict(target=(cases.target + 1) % 10), dict(x=cases.x + .1),
               dict(regions=(np.zeros((1, 16, 16), bool),)*2)]
    for k, change in enumerate(changed, 2):
        scores(dataclasses.replace(cases, **change), 'edges', progress=False)
        assert len(measured) == k, change.keys()
    with torch.no_grad(): next(cases.network.net.parameters()).add_(.1)
    scores(dataclasses.replace(cases, network=dataclasses.replace(cases.network)), 'edges', progress=False)
    assert len(measured) == 5, 'other weights'


def test_a_killed_measurement_goes_on(record, monkeypatch):
    calls, chunk = [], map_scores._chunk
    def dies(cases, index, *args):
        if len(calls) == 1: raise KeyboardInterrupt
        return calls.append(index) or chunk(cases, index, *args)
    monkeypatch.setattr(map_scores, '_chunk', dies)
    with pytest.raises(KeyboardInterrupt): scores(cases_of_test_images(record, 20), 'edges', progress=False)
    monkeypatch.setattr(map_scores, '_chunk', lambda cases, index,
                        *args: calls.append(index) or chunk(cases, index, *args))
    assert len(scores(cases_of_test_images(record, 20), 'edges', progress=False)) == 20 and sum(map(len,
        calls)) == 20, 'the first eight are not measured twice'


def test_pointing_games_on_digits(record):
    cases = scene_cases(run(Run(dataset=scene_dataset(200), backbone='wrn_10_1', steps=2), progress=False), 16)
    assert all((m.shape[1:] == cases.x.shape[2:]) and m.any() for m in cases.regions)
    df = scores(cases, 'random', ('pointing_game', 'energy', 'sch'), progress=False)
    maps = torch.cat([explain(cases.network.net, x, y, 'random') for x,
                      y in zip(cases.x.split(8), cases.target.split(8))])  # as it is measured
    boxes = []
    for i, m in enumerate(cases.regions):
        rows, columns = np.flatnonzero(m.any((0, 2))), np.flatnonzero(m.any((0, 1)))
        boxes.append(np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], float))
        inside = maps[i].numpy()[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].sum()/maps[i].numpy().sum()
        assert math.isclose(df.energy[i], 100*inside, rel_tol=1e-3)
    np.testing.assert_allclose(df.pointing_game, 100*pointing_game(maps, boxes, 15*cases.x.shape[-1]/224))
    assert (df.sch <= df.energy + 1e-6).all(), 'a mask is inside its box'


def of_maps(monkeypatch, cases, maps):
    "Scores of places of given maps."
    monkeypatch.setattr(map_scores, 'explain', lambda *args, **options: maps)
    monkeypatch.setattr(map_scores, '_file',
                        lambda *args: map_scores.root()/'data'/'scores'/f'{torch.rand(()).item()}.csv')
    return scores(cases, 'edges', ('pointing_mask', 'sch', 'mosu'), progress=False)


def test_places_by_hand(scenes, monkeypatch):
    "All on the first object; all far from every object; nothing at all."
    first, far = torch.zeros(4, 48, 48), torch.zeros(4, 48, 48)
    for i, r in enumerate(scenes.regions):
        first[i][torch.from_numpy(r[0])] = 1
        distance = torch.stack([(torch.arange(48)[:, None] - y)**2 + (torch.arange(48)[None] - x)**2 for y,
                                x in np.argwhere(r.any(0))]).amin(0)
        far[i].view(-1)[distance.argmax()] = 1
    on, off, none = (of_maps(monkeypatch, scenes, m) for m in (first, far, torch.zeros(4, 48, 48)))
    several = np.array([len(r) > 1 for r in scenes.regions])
    assert several.any() and not several.all()
    assert (on.sch == 100).all() and (on.pointing_mask == 100).all() and (off.sch == 0).all() and (off.pointing_mask
        == 0).all()
    assert np.allclose(on.mosu[several], math.log(2), rtol=1e-4) and on.mosu[~several].isna().all()
    assert none.constant.all() and not on.constant.any() and none[['sch', 'pointing_mask',
        'mosu']].isna().all(axis=None)
    some = of_maps(monkeypatch, scenes, torch.cat([first[:1], torch.zeros(1, 48, 48), first[2:]]))
    second = [False, True, False, False]
    assert some.pointing_mask.isna().tolist() == some.sch.isna().tolist() == some.constant.tolist() == second


@pytest.mark.parametrize('pixels, hit', [(3, 100), (4, 0)])  # 15 of 224 are 3.2 of 48
def test_the_tolerance_is_scaled(scenes, monkeypatch, pixels, hit):
    mask = np.zeros((1, 48, 48), bool); mask[0, :, :10] = True
    maps = torch.zeros(1, 48, 48); maps[0, 20, 9 + pixels] = 1
    one = dataclasses.replace(scenes, x=scenes.x[:1], target=scenes.target[:1], names=('a',), regions=(mask,))
    assert of_maps(monkeypatch, one, maps).pointing_mask[0] == hit


def test_means_are_of_the_images_below_them(record):
    rows, per_image = score([cases_of_test_images(record, 8)], ['rise', 'edges'], options=dict(rise=dict(n_masks=3)),
                            progress=False)
    assert rows.saliency_options.tolist() == ['n_masks=3',
                                              ''] and per_image.saliency_options.tolist() == ['n_masks=3']*8 + ['']*8
    np.testing.assert_allclose(rows.insertion, per_image.insertion.to_numpy().reshape(2, 8).mean(1))


@pytest.mark.parametrize('call, sentence', [
    (lambda cases: scores(cases, 'gradcam'), "unknown saliency method 'gradcam'"),
    (lambda cases: scores(cases, metrics=['insert']), "unknown metric 'insert'"),
    (lambda cases: scores(cases, metrics=['sch']), 'sch needs images with known objects'),
    (lambda cases: saliency_options('rise=3'), 'expected METHOD.NAME=VALUE'),
    (lambda cases: saliency_options('gradcam.x=3'), "unknown saliency method 'gradcam'")])
def test_refusals(record, call, sentence):
    with pytest.raises(ValueError, match=sentence): call(cases_of_test_images(record, 2))


def test_curves_from_and_to_other_places(record):
    "An image's mean colour, and normal noise of its own whatever is measured beside it."
    cases = cases_of_test_images(record, 3)
    net, x, y = cases.network.net, cases.x, cases.target
    places = dict(mean=x.flatten(2).mean(2)[..., None, None], noise=noise_like(x, cases.names))
    wanted = {f'{play.__name__}_{k}': (play, b) for play in (insertion, deletion) for k, b in places.items()}
    df, maps = scores(cases, metrics=[*wanted, 'ses'], progress=False), explain(net, x, y)
    for k, (play, b) in wanted.items():
        np.testing.assert_allclose(df[k], 100*play(net, x, maps, y, baseline=b).auc, rtol=2e-4, err_msg=k)
    z = noise_like(torch.zeros(2, 3, 64, 64), 'ab')
    assert stats.kstest(z.flatten(), 'norm').pvalue > 1e-3 and torch.equal(noise_like(z[1:], 'b'), z[1:])
    twice = dataclasses.replace(cases, x=x[[0, 0]], target=y[[0, 0]], names=('a', 'b'))
    df = scores(twice, metrics=['insertion_noise', 'ses'], progress=False)
    assert df.insertion_noise.nunique() == df.ses.nunique() == 2


def test_images_of_a_class_are_not_its_first(record):
    cases = cases_of_test_images(record, 20)
    y = load('digits').test.y
    first = {int(i) for c in range(10) for i in (y == c).nonzero()[:2, 0]}
    assert {int(o) for o in cases.names} != first and y[[int(o) for o in cases.names]].bincount().tolist() == [2]*10
