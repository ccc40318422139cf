import math
from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from scipy import stats
from scipy.special import logsumexp
from torch import nn

from lico import rivals, training
from lico.backbones import create_backbone
from lico.data import load
from lico.experiments import Run, frame, load_data, spec, start
from lico.records import run
from lico.model import CrossEntropy
from lico.rivals import (CGC, GCC, LabelSmoothing, SupCon, cgc_loss, composites, gcc_loss, random_views,
                         supcon_loss, tile, view)
from lico.networks import statistics_kept
from lico.training import fit

KINDS = (CGC, GCC)


class Local(nn.Module):
    "Every position sees its own pixel only, every map counts for the classes of `head` [K, 3]."
    def __init__(self, head):
        super().__init__()
        self.scale, self.head, self.norm = (nn.Parameter(torch.ones(())), nn.Parameter(head),
                                            nn.BatchNorm2d(3, affine=False))

    def forward_features(self, x):
        self.norm(x)  # for its statistics
        return self.scale*x

    def forward_head(self, maps): return maps.mean((2, 3)) @ self.head.T

    def forward(self, x): return self.forward_head(self.forward_features(x))


def small(seed=0, name='wrn_10_1', size=16):
    torch.manual_seed(seed)
    return create_backbone(name, num_classes=10, image_size=size)


def batch(n=12, size=16, classes=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=g), torch.arange(n) % classes


def test_views_are_crops_in_pixels():
    "A picture whose values are its coordinates shows where each pixel of a view comes from."
    S = 16
    rows, columns = torch.meshgrid(torch.arange(S).double(), torch.arange(S).double(), indexing='ij')
    torch.manual_seed(0)
    views = random_views(50, S)
    for (top, left, h, w, mirrored), shown in zip(views, view(torch.stack([rows, columns]).expand(50, 2, S, S), views)):
        assert 0 <= top and top + h <= S and 0 <= left and left + w <= S
        place = lambda start, n: (start + (torch.arange(S) + 0.5)*n/S - 0.5).clamp(start, start + n - 1)
        expected = place(left, w).flip(0) if mirrored else place(left, w)
        torch.testing.assert_close(shown[0], place(top, h).double()[:, None].expand(S, S))
        torch.testing.assert_close(shown[1], expected.double()[None].expand(S, S))


def test_views_are_drawn_from_torchs_generator():
    torch.manual_seed(3)
    views = random_views(2000, 224)
    torch.manual_seed(3)
    assert views == random_views(2000, 224) != random_views(2000, 224)
    area = np.array([h*w/224**2 for _, _, h, w, _ in views])
    assert 0.07 < area.min() < 0.09 and 0.97 < area.max() <= 1
    assert max(max(h/w, w/h) for _, _, h, w, _ in views) < 4/3 + 0.05
    assert stats.binomtest(sum(bool(m) for *_, m in views), 2000).pvalue > 1e-3


@pytest.mark.parametrize('T', [0.1, 0.5, 2.])
def test_cgc_loss_from_its_formula(T):
    u, v = np.random.default_rng(0).random((2, 7, 30))
    unit = lambda m: m/np.linalg.norm(m, axis=1, keepdims=True)
    similarity = unit(u) @ unit(u).T
    np.fill_diagonal(similarity, (unit(u)*unit(v)).sum(1))
    expected = (logsumexp(similarity/T, axis=1) - similarity.diagonal()/T).mean()
    got = cgc_loss(*(torch.from_numpy(m).view(7, 1, 5, 6) for m in (u, v)), T)
    assert (math.isclose(got, expected, rel_tol=1e-10)
            and math.isclose(got, cgc_loss(3*torch.from_numpy(u), torch.from_numpy(v)/7, T), rel_tol=1e-10))


def test_cgc_loss_at_its_ends():
    "The least is where maps agree and do not overlap; nothing below it is found by descending."
    B, T = 6, 0.5
    apart, least = torch.eye(B).view(B, 1, 2, 3), math.log(1 + (B - 1)*math.exp(-1/T))
    assert math.isclose(cgc_loss(apart, apart, T), least, rel_tol=1e-6) and cgc_loss(apart[:1], apart[:1], T) == 0
    raw = torch.rand(2, B, 1, 2, 3, requires_grad=True)
    optimiser = torch.optim.Adam([raw], 0.05)
    for _ in range(300):
        optimiser.zero_grad()
        loss = cgc_loss(*raw.square(), T)
        loss.backward()
        optimiser.step()
    assert least - 1e-5 < loss < least + 0.02


def test_a_map_without_evidence_does_no_harm():
    for loss in (lambda m: cgc_loss(m, m.detach().flip(0), 0.5),
                 lambda m: gcc_loss(tile(m[:, None].expand(-1, 4, -1, -1)), m, torch.tensor([0, 3]))):
        maps = torch.zeros(2, 3, 3)
        maps[0, 1, 1] = 1.
        maps.requires_grad_()
        value = loss(maps.relu())
        value.backward()
        assert value.isfinite() and maps.grad.isfinite().all() and (maps.grad[1] == 0).all()


@pytest.mark.parametrize('training', [True, False])
def test_maps_of_a_local_network_follow_every_view(training, monkeypatch):
    "Maps that are sums of pixels move with the picture, so both ways to the map of a view give the same."
    seen = []
    monkeypatch.setattr(rivals, 'cgc_loss', lambda u, v, T: (seen.append((u, v)), cgc_loss(u, v, T))[1])
    net, (x, y) = Local(torch.rand(4, 3) + 0.1).train(training), batch()
    out = CGC(net)(x.abs(), y)
    [(u, v)] = seen
    torch.testing.assert_close(u, v)
    assert u.flatten(1).std(1).min() > 1e-4 and torch.isclose(out.stats['cgc'], cgc_loss(v, v, 0.5))


def test_cgc_explains_what_is_predicted():
    x, _ = batch()
    net = Local(torch.tensor([[1., 1, 1], [-1, -1, -1]]))
    assert CGC(net).explained(x.abs(), torch.ones(12).long()).tolist() == [0]*12


def one_colour(n=12, size=8):
    "Images of class c have evidence in channel c only."
    y = torch.arange(n) % 3
    return F.one_hot(y, 3)[..., None, None]*torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)), y


def test_gcc_is_zero_where_classes_do_not_share_evidence():
    x, y = one_colour()
    assert GCC(Local(torch.eye(3)))(x, y).stats['gcc'] < 1e-8
    assert GCC(Local(torch.ones(3, 3)))(x, y).stats['gcc'] > 1e-3, 'a map that sees the other images'


def test_gcc_loss_from_its_formula():
    rng, h, w = np.random.default_rng(0), 3, 5
    maps, seen, cell = rng.random((8, h, w)), rng.random((8, 2*h, 2*w)), np.arange(8) % 4
    wanted = np.zeros_like(seen)
    for i, c in enumerate(cell): wanted[i, (c//2)*h:(c//2 + 1)*h, (c % 2)*w:(c % 2 + 1)*w] = maps[i]/maps[i].sum()
    expected = np.abs(seen/seen.sum((1, 2), keepdims=True) - wanted).mean()
    got = gcc_loss(torch.from_numpy(seen), torch.from_numpy(maps), torch.from_numpy(cell))
    assert math.isclose(got, expected, rel_tol=1e-10) and got < 2/(4*h*w)
    assert math.isclose(gcc_loss(torch.from_numpy(5*seen), torch.from_numpy(maps/9), torch.from_numpy(cell)), expected,
                        rel_tol=1e-10)


def test_composites():
    "Own cell anywhere, in the others any image of another class; empty cells where there is none."
    torch.manual_seed(0)
    y = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    drawn = [composites(y) for _ in range(600)]
    index, cell = torch.stack([i for i, _ in drawn]), torch.stack([c for _, c in drawn])
    own = F.one_hot(cell, 4).bool()
    assert (index[own] == torch.arange(7).repeat(600)).all()
    assert (y[index][~own] != y[None, :, None].expand_as(index)[~own]).all()
    assert stats.chisquare(cell.flatten().bincount(minlength=4)).pvalue > 1e-3
    assert stats.chisquare(index[:, 0][~own[:, 0]].bincount(minlength=7)[2:]).pvalue > 1e-3
    index, cell = composites(torch.tensor([5, 5, 5]))
    assert (index[~F.one_hot(cell, 4).bool()] == 3).all()
    x = torch.rand(3, 3, 4, 4)
    assert GCC(Local(torch.ones(10, 3)))(x, torch.tensor([5, 5, 5])).stats['gcc'] < 1e-8, 'empty cells hold no evidence'


def test_tile_is_row_by_row():
    cells = torch.arange(2*4*3*2*5).view(2, 4, 3, 2, 5)
    whole = tile(cells)
    for c in range(4): assert torch.equal(whole[:, :, (c//2)*2:(c//2 + 1)*2, (c % 2)*5:(c % 2 + 1)*5], cells[:, c])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name, size', [('wrn_10_1', 16), ('test_vit', 32)])
def test_gradient_by_differences(kind, name, size):
    "The derivative of the term along a random direction in the space of all weights, in float64 and train mode."
    net, (x, y) = small(name=name, size=size).double(), batch(6, size)
    model, weights = kind(net), list(net.parameters())
    along = [torch.randn_like(p) for p in weights]
    def term(by=0.):
        with torch.no_grad():
            for p, d in zip(weights, along): p.add_(by*d)
        torch.manual_seed(1)
        out = model(x.double(), y)
        return out.loss - out.ce
    exact = sum((g*d).sum()
                for g, d in zip(torch.autograd.grad(term(), weights, allow_unused=True), along) if g is not None).item()
    numeric = (term(1e-8) - term(-2e-8)).item()/2e-8
    assert abs(exact) > 1e-3 and math.isclose(exact, numeric, rel_tol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name, size', [('parn_18', 16), ('resnet10t', 64), ('test_efficientnet', 64),
                                        ('test_convnext', 64), ('test_vit', 32)])
def test_any_backbone(kind, name, size):
    net, (x, y) = small(name=name, size=size), batch(6, size)
    out = kind(net)(x, y)
    (out.loss - out.ce).backward()
    assert sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None) > 0
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    assert (set(out.stats) == {kind.name} and not out.stats[kind.name].requires_grad and out.mm.isnan()
            and out.ot.isnan() and out.logits.shape == (6, 10))


@pytest.mark.parametrize('kind', KINDS)
def test_loss_is_cross_entropy_and_weight_times_term(kind):
    x, y = batch()
    net = small()
    torch.manual_seed(0)
    out = kind(net, weight=3.)(x, y)
    torch.testing.assert_close(out.ce, F.cross_entropy(net(x), y))
    torch.testing.assert_close(out.loss, out.ce + 3*out.stats[kind.name])
    assert '3.0' in str(kind(net, weight=3.)), 'a folder of `fit` tells models apart by their text'


@pytest.mark.parametrize('kind', KINDS)
def test_statistics_are_those_of_the_images(kind):
    "Views and composites leave no trace in what inference normalises by."
    x, y = batch()
    nets = small(), small()
    CrossEntropy(nets[0])(x, y), kind(nets[1])(x, y)
    for a, b in zip(*(n.modules() for n in nets)):
        if isinstance(a, nn.BatchNorm2d):
            assert (torch.equal(a.running_mean, b.running_mean) and torch.equal(a.running_var, b.running_var)
                    and a.momentum == b.momentum)


def test_statistics_kept_restores_after_an_error():
    net = small()
    net.bn.momentum = 0.3
    with pytest.raises(ZeroDivisionError), statistics_kept(net): 1/0
    assert net.bn.momentum == 0.3 and net.training


@pytest.mark.parametrize('kind', KINDS)
def test_without_weight_it_is_the_baseline(kind):
    data, runs = load('digits', labels=40, seed=0), []
    for make in (CrossEntropy, partial(kind, weight=0.)):
        net = small()
        runs.append((net.state_dict(), fit(make(net), data, steps=3, batch_size=16, seed=0, progress=False)))
    (a, log_a), (b, log_b) = runs
    assert (all(torch.equal(a[k], b[k]) for k in a if 'tracked' not in k)
            and [r['ce'] for r in log_a] == [r['ce'] for r in log_b])
    assert log_b[-1][kind.name] > 0 and not {'mm', 'ot'} & set(log_b[-1])


@pytest.mark.parametrize('kind', KINDS)
def test_a_killed_training_goes_on_bit_for_bit(kind, tmp_path, monkeypatch):
    data = load('digits', labels=40, seed=0)
    whole, parts = small(), small()
    log = fit(kind(whole), data, steps=6, batch_size=20, seed=0, progress=False)
    advance = training._advance
    def killed(t, x, y):
        if t.step == 4: raise KeyboardInterrupt
        return advance(t, x, y)
    go = lambda: fit(kind(parts), data, steps=6, batch_size=20, seed=0, folder=tmp_path, checkpoint_seconds=0,
                     progress=False)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training, '_advance', killed)
        go()
    parts = small()
    resumed = go()
    assert [r[kind.name] for r in resumed] == [r[kind.name] for r in log]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))


@pytest.mark.slow
def test_training_makes_held_out_maps_more_consistent():
    data, found = load('digits', labels=100, seed=2), {}
    x, y = data.normalise(data.test.x[:128]), data.test.y[:128]
    for make in (CrossEntropy, *KINDS):
        net = small(2)
        fit(make(net), data, steps=80, batch_size=32, seed=2, progress=False)
        for kind in KINDS:
            torch.manual_seed(0)
            found[make, kind] = kind(net.eval())(x, y).stats[kind.name]
    for kind in KINDS: assert found[kind, kind] < 0.98*found[CrossEntropy, kind]


def test_refuses_maps_of_one_position():
    net = small(name='resnet18', size=32)
    with pytest.raises(ValueError, match='one position at 32 pixels.*give a larger image_size, or use GCC'): CGC(net)
    x, y = batch(6, 32)
    assert GCC(net)(x, y).stats['gcc'].isfinite()


def plain_supcon(z, y, T):
    "Eq. 2 of Khosla et al. (2020), one image after the other, in NumPy."
    z, terms = z/np.linalg.norm(z, axis=1, keepdims=True), []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        if not positives: continue
        log_total = logsumexp([z[i] @ z[a]/T for a in others])
        terms.append(-np.mean([z[i] @ z[p]/T - log_total for p in positives]))
    return np.mean(terms)


@pytest.mark.parametrize('T', [0.05, 0.1, 1.])
@pytest.mark.parametrize('y', [[0, 1, 0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6]])
def test_supcon_from_its_formula(T, y):
    "In the last batch six images are alone in their classes: no anchors, but others for the anchors there are."
    z = np.random.default_rng(0).normal(size=(8, 5))
    got = supcon_loss(torch.from_numpy(z), torch.tensor(y), T)
    assert got.dtype == torch.float64 and math.isclose(got, plain_supcon(z, y, T), rel_tol=1e-10, abs_tol=1e-14)
    assert math.isclose(supcon_loss(7*torch.from_numpy(z).view(8, 5, 1), torch.tensor(y), T), got,
                        rel_tol=1e-10), 'lengths do not count'


def test_supcon_of_one_positive_and_one_negative():
    """Section 3.2.3 of the paper: with one of each it is the triplet loss, made smooth; with two images there is
    nothing to tell apart."""
    T, z = 0.1, F.normalize(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    pair, y = z[0] @ z[1], torch.tensor([5, 5, 7])
    expected = sum(math.log1p(math.exp((z[a] @ z[2] - pair)/T)) for a in (0, 1))/2
    assert math.isclose(supcon_loss(z, y, T), expected, rel_tol=1e-10)
    assert supcon_loss(z[:2], y[:2], T) == 0 == supcon_loss(z[1:], y[1:], T)


def test_supcon_gradient_by_differences():
    z = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    assert torch.autograd.gradcheck(lambda z: supcon_loss(z, y, 0.2), z)
    assert torch.autograd.grad(supcon_loss(z, y, 0.2), z)[0].abs().min() > 0, 'lonely images are pushed away too'


@pytest.mark.parametrize('y', [[0], [4, 2], [0, 1, 2, 3, 4]])
def test_supcon_without_positives_is_zero(y):
    z = torch.randn(len(y), 4, requires_grad=True)
    loss = supcon_loss(z, torch.tensor(y), 0.1)
    loss.backward()
    assert loss == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_supcon_of_a_dead_feature():
    "All zeros after a ReLU: like nothing, and no gradient of its own."
    z = torch.rand(4, 3)
    z[1] = 0
    z.requires_grad_()
    loss = supcon_loss(z, torch.tensor([0, 0, 1, 1]), 0.1)
    loss.backward()
    assert (loss.isfinite() and z.grad.isfinite().all() and torch.equal(z.grad[1], torch.zeros(3))
            and z.grad[2].abs().sum() > 0)


@pytest.mark.parametrize('smoothing', [0.1, 0.4])
def test_label_smoothing_from_its_formula(smoothing):
    x, y = batch()
    net = small()
    out = LabelSmoothing(net, smoothing)(x, y)
    p = out.logits.detach().double().softmax(1)
    wanted = torch.full_like(p, smoothing/10)
    wanted[torch.arange(len(y)), y] += 1 - smoothing
    torch.testing.assert_close(out.loss.double(), -(wanted*p.log()).sum(1).mean(), rtol=1e-6, atol=0)
    gradient, = torch.autograd.grad(out.loss, out.logits)
    torch.testing.assert_close(gradient.double(), (p - wanted)/len(y), rtol=1e-4, atol=1e-7)
    assert torch.equal(out.ce, F.cross_entropy(out.logits, y)) and out.mm.isnan() and set(out.stats) == {'cosine'}


@pytest.mark.parametrize('kind, strength', [(LabelSmoothing, 'label_smoothing'), (SupCon, 'weight')])
def test_the_classes_and_nothing_else(kind, strength):
    """At strength zero it is the baseline bit for bit; else it is told apart by its text, and its gradient is that
    of its loss."""
    data, ends = load('digits', labels=40, seed=0), []
    for make in (CrossEntropy, partial(kind, **{strength: 0.}), kind):
        net = small()
        fit(make(net), data, steps=3, batch_size=16, seed=0, progress=False)
        ends.append(torch.cat([v.flatten().double() for v in net.state_dict().values()]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    assert f'{strength}=0.3' in str(kind(net, **{strength: 0.3}))
    net, (x, y) = small().double(), batch(classes=3)
    weights, along = list(net.parameters()), [torch.randn_like(p) for p in net.parameters()]
    def loss(by=0.):
        with torch.no_grad():
            for p, d in zip(weights, along): p.add_(by*d)
        return kind(net, **{strength: 0.5})(x.double(), y).loss
    exact = sum((g*d).sum() for g, d in zip(torch.autograd.grad(loss(), weights), along)).item()
    assert math.isclose(exact, (loss(1e-8) - loss(-2e-8)).item()/2e-8, rel_tol=1e-4)


@pytest.mark.parametrize('method, options', [
    ('CE+LS', dict(label_smoothing=0.1)), ('CE+SupCon', dict(supcon_weight=0.1, supcon_temperature=0.1))])
def test_controls_are_run_like_any_other(lico_root, method, options):
    r = Run(labels=40, backbone='wrn_10_1', steps=1, method=method)
    data, other = load_data(r), {k: 0.7 for k in options}
    assert spec(r, data)['losses'] == options and 'text_encoder' not in spec(r, data)
    model = start(Run(backbone='wrn_10_1', method=method, options=other), data)
    assert {getattr(model, k.removeprefix('supcon_')) for k in options} == {0.7}
    assert torch.equal(model.backbone.fc.weight, start(Run(backbone='wrn_10_1'), data).backbone.fc.weight)
    record = run(r, progress=False)
    assert (record['inactive'] is None
            and ('supcon' in record) == ('supcon' in frame([record])) == (method == 'CE+SupCon'))
