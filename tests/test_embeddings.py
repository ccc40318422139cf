"Figure 9 against independent references: the last layer's input, pandas, splits and orders whose answer is known."
import numpy as np, pandas as pd, pytest, torch
from dataclasses import replace
from types import SimpleNamespace

from scipy import stats

from lico.backbones import create_backbone
from lico.config import root
from lico.data import load
from lico.evidence.embeddings import (
    MEASURES, centroids, collect_embeddings, describe, draw_embeddings, embed, harder_splits,
    linear_probe, measure_features, order_correlation, order_sentences, picture_sentence, pooled_features)
from lico.evidence.stats import METRICS, conditions, paired
from lico.evidence.store import read_points, read_results, write_results
from lico.experiments import Run
from lico.records import run
from lico.text import PromptLearner, load_text_encoder

TOP = root()
rng = np.random.default_rng(0)
y = np.repeat(np.arange(10), 20)


@pytest.mark.parametrize('name', ['wrn_10_1', 'resnet10t', 'vit_tiny_patch16_224'])
def test_pooled_is_what_the_last_layer_reads(name):
    "Heard at the last layer's input by a hook, with a batch that does not divide the images; the mode is left alone."
    data, heard = load('digits', image_size=32), []
    net = create_backbone(name, image_size=32)
    net.get_classifier().register_forward_hook(lambda module, args, out: heard.append(args[0]))
    with torch.no_grad(): net.eval()(data.normalise(data.test.x[:10]))
    net.train()
    out = pooled_features(net, data, data.test[:10], batch_size=4)
    assert net.training and out.shape == (10, net.num_features)
    torch.testing.assert_close(out, heard[0], rtol=1e-4, atol=1e-5)


def test_centroids_and_order():
    features = rng.normal(size=(200, 4))
    np.testing.assert_allclose(centroids(features, y), pd.DataFrame(features).groupby(y).mean())
    place = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    assert order_correlation(place[y][:, None]*np.ones((1, 3)), y, place) == pytest.approx(1)
    assert abs(order_correlation(place[y][:, None], y, range(10))) < 0.9
    mixed = rng.permutation(200)
    in_order = order_correlation(torch.tensor(features), y, range(10))
    assert order_correlation(features[mixed], torch.tensor(y[mixed]), range(10)) == pytest.approx(in_order)


def test_a_plane_splits_what_it_can():
    far = 30*np.eye(10)[y] + rng.normal(size=(200, 10))
    group = np.arange(10) < 4
    assert linear_probe(far, group[y]) > 99, 'classes in sorted order must not fall into folds one by one'
    xor = rng.choice([-1, 1], (200, 2))
    assert linear_probe(xor + rng.normal(0, .1, (200, 2)), xor[:, 0] == xor[:, 1]) < 70
    assert harder_splits(far, y, group, n=5) == 50
    assert harder_splits(y[:, None] + rng.normal(0, .1, (200, 1)), y, group, n=5) == 100
    assert harder_splits(y[:, None] + rng.normal(0, .1, (200, 1)), y, np.arange(10) % 5 < 2, n=8) < 75


def test_describe_measures_what_the_names_allow():
    features = rng.normal(size=(200, 5)) + 5*y[:, None]
    digits, points = describe(features, y, tuple('0123456789'))
    assert (points.shape == (200, 2) and digits['ordinal'] > 0.95 > digits['ordinal_0_as_10']
            and not any('vehicles' in k for k in digits))
    names = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
    cifar = describe(features, y, names)[0]
    assert not any('ordinal' in k for k in cifar) and cifar['vehicles'] < 90 and np.isfinite(list(cifar.values())).all()
    assert {'trustworthiness', 'silhouette', 'silhouette_embedded'} == set(
        describe(features, y, tuple('abcdefghij'))[0])
    np.testing.assert_array_equal(embed(features[:40], 3), embed(features[:40], 3))


def test_every_measure_can_be_compared():
    assert set(MEASURES) <= set(METRICS) and len(set(MEASURES)) == 12


def test_pictures_have_the_perplexity_asked_for():
    features = rng.normal(size=(100, 5))
    assert (not np.array_equal(embed(features, perplexity=5), embed(features))
            and np.isfinite(embed(features[:12], perplexity=50)).all())


def test_points_are_kept_or_replaced(tmp_path):
    points = lambda name, n, x: pd.DataFrame(dict(id=name, x=[x]*n, y=0., name='7'))
    def write_points(folder, df, **more): write_results(folder, df[['id']].drop_duplicates(), points=df, **more)
    write_points(tmp_path, points('a-p1', 2, .126))
    assert read_points(tmp_path).x.tolist() == [.13, .13] and read_points(tmp_path).name.tolist() == ['7', '7']
    write_points(tmp_path, points('b-p1', 1, 2), keep=True)
    write_points(tmp_path, points('b-p1', 3, 3), keep=True)
    assert read_points(tmp_path).id.tolist() == ['a-p1']*2 + ['b-p1']*3 and read_points(tmp_path).x.iloc[-1] == 3
    write_points(tmp_path, points('b-p1', 1, 2))
    assert read_points(tmp_path).id.tolist() == ['b-p1']


@pytest.mark.filterwarnings('ignore::lico.watch.InactiveMatchingWarning')
def test_collected_rows_points_and_picture(lico_root):
    "One baseline serves both presets; points are of the first seed; what is stored is what is returned."
    import matplotlib.pyplot as plt
    p = SimpleNamespace(out=lico_root/'f', images=100, seeds=[3, 4], workers=1, stored=None, stand_in=None,
                        protocol='test')
    runs = [Run(labels=40, backbone='wrn_10_1', method=m, preset=pre, steps=1, seed=s)
            for s in p.seeds for pre in ('paper', 'repaired') for m in ('CE', 'LICO')]
    df, points = collect_embeddings(p, runs)
    assert df.arm.tolist().count('CE') == 2 and len(df) == 6 and (df.classes == 10).all() and (df.images == 100).all()
    assert points.groupby('id').size().tolist() == [100]*3 and set(points.id) == set(df[df.seed == 3].id)
    fig = draw_embeddings(df, points)
    assert [ax.get_title().split(',')[0] for ax in fig.axes] == ['CE', 'LICO (paper)', 'LICO (repaired)']
    plt.close(fig)
    p.stored = 'only'
    again, same = collect_embeddings(p, runs)
    assert again.equals(df) and same.equals(points)
    assert set(paired(conditions(df), ['silhouette']).preset) == {'paper', 'repaired'}
    with pytest.raises(ValueError, match='images = 9: expected at least 10'): measure_features(dict(), 9)
    with pytest.raises(ValueError, match='images = 12: . of 10 classes are missing'):
        measure_features(run(runs[0], progress=False), 12)


def test_order_sentences_have_the_textbooks_interval():
    d = np.array([.1, .25, .3, .05])
    df = pd.DataFrame(dict(dataset='digits', backbone='wrn_16_1', labels='40', arm='CE', preset='paper',
                           text_encoder=None, ordinal=.2, ordinal_0_as_10=.2 + d,
                           ordinal_embedded=[-.5, .1, .2, .31], ordinal_text=np.nan))
    half = stats.t.ppf(.975, 3)*stats.sem(d)
    assert (f'changes by +{d.mean():.2f} ± {half:.2f}' in order_sentences(df)
            and 'from -0.50 to 0.31' in order_sentences(df))
    assert order_sentences(df.drop(columns='ordinal')) == ''


def test_the_picture_is_held_against_the_features():
    "Figure 9's committed rows: how many agree, and which does not, counted from their intervals."
    df = read_results(TOP/'figures'/'figure9')
    of = [f'{m}{end}' for m in ('silhouette', 'ordinal') for end in ('', '_embedded')]
    found = paired(conditions(df), of)
    side = (np.sign(found.difference)*(found.difference.abs() > found.half_width)).groupby(found.metric).apply(list)
    agree = np.array([a == b for m in ('silhouette', 'ordinal') for a, b in zip(side[m], side[f'{m}_embedded'])])
    said = picture_sentence(found)
    assert f'in {agree.sum()} of {len(agree)} rows' in said and (~agree).sum() == said.count('in the picture') == 1
    assert 'but not here: order, 0 before 1, digits, all labels, LICO (repaired)' in said
    two = picture_sentence(paired(conditions(df[df.seed < 2]), ['ordinal', 'ordinal_embedded']))
    assert 'cannot be told from fewer than three pairs' in two


def test_committed_points_are_of_committed_networks():
    for folder in ('figure9', 'figure9-cifar10'):
        assert set(read_points(TOP/'figures'/folder).id) <= set(read_results(TOP/'figures'/folder).id), folder


def test_all_networks_are_measured_on_the_same_images(lico_root):
    tiny = Run(labels=40, backbone='wrn_10_1', steps=1)
    runs = [run(replace(tiny, method=m, seed=s), progress=False) for m, s in (('CE', 0), ('CE+OT', 1))]
    points = [measure_features(r, 100)[1].name.tolist() for r in runs]
    assert points[0] == points[1]
    names = tuple(map(str, range(10)))
    vectors = PromptLearner(load_text_encoder('minilm'), names, n_context=0)(torch.arange(10))[:, -1].detach()
    assert measure_features(runs[1], 100)[0]['ordinal_text'] == order_correlation(vectors, range(10), range(10))
