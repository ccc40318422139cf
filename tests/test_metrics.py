"""The metrics of saliency maps against plain loops, reference libraries, cases with a known answer, and properties
that hold for every input."""
import math
import numpy as np, pytest, scipy.stats, skimage.metrics, timm, torch
from contextlib import nullcontext
from functools import partial
from hypothesis import given, settings, strategies as st
from torch import nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from lico.metrics import blur, deletion, energy_pointing_game, insertion, mosu, overall, pointing_game
from lico.sensitivity import parameter_layers, random_affine, randomised, rank_correlation, sanity_check, ses, ssim

torch.set_num_threads(1)

def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def uniform(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

def network(channels=3, classes=5, seed=0):
    "Small, with batch normalisation and dropout, in train mode, statistics far from those of a batch."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                        nn.Flatten(), nn.Dropout(0.5),
                        nn.Linear(32, classes))
    net[1].running_mean.normal_(); net[1].running_var.uniform_(0.5, 2)
    return net.train()

def own_scores(net, x, target):
    with torch.no_grad(): return net.eval()(x).softmax(1)[range(len(x)), target]

# insertion and deletion

def loop(net, start, end, saliency, target, step):
    "One image in numpy: scores of the target, and their area."
    start, end, order = start.numpy(), end.numpy(), np.argsort(-saliency.numpy().ravel(), kind='stable')
    scores, fractions = [], []
    for n in [*range(0, order.size, step), order.size]:
        x = start.copy().reshape(len(start), -1)
        x[:, order[:n]] = end.reshape(len(end), -1)[:, order[:n]]
        with torch.no_grad(): logits = net(torch.from_numpy(x.reshape(1, *start.shape)))[0].numpy().astype(float)
        scores.append(np.exp(logits[target])/np.exp(logits).sum()); fractions.append(n/order.size)
    return scores, sum((a + b)/2*(v - u) for a, b, u, v in zip(scores, scores[1:], fractions, fractions[1:]))

@pytest.mark.parametrize('step, size', [(None, (20, 20)), (1, (7, 9)), (16, (16, 12)), (50, (13, 11)), (143, (13, 11))])
def test_curves_are_what_a_loop_gives(step, size):
    net, x, target = network(), normal(3, 3, *size), torch.tensor([4, 0, 2])
    maps = (uniform(3, *size, seed=1)*8).round()/8  # with ties
    pixels = step or math.ceil(size[0]*size[1]/28)
    curves = insertion(net, x, maps, target, step, batch_size=5), deletion(net, x, maps, target, step)
    net.eval()
    for got, start, end in zip(curves, (blur(x), x), (x, torch.zeros_like(x))):
        assert got.curve.shape == (3, math.ceil(size[0]*size[1]/pixels) + 1) and got.auc.shape == (3,)
        for i in range(3):
            scores, auc = loop(net, start[i], end[i], maps[i], target[i], pixels)
            assert np.allclose(got.curve[i], scores, atol=1e-5) and math.isclose(got.auc[i], auc, abs_tol=1e-5)
    assert torch.allclose(overall(*curves), curves[0].auc - curves[1].auc)

def test_28_steps_at_224():
    net = nn.Sequential(nn.AvgPool2d(224), nn.Flatten())
    got = deletion(net, normal(1, 3, 224, 224), uniform(1, 224, 224), 0)
    assert got.curve.shape == (1, 29) and torch.allclose(got.fraction, torch.arange(29)/28)

class Maps:
    "A stub in the place of torchcam's extractor: the maps it is given."
    def __init__(self, model, maps): self.model, self.maps = model, maps
    def __call__(self, class_idx=None, scores=None, normalized=True, **_): return [self.maps]
    def fuse_cams(self, cams): return cams[0]
    def _hooks_off(self): return nullcontext()

@pytest.mark.parametrize('size', (16, 21))
def test_against_torchcam(size):
    "It takes one baseline for both curves, so one metric each; the last step of 21 x 21 pixels is a short one."
    metrics = pytest.importorskip('torchcam.metrics', reason='torchcam >= 0.5 needs Python 3.11')
    if not hasattr(metrics, 'DeletionInsertionMetric'): pytest.skip('torchcam is older than 0.5')
    net, x, maps, target = network(), normal(4, 3, size, size), uniform(4, size, size, seed=1), [0, 4, 4, 1]
    def theirs(baseline, name):
        metric = metrics.DeletionInsertionMetric(Maps(net, maps), partial(torch.softmax, dim=-1), steps=28,
                                                 baseline=baseline)
        metric.update(x, target)
        return metric.summary()[name]
    assert math.isclose(insertion(net, x, maps, torch.tensor(target)).auc.mean(), theirs(blur, 'insertion_auc'),
                        abs_tol=1e-5)
    assert math.isclose(deletion(net, x, maps, torch.tensor(target)).auc.mean(), theirs(None, 'deletion_auc'),
                        abs_tol=1e-5)

@pytest.mark.parametrize('step', (1, 4))
@pytest.mark.parametrize('n', (1, 8, 36))
def test_a_perfect_map_of_a_linear_model(n, step):
    "n of N pixels carry the score. In steps of s the falling edge is a chain of trapezia, exact where s divides n."
    N = 36
    weight = torch.zeros(N); weight[torch.randperm(N, generator=torch.Generator().manual_seed(0))[:n]] = 1
    net = nn.Sequential(nn.Flatten(), nn.Linear(N, 2, bias=False))
    net[1].weight.data = torch.stack([torch.zeros(N), weight])
    run = lambda metric, m: metric(net, torch.ones(1, 1, 6, 6), m.view(1, 6, 6), 1, step=step, baseline=0.,
                                   score='logit').auc.item()
    value = lambda k: max(n - k, 0)
    low = sum((value(k) + value(k + step))/2*step/N for k in range(0, N, step))
    if n % step == 0: assert math.isclose(low, n*n/2/N)
    assert math.isclose(run(deletion, weight), low, rel_tol=1e-6)
    assert math.isclose(run(insertion, weight), n - low, rel_tol=1e-6)
    if n % step == 0 and (N - n) % step == 0:
        assert (math.isclose(run(deletion, -weight), n - n*n/2/N, rel_tol=1e-6)
                and math.isclose(run(insertion, -weight), n*n/2/N, rel_tol=1e-6))

def test_the_end_points_are_the_networks_own_scores():
    net, x, maps, y = network(), normal(5, 3, 12, 12), uniform(5, 12, 12), torch.arange(5)
    ins, dele = insertion(net, x, maps, y), deletion(net, x, maps, y)
    for got, expected in ((ins.curve[:, -1], x), (dele.curve[:, 0], x), (ins.curve[:, 0], blur(x)),
                          (dele.curve[:, -1], 0*x)):
        assert torch.allclose(got, own_scores(net, expected, y), atol=1e-6)

sizes = st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(3, 9), st.integers(0, 10**6))

@settings(deadline=None, max_examples=40)
@given(sizes, st.data())
def test_properties_of_curves(shape, data):
    B, H, W, seed = shape
    step, batch = data.draw(st.integers(1, H*W)), data.draw(st.integers(1, 40))
    net, x, maps, y = (network(seed=seed % 7), normal(B, 3, H, W, seed=seed), uniform(B, H, W, seed=seed + 1),
                       torch.arange(B) + seed % 3)
    ins, dele = insertion(net, x, maps, y, step, baseline=0.), deletion(net, x, maps, y, step, baseline=0.)
    assert (ins.fraction[0] == 0 and ins.fraction[-1] == 1 and (ins.fraction.diff() > 0).all()
            and torch.equal(ins.fraction, dele.fraction))
    assert ins.curve.shape == (B, math.ceil(H*W/step) + 1) and (ins.curve >= 0).all() and (ins.curve <= 1).all()
    assert (ins.auc >= ins.curve.amin(1) - 1e-6).all() and (ins.auc <= ins.curve.amax(1) + 1e-6).all()
    other = insertion(net, x, maps, y, step, baseline=0., batch_size=batch)
    assert torch.allclose(other.curve, ins.curve, atol=1e-5)
    assert torch.allclose(insertion(net, x, maps.exp()*3, y, step, baseline=0.).curve, ins.curve,
                          atol=1e-5), 'only the order of a map counts'
    one = [insertion(net, x[i:i + 1], maps[i:i + 1], int(y[i]), step, baseline=0.).curve[0] for i in range(B)]
    assert torch.allclose(torch.stack(one), ins.curve, atol=1e-5)
    if H*W % step == 0:  # what is inserted first by a map is deleted last by its inverse, frame by frame
        assert torch.allclose(deletion(net, x, -maps, y, step, baseline=0.).curve.flip(1), ins.curve, atol=1e-5)
        assert torch.allclose(deletion(net, x, -maps, y, step, baseline=0.).auc, ins.auc, atol=1e-5)

def test_equal_values_change_in_the_order_of_rows():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 1, bias=False))
    net[1].weight.data = torch.tensor([[1., 2, 4, 8, 16, 32]])
    got = insertion(net, torch.ones(1, 1, 2, 3), torch.tensor([[[0., 1, 0], [1, 0, 1]]]), 0, step=1, baseline=0.,
                    score='logit')
    assert got.curve.tolist() == [[0, 2, 10, 42, 43, 47, 63]]

def test_blur_scales_with_the_image():
    for size, kernel, sigma in ((224, 11, 5.), (448, 21, 10.), (160, 9, 25/7), (32, 3, 5/7), (16, 3, 5/14)):
        x = torch.zeros(1, 1, size, size + 8); x[..., size//2, size//2] = 1
        g = np.exp(-(np.arange(kernel) - kernel//2)**2/2/sigma**2)
        expected = np.outer(g, g)/g.sum()**2
        r = kernel//2
        assert np.allclose(blur(x)[0, 0, size//2 - r:size//2 + r + 1, size//2 - r:size//2 + r + 1], expected, atol=1e-6)
        assert math.isclose(blur(x).sum(), 1, rel_tol=1e-5)
    assert (not torch.equal(blur(x, 5, 2.), blur(x))
            and torch.allclose(blur(torch.ones(2, 3, 9, 9)), torch.ones(2, 3, 9, 9)))

def test_modes_gradients_and_memory():
    net, x, maps = network(), normal(6, 3, 10, 10), uniform(6, 10, 10)
    net[1].eval()
    for p in net.parameters(): p.grad = torch.ones_like(p)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    class Largest(TorchDispatchMode):
        size = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max([self.size, *(o.shape[0] for o in torch.utils._pytree.tree_leaves(out)
                                          if isinstance(o, torch.Tensor) and o.ndim == 4)])
            assert not (torch.is_tensor(out) and out.requires_grad)
            return out
    with Largest() as seen: insertion(net, x, maps, 0, batch_size=7)
    assert seen.size == 7, 'no more frames at once than asked for, however many there are'
    assert [m.training for m in net] == [True, False, *[True]*5] and net.training
    assert (all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
            and all((p.grad == 1).all() for p in net.parameters()))
    with pytest.raises(ValueError): insertion(net, x, maps, 99)
    assert [m.training for m in net] == [True, False, *[True]*5] and torch.is_grad_enabled()

@pytest.mark.parametrize('change, message', [
    (dict(x=torch.zeros(2, 3, 8)), r"images \[2, 3, 8\] of torch.float32: expected a tensor \[B, C, H, W\] of floats"),
    (dict(x=torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), "images .* of torch.uint8: expected a tensor"),
    (dict(saliency=torch.rand(8, 8)), r"saliency of shape \[8, 8\]: expected maps \[B, H, W\]"),
    (dict(saliency=torch.rand(1, 8, 8)), r"images \[2, 3, 8, 8\] and maps \[1, 8, 8\]: expected one map \[8, "
                                         r"8\] for each of 2 images"),
    (dict(saliency=torch.rand(2, 8, 7)), r"images \[2, 3, 8, 8\] and maps \[2, 8, 7\]"),
    (dict(saliency=torch.full((2, 8, 8), math.inf)), r"saliency map 0 of 2 \(and 1 more\) is not finite"),
    (dict(target=5), r"target 5 and an output of shape \[\d+, 5\]: expected \[n, K\] and class indices below K"),
    (dict(target=-1), "target -1: class indices begin at 0"),
    (dict(target=torch.zeros(3, dtype=torch.long)), r"target is torch.int64 of shape \[3\]: expected one class index, "
                                                    r"or one for each of 2 images"),
    (dict(target=0.5), r"target is torch.float32 of shape \[\]"),
    (dict(step=0), "step = 0: expected a whole number from 1 to 64"), (dict(step=65), "step = 65"),
    (dict(step=2.5), "step = 2.5"), (dict(batch_size=0), "batch_size = 0: expected a whole number"),
    (dict(score='probability'), "unknown score 'probability': choose one of softmax, logit"),
    (dict(baseline=torch.zeros(2, 1, 1)), r"baseline of shape \[2, 1, 1\] for images \[2, 3, 8, 8\]")])
@pytest.mark.parametrize('metric', (insertion, deletion))
def test_refusals_of_curves(metric, change, message):
    with pytest.raises(ValueError, match=message) as error:
        metric(**{**dict(net=network(), x=normal(2, 3, 8, 8), saliency=uniform(2, 8, 8), target=0), **change})
    assert '\n' not in str(error.value)

def test_a_target_out_of_range_is_found_at_once():
    net, seen = network(), []
    net.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match=r"target 5 and an output of shape \[1, 5\]"):
        deletion(net, normal(3, 3, 8, 8), uniform(3, 8, 8), torch.tensor([0, 1, 5]), batch_size=1)
    assert len(seen) == 1

def test_overall_wants_the_same_steps():
    a, b = (insertion(network(), normal(1, 3, 8, 8), uniform(1, 8, 8), 0, step=s) for s in (3, 8))
    with pytest.raises(ValueError,
                       match=r"curves \[1, 23\] and \[1, 9\]: expected the same images and the same step for both"):
        overall(a, b)

# pointing games

def point(H, W, *places):
    m = torch.zeros(1, H, W)
    for r, c in places: m[0, r, c] = 1
    return m

@pytest.mark.parametrize('place, tolerance, hit', [
    # the box is rows 10 to 12, columns 10 to 14
    ((10, 10), 0, 1), ((12, 14), 0, 1), ((9, 10), 0, 0), ((13, 10), 0, 0), ((10, 15), 0, 0), ((12, 9), 0, 0),
    ((7, 10), 3, 1), ((7, 10), 2.9, 0), ((7, 6), 5, 1), ((7, 6), 4.99, 0), ((0, 0), 14.1, 0), ((0, 0), 14.2, 1)])
def test_planted_maxima(place, tolerance, hit):
    "The last four are diagonal: 3-4-5, and the square root of 200."
    box = [[10, 10, 15, 13]]
    mask = torch.zeros(30, 30, dtype=torch.bool); mask[10:13, 10:15] = True
    for region in (box, torch.tensor(box), mask, mask[None], mask.numpy(), [[25, 0, 26, 1], *box] if hit else box):
        assert pointing_game(point(30, 30, place), [region], tolerance).tolist() == [hit]

def test_the_tolerance_is_15():
    assert pointing_game(torch.cat([point(40, 40, (20, 0)), point(40, 40, (20, 1))]),
                         [[[16, 20, 17, 21]]]*2).tolist() == [0, 1]

def test_ties_count_by_their_share():
    tied = point(20, 20, (2, 2), (2, 17), (17, 2), (17, 17))
    for boxes, share in (([[0, 0, 5, 5]], 0.25), ([[0, 0, 5, 5], [15, 15, 20, 20]], 0.5), ([[0, 0, 20, 5]], 0.5),
                         ([[8, 8, 10, 10]], 0)):
        for turned in (tied, tied.flip(1), tied.flip(2)): assert pointing_game(turned, [boxes], 0).tolist() == [share]

def test_boxes_at_the_border():
    corners = torch.cat([point(10, 12, p) for p in ((0, 0), (0, 11), (9, 0), (9, 11))])
    assert pointing_game(corners, [[[-5, -5, 1, 1]], [[11, 0, 99, 1]], [[0, 9.2, 0.1, 10]], [[11.9, 9.9, 12, 10]]],
                         0).tolist() == [1]*4
    assert (pointing_game(corners, [[[1, 1, 11, 9]]]*4, 1).tolist() == [0]*4
            and pointing_game(corners, [[[1, 1, 11, 9]]]*4, 2**0.5).tolist() == [1]*4)

@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 10**6), st.floats(0, 9), st.integers(2, 4))
def test_pointing_game_is_what_a_loop_gives(H, W, seed, tolerance, levels):
    s, mask = (uniform(1, H, W, seed=seed)*levels).floor(), uniform(H, W, seed=seed + 1) < 0.2
    s[0, 0, 0] = -1
    mask[H//2, W//2] = True
    near = lambda r, c: any(mask[a, b] and (a - r)**2 + (b - c)**2 <= tolerance**2 for a in range(H) for b in range(W))
    expected = np.mean([near(r, c) for r in range(H) for c in range(W) if s[0, r, c] == s.max()])
    assert math.isclose(pointing_game(s, [mask], tolerance), expected, rel_tol=1e-6)
    e = uniform(1, H, W, seed=seed)
    assert math.isclose(energy_pointing_game(e, [mask]), (e[0]*mask).sum()/e.sum(), rel_tol=1e-5)

def test_energy():
    s = torch.ones(2, 10, 10); s[1, :5] = 3
    assert torch.allclose(energy_pointing_game(s, [[[0, 0, 10, 5]]]*2), torch.tensor([0.5, 0.75]))
    assert torch.allclose(energy_pointing_game(s, [[[0, 0, 10, 4], [0, 2, 10, 5]]]*2),
                          torch.tensor([0.5, 0.75])), 'pixels of two boxes count once'
    assert torch.allclose(energy_pointing_game(7*s, torch.ones(2, 10, 10, dtype=torch.bool)), torch.ones(2))

@pytest.mark.parametrize('play', (pointing_game, energy_pointing_game))
@pytest.mark.parametrize('change, message', [
    (dict(regions=[[[0, 0, 3, 3]]]), "1 regions for 2 maps: expected one for each"),
    (dict(regions=[[[0, 0, 3, 3]], []]), "region 1 has no box and no mask"),
    (dict(regions=[[[0, 0, 3, 3]], torch.zeros(0, 4)]), "region 1 has no box and no mask"),
    (dict(regions=[[[0, 0, 3, 3]], [[3, 3, 3, 5]]]), r"region 1 has the box \(3, 3, 3, 5\): expected x0 < x1 and y0 < "
                                                     r"y1, and a part of it inside the image of 9 x 8 pixels"),
    (dict(regions=[[[0, 0, 3, 3]], [[9, 0, 12, 3]]]), "region 1 has the box .* inside the image of 9 x 8"),
    (dict(regions=[[[0, 0, 3, 3]], [[0, 0, math.nan, 3]]]), "region 1 has the box"),
    (dict(regions=torch.zeros(2, 8, 9, dtype=torch.bool)), "region 0 has an empty mask"),
    (dict(regions=torch.ones(2, 9, 8, dtype=torch.bool)), r"region 0 is bool of shape \[9, 8\]: expected boxes \[K, "
                                                          r"4\] or boolean masks \[K, 8, 9\]"),
    (dict(regions=torch.ones(2, 8, 9)), r"region 0 is float32 of shape \[8, 9\]"),
    (dict(saliency=torch.full((2, 8, 9), math.nan)), r"saliency map 0 of 2 \(and 1 more\) is not finite"),
    (dict(saliency=torch.zeros(2, 8, 9)), "saliency map 0 of 2 .and 1 more. is (constant: "
                                          "it points nowhere|zero everywhere)")])
def test_refusals_of_pointing_games(play, change, message):
    with pytest.raises(ValueError, match=message):
        play(**{**dict(saliency=uniform(2, 8, 9), regions=[[[0, 0, 3, 3]]]*2), **change})

@pytest.mark.parametrize('play', [insertion, deletion])
def test_a_curve_of_a_constant_map_is_said_to_be_none_of_the_map(play):
    maps = torch.stack([uniform(1, 8, 9)[0], torch.zeros(8, 9)])
    net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*72, 4)), torch.randn(2, 3, 8, 9)
    with pytest.warns(UserWarning, match='map 1 of 2 is constant: its curve is that of the order of the pixels'):
        play(net, x, maps, 0)


def test_more_refusals():
    box, s = [[[0, 0, 3, 3]]], uniform(1, 8, 9)
    with pytest.raises(ValueError, match="tolerance = -1: expected pixels, 0 or more"): pointing_game(s, box, -1)
    for noise in (0, torch.finfo(torch.float32).eps):  # rounding points nowhere
        with pytest.raises(ValueError, match="saliency map 0 of 1 is constant"):
            pointing_game(1 + noise*torch.eye(9)[:8][None], box)
    with pytest.raises(ValueError, match="saliency map 0 of 1 has negative values"): energy_pointing_game(s - 0.5, box)
    with pytest.raises(ValueError, match="region 0 has one instance: evenness needs two or more"): mosu(s, box)
    with pytest.raises(ValueError, match=r"maps \[1, 8, 9\] and \[1, 9, 9\]: expected pairs of the same size"):
        rank_correlation(s, uniform(1, 9, 9))
    with pytest.raises(ValueError, match="a map of 8 x 9 pixels from .*: SSIM needs 11 x 11 or more"): ssim(s, s)
    with pytest.raises(ValueError, match="a map of 12 x 12 pixels from .* to .*: SSIM needs 11 x 11 or more, in "):
        ssim(2*uniform(1, 12, 12), uniform(1, 12, 12))
    with pytest.raises(ValueError, match=r"theta of shape \[2, 2, 3\] for 1 images"):
        ses(lambda x: x[:, 0], normal(1, 3, 8, 8), random_affine(2))
    with pytest.raises(ValueError, match="area = .0, 1.: expected two shares"): random_affine(2, area=(0, 1))
    with pytest.raises(ValueError, match="unknown scheme 'top-down': choose one of cascading, independent"):
        sanity_check(lambda net: s, network(), scheme='top-down')

# evenness over instances

@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(0, 10**6))
def test_mosu_is_scipys_relative_entropy(K, seed):
    s, masks = uniform(1, 9, 9, seed=seed), uniform(K, 9, 9, seed=seed + 1) < 0.5
    masks[:, 0, 0] = True
    share = [(s[0]*m).sum().item() for m in masks]
    got = mosu(s, [masks])
    assert math.isclose(got, scipy.stats.entropy(share, [1/K]*K), abs_tol=1e-5) and -1e-6 <= got <= math.log(K)
    assert torch.allclose(mosu(5*s, [masks.flip(0)]), got, atol=1e-6)

def test_mosu_at_its_ends():
    boxes = [[0, 0, 2, 2], [4, 4, 6, 6], [8, 8, 10, 10]]
    even, one, none = torch.ones(1, 10, 10), point(10, 10, (1, 1)), point(10, 10, (0, 9))
    assert (math.isclose(mosu(even, [boxes]), 0, abs_tol=1e-7)
            and math.isclose(mosu(one, [boxes]), math.log(3), rel_tol=1e-6) and mosu(none, [boxes]).isnan())

# randomisation

def same(net, state): return {k: torch.equal(v, state[k]) for k, v in net.state_dict().items()}

@pytest.mark.parametrize('name', ('resnet18', 'vit_tiny_patch16_224', 'convnext_atto', 'parametrised'))
def test_randomised_networks_are_put_back_bit_for_bit(name):
    if name == 'parametrised':
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    else: net = timm.create_model(name, num_classes=3, **(dict(depth=2) if name.startswith('vit') else {}))
    for b in net.buffers():
        if b.is_floating_point(): b.uniform_(0.5, 2)  # statistics as after training
    layers, state, ids = (parameter_layers(net), {k: v.clone() for k, v in net.state_dict().items()},
                          [id(p) for p in net.parameters()])
    rng = torch.get_rng_state()
    with randomised(net, layers[:1]):
        changed = [k for k, v in same(net, state).items() if not v]
        assert changed and all(k.startswith(layers[0]) for k in changed)
    assert all(same(net, state).values())
    with pytest.raises(KeyboardInterrupt), randomised(net, layers) as inside:
        assert inside is net and not any(v for k, v in same(net, state).items()
                                         if k.endswith('weight') and net.get_parameter(k).ndim > 1)
        net.train()
        raise KeyboardInterrupt
    assert (all(same(net, state).values()) and [id(p) for p in net.parameters()] == ids
            and torch.equal(torch.get_rng_state(), rng))

def test_layers_from_the_output_down():
    assert parameter_layers(network()) == ['6', '1', '0']
    net = timm.create_model('resnet18')
    layers = parameter_layers(net)
    assert (layers[0] == 'fc' and layers[-1] == 'conv1' and layers[1].startswith('layer4.1')
            and len(set(layers)) == len(layers))
    vit = parameter_layers(timm.create_model('vit_tiny_patch16_224', depth=1))
    assert vit[0] == 'head' and {'cls_token', 'pos_embed'} <= set(vit) and '' not in vit

def test_new_weights_depend_on_seed_and_name_only():
    net = network()
    def weights(layers, seed=0):
        torch.randn(3)
        with randomised(net, layers, seed): return net[0].weight.clone(), net[6].weight.clone()
    assert (torch.equal(weights(['6', '1', '0'])[0], weights(['0'])[0])
            and torch.equal(weights(['6'])[1], weights(['0', '6'])[1]))
    assert (not torch.equal(weights(['6'])[1], weights(['6'], seed=1)[1])
            and torch.equal(weights(['6'])[0], net[0].weight))
    with randomised(net, ['1']): assert net[1].running_mean.abs().max() == 0, 'a normalisation forgets its statistics'
    assert net[1].running_mean.abs().max() > 0

def test_layers_of_one_shape_get_different_weights():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with randomised(net, ['1', '0']): assert not torch.equal(net[0].weight, net[1].weight)

def test_a_parameter_with_no_rule_keeps_its_mean_and_spread():
    net = timm.create_model('vit_tiny_patch16_224', depth=1)
    with torch.no_grad(): net.pos_embed.normal_(3, 0.5)
    with randomised(net, ['pos_embed']):
        assert abs(net.pos_embed.mean() - 3) < 0.02 and abs(net.pos_embed.std() - 0.5) < 0.01

def test_a_module_is_redrawn_with_all_it_contains():
    "Also where its weight is computed from others, and parameters of modules that have no rule of their own."
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    vit = timm.create_model('vit_tiny_patch16_224', depth=1, init_values=0.1)
    with torch.no_grad(): vit.blocks[0].ls1.gamma.normal_()
    for model, name in ((net, '0'), (vit, 'blocks.0')):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        with randomised(model, [name]): changed = [k for k, v in same(model, state).items() if not v]
        drawn = {k for k in state if k.startswith(name) and 'norm' not in k and 'ls2' not in k
                 and ('original' in k or k.endswith(('gamma', 'weight')))}
        assert drawn <= set(changed)
        assert all(k.startswith(name) for k in changed)

def test_a_layer_that_is_not_there():
    with (pytest.raises(ValueError, match="the network has no layer 'fc': choose names such as 6, 1, 0"),
          randomised(network(), ['6', 'fc'])):
        pass

def test_similarities_against_the_libraries():
    a, b = uniform(3, 16, 20), uniform(3, 16, 20, seed=1)
    b[1] = a[1]**3; b[2] = (a[2]*4).round()/4
    assert np.allclose(rank_correlation(a, b),
                       [scipy.stats.spearmanr(p.ravel(), q.ravel()).statistic for p, q in zip(a.numpy(), b.numpy())],
                       atol=1e-6)
    direct = [skimage.metrics.structural_similarity(p, q, data_range=1, gaussian_weights=True,
                                                    use_sample_covariance=False) for p, q in zip(a.numpy(), b.numpy())]
    assert np.allclose(ssim(a, b), direct, atol=1e-5)
    assert rank_correlation(a, torch.zeros_like(a)).isnan().all()

@pytest.mark.parametrize('scheme', ('cascading', 'independent'))
def test_sanity_check(scheme):
    net, x = network(), normal(2, 3, 16, 16)
    seen, before = [], {k: v.clone() for k, v in net.state_dict().items()}
    def explain(net):
        seen.append([k.split('.')[0] for k, v in same(net, before).items() if not v])
        return net.eval()[:3](x).detach().amax(1).sigmoid()
    entries = sanity_check(explain, net, scheme=scheme)
    assert [e.layer for e in entries] == ['6', '1', '0'] and all(same(net, before).values())
    assert [sorted(set(s)) for s in seen] == [[], ['6'], ['1', '6'] if scheme == 'cascading' else ['1'],
                                              ['0', '1', '6'] if scheme == 'cascading' else ['0']]
    assert (torch.equal(entries[0].spearman, torch.ones(2))
            and torch.allclose(entries[0].ssim, torch.ones(2))), 'the head does not reach this map'
    assert (entries[2].spearman < 0.9).all() and (entries[2].ssim < 0.99).all() and entries[2].maps.shape == (2, 16, 16)
    assert torch.equal(rank_correlation(explain(net), entries[1].maps), entries[1].spearman)

# equivariance

def warped(image, theta):
    "scipy's affine transform of [H, W] by a map from output to input coordinates in [-1, 1]."
    from scipy.ndimage import affine_transform
    H, W = image.shape
    scale, shift = np.array([H/2, W/2]), np.array([(H - 1)/2, (W - 1)/2])
    A, t = theta[:, :2].numpy()[::-1, ::-1], theta[:, 2].numpy()[::-1]  # in the order row, column
    matrix = scale[:, None]*A/scale
    return affine_transform(image, matrix, shift + scale*t - matrix@shift, order=1, mode='nearest')

def test_ses_against_scipys_affine_transform():
    x, theta = blur(uniform(4, 1, 30, 40), 5, 2.), random_affine(4, seed=3, area=(0.3, 0.6))
    theta[0] = torch.tensor([[0.5, 0, 0.5], [0, 0.5, -0.5]])  # the upper right corner, up to the border
    explain = lambda z: z[:, 0]**2 + torch.linspace(0, 1, 40)
    expected = []
    for image, t in zip(x[:, 0].double().numpy(), theta.double()):
        a = warped(image**2 + np.linspace(0, 1, 40), t)
        b = warped(image, t)**2 + np.linspace(0, 1, 40)
        expected.append((a*b).sum()/np.sqrt((a*a).sum()*(b*b).sum()))
    assert np.allclose(ses(explain, x, theta), expected, atol=1e-4)

def test_ses_of_maps_that_move_and_maps_that_do_not():
    x, theta = uniform(8, 3, 32, 32), random_affine(8, degrees=30, area=(0.3, 0.9))
    assert torch.allclose(ses(lambda z: z.mean(1), x, theta), torch.ones(8), atol=1e-5)
    assert torch.allclose(ses(lambda z: torch.ones(len(z), 32, 32), x, theta), torch.ones(8), atol=1e-5)
    spot = torch.zeros(32, 32); spot[4:8, 4:8] = 1
    assert (ses(lambda z: spot.expand(len(z), 32, 32), x, theta) < 0.6).all()
    assert torch.allclose(ses(lambda z: spot.expand(len(z), 32, 32), x, torch.eye(2, 3).expand(8, 2, 3)), torch.ones(8))

def test_pixels_from_outside_do_not_count():
    "Shifted by half an image: a map that is right on what stays in view is right, whatever it says of the rest."
    x, theta = uniform(1, 1, 16, 16), torch.tensor([[[1., 0, 1], [0, 1, 0]]])
    def explain(z):
        m = z[:, 0].clone()
        if not torch.equal(z, x): m[:, :, 8:] = 100
        return m
    assert torch.allclose(ses(explain, x, theta), torch.ones(1), atol=1e-5)

@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.05, 1), st.booleans())
def test_random_windows_lie_inside(seed, smallest, flip):
    theta = random_affine(20, seed, (smallest, 1), 0, flip)
    corners = torch.tensor([[a, b, 1.] for a in (-1, 1) for b in (-1, 1)])
    assert (torch.einsum('nij,cj->nci', theta, corners).abs() <= 1 + 1e-5).all()
    area = theta[:, 0, 0].abs()*theta[:, 1, 1]
    assert (area >= smallest*0.74).all() and (area <= 1 + 1e-5).all() and (flip or (theta[:, 0, 0] > 0).all())
    assert (torch.equal(theta, random_affine(20, seed, (smallest, 1), 0, flip))
            and not torch.equal(theta, random_affine(20, seed + 1, (smallest, 1), 0, flip)))

def test_rotations_and_mirrors():
    """A square window of the whole image, turned: the columns stay at right angles and of equal length, half of
    them mirrored, none by more than asked."""
    theta = random_affine(400, degrees=30, area=(0.2, 0.2))
    x_axis, y_axis = theta[:, :, 0], theta[:, :, 1]
    assert (x_axis*y_axis).sum(1).abs().max() < 1e-6
    angle = torch.rad2deg(torch.atan2(-y_axis[:, 0], y_axis[:, 1]))
    assert 25 < angle.max() <= 30 and -30 <= angle.min() < -25
    mirrored = torch.linalg.det(theta[:, :, :2]) < 0
    assert (0.4 < mirrored.float().mean() < 0.6
            and torch.allclose(torch.linalg.det(theta[:, :, :2]).abs(), torch.tensor(0.2), atol=1e-5))
    ratio = x_axis.norm(dim=1)/y_axis.norm(dim=1)
    assert 0.75 - 1e-4 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= 4/3 + 1e-4


@pytest.mark.parametrize('norm', (nn.utils.spectral_norm, nn.utils.weight_norm,
                                  nn.utils.parametrizations.spectral_norm))
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_layers_whose_weight_is_computed_are_randomised(norm):
    torch.manual_seed(0)
    net, x = nn.Sequential(norm(nn.Conv2d(3, 8, 3, bias=False))).eval(), uniform(2, 3, 8, 8)
    with torch.no_grad():
        before = net(x)
        with randomised(net, ['0']): assert F.cosine_similarity(before.flatten(1), net(x).flatten(1)).max() < .9
        assert torch.equal(before, net(x))


def test_rotations_of_images_that_are_not_square():
    "In pixels both directions are stretched alike, but for the window's own aspect."
    H, W = 32, 64
    pixels = torch.diag(torch.tensor([W/2., H/2.]))
    turned = random_affine(500, 0, (1, 1), 90, False, (H, W))[:, :, :2]
    stretch = torch.linalg.svdvals(pixels @ turned @ pixels.inverse())
    assert (stretch[:, 0]/stretch[:, 1]).max() < 4/3 + 1e-4


def test_torchvision_s_boxes_are_read_in_their_format():
    from torchvision.tv_tensors import BoundingBoxes
    saliency = torch.zeros(1, 12, 20)
    saliency[0, 7, 14] = 1
    for box, form in (((10, 5, 22, 11), 'XYXY'), ((10, 5, 12, 6), 'XYWH'), ((16, 8, 12, 6), 'CXCYWH')):
        boxes = BoundingBoxes([box], format=form, canvas_size=(12, 20))
        assert pointing_game(saliency, [boxes], 0) == 1 and energy_pointing_game(saliency, [boxes]) == 1
    with pytest.raises(ValueError, match='region 0 has rows of different lengths'):
        pointing_game(saliency, [[[1, 2, 3, 4], [1, 2]]])
