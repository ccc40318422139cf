"""Saliency against libraries called directly, other people's algorithms and slow loops; and that an explanation
leaves no trace."""
import copy, random

import numpy as np, pytest, skimage.data, timm, torch, torchvision
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur

import lico.attribution as attribution
from lico.backbones import create_backbone
from lico.networks import undisturbed
from lico.cams import _blurred, grad_cam, imagenet_classifier, masked_scores, to_unit, weighted_maps
from lico.probes import default_layer
from lico.saliency import METHODS, explain
from lico.attribution import guided_path_attribution, input_gradient, rise_masks

CAMS = ['grad-cam', 'grad-cam++', 'score-cam', 'group-cam']
FAST = {'rise': dict(n_masks=20), 'group-cam': dict(groups=8), 'xrai': dict(steps=4, fast=True),
        'smoothgrad': dict(samples=4), 'integrated-gradients': dict(steps=8),
        'guided-ig': dict(steps=6, anchors=1)}


# timm's own arguments: the same layers, fewer channels
NARROW = {'resnet18': dict(channels=(8, 16, 32, 64)), 'vgg19': dict(mlp_ratio=1/64),
          'swin_tiny_patch4_window7_224': dict(img_size=56, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4)),
          'vit_small_patch16_rope_224': dict(img_size=48, embed_dim=64, depth=2, num_heads=2)}


def small(name='wrn_10_1', size=16, seed=0):
    """A random network whose batch normalisation has statistics of its own, so that the eval mode differs from the
    train mode."""
    torch.manual_seed(seed)
    net = (timm.create_model(name, num_classes=7, **NARROW[name]) if name in NARROW
           else create_backbone(name, num_classes=7, image_size=size)).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .3); m.running_var.uniform_(.5, 2)
    return net


def pictures(n=3, h=16, w=16, seed=1): return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def enlarge(maps, size): return to_unit(F.interpolate(to_unit(maps)[:, None], size, mode='bilinear')[:, 0])


def test_real_network_names_real_photographs():
    net, preprocess, names = imagenet_classifier()
    x = torch.stack([preprocess(Image.fromarray(getattr(skimage.data, n)())) for n in ('chelsea', 'coffee', 'rocket')])
    assert x.shape == (3, 3, 224, 224) and len(names) == 1000 and not net.training
    with torch.no_grad(): cat, coffee, rocket = (names[k] for k in net(x).argmax(1))
    assert 'cat' in cat and coffee == 'espresso' and 'missile' in rocket


@pytest.mark.parametrize('method', METHODS)
def test_every_method_on_pictures_that_are_not_square(method):
    """[B, H, W] in [0, 1]; a picture's map does not depend on its neighbours, on `batch_size` or on how often it is
    asked for."""
    net, x, target = small(), pictures(3, 16, 24), torch.tensor([2, 5, 0])
    maps = explain(net, x, target, method, **FAST.get(method, {}))
    assert maps.shape == (3, 16, 24) and maps.dtype == torch.float32 and not maps.requires_grad
    assert maps.amin((1, 2)).tolist() == [0]*3 and set(maps.amax((1, 2)).tolist()) in (
        {1}, {0, 1} if method == 'group-cam' else {1}), 'Group-CAM may find nothing'
    passes = []
    handle = net.stem.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    two = explain(net, x, target, method, batch_size=2, **FAST.get(method, {}))
    handle.remove()
    assert max(passes, default=0) <= 2, 'no pass through the network is larger than batch_size'
    torch.testing.assert_close(maps, two, rtol=0, atol=1e-3)
    if method not in ('random', 'edges', 'rise'):
        assert ((explain(net, x[1:2], 6, method, **FAST.get(method, {})) - maps[1:2]).abs().max()
                > 0.01), 'the class matters'


def test_a_map_that_is_constant_up_to_rounding_becomes_zeros():
    class Even(nn.Module):  # looks at nothing but the mean, with maps that are the same everywhere
        def __init__(self): super().__init__(); self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        def forward(self, x): return self.fc(self.conv(x.mean((2, 3), keepdim=True).expand_as(x)).mean((2, 3)))
    for method in CAMS:
        options = dict(groups=2) if method == 'group-cam' else {}
        assert (explain(Even(), pictures(2, 32, 32), 1, method, layer='conv', **options) == 0).all(), method
    assert ((to_unit(torch.tensor([[[1e5, 1e5 + 0.01]]])) == 0).all()
            and to_unit(torch.tensor([[[1e-20, 2e-20]]])).tolist() == [[[0, 1]]])


def test_predicted_class_is_the_default():
    net, x = small(), pictures()
    predicted = net(x).argmax(1)
    assert (torch.equal(explain(net, x), explain(net, x, predicted))
            and torch.equal(explain(net, x, 3), explain(net, x, torch.tensor([3]*3))))


@pytest.mark.parametrize('name, size', [('parn_18', 16), ('resnet18', 64), ('tf_efficientnet_lite0', 64),
                                        pytest.param('vgg19', 64, marks=pytest.mark.slow),
                                        ('convnext_atto', 64), ('swin_tiny_patch4_window7_224', 56),
                                        ('vit_tiny_patch16_224', 48), ('vit_small_patch16_rope_224', 48)])
def test_cams_on_many_networks(name, size):
    net, x, target = small(name, size), pictures(2, size, size), torch.tensor([1, 4])
    for method in ('grad-cam', 'grad-cam++', 'group-cam', *(['score-cam'] if name.startswith('vit') else [])):
        maps = explain(net, x, target, method)
        assert maps.shape == (2, size, size)
        torch.testing.assert_close(maps[1:], explain(net, x[1:], target[1:], method), rtol=0, atol=2e-3)
    cam, logits = grad_cam(net, x, target)
    torch.testing.assert_close(logits, net(x))
    torch.testing.assert_close(explain(net, x, target), enlarge(cam.detach(), (size, size)), rtol=0, atol=2e-3)


def test_vit_as_the_library_s_tutorial_does_it():
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    net, x = small('vit_tiny_patch16_224', 64), pictures(2, 64, 64)
    reshape = lambda t: t[:, 1:].reshape(len(t), 4, 4, -1).permute(0, 3, 1, 2)
    theirs = GradCAM(other := copy.deepcopy(net), [other.blocks[-1].norm1], reshape)(x, [ClassifierOutputTarget(2)]*2)
    torch.testing.assert_close(explain(net, x, 2), torch.from_numpy(theirs), rtol=0, atol=1e-5)
    maps = weighted_maps(net, x, torch.tensor([2, 2]))[0]
    assert maps.shape == (2, 192, 4, 4)


def theirs(name, net, x, target):
    "pytorch-grad-cam as its README calls it."
    import pytorch_grad_cam as lib
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    net = copy.deepcopy(net)
    return torch.from_numpy(getattr(lib, name)(net, [net.layer4])(x,
                                                                  [ClassifierOutputTarget(c) for c in target.tolist()]))


def test_equal_to_pytorch_grad_cam():
    net, x, target = small('resnet18', 64), pictures(2, 64, 64), torch.tensor([1, 4])
    for method, name in (('grad-cam', 'GradCAM'), ('score-cam', 'ScoreCAM')):
        torch.testing.assert_close(explain(net, x, target, method), theirs(name, net, x, target), rtol=0, atol=1e-3)
    with torch.no_grad(): net.fc.weight.mul_(1000)  # gradients so large that the library's epsilon does not matter
    torch.testing.assert_close(explain(net, x, target, 'grad-cam++'), theirs('GradCAMPlusPlus', net, x, target), rtol=0,
                               atol=1e-3)


def test_grad_cam_plus_plus_is_the_paper_s_whatever_the_size_of_gradients():
    net, x, target = small('resnet18', 64), pictures(2, 64, 64), torch.tensor([1, 4])
    # and one picture's smaller than its neighbour's
    with torch.no_grad(): net.fc.weight.mul_(torch.tensor([[.01], [.01], [.01], [.01], [1e-5], [.01], [.01]]))
    maps = net.double().forward_features(x.double())
    g, = torch.autograd.grad(net.forward_head(maps).gather(1, target[:, None]).sum(), maps)
    alpha = (g**2/(2*g**2 + maps.sum((2, 3), keepdim=True)*g**3)).nan_to_num()
    paper = enlarge(((alpha*g.relu()).sum((2, 3), keepdim=True)*maps).sum(1).relu().detach(), (64, 64)).float()
    net.float()
    torch.testing.assert_close(explain(net, x, target, 'grad-cam++'), paper, rtol=0, atol=1e-3)
    assert (theirs('GradCAMPlusPlus', net, x, target) - paper).abs().max() > 0.01, ('the epsilon is why ours differs '
                                                                                    'from the library as it is')


def test_torchcam_and_where_it_differs():
    methods = pytest.importorskip('torchcam.methods')
    net, x, target = small('resnet18', 64), pictures(2, 64, 64), torch.tensor([1, 4])
    with torch.no_grad(): net.fc.weight.mul_(10)  # the epsilon in its scaling to [0, 1]
    def run(name):
        with getattr(methods, name)(net, 'layer4') as extractor: return extractor(target.tolist(), net(x))[0].detach()
    torch.testing.assert_close(explain(net, x, target), enlarge(run('GradCAM'), (64, 64)), rtol=0, atol=1e-3)
    # Grad-CAM++: alpha[mask].div_() divides a copy, so alpha stays the squared gradient
    maps = net.forward_features(x)
    g, = torch.autograd.grad(net.forward_head(maps).gather(1, target[:, None]).sum(), maps)
    undivided = ((g**2*g.relu()).sum((2, 3), keepdim=True)*maps).sum(1).relu().detach()
    torch.testing.assert_close(run('GradCAMpp'), to_unit(undivided), rtol=0, atol=1e-3)
    # Score-CAM: scales a feature map before it enlarges it, corners not aligned; ours, as pytorch-grad-cam, after
    def score_cam(masks):
        with torch.no_grad():
            scores = torch.stack([net(image*m[:, None])[:, c] for image, m, c in zip(x, masks, target)])
        return (scores.softmax(1)[..., None, None]*maps).sum(1).relu().detach()
    unit = lambda m: (m - m.amin((2, 3), keepdim=True))/(
        m.amax((2, 3), keepdim=True) - m.amin((2, 3), keepdim=True)).clamp(min=1e-8)
    before = F.interpolate(unit(maps.detach()), (64, 64), mode='bilinear')
    after = unit(F.interpolate(maps.detach(), (64, 64), mode='bilinear', align_corners=True))
    torch.testing.assert_close(run('ScoreCAM'), to_unit(score_cam(before)), rtol=0, atol=1e-3)
    torch.testing.assert_close(explain(net, x, target, 'score-cam'), enlarge(score_cam(after), (64, 64)), rtol=0,
                               atol=1e-3)


@pytest.mark.parametrize('training', [False, True])
def test_grad_cam_s_gradient_by_central_differences(training):
    "In float64, for weights of the stem, of the head (through which the maps' weights move too) and for the picture."
    net = small()
    net.fc = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 7))
    net.double().train(training)
    x, target = pictures(4).double().requires_grad_(), torch.tensor([1, 3, 0, 2])
    scale = torch.rand(4, 4, 4, dtype=torch.float64)
    energy = lambda: (grad_cam(net, x, target)[0]*scale).sum()
    leaves = [net.stem.weight, net.fc[0].weight, net.fc[2].weight, x]
    assert energy() > 0
    for leaf, gradient in zip(leaves, torch.autograd.grad(energy(), leaves)):
        direction, values = torch.randn_like(leaf), []
        for by in (1e-7, -2e-7):
            leaf.data.add_(by*direction)
            values.append(energy().item())
        leaf.data.add_(1e-7*direction)
        torch.testing.assert_close((values[0] - values[1])/2e-7, (gradient*direction).sum().item(), rtol=1e-4,
                                   atol=1e-7)
    assert (net.training == training and all(p.grad is None for p in net.parameters())
            and not any(m._forward_hooks for m in net.modules()))


def test_changes_in_place_after_the_maps_do_no_harm():
    class Net(nn.Module):
        num_classes = 3
        def __init__(self, inplace):
            super().__init__(); torch.manual_seed(0)
            self.body, self.act, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Linear(8, 3)
        def forward_features(self, x): return self.body(x)
        def forward_head(self, maps): return self.fc(self.act(maps).mean((2, 3)))
        def forward(self, x): return self.forward_head(self.forward_features(x))
    x = pictures(2)
    for method in CAMS:
        assert torch.equal(explain(Net(True), x, 1, method, **({'groups': 4} if method == 'group-cam' else {})),
                           explain(Net(False), x, 1, method, **({'groups': 4} if method == 'group-cam' else {})))


def test_rise_masks_are_the_published_ones():
    """A grid of 7 x 7 cells enlarged to one cell more than the picture, cut at a random shift of less than one cell.
    The authors' code mirrors the grid at its border (mode "reflect"), ours goes on with the border's value as torch and
    Pillow do: a difference in the outermost half cell only."""
    from skimage.transform import resize
    u = torch.rand(50, 51, generator=torch.Generator().manual_seed(5))
    ours = rise_masks(50, (30, 45), torch.Generator().manual_seed(5))
    for mask, row in zip(ours.numpy(), u.numpy()):
        grid = (row[:49] < 0.5).reshape(7, 7).astype(np.float64)
        top, left = int(row[49]*5), int(row[50]*7)
        for mode, border in (('edge', 0), ('reflect', 4)):
            large = resize(grid, (8*5, 8*7), order=1, mode=mode, anti_aliasing=False)
            np.testing.assert_allclose(mask[border:, border:], large[top + border:top + 30, left + border:left + 45],
                                       atol=1e-6)
    assert (ours.shape == (50, 30, 45)
            and abs(rise_masks(2000, (14, 14), torch.Generator().manual_seed(0), p=0.3).mean() - 0.3) < 0.01)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(torch.cat([rise_masks(n, (30, 45), generator) for n in (1, 30, 19)]),
                       ours), 'however they are divided into batches'


def test_rise_is_a_slow_loop_over_its_masks():
    net, x, target = small(), pictures(2, 16, 24), torch.tensor([1, 4])
    masks = rise_masks(11, (16, 24), torch.Generator().manual_seed(7), cells=4, p=0.6)
    with torch.no_grad():
        slow = torch.stack([sum(net(o[None]*m).softmax(1)[0, c]*m for m in masks)/(11*0.6) for o, c in zip(x, target)])
    with undisturbed(net):
        torch.testing.assert_close(attribution.rise(net, x, target, 6, seed=7, n_masks=11, cells=4, p=0.6), slow)


def test_rise_is_seeded_and_finds_the_pixels_that_matter():
    class Corner(nn.Module):  # its class is there if the upper left corner is
        num_classes = 2
        def forward_features(self, x): return x
        def forward_head(self, x): return torch.stack([x[:, :, :6, :6].mean((1, 2, 3))*20 - 10, torch.zeros(len(x))], 1)
        def forward(self, x): return self.forward_head(x)
    x = torch.ones(1, 3, 28, 28)
    a, b, c = (explain(Corner(), x, 0, 'rise', n_masks=1500, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a[0, :6, :6].min() > a[0, 12:, 12:].max()


def test_memory_does_not_grow_with_the_number_of_masks(monkeypatch):
    made = []
    monkeypatch.setattr(attribution, 'rise_masks', lambda n, *args: made.append(n) or rise_masks(n, *args))
    explain(small(), pictures(3), 0, 'rise', batch_size=12, n_masks=101)
    assert max(made) == 4 and sum(made) == 101


def test_group_cam_s_limits():
    net, x, target = small(), pictures(2), torch.tensor([1, 4])
    background, maps = _blurred(x), weighted_maps(net, x, target)[0].detach()
    torch.testing.assert_close(_blurred(x*0 + 1), x*0 + 1)
    wide = torch.rand(2, 3, 40, 72)  # in one go, with a kernel of two dimensions
    torch.testing.assert_close(_blurred(wide), gaussian_blur(wide, [17, 9], [50*72/224, 50*40/224]))
    one, cam = (explain(net, x, target, 'group-cam', groups=1, denoise=0),
                enlarge(grad_cam(net, x, target)[0].detach(), (16, 16)))
    gain = lambda masks: masked_scores(lambda o: net(o).softmax(1), x, target, masks, 8,
                                       background) - net(background).softmax(1).gather(1, target[:, None])
    for b in range(2):
        torch.testing.assert_close(one[b], cam[b] if gain(maps.sum(1, True).relu())[b] > 0 else 0*cam[b], rtol=0,
                                   atol=1e-3)
    every = torch.zeros(2, 16, 16)  # one group per channel: a loop over the channels
    with torch.no_grad():
        for b in range(2):
            for m in maps[b]:
                mask = to_unit(F.interpolate(m.relu()[None, None], (16, 16), mode='bilinear')[0])[0]
                p = lambda o: net(o[None]).softmax(1)[0, target[b]]
                every[b] += (p(x[b]*mask + background[b]*(1 - mask)) - p(background[b]))*mask
    torch.testing.assert_close(explain(net, x, target, 'group-cam', groups=64, denoise=0), to_unit(every.relu()),
                               rtol=0, atol=1e-3)


class Guided(nn.Module):
    "A rectifier that replaces the gradient by the rule, as an autograd function of its own."
    def __init__(self, act): super().__init__(); self.act = act

    def forward(self, x):
        act = self.act
        class Rule(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x): ctx.save_for_backward(x); return act(x.clone())
            @staticmethod
            def backward(ctx, g):
                z, = ctx.saved_tensors
                slope = getattr(act, 'negative_slope', 0)
                return torch.where(g > 0, g, 0)*torch.where(
                    z > 0, torch.where(z < 6, 1., 0.) if isinstance(act, nn.ReLU6) else 1., slope)
        return Rule.apply(x)


def swap(net):
    for name, child in net.named_children():
        if isinstance(child, (nn.ReLU, nn.ReLU6, nn.LeakyReLU)): setattr(net, name, Guided(child))
        else: swap(child)
    return net


@pytest.mark.parametrize('name, size', [('wrn_10_1', 16), ('parn_18', 16), ('resnet18', 32), ('vgg19', 32),
                                        ('tf_efficientnet_lite0', 32)])
def test_guided_backprop_is_the_rule_at_every_rectifier(name, size):
    "Leaky, in place, ReLU6, one module used several times: against a copy of the network with other rectifiers."
    net, x, target = small(name, size), pictures(2, size, size), torch.tensor([1, 4])
    ruled = input_gradient(swap(copy.deepcopy(net)), x, target).abs().sum(1)
    torch.testing.assert_close(explain(net, x, target, 'guided-backprop'), to_unit(ruled), rtol=0, atol=1e-4)
    assert ((to_unit(input_gradient(net, x, target).abs().sum(1)) - to_unit(ruled)).abs().max()
            > 0.05), 'and not the plain gradient'


def test_guided_backprop_equals_captum_where_captum_has_a_rule():
    from captum.attr import GuidedBackprop
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(8*12*12, 5))
    x, target = pictures(2), torch.tensor([1, 4])
    with pytest.warns(UserWarning): theirs = GuidedBackprop(net).attribute(x.clone().requires_grad_(), target=target)
    torch.testing.assert_close(attribution.guided_backprop(net, x, target), theirs.abs().sum(1))


@pytest.mark.parametrize('name', ['convnext_atto', 'vit_tiny_patch16_224', 'mobilenetv3_small_050', 'efficientnet_b0'])
def test_guided_backprop_refuses_what_it_has_no_rule_for(name):
    with pytest.raises(ValueError,
                       match='guided-backprop has no rule for '
                             '(Gelu|ScaledDotProduct.*|Hardswish|Hardsigmoid|Silu|Sigmoid|SwishMeBackward)'):
        explain(small(name, 32), pictures(1, 32, 32), 0, 'guided-backprop')


def test_guided_backprop_refuses_rectifiers_that_do_not_start_at_zero():
    for act in (nn.Hardtanh(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.ELU(), nn.PReLU(), lambda x: x.clamp(min=0)):
        with pytest.raises(ValueError, match='no rule for'):
            attribution.guided_backprop(lambda x: act(x).sum((2, 3)), pictures(1), torch.tensor([0]))
    attribution.guided_backprop(lambda x: F.hardtanh(F.relu6(F.leaky_relu(x.relu())), 0, 2).sum((2, 3)), pictures(1),
                             torch.tensor([0]))


def test_smoothgrad_s_noise():
    "A part of each picture's own range; seeded, whatever torch's generator has been used for meanwhile."
    net, x, target = small(), pictures(2)*torch.tensor([1., 9]).view(2, 1, 1, 1), torch.tensor([1, 4])
    maps = explain(net, x, target, 'smoothgrad', samples=3)
    torch.rand(5)
    assert (torch.equal(explain(net, x, target, 'smoothgrad', samples=3), maps)
            and not torch.equal(explain(net, x, target, 'smoothgrad', samples=3, seed=1), maps))
    for b in range(2):
        generator = torch.Generator().manual_seed(0)
        noise = 0.15*(x[b].max() - x[b].min())*torch.randn(3, 3, 16, 16, generator=generator)
        slow = input_gradient(net, x[b] + noise, target[b].repeat(3)).mean(0).abs().sum(0)
        torch.testing.assert_close(maps[b], to_unit(slow[None])[0], rtol=0, atol=1e-3)


def test_guided_ig_is_the_library_s_algorithm(monkeypatch):
    """PAIR's own code, with np.quantile's old argument given back to it; between anchors, one call per piece of the
    straight line."""
    from saliency.core.guided_ig import guided_ig_impl
    quantile = np.quantile
    monkeypatch.setattr(np, 'quantile', lambda a, q, interpolation: quantile(a, q, method=interpolation))
    net, x, target = small().double(), pictures(2).double(), torch.tensor([1, 4])
    for steps, fraction, anchors in ((9, 0.25, 0), (12, 0.1, 2), (4, 0.8, 1)):
        ours = guided_path_attribution(net, x, target, steps, fraction, anchors)
        for b in range(2):
            slope = lambda z: input_gradient(net, torch.tensor(z)[None], target[b:b + 1])[0].numpy()
            ends = [x[b].numpy()*k/(anchors + 1) for k in range(anchors + 2)]
            pieces = [guided_ig_impl(end, start, slope, steps//(anchors + 1), fraction, max_dist=1.)
                      for start, end in zip(ends, ends[1:])]
            np.testing.assert_allclose(ours[b].numpy(), sum(pieces), rtol=1e-6, atol=1e-9)
    maps = explain(net.float(), x.float(), target, 'guided-ig', steps=4, fraction=0.8, anchors=1)
    torch.testing.assert_close(maps, to_unit(ours.abs().sum(1)).float(), rtol=0, atol=0.02)


def test_integrated_gradients_are_complete_and_exact_for_a_linear_model():
    net, x = small(), pictures(2)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    expected = (linear[1].weight[3]*x.flatten(1)).view_as(x).abs().sum(1).detach()
    torch.testing.assert_close(attribution.integrated_gradients(linear, x, torch.tensor([3, 3]), steps=3), expected)
    torch.testing.assert_close(attribution.guided_ig(linear, x, torch.tensor([3, 3]), steps=3), expected)
    signed = guided_path_attribution(net, x, torch.tensor([1, 4]), steps=210)
    torch.testing.assert_close(signed.sum((1, 2, 3)), (net(x) - net(0*x))[[0, 1], [1, 4]].detach(), rtol=0.02,
                               atol=0.01)


@pytest.mark.parametrize('fast', [True, False])
def test_xrai_is_the_library_s(fast):
    from saliency.core import XRAI, XRAIParameters
    net, x = small(), pictures(1)
    x = F.interpolate(x[:, :, :3, :3], (16, 16), mode='nearest')  # patches, so that there are segments
    def call(batch, call_model_args=None, expected_keys=None):
        batch = torch.tensor(np.moveaxis(batch, -1, 1), dtype=torch.float32, requires_grad=True)
        net(batch)[:, 2].sum().backward()
        return {'INPUT_OUTPUT_GRADIENTS': np.moveaxis(batch.grad.numpy(), 1, -1)}
    mask = XRAI().GetMask(np.moveaxis(x[0].numpy(), 0, -1), call,
                          extra_parameters=XRAIParameters(steps=5, algorithm='fast' if fast else 'full'))
    maps = explain(net, x, 2, 'xrai', steps=5, fast=fast)
    torch.testing.assert_close(maps[0], to_unit(torch.tensor(mask, dtype=torch.float32)[None])[0], rtol=0, atol=1e-3)
    assert len(maps.unique()) > 1


def test_baselines():
    x = torch.zeros(1, 3, 8, 8)
    x[:, 2, :, 4:] = 1
    edge = explain(small(), x, 0, 'edges')[0]
    assert (edge[:, 3:5] == 1).all() and (edge[:, :2] == 0).all() and (edge[:, 6:] == 0).all()
    assert (explain(small(), x*0 + 3, 0, 'edges') == 0).all(), 'a constant map becomes zeros'
    many = pictures(40, 16, 16)
    noise = explain(small(), many, 0, 'random', seed=4)
    assert (abs(noise.mean() - 0.5) < 0.02 and not torch.equal(noise[0], noise[1])
            and torch.equal(noise[7:8], explain(small(), many[7:8], 0, 'random', seed=4)))
    assert not torch.equal(noise, explain(small(), many, 0, 'random', seed=5))


def traces(net):
    "All that an explanation could leave behind."
    hooks = [len(getattr(m, h)) for m in net.modules()
             for h in ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')]
    return dict(modes=[m.training for m in net.modules()], flags=[p.requires_grad for p in net.parameters()],
                hooks=hooks, state={k: v.clone() for k, v in net.state_dict().items()},
                grads=[p.grad for p in net.parameters()],
                values=[None if p.grad is None else p.grad.clone() for p in net.parameters()],
                torch=torch.get_rng_state(),
                numpy=np.random.get_state()[1].copy(), python=random.getstate(), enabled=torch.is_grad_enabled(),
                modules=[id(m) for m in net.modules()])


def same(a, b):
    assert all(x is y for x, y in zip(a.pop('grads'), b.pop('grads'), strict=True)), 'the very tensors'
    for key in a:
        if key in ('state', 'values'):
            assert all(x is y is None or torch.equal(x, y)
                       for x, y in zip(*(list(o[key].values()) if key == 'state' else o[key] for o in (a, b)),
                                       strict=True)), key
        elif key in ('torch', 'numpy'): assert (np.asarray(a[key]) == np.asarray(b[key])).all(), key
        else: assert a[key] == b[key], key


def lived_in(name='wrn_10_1', size=16):
    "A network in the middle of something: train mode but for one block, some parameters frozen, some with a gradient."
    net = small(name, size).train()
    list(net.children())[1].eval()
    net(pictures(4, size, size)).square().sum().backward()
    for p in list(net.parameters())[::3]: p.requires_grad_(False); p.grad = None
    return net


class Stop(Exception): pass


@pytest.mark.parametrize('method', METHODS)
def test_leaves_no_trace(method):
    net, x = lived_in(), pictures(2).requires_grad_()
    before = traces(net)
    maps = explain(net, x, 2, method, **FAST.get(method, {}))
    same(before, traces(net))
    assert x.requires_grad and x.grad is None and torch.equal(x, pictures(2))
    torch.testing.assert_close(maps, explain(net.eval(), x, 2, method, **FAST.get(method, {})), rtol=0, atol=1e-5)
    with torch.no_grad(): a = explain(net, x, 2, method, **FAST.get(method, {}))
    with torch.inference_mode(): b = explain(net, x*1, 2, method, **FAST.get(method, {}))
    torch.testing.assert_close(a, maps, rtol=0, atol=1e-5)
    torch.testing.assert_close(b.clone(), maps, rtol=0, atol=1e-5)


@pytest.mark.parametrize('error', [Stop, IndexError])
@pytest.mark.parametrize('method', [m for m in METHODS if m not in ('random', 'edges')])
def test_leaves_no_trace_after_an_exception(method, error):
    net, x = lived_in(), pictures(2)
    def stop(module, args, out): raise error('half-way')
    handle = net.fc.register_forward_hook(stop)
    before = traces(net)
    with pytest.raises(error, match='half-way'): explain(net, x, 2, method, **FAST.get(method, {}))
    same(before, traces(net))
    handle.remove()


def test_leaves_no_trace_in_a_vit():
    net, x = lived_in('vit_tiny_patch16_224', 32), pictures(2, 32, 32)
    before = traces(net)
    for method in ('grad-cam', 'grad-cam++', 'group-cam'): explain(net, x, 2, method)
    same(before, traces(net))
    handle = net.head.register_forward_hook(lambda *args: 1/0)
    before, held = traces(net), []  # the exceptions are held, so that nothing is cleaned up by their going out of scope
    for method in ('grad-cam', 'group-cam'):
        with pytest.raises(ZeroDivisionError) as error: explain(net, x, 2, method)
        held.append(error)
    same(before, traces(net))
    handle.remove()


@pytest.mark.parametrize('change, sentence', [
    (dict(method='cam'), "unknown saliency method 'cam': choose one of grad-cam, .*, random, edges"),
    (dict(x=torch.zeros(3, 16, 16)), r"images \[3, 16, 16\] of torch.float32: expected a tensor \[B, C, H, W\] of"),
    (dict(x=torch.zeros(2, 1, 16, 16)), r"images \[2, 1, 16, 16\]: expected"),
    (dict(x=torch.zeros(0, 3, 16, 16)), r"images \[0, 3, 16, 16\] of torch.float32: expected"),
    (dict(x=torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), 'of floats, normalised as the network takes it'),
    (dict(x=[1, 2]), 'images list: expected a tensor'),
    (dict(x=torch.full((1, 3, 16, 16), float('inf'))), 'images hold values that are not finite'),
    (dict(target=7), r'target 7: expected class indices from 0 to 6'),
    (dict(target=-1), 'target -1: class indices begin at 0'),
    (dict(target=torch.tensor([1, 2, 3])), r'shape \[3\]: expected one class index, or one for each of 2 images'),
    (dict(target=1.5), 'target is torch.float32 of shape'),
    (dict(target=torch.tensor([True, False])), 'target is torch.bool'),
    (dict(batch_size=0), 'batch_size = 0: expected a whole number of at least 1'),
    (dict(method='rise', masks=3), "rise has no option 'masks': its options are n_masks, cells, p"),
    (dict(kind='score-cam'), "grad-cam has no option 'kind': its options are none"),
    (dict(method='rise', n_masks=0), 'rise.n_masks = 0: expected a whole number of at least 1'),
    (dict(method='rise', p=1.), 'rise.p = 1.0: expected'),
    (dict(method='guided-ig', steps=0), 'guided-ig.steps = 0: expected'),
    (dict(method='group-cam', groups=65), '65 groups of 64 channels: expected 1 to 64'),
    (dict(method='group-cam', denoise=1), 'group-cam.denoise = 1: expected a number from 0 to 1'),
    (dict(method='xrai', x=torch.ones(1, 3, 16, 16)), 'xrai cannot cut image 0 into segments: '
                                                      'all its values are equal')])
def test_refusals_are_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        explain(**{**dict(net=small(), x=pictures(2), target=1), **change})
    assert '\n' not in str(refusal.value)


def test_networks_that_cannot_be_explained():
    with pytest.raises(ValueError, match=r'images \[2, 3, 16, 16\]: expected what Linear takes, which stops with'):
        explain(nn.Linear(3, 3), pictures(2))
    net = small()
    net.fc.weight.data.fill_(float('nan'))
    for method in METHODS:
        if method in ('random', 'edges'): continue
        with pytest.raises(ValueError, match='not finite: check the network'):
            explain(net, pictures(2), 1, method, **FAST.get(method, {}))



def test_undisturbed_is_nested_safely():
    net = lived_in()
    before = traces(net)
    with undisturbed(net), undisturbed(net): torch.rand(3)
    same(before, traces(net))


def test_a_layer_by_its_name_wherever_the_name_comes_from():
    net, x = create_backbone('wrn_10_1', 10, 16).eval(), torch.randn(2, 3, 16, 16)
    name = ''.join(default_layer(net, x))  # as a file or an argument has it: another object
    assert name == 'forward_features' and torch.equal(explain(net, x, layer=name), explain(net, x))
    with pytest.raises(ValueError, match="has no layer 'forward_features'"):
        explain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), x, layer=name)


@pytest.mark.parametrize('score, more', [('softmax', ()), (torch.sigmoid, ()), (None, (nn.Softmax(1),)),
                                         (None, (nn.Sigmoid(),)), (lambda z: z.log_softmax(1), ())])
def test_guided_backprop_s_rule_is_for_hidden_layers(score, more):
    "Not for what makes probabilities of an answer, which has its own gradient."
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(2, 3, 12, 12)
    found = explain(nn.Sequential(body, *more), x, 1, 'guided-backprop', score=score)
    hooks = [m.register_full_backward_hook(lambda m, given, out: (given[0].clamp(min=0)*(out[0] > 0),))
             for m in body if isinstance(m, nn.ReLU)]
    z = nn.Sequential(body, *more)(asked := x.clone().requires_grad_())
    z = z.softmax(1) if score == 'softmax' else score(z) if score else z
    wanted = torch.autograd.grad(z[:, 1].sum(), asked)[0].abs().sum(1)
    assert len(hooks) == 2 and torch.allclose(found, to_unit(wanted), atol=1e-5)
    with pytest.raises(ValueError, match='guided-backprop has no rule for Silu'):
        explain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 3, 1)), x, 0, 'guided-backprop',
                score=lambda z: z.mean((2, 3)))


def test_classes_of_any_kind_of_whole_number():
    x = pictures(2)
    found = [explain(small(), x, np.array([1, 2], dtype=o), 'random') for o in (np.uint16, np.uint8, np.int64)]
    assert found[0].equal(found[1]) and found[1].equal(found[2])


@pytest.mark.parametrize('make', [lambda: create_backbone('wrn_16_1', num_classes=5, image_size=16),
                                  lambda: torchvision.models.resnet18(num_classes=5)], ids=['timm', 'torchvision'])
@pytest.mark.parametrize('method', ['grad-cam', 'grad-cam++'])
@pytest.mark.parametrize('target', [None, 3])
def test_no_more_passes_than_are_needed(make, method, target):
    "A look at what the answer is, one for the layer, which is the map's own of a single image; the class costs none."
    torch.manual_seed(0)
    net, seen = make().eval(), []
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    x = torch.randn(3, 3, 64, 64)
    alone = [explain(net, o[None], target, method)[0] for o in x]
    assert seen == [1, 1]*3
    seen.clear()
    torch.testing.assert_close(explain(net, x, target, method), torch.stack(alone), atol=1e-5, rtol=1e-4)
    assert seen == [1, 1, 3]
