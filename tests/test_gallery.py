"What the figures share: numbers against their own definitions, files that come back as they were, scenes of the right kind."
import dataclasses, math
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from scipy.stats import ttest_rel
from torchvision.transforms.v2.functional import gaussian_blur

from lico.backbones import create_backbone
from lico.experiments import Run, run_id
from lico.differences import differences, draw_differences, reads
from lico.gallery import Explained, Shown, _command, a_row_a_method, compared, draw, explained, label, of_kind, read_shown, read_worth, save_shown, save_worth, scene_runs, to_show, worth
from lico.metrics import Curve, deletion, insertion
from lico.scenes import digit_scenes
from lico.cases import on_scenes


SEED = 1


@pytest.fixture(scope='module')
def cases():
    torch.manual_seed(0)
    net, scenes = create_backbone('wrn_10_1', 10, 32).eval(), digit_scenes(4, 48, (1, 2), (18, 24), 'same', seed=SEED)
    about = dict(method='LICO', preset='repaired', seed=0, id='x', kind='same')
    return on_scenes(net, 'x', about, scenes, lambda i: i.float()/127.5 - 1, {n: (k,) for k, n in enumerate(scenes.class_names)})


def made(cases, maps): return Explained(cases, 'made', maps, *[Curve(torch.linspace(0, 1, 3), torch.full((len(maps), 3), v)) for v in (.5, .25)])


def test_explained_is_the_metric_of_the_map(cases):
    e = explained(cases, 'grad-cam')
    for own, metric, baseline in ((e.insertion, insertion, gaussian_blur(cases.x, 11, 5.)), (e.deletion, deletion, 0.)):
        assert torch.allclose(own.curve, metric(cases.net, cases.x, e.maps, cases.target, baseline=baseline).curve, atol=1e-5)
    df = worth(e)
    assert np.allclose(df.overall, 100*(e.insertion.auc - e.deletion.auc), atol=1e-3) and df.image.tolist() == list(cases.names) and (df.saliency == 'grad-cam').all()
    with torch.no_grad(): p = cases.net(cases.x).softmax(1)[range(len(cases)), cases.target]
    assert np.allclose(df.probability, 100*p, atol=1e-3)


def test_places_by_hand(cases):
    "All on the first object; all far from every object; nothing at all."
    first, far = torch.zeros(4, 48, 48), torch.zeros(4, 48, 48)
    for i, r in enumerate(cases.regions):
        first[i][torch.from_numpy(r[0])] = 1
        distance = torch.stack([(torch.arange(48)[:, None] - y)**2 + (torch.arange(48)[None] - x)**2 for y, x in np.argwhere(r.any(0))]).amin(0)
        far[i].view(-1)[distance.argmax()] = 1
    on, off, none = (worth(made(cases, m)) for m in (first, far, torch.zeros(4, 48, 48)))
    several = np.array([len(r) > 1 for r in cases.regions])
    assert several.any() and not several.all() and (on.objects == [len(r) for r in cases.regions]).all()
    assert (on.sch == 100).all() and (on.pointing == 100).all() and (off.sch == 0).all() and (off.pointing == 0).all()
    assert np.allclose(on.mosu[several], math.log(2)) and on.mosu[~several].isna().all()
    assert none.constant.all() and not on.constant.any() and 'sch' not in none


@pytest.mark.parametrize('pixels, hit', [(3, 100), (4, 0)])  # 15 of 224 are 3.2 of 48
def test_the_tolerance_is_scaled(cases, pixels, hit):
    mask = np.zeros((1, 48, 48), bool); mask[0, :, :10] = True
    maps = torch.zeros(1, 48, 48); maps[0, 20, 9 + pixels] = 1
    one = SimpleNamespace(names=('a',), target=torch.tensor([0]), regions=(mask,), about={})
    assert worth(made(one, maps)).pointing[0] == hit


def test_to_show_and_back(cases, tmp_path):
    e = explained(cases, 'random')
    s = to_show({'a\nb': e, 'c': explained(cases, 'edges')}, ['x', 'y', 'z'], (.5,)*3, (.5,)*3)
    scenes = digit_scenes(4, 48, (1, 2), (18, 24), 'same', seed=SEED)
    for k in range(3):
        scene = scenes[int(cases.names[k].split()[0])]
        assert np.array_equal(s.images[k], scene.image) and np.array_equal(s.boxes[k][:len(scene.boxes)], scene.boxes) and np.isnan(s.boxes[k][len(scene.boxes):]).all()
    assert np.abs(s.maps[:, 0]/255 - e.maps[:3].numpy()).max() <= .5/255 + 1e-6 and np.array_equal(s.insertion[:, 0], e.insertion.curve[:3])
    save_shown(s, tmp_path/'m.npz')
    again = read_shown(tmp_path/'m.npz')
    for k in vars(s): assert np.array_equal(getattr(s, k), getattr(again, k), equal_nan=k == 'boxes'), k
    half = to_show({'a': e}, ['x'], (.5,)*3, (.5,)*3, size=24)
    assert half.images.shape == (1, 3, 24, 24) and half.maps.shape == (1, 1, 24, 24) and np.allclose(half.boxes[0], s.boxes[0][:1]/2)


def test_pictures_show_what_they_are_given(cases):
    "Curves and their areas, the class's probability, boxes, and the difference with its interval, read back from the axes."
    s = to_show({'a': explained(cases, 'edges'), 'b': explained(cases, 'random')}, ['x'], (.5,)*3, (.5,)*3)
    s = dataclasses.replace(s, deletion=s.deletion*0 + np.float32([[.37], [.62]]))  # which the untrained network's curves, all of them a tenth, would not tell apart
    axes = draw(s).axes
    rising = axes[3].lines[1]
    assert np.array_equal(rising.get_ydata(), s.insertion[0, 1]) and rising.get_label() == f'{np.trapezoid(s.insertion[0, 1], s.fraction):.0%} b'
    assert [ax.get_xlabel() for ax in axes[1:3]] == ['p = 37%', 'p = 62%'] and axes[0].get_ylabel() == 'x' and axes[2].images[1].get_clim() == (0, 1)
    assert [o.get_bbox().bounds for o in axes[0].patches] == [(x0 - .5, y0 - .5, x1 - x0, y1 - y0) for x0, y0, x1, y1 in s.boxes[0] if not np.isnan(x0)]
    d = differences(rows(), ['sch'])
    (line, caps, bars), = draw_differences(d).axes[0].containers
    assert np.isclose(line.get_xdata()[0], d.difference[0]) and np.allclose(bars[0].get_segments()[0][:, 0], [d.difference[0] - d.half_width[0], d.difference[0] + d.half_width[0]])


def rows(seeds=(0, 1, 2), gap=np.nan):
    rng, out = np.random.default_rng(0), []
    for method in ('CE', 'LICO'):
        for seed in seeds:
            for image in 'abc': out.append(dict(kind='one', saliency='rise', method=method, preset='paper', seed=seed, image=image, sch=rng.normal(), mosu=rng.normal()))
    df = pd.DataFrame(out)
    df.loc[(df.method == 'LICO') & (df.seed == 1) & (df.image == 'b'), 'sch'] = gap
    return df


def test_differences_are_paired_on_seeds():
    "Against scipy's paired t-test over the means of each seed, of the images that both have."
    df = rows()
    kept = df[~((df.seed == 1) & (df.image == 'b'))]
    for metric, part in (('sch', kept), ('mosu', df)):
        means = part.groupby(['method', 'seed'])[metric].mean().unstack('method')
        test = ttest_rel(means.LICO, means.CE)
        r = differences(df, ['sch', 'mosu']).set_index('metric').loc[metric]
        low, high = test.confidence_interval()
        assert np.isclose(r.difference, (low + high)/2) and np.isclose(r.half_width, (high - low)/2) and (r.seeds, r.images) == (3, 3)
        assert np.isclose(r.baseline, means.CE.mean()) and np.isclose(r.value, means.LICO.mean())
    assert '3 pairs of networks, 3 images each' in reads(differences(df, ['sch']))
    one = differences(rows(seeds=(0,), gap=0.), ['sch'])
    assert math.isinf(one.half_width[0]) and '±' not in reads(one) and one.verdict[0] == 'inconclusive'


def test_a_row_says_what_made_it(tmp_path):
    df = save_worth(rows(gap=0.).assign(options='lr=0.1'), tmp_path, profile='smoke')
    assert len(df) == 18 and {'hardware', 'torch', 'commit', 'profile'} <= set(df) and df.equals(read_worth(tmp_path))
    with pytest.raises(FileNotFoundError, match='no .*results.csv: run the notebook without `stored`'): read_worth(tmp_path/'other')
    record = dict(run=dict(dataset='folder:/x/data/digit-scenes'), command="python -c \"from lico.experiments import *; run(Run(dataset='folder:/x/data/digit-scenes', steps=2))\"")
    assert _command(record) == 'python -c "from lico.experiments import *; from lico.scenes import *; run(Run(dataset=scene_dataset(), steps=2))"'


def test_kinds_of_scenes():
    scenes = digit_scenes(40, objects=(1, 3))
    for kind, fits in (('one', lambda l: len(l) == 1), ('same', lambda l: len(l) > 1 and len(set(l)) == 1), ('different', lambda l: len(set(l)) > 1)):
        found = of_kind(scenes, kind)
        assert [s.name for s in found] == [s.name for s in scenes if fits(s.labels.tolist())] and found.names == tuple(s.name for s in found)


def test_networks_are_shared(lico_root):
    "Figures and Table 8 ask for the same runs; a baseline is trained once for both readings."
    p = SimpleNamespace(profile='smoke', datasets=['digit-scenes'], backbones=['wrn_10_1'], labels=[40], methods=['CE', 'LICO'], presets=['paper', 'repaired'], seeds=[0], steps=2, epochs=None,
                        evaluations=3, image_size=None, text_encoder='minilm', options={}, workers=1, stand_in=None)
    runs = scene_runs(p)
    assert len(runs) == 4 and len({run_id(r) for r in runs}) == 3 and all(r.labels is None and r.evaluations == 1 and r.steps == 2 for r in runs)
    assert runs[0].dataset == f'folder:{lico_root}/data/digit-scenes-200' and label(dict(method='CE', preset='paper')) == 'CE'


def test_compared_measures_each_network_and_reads_it_again(lico_root):
    p = SimpleNamespace(profile='smoke', protocol='smoke', datasets=['digit-scenes'], backbones=['wrn_10_1'], methods=['CE'], presets=['paper'], seeds=[0, 1], steps=1, epochs=None, image_size=None,
                        text_encoder='minilm', options={}, stand_in=None, saliency=['grad-cam', 'random'], saliency_options=None, images=3, shown=1, stored=None, out=lico_root/'out')
    df, maps = compared(p, ('one', 'same'))
    assert len(df) == 2*2*2*3 and set(df.kind) == {'one', 'same'} and list(maps.columns) == ['CE\ngrad-cam'] and (df[df.kind == 'one'].objects == 1).all()
    assert df.id.nunique() == 2 and (df.dataset == 'digit-scenes-200').all() and df.command.str.contains('scene_dataset\\(200\\)').all()
    p.stored = 'only'
    again, stored = compared(p, ('one', 'same'))
    assert again.equals(df) and np.array_equal(stored.maps, maps.maps)


def test_a_row_for_each_method():
    "Two pictures, networks a and b, methods x and y: each map, curve and picture is found again in its own row."
    maps = np.arange(8, dtype=np.uint8).reshape(2, 4, 1, 1)
    s = Shown(np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1), np.zeros((2, 1, 4), np.float32), maps, maps[..., 0]/1., maps[..., 0]/2., np.zeros(1), np.array(['p', 'q']), np.array(['a\nx', 'b\nx', 'a\ny', 'b\ny']))
    r = a_row_a_method(s)
    assert r.columns.tolist() == ['a', 'b'] and r.rows.tolist() == ['p\nx', 'p\ny', 'q\nx', 'q\ny'] and r.images.flatten().tolist() == [0, 0, 1, 1]
    assert r.maps[..., 0, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and (r.insertion[..., 0] == r.maps[..., 0, 0]).all() and (2*r.deletion == r.insertion).all()
