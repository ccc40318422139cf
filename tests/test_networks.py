"""Any network through one door: maps against ones weighed by hand with hooks of this file's own, scores against plain
loops, other libraries' networks, outputs of every kind, and that two threads do not disturb each other."""
import gc, threading, types
from collections import OrderedDict

import numpy as np, pytest, timm, torch, torchvision
import torch.nn.functional as F
from PIL import Image
from torch import nn

from lico import copies
from lico.backbones import adapt, create_backbone, features
from lico.networks import undisturbed
from lico.probes import default_layer
from lico.cams import to_unit
from lico.metrics import deletion, insertion, pointing_game
from lico.sensitivity import sanity_check
from lico.saliency import METHODS, explain, overlay
from test_saliency import FAST, lived_in, pictures, same, small, traces


def seeded(make, *args, **options):
    "A network with random weights and statistics, no layer of it zero."
    torch.manual_seed(0)
    net = make(*args, **options).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .3); m.running_var.uniform_(.5, 2)
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.1)
    return net


def by_hand(net, module, x, target, places=lambda t: t, pick=lambda out: out, logits=lambda out: out):
    "Grad-CAM with hooks: mean gradient times activations, positive part, scaled, enlarged."
    kept = {}
    def forward(m, args, out):
        kept['a'] = pick(out); kept['a'].retain_grad()
        return out.clone() if out is kept['a'] else None  # what comes next may change it in place
    handle = module.register_forward_hook(forward)
    x = x.clone().requires_grad_()
    rows = logits(net(x))
    handle.remove()
    rows[torch.arange(len(x)), target].sum().backward()
    a, g = places(kept['a'].detach()), places(kept['a'].grad)
    net.zero_grad()
    cam = (g.mean((2, 3), keepdim=True)*a).sum(1).clamp(min=0)
    return to_unit(F.interpolate(to_unit(cam)[:, None], x.shape[2:], mode='bilinear')[:, 0])


def hugging_face(name, **options):
    import transformers
    config, model = (getattr(transformers, f'{name}{part}') for part in ('Config', 'ForImageClassification'))
    return seeded(lambda: model(config(num_labels=5, **options)))


def tokens(h, w, prefix): return lambda t: t[:, prefix:].mT.unflatten(2, (h, w))
last = lambda t: t.movedim(-1, 1)
tv = torchvision.models
VIT = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
HF_VIT = dict(image_size=32, patch_size=8, num_hidden_layers=2, num_attention_heads=2, hidden_size=32,
              intermediate_size=64)
NETWORKS = {  # name -> (how it is made, the layer that is expected, how its places lie, size of images)
    'resnet': (lambda: tv.resnet18(num_classes=5), 'layer4', None, 64),
    'vgg': (lambda: nn.Sequential(OrderedDict(features=tv.vgg.make_layers([8, 'M', 16, 'M', 16, 'M']),
        avgpool=nn.AdaptiveAvgPool2d(7), flat=nn.Flatten(), classifier=nn.Linear(784, 5))), 'features', None, 48),
    'densenet': (lambda: tv.DenseNet(8, (1, 1), 8, num_classes=5), 'features', None, 64),
    'mobilenet': (lambda: tv.mobilenet_v3_small(num_classes=5), 'features', None, 64),
    'convnext': (lambda: tv.ConvNeXt([tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)],
                                     num_classes=5), 'features', None, 64),
    'swin': (lambda: tv.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5), 'permute', None, 64),
    'vit': (lambda: tv.VisionTransformer(**VIT), 'encoder.layers.encoder_layer_1.ln_1', tokens(4, 4, 1), 32),
    'hf vit': (lambda: hugging_face('ViT', **HF_VIT), None, tokens(4, 4, 1), 32),
    'hf dinov2 with registers': (lambda: hugging_face('Dinov2WithRegisters', num_register_tokens=3, **{
        **HF_VIT, 'patch_size': 4, 'image_size': 16}), None, tokens(4, 4, 4), 16),
    'hf swin': (lambda: hugging_face('Swin', image_size=64, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 2],
                                     window_size=4), 'swin.layernorm', tokens(8, 8, 0), 64),
    'hf convnext': (lambda: hugging_face('ConvNext', hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), None, None,
                    64),
    'hf resnet': (lambda: hugging_face('ResNet', embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                       layer_type='basic'), None, None, 64)}
LAYERS = {'hf vit': r'vit\..*layernorm_before', 'hf dinov2 with registers': 'dinov2_with_registers.layernorm',
          'hf convnext': 'convnext.encoder.stages.1', 'hf resnet': 'resnet.encoder.stages.1'}


@pytest.mark.parametrize('name', NETWORKS)
def test_other_libraries_networks(name):
    "The layer is the expected one, its map is the one weighed by hand, and scores are a plain loop's."
    import re
    make, layer, places, size = NETWORKS[name]
    net, x, target = seeded(make), pictures(2, size, size), torch.tensor([1, 4])
    read = lambda out: getattr(out, 'logits', out)
    found = default_layer(net, x[:1])
    assert re.fullmatch(layer or LAYERS[name], found), found
    module = net.get_submodule(found)
    hand = by_hand(net, module, x, target, places or (lambda t: t), logits=read)
    assert hand.flatten(1).std(1).max() > 0.01
    before = traces(net)
    for given in (None, found, module):
        torch.testing.assert_close(explain(net, x, target, layer=given), hand, rtol=0, atol=2e-3)
    curve = insertion(net, x, hand, target, baseline=0.)
    same(before, traces(net))
    with torch.no_grad(): torch.testing.assert_close(
        curve.curve[:, [0, -1]], torch.stack([read(net(o)).softmax(1)[[0, 1], target] for o in (0*x, x)], 1),
        rtol=1e-4, atol=1e-5)


def test_a_vit_s_layouts_are_not_guessed():
    "Segment Anything's ViT keeps its places last between its blocks, and gives them first."
    net = seeded(timm.create_model, 'samvit_base_patch16', img_size=64, embed_dim=24, depth=2, num_heads=2,
                 num_classes=5, window_size=2, global_attn_indexes=(1,))
    x, target = pictures(2, 64, 64), torch.tensor([1, 4])
    hand = by_hand(net, net.blocks[-1].norm1, x, target, last)
    torch.testing.assert_close(explain(net, x, target), hand, rtol=0, atol=2e-3)
    for layer, places in (('neck', lambda t: t), ('blocks.1', last), ('blocks.0.mlp.fc2', tokens(4, 4, 0))):
        torch.testing.assert_close(explain(net, x, target, layer=layer),
                                   by_hand(net, net.get_submodule(layer), x, target, places), rtol=0, atol=2e-3)


class Tokens(nn.Module):
    "A small transformer whose tokens nobody can lay out: 4 x 6 places and three more under a name of their own."
    def __init__(self, more=3, named='extra'):
        super().__init__()
        self.patch, self.norm, self.fc = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 5)
        self.register_parameter(named, nn.Parameter(torch.randn(1, more, 16)))
        self.named, self.mix = named, nn.Linear(24 + more, 1)
    def forward(self, x):
        t = self.patch(x).flatten(2).mT
        t = self.norm(torch.cat([getattr(self, self.named).expand(len(x), -1, -1), t], 1))
        return self.fc(self.mix(t.mT)[..., 0])


def test_what_cannot_be_settled_is_refused_by_name():
    net, x = seeded(Tokens, 20), pictures(2, 16, 24)
    with pytest.raises(ValueError, match=r"'norm' of Tokens gives features \[1, 44, 16\], which are no grid .* layer=, "
                                         "or reshape="): explain(net, x, 1)
    hand = by_hand(net, net.norm, x, 1, tokens(4, 6, 20))
    torch.testing.assert_close(explain(net, x, 1, layer='norm', reshape=tokens(4, 6, 20)), hand, rtol=0, atol=2e-3)
    torch.testing.assert_close(explain(seeded(Tokens, 1, 'cls_token'), x, 1), by_hand(
        net := seeded(Tokens, 1, 'cls_token'), net.norm, x, 1, tokens(4, 6, 1)), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match='reshape gives .*: expected maps'): explain(net, x, 1, reshape=lambda t: t[0])
    for more, named in ((1, 'extra'), (3, 'extra'), (4, 'extra'), (16, 'extra'), (2, 'extra_token'), (3, 'positions')):
        with pytest.raises(ValueError, match=rf"features \[1, {24 + more}, 16\], which are no grid .* or reshape="):
            explain(seeded(Tokens, more, named), x, 1)
    for more, named in ((1, 'cls'), (1, 'class_token'), (3, 'register_tokens'), (4, 'reg_token'), (2, 'dist_token_1')):
        net = seeded(Tokens, more, named)
        torch.testing.assert_close(explain(net, x, 1), by_hand(net, net.norm, x, 1, tokens(4, 6, more)), rtol=0,
                                   atol=2e-3)
    for method in ('rise', 'smoothgrad', 'integrated-gradients', 'edges', 'random', 'guided-ig'):
        assert explain(seeded(Tokens, 20), x, 1, method, **FAST.get(method, {})).shape == (2, 16, 24), 'needs no layer'


def test_layers_by_name_and_by_mistake():
    net, x = seeded(tv.resnet18, num_classes=5), pictures(1, 64, 64)
    assert torch.equal(explain(net, x, 1, layer='layer3'), explain(net, x, 1, layer=net.layer3))
    for layer, sentence in (('layer5', "ResNet has no layer 'layer5'; near it: layer"),
                            (nn.ReLU(), 'layer= is a ReLU that is no module of the ResNet'),
                            ('fc', r"'fc' of ResNet gives features \[1, 5\], which are no grid of places"),
                            ('avgpool', "the maps of 'avgpool' have one position at 64 x 64 pixels")):
        with pytest.raises(ValueError, match=sentence) as e: explain(net, x, 1, layer=layer)
        assert '\n' not in str(e.value)
    for method in ('grad-cam', 'grad-cam++', 'group-cam', 'score-cam'):
        with pytest.raises(ValueError, match='one position at 32 x 32 pixels'):
            explain(net, pictures(1, 32, 32), 1, method)
    net.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="'spare' of ResNet gives nothing in a forward pass"):
        explain(net, x, 1, layer='spare')


class Plain(nn.Module):
    "A network of nobody's, for any number of channels and classes, whose output can be dressed."
    def __init__(self, channels=3, classes=5, dress=lambda z: z):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, classes)
        self.dress, self.num_classes = dress, 1000  # which is a lie
    def forward(self, x): return self.dress(self.fc(self.bn(self.conv(x)).relu().mean((2, 3))))


@pytest.mark.parametrize('dress', [lambda z: types.SimpleNamespace(logits=z), lambda z: dict(logits=z, loss=z.sum()),
                                   lambda z: dict(out=z), lambda z: (z,), lambda z: z[..., None, None],
                                   lambda z: z.squeeze()])
def test_outputs_are_unwrapped(dress):
    x = pictures(2)
    bare, dressed = seeded(Plain), seeded(Plain, dress=dress)
    for method in METHODS:
        torch.testing.assert_close(explain(dressed, x, 2, method, **FAST.get(method, {})),
                                   explain(bare, x, 2, method, **FAST.get(method, {})), rtol=0, atol=1e-5)
    maps = explain(bare, x)
    for metric in (insertion, deletion):
        torch.testing.assert_close(metric(dressed, x, maps, 2).curve, metric(bare, x, maps, 2).curve)


def written(x, how):
    "Images, after something was written into them."
    return getattr(x, how[0])(*how[1:])

@pytest.mark.parametrize('how', [('relu_',), ('sub_', .3), ('mul_', -1)])
def test_networks_that_write_into_their_images(how):
    "Right maps and scores, of images that stay as they were; one image or a view of one, too."
    class Writes(Plain):
        def forward(self, x): return super().forward(written(x, how))
    class Copies(Plain):
        def forward(self, x): return super().forward(written(x.clone(), how))
    x, writes, copies = pictures(2), seeded(Writes), seeded(Copies)
    given, before = x.clone(), traces(writes)
    for method in METHODS:
        maps = explain(writes, given, 2, method, **FAST.get(method, {}))
        torch.testing.assert_close(maps, explain(copies, x, 2, method, **FAST.get(method, {})), rtol=0, atol=1e-5)
        assert given.equal(x), method
    for metric in (insertion, deletion):
        for images in (given, given[:1].expand(2, -1, -1, -1)):
            torch.testing.assert_close(metric(writes, images, maps, 2).curve, metric(copies, images, maps, 2).curve)
        assert given.equal(x), metric
    same(before, traces(writes))


@pytest.mark.parametrize('dress, what', [
    (lambda z: (z, z*2), 'tuple'), (lambda z: dict(a=z, b=z), 'dict'), (lambda z: 'cat', 'str'),
    (lambda z: None, 'None'),
    (lambda z: z[:, :, None].expand(-1, -1, 4), r'tensor \[1, 5, 4\]'),
    (lambda z: z.argmax(1, keepdim=True), r'tensor \[1, 1\]')])
def test_outputs_that_are_not_clear_are_refused(dress, what):
    net, x = seeded(Plain, dress=dress), pictures(2)
    for call in (lambda **o: explain(net, x, 1, **o), lambda **o: insertion(net, x, torch.rand(2, 16, 16), 1, **o)):
        with pytest.raises(ValueError, match=f'output for 1 image is a {what}.*pass score=') as e: call()
        assert '\n' not in str(e.value)
    if what == 'tuple':
        bare, score = seeded(Plain), lambda out: out[0].softmax(1)
        torch.testing.assert_close(explain(net, x, 1, 'rise', score=score, n_masks=20), explain(bare, x, 1, 'rise',
                                                                                                n_masks=20))
        torch.testing.assert_close(explain(net, x, 1, score=score), explain(bare, x, 1, score='softmax'))


@pytest.mark.parametrize('dress', [lambda z: z.detach(), torch.no_grad()(lambda z: z*1), torch.inference_mode()(
    lambda z: z*1)])
@pytest.mark.parametrize('method', ['grad-cam', 'group-cam', 'smoothgrad', 'integrated-gradients', 'guided-backprop'])
def test_an_answer_without_a_gradient_is_said(dress, method):
    net, x = seeded(Plain, dress=dress), pictures(2)
    with pytest.raises(ValueError, match='the answer of Plain has no gradient .*: use a method that needs none') as e:
        explain(net, x, 1, method)
    assert '\n' not in str(e.value) and explain(net, x, 1, 'rise', n_masks=20).std() > 0


@pytest.mark.parametrize('compiled', [torch.jit.script, lambda net: torch.jit.trace(net, pictures(1, 64, 64))])
@pytest.mark.filterwarnings('ignore')
def test_networks_compiled_by_jit(compiled):
    "Where no layer can be listened to, this is said; the rest is as without."
    net, x = seeded(tv.resnet18, num_classes=5), pictures(2, 64, 64)
    for o in (dict(method='rise', n_masks=20), dict(method='integrated-gradients', steps=3)):
        torch.testing.assert_close(explain(compiled(net), x, 1, **o), explain(net, x, 1, **o), rtol=0, atol=1e-4)
    for layer in (None, 'layer4'):
        with pytest.raises(ValueError, match='is compiled by torch.jit, whose layers cannot be listened to: pass') as e:
            explain(compiled(net), x, 1, layer=layer)
        assert '\n' not in str(e.value)


def test_probabilities_are_left_as_they_are():
    "A network that ends in a softmax has the curves of the one without."
    bare, ended, x = seeded(Plain), seeded(Plain, dress=lambda z: dict(out=z.softmax(1))), pictures(2)
    maps = explain(bare, x, 1)
    for metric in (insertion, deletion):
        torch.testing.assert_close(metric(ended, x, maps, 1).curve, metric(bare, x, maps, 1).curve)
    torch.testing.assert_close(explain(ended, x, 1, 'rise', n_masks=20), explain(bare, x, 1, 'rise', n_masks=20))
    torch.testing.assert_close(explain(ended, x, 1), explain(bare, x, 1, score='softmax'))


def test_images_that_change_each_other_s_answers():
    "A normalisation by the batch gives each image the map that it has alone, or a sentence."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x, maps = pictures(3), torch.rand(3, 16, 16)
    for ask in (lambda x, **o: explain(net, x, 1, **o), lambda x, **o: explain(net, x, 1, 'rise', n_masks=9, **o),
                lambda x, **o: insertion(net, x, maps[:len(x)], 1, **o).curve):
        with pytest.raises(ValueError, match="without running statistics, .*: pass batch_size=1"): ask(x)
        with pytest.raises(ValueError, match="without running statistics"): ask(x, batch_size=2)
    torch.testing.assert_close(explain(net, x, 1, batch_size=1), torch.cat(
        [explain(net, o[None], 1, batch_size=1) for o in x]), rtol=0, atol=1e-5)


@pytest.mark.parametrize('given, sentence', [
    (dict(score='sigmoid'), "unknown score 'sigmoid': choose one of softmax, logit"),
    (dict(target='cat'), "target 'cat': expected one class index"), (dict(target=[1, [2]]), 'expected one class index'),
    (dict(method='integrated-gradients', steps=0), 'integrated-gradients.steps = 0: expected a whole number of at le'),
    (dict(method='xrai', steps=0), 'xrai.steps = 0: expected a whole number of at least 1')])
def test_arguments_that_mean_nothing(given, sentence):
    with pytest.raises(ValueError, match=sentence) as e: explain(seeded(Plain), pictures(2), **{'target': 1, **given})
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('dress', [lambda z: z, lambda z: z[:, 0], lambda z: z.squeeze()])
def test_one_logit_is_a_yes_and_a_no(dress):
    "As the network with two columns that means the same."
    one, two, x = seeded(Plain, classes=1, dress=dress), seeded(Plain, classes=2), pictures(3)
    with torch.no_grad():
        two.fc.weight.copy_(torch.cat([-one.fc.weight/2, one.fc.weight/2]))
        two.fc.bias.copy_(torch.cat([-one.fc.bias/2, one.fc.bias/2]))
    for state in ('conv', 'bn'): getattr(two, state).load_state_dict(getattr(one, state).state_dict())
    for target in (0, 1, None):
        for method in METHODS if one(x).shape == (3, 1) and target is not None else ('grad-cam', 'rise'):
            torch.testing.assert_close(explain(one, x, target, method, **FAST.get(method, {})),
                                       explain(two, x, target, method, **FAST.get(method, {})), rtol=0, atol=1e-4)
    maps, p = explain(one, x, 1), torch.sigmoid(one(x).reshape(3)).detach()
    torch.testing.assert_close(deletion(one, x, maps, 1).curve[:, 0], p)
    torch.testing.assert_close(deletion(one, x, maps, 0).curve[:, 0], 1 - p)
    with pytest.raises(ValueError, match='target 2: expected class indices from 0 to 1'): explain(one, x, 2)
    with pytest.raises(ValueError, match='target 2 and an output'): deletion(one, x, maps, 2)


def test_many_labels_and_scores_of_one_s_own():
    net, x = seeded(Plain), pictures(2)
    maps = explain(net, x, 3)
    torch.testing.assert_close(deletion(net, x, maps, 3, score=torch.sigmoid).curve[:, 0],
                               net(x).sigmoid()[:, 3].detach())
    torch.testing.assert_close(deletion(net, x, maps, 3, score='logit').curve[:, 0], net(x)[:, 3].detach())
    hand = by_hand(net, net.conv, x, 3, logits=torch.sigmoid)
    torch.testing.assert_close(explain(net, x, 3, layer='conv', score=torch.sigmoid), hand, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match='target 5: expected class indices from 0 to 4'): explain(net, x, 5)
    regression = lambda out: out[:, :1]
    assert explain(net, x, score=regression).shape == (2, 16, 16)
    with pytest.raises(ValueError, match='expected class indices from 0 to 0'): explain(net, x, 1, score=regression)


@pytest.mark.parametrize('channels', [1, 2, 11])
@pytest.mark.parametrize('method', METHODS)
def test_any_number_of_channels(channels, method):
    x = torch.randn(2, channels, 16, 24)
    assert explain(seeded(Plain, channels), x, 1, method, **FAST.get(method, {})).shape == (2, 16, 24)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('where', ['images', 'network', 'both'])
def test_float32_whatever_comes_in(dtype, where):
    net, x = small(), pictures(2).to(torch.bfloat16).float()
    for p in net.parameters(): p.data = p.data.to(torch.bfloat16).float()  # numbers that all types have
    for b in net.buffers(): b.data = b.data.to(torch.bfloat16).to(b.dtype)
    plain = {m: explain(net, x, 2, m, **FAST.get(m, {})) for m in ('grad-cam', 'rise', 'integrated-gradients')}
    curve = insertion(net, x, plain['grad-cam'], 2).curve
    if where != 'images': net = net.to(dtype)
    if where != 'network': x = x.to(dtype)
    before = traces(net)
    tolerance = dict(rtol=0, atol=2e-2 if dtype == torch.float16 and where != 'network' else 1e-4)
    with torch.autocast('cpu', torch.bfloat16):
        for m, maps in plain.items():
            got = explain(net, x, 2, m, **FAST.get(m, {}))
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, maps, **tolerance)
        torch.testing.assert_close(insertion(net, x, plain['grad-cam'], 2).curve, curve, **tolerance)
    same(before, traces(net))
    assert next(net.parameters()).dtype == (torch.float32 if where == 'images' else dtype)


def test_networks_made_in_inference_mode():
    with torch.inference_mode(): net = small()
    x = pictures(2)
    torch.testing.assert_close(explain(net, x, 1), explain(small(), x, 1))
    maps = torch.rand(2, 16, 16)
    torch.testing.assert_close(insertion(net, x, maps, 1).curve, insertion(small(), x, maps, 1).curve)


def test_wrapped_networks():
    net, x = seeded(tv.resnet18, num_classes=5), pictures(2, 64, 64)
    maps, wrapped = explain(net, x, 1), nn.DataParallel(net)
    for layer in (None, 'layer4', net.layer4, 'module.layer4'):
        torch.testing.assert_close(explain(wrapped, x, 1, layer=layer), maps)
    torch.testing.assert_close(insertion(wrapped, x, maps, 1).curve, insertion(net, x, maps, 1).curve)


@pytest.mark.parametrize('how', ['whole', 'in place', 'a part'])
def test_compiled_networks_are_asked_as_they_are_written(how):
    net, x = small(), pictures(2)
    curve = insertion(net, x, maps := explain(net, x, 1), 1).curve
    if how == 'in place': net.compile()
    if how == 'a part': net.blocks = torch.compile(net.blocks)
    compiled = torch.compile(net) if how == 'whole' else net
    torch.testing.assert_close(explain(compiled, x, 1), maps)
    torch.testing.assert_close(explain(compiled, x, 1, layer=net.stem), explain(net, x, 1, layer='stem'))
    torch.testing.assert_close(insertion(compiled, x, maps, 1).curve, curve)


@pytest.mark.slow
def test_a_network_that_was_compiled_and_run():
    "And is compiled still."
    net, x = small(), pictures(2)
    maps, compiled = explain(net, x, 1), torch.compile(net)
    with torch.no_grad(): before = compiled(x)
    torch.testing.assert_close(explain(compiled, x, 1), maps)
    torch.testing.assert_close(explain(compiled, x, 1, layer='blocks.0'), explain(net, x, 1, layer='blocks.0'))
    with torch.no_grad(): torch.testing.assert_close(compiled(x), before)


def test_two_threads_ask_one_network():
    "The right maps, whatever the other one does meanwhile, and a network as it was."
    net, x = lived_in(), pictures(4)
    jobs = [('grad-cam', 1, 'blocks.0'), ('grad-cam', 2, None), ('smoothgrad', 1, None), ('rise', 3, None),
            ('group-cam', 4, 'blocks.1')]
    options = {'smoothgrad': dict(samples=4), 'rise': dict(n_masks=20), 'group-cam': dict(groups=4)}
    alone = [explain(net, x, c, m, layer=layer, **options.get(m, {})) for m, c, layer in jobs]
    before, wrong = traces(net), []
    def work(k):
        m, c, layer = jobs[k % len(jobs)]
        for i in range(3):
            maps = explain(net, x[i:], c, m, layer=layer, **options.get(m, {}))
            if not torch.allclose(maps, alone[k % len(jobs)][i:], atol=1e-4): wrong.append((m, c, layer))
        insertion(net, x, maps if len(maps) == 4 else alone[0], 1)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2*len(jobs))]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert not wrong, wrong
    same(before, traces(net))


def test_threads_that_overlap():
    "The first to leave must not switch the other's network to train mode; the last puts all back."
    net = lived_in()
    before, inside, leave = traces(net), threading.Event(), threading.Event()
    def other():
        with undisturbed(net.blocks): inside.set(); leave.wait(10)
    t = threading.Thread(target=other)
    with undisturbed(net): t.start(); inside.wait(10)
    assert not any(m.training for m in net.blocks.modules()) and net.training, 'what one still asks, and what none asks'
    leave.set(); t.join()
    same(before, traces(net))


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize('ask', ['explain', 'insertion', 'sanity', 'predict'])
def test_left_as_it_was_after_any_error(ask, error):
    from lico.data import load
    from lico.training import predict
    net, x, maps = lived_in(), pictures(2), torch.rand(2, 16, 16)
    digits = load('digits', image_size=16) if ask == 'predict' else None
    calls = []
    def stop(module, args, out):
        calls.append(1)
        if len(calls) > (ask == 'sanity'): raise error('stop')
    handle = net.bn.register_forward_hook(stop)
    before = traces(net)
    with pytest.raises(error):
        if ask == 'explain': explain(net, x, 1)
        elif ask == 'insertion': insertion(net, x, maps, 1)
        elif ask == 'sanity': sanity_check(lambda net: net(x).softmax(1)[:, :1, None].expand(-1, 11, 11), net)
        else: predict(net, digits, digits.test[:5])
    same(before, traces(net))
    handle.remove()


def test_a_frozen_normalisation_stays_frozen():
    from lico.data import load
    from lico.training import predict
    net, digits = small().train(), load('digits', image_size=16)
    net.blocks[0].bn1.eval()
    predict(net, digits, digits.test[:5])
    assert net.training and not net.blocks[0].bn1.training and net.blocks[0].bn2.training


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_what_is_not_finite_is_said_before_work(bad):
    net, x, seen = seeded(Plain), pictures(2), []
    net.register_forward_pre_hook(lambda *a: seen.append(1))
    x[1, 0, 3, 3] = bad
    for call in [lambda m=m: explain(net, x, 1, m) for m in METHODS] + [
            lambda: insertion(net, x, torch.rand(2, 16, 16), 1), lambda: deletion(net, x, torch.rand(2, 16, 16), 1)]:
        with pytest.raises(ValueError, match='values that are not finite'): call()
    assert not seen
    net.fc.weight.data[2, 3] = bad
    for call in [lambda m=m: explain(net, pictures(2), 1, m) for m in METHODS] + [
            lambda: insertion(net, pictures(2), torch.rand(2, 16, 16), 1)]:
        seen.clear()
        with pytest.raises(ValueError, match="the network's answer to image 0 is not finite: check"): call()
        assert len(seen) == 1


def test_boxes_in_shares_are_refused():
    for boxes in ([[.1, .2, .5, .6]], [[0, 0, 1, 1]], [[0, 0, .5, .5], [.5, .5, 1, 1]]):
        with pytest.raises(ValueError, match='region 0 has boxes from 0 to 1, .*: expected pixels of the image of'):
            pointing_game(torch.rand(1, 16, 16), [boxes])
    assert pointing_game(torch.rand(1, 16, 16), [[[0, 0, 1.5, 1]]]).shape == (1,)


def test_images_a_network_cannot_take_are_one_sentence():
    for net, x in ((seeded(Plain), pictures(2)[:, :1]), (create_backbone('vit_tiny_patch16_224', image_size=32).eval(),
                                                        pictures(1, 48, 48))):
        for call in (lambda: explain(net, x, 1), lambda: insertion(net, x, torch.rand(len(x), *x.shape[2:]), 1)):
            with pytest.raises(ValueError, match='expected what .* takes, which stops with') as e: call()
            assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='net is a function: expected a torch.nn.Module'): explain(lambda x: x, x)


# LICO's own training on other networks

@pytest.mark.parametrize('name, layer', [('resnet', 'layer4'), ('vgg', 'features'), ('densenet', 'features'),
                                         ('swin', 'norm'), ('vit', 'encoder.ln'), ('hf vit', 'vit.layernorm'),
                                         ('hf swin', 'swin.layernorm'), ('hf convnext', 'convnext.encoder'),
                                         ('hf resnet', 'resnet.encoder.stages.1')])
def test_adapted_networks_have_the_protocol(name, layer):
    make, _, _, size = NETWORKS[name]
    module, x = seeded(make), pictures(3, size, size)
    net = adapt(module, layer, num_classes=5, image_size=size)
    read = lambda out: getattr(out, 'logits', out)
    assert net.num_classes == 5 and net.image_size == size and not net.training and net.module is module
    maps = net.forward_features(x)
    assert features(net, x).shape == (3, *net.feature_shape)
    torch.testing.assert_close(net(x), read(module(x)))
    torch.testing.assert_close(net.forward_head(maps), net(x))
    torch.testing.assert_close(net.forward_head(maps.detach().clone()), net(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.forward_head(maps[1:].detach().clone()), net(x[1:]), rtol=1e-4, atol=1e-5)
    pooled = net.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(net.get_classifier()(pooled), net(x))
    assert pooled.shape == (3, net.num_features)
    a, = torch.autograd.grad(net.forward_head(maps)[:, 1].sum(), maps, retain_graph=True)
    other = maps.detach().clone().requires_grad_()
    b, = torch.autograd.grad(net.forward_head(other)[:, 1].sum(), other)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert not any(m._forward_hooks or 'forward' in vars(m) for m in module.modules())
    if name in ('resnet', 'hf vit'):
        torch.testing.assert_close(explain(net, x, 1), explain(module, x, 1), rtol=0, atol=1e-3)


def test_an_adapted_network_is_trained_by_lico():
    "One step moves the module's weights and its statistics, once, and one pass is what it takes."
    from lico.model import CrossEntropy
    module, x, y = seeded(NETWORKS['resnet'][0]), pictures(4, 64, 64), torch.tensor([0, 1, 2, 3])
    net, passes = adapt(module.train(), num_classes=5, image_size=64), []
    assert net.training
    module.register_forward_pre_hook(lambda *a: passes.append(1))
    counted, weight = module.bn1.num_batches_tracked.item(), module.conv1.weight.clone()
    CrossEntropy(net)(x, y).loss.backward()
    assert len(passes) == 1 and module.bn1.num_batches_tracked == counted + 1
    assert module.conv1.weight.grad.abs().sum() > 0
    net.forward_head(net.forward_features(x).detach().clone())
    assert module.bn1.num_batches_tracked == counted + 2, 'what stands before the layer is not run again'


class Around(nn.Module):
    "A network with a way around its layer."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)
    def forward(self, x): return self.fc((self.b(h := self.a(x).relu()) + h).mean((2, 3)))


@pytest.mark.parametrize('net, options, sentences', [
    (tv.resnet18(num_classes=7), {}, ['it gives 7 numbers an image, and not num_classes = 10']),
    (tv.resnet18(num_classes=10), dict(layer='layer5'), ["ResNet has no layer 'layer5'; near it: layer"]),
    (Around(), dict(layer='c'), ["Around has no layer 'c'", 'it gives 5 numbers an image, and not num_classes = 10']),
    (Around(), dict(layer='b', num_classes=5), ["its logits cannot be had from what 'b' gives alone"]),
    (Around(), dict(layer='b'), ['it gives 5 numbers an image', "its logits cannot be had from what 'b' gives alone"]),
    (Around().requires_grad_(False), dict(layer='b', num_classes=5), ['no parameter of it asks', 'alone']),
    (Around(), dict(layer='fc', num_classes=5), [r"'fc' gives \[2, 5\], which are no feature maps"]),
    (seeded(Plain, 1), dict(layer='conv', num_classes=5), [r'images \[2, 3, 32, 32\] stop it'])])
def test_adapt_refuses_all_at_once(net, options, sentences):
    with pytest.raises(ValueError, match='cannot be trained with LICO: ' + '.*'.join(sentences)) as e:
        adapt(net, **{'image_size': 32, **options})
    assert '\n' not in str(e.value)


# to be looked at

def test_overlay():
    rng = np.random.default_rng(0)
    image, m = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), torch.rand(20, 30)
    from matplotlib import colormaps
    expected = np.round(255*(.4*image/255 + .6*colormaps['jet'](m.numpy())[..., :3])).astype(np.uint8)
    for picture in (image, Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1), image/255,
                    torch.from_numpy(image).permute(2, 0, 1)/255):
        got = overlay(picture, m, alpha=.6)
        assert got.dtype == np.uint8 and got.shape == (20, 30, 3) and abs(got.astype(int) - expected).max() <= 1
    assert np.array_equal(overlay(image, m, alpha=0), image) and overlay(image[..., 0], m[:5, :5]).shape == (20, 30, 3)
    assert overlay(Image.fromarray(image).convert('RGBA'), m).shape == (20, 30, 3)
    for wrong, sentence in ((dict(image=torch.randn(3, 8, 8)), 'expected uint8, or floats from 0 to 1'),
                            (dict(image=torch.rand(2, 3, 8, 8)), 'one picture and not a batch'),
                            (dict(image=torch.rand(11, 8, 8)), 'expected grey or RGB'),
                            (dict(saliency=torch.rand(2, 8, 8)), 'expected one map'),
                            (dict(saliency=torch.rand(8, 8)*3), r'in \[0, 1\]'), (dict(alpha=2), 'alpha is 2')):
        with pytest.raises(ValueError, match=sentence): overlay(**{**dict(image=image, saliency=m), **wrong})


def test_help_tells_every_method():
    import inspect
    told = explain.__doc__
    for method, function in METHODS.items():
        assert method in told
        for name, p in inspect.signature(function).parameters.items():
            if name in ('net', 'x', 'target', 'kind', 'batch_size', 'seed'): continue
            assert f'{name}={p.default}' in told, f'{method}: {name}'



# timm's families: the smallest network of each, its map weighed by hand

FAMILIES = dict(
    beit='beit_base_patch16_224', byoanet='halonet_h1', byobnet='test_byobnet', cait='cait_xxs24_224',
    coat='coat_tiny', convit='convit_tiny', convmixer='convmixer_768_32', convnext='test_convnext',
    cpubone='cpubone_nano', crossvit='crossvit_tiny_240', csatv2='csatv2', cspnet='cs3darknet_focus_s',
    cspnext='cspnext_tiny', davit='davit_tiny', deepseek_vit='deepseek_vit_412m', deit='deit_tiny_patch16_224',
    densenet='densenet121', dla='dla46x_c', dpn='dpn48b', edgenext='edgenext_xx_small',
    efficientformer='efficientformer_l1', efficientformer_v2='efficientformerv2_s0', efficientnet='test_efficientnet',
    efficientvim='efficientvim_m1', efficientvit_mit='efficientvit_b0', efficientvit_msra='efficientvit_m0',
    eva='vit_tiny_patch16_dinov3_qkvb', fasternet='fasternet_t0', fastvit='fastvit_t8', focalnet='focalnet_tiny_srf',
    gcvit='gcvit_xxtiny', gemma4_vit='gemma4_vit_167m', ghostnet='ghostnet_050', hardcorenas='hardcorenas_a',
    hgnet='hgnetv2_b0', hiera='hiera_tiny_224', hieradet_sam2='hieradet_small', hrnet='hrnet_w18_small',
    iformer='iformer_t', inception_next='inception_next_atto', inception_resnet_v2='inception_resnet_v2',
    inception_v3='inception_v3', inception_v4='inception_v4', lcnetv2='lcnetv2_small', levit='levit_128s',
    lowformer='lowformer_b0', mambaout='mambaout_femto', maxxvit='test_coatnet', metaformer='poolformerv2_s12',
    mlp_mixer='mixer_s32_224', mobilenetv3='mobilenetv3_small_050', mobilenetv5='mobilenetv5_300m',
    mobilevit='mobilevit_xxs', mvitv2='mvitv2_tiny', naflexvit='naflexvit_base_patch16_gap', nasnet='nasnetalarge',
    nest='nest_tiny', nextvit='nextvit_small', nfnet='test_nfnet', pit='pit_ti_224', pnasnet='pnasnet5large',
    pvt_v2='pvt_v2_b0', qwen3_vit='qwen3_vit_88m', rdnet='rdnet_tiny', regnet='regnetx_002', repghost='repghostnet_050',
    repvit='repvit_m0_9', res2net='res2net50_48w_2s', resnest='resnest14d', resnet='test_resnet',
    resnetv2='resnetv2_18',
    rexnet='rexnet_100', selecsls='selecsls42', senet='legacy_seresnet18', sequencer='sequencer2d_s', shvit='shvit_s1',
    sknet='skresnet18', starnet='starnet_s1', swiftformer='swiftformer_xs', swin_transformer='swin_s3_tiny_224',
    swin_transformer_v2='swinv2_tiny_window8_256', swin_transformer_v2_cr='swinv2_cr_tiny_224',
    tiny_vit='tiny_vit_5m_224', tnt='tnt_s_patch16_224', tresnet='tresnet_m', twins='twins_svt_small', vgg='vgg11',
    visformer='visformer_tiny', vision_transformer='test_vit', vision_transformer_hybrid='vit_tiny_r_s16_p8_224',
    vision_transformer_relpos='test_vit_relpos', vision_transformer_sam='samvit_base_patch16_224',
    vitamin='vitamin_small_224', volo='volo_d1_224', vovnet='ese_vovnet19b_slim_dw', xception='legacy_xception',
    xception_aligned='xception41', xcit='xcit_nano_12_p16_224')
SHALLOW = dict(deepseek_vit=dict(depth=2), gemma4_vit=dict(depth=2), qwen3_vit=dict(depth=2), beit=dict(depth=2),
               naflexvit=dict(depth=2), vision_transformer_sam=dict(depth=2, global_attn_indexes=(1,)))
# the last that has places here are attention heads by tokens by width, which are no maps
REFUSED = dict(coat="'crpe4' of CoaT gives features .*, which are no grid of places that can be told")
DOZEN = ['vision_transformer', 'resnet', 'efficientnet', 'convnext', 'nfnet', 'byobnet', 'maxxvit',
         'vision_transformer_relpos', 'levit', 'pvt_v2', 'mobilenetv3', 'pit']


def places_by_hand(net, a, size):
    "Maps [B, C, h, w], by the widths that timm's network states."
    if a.ndim == 4:
        stated = [w for w in (net.num_features, getattr(net, 'embed_dim', 0)) if w in (a.shape[1], a.shape[3])]
        first = a.shape[2] == a.shape[3] and a.shape[1] in (stated or [a.shape[1]])
        return a if first else a.movedim(-1, 1)
    n = int(a.shape[1]**.5)
    return a[:, a.shape[1] - n*n:].mT.unflatten(2, (n, n))


def check_family(family):
    net = seeded(timm.create_model, FAMILIES[family], num_classes=5, **SHALLOW.get(family, {}))
    fixed = net.pretrained_cfg.get('fixed_input_size') or family in ('byoanet', 'deepseek_vit', 'gemma4_vit',
                                                                          'qwen3_vit')
    size = net.pretrained_cfg['input_size'][-1] if fixed else 128
    x, before = pictures(1, size, size), traces(net)
    layer, kept = default_layer(net, x), []
    if layer == 'forward_features':
        kept.append(a := net.forward_features(x))
        z = net.forward_head(a.clone())
    else:
        handle = net.get_submodule(layer).register_forward_hook(lambda m, args, out: kept.append(out))
        z = net(x)
        handle.remove()
    g, = torch.autograd.grad(z[0, 2], kept[-1])
    g, a = (places_by_hand(net, t.detach(), size) for t in (g, kept[-1]))
    cam = to_unit((g.mean((2, 3), keepdim=True)*a).sum(1).relu())
    hand = to_unit(F.interpolate(cam[:, None], (size, size), mode='bilinear')[:, 0])
    maps = explain(net, x, 2)
    torch.testing.assert_close(maps, hand, rtol=0, atol=5e-3)
    curve = insertion(net, x, maps, 2, step=size*size//3)
    p = torch.softmax(z.detach(), 1)[0, 2]
    torch.testing.assert_close(curve.curve[0, -1], p, rtol=1e-3, atol=1e-4)
    same(before, traces(net))
    return layer


@pytest.mark.parametrize('family', [pytest.param(f, marks=[] if f in DOZEN else pytest.mark.slow) for f in FAMILIES])
def test_timm_families(family):
    if family not in REFUSED: check_family(family)
    else:
        with pytest.raises(ValueError, match=REFUSED[family]): check_family(family)


@pytest.mark.slow
def test_no_family_is_missing():
    from timm.models._registry import _module_to_models
    known = {k for k, v in _module_to_models.items() if v & set(timm.list_models())}
    assert known - set(FAMILIES) == set(), 'new in timm: add the smallest network of each'


def changed_weight(net): net.conv1.weight.data[0, 0, 0, 0] += 1e-6
def changed_module(net): net.layer1[0].act2 = torch.nn.Sigmoid()
def changed_number(net): net.layer1[0].forward = lambda x: 2*x


@pytest.mark.parametrize('change', [changed_weight, changed_module, changed_number, lambda net: None])
def test_a_kept_copy_answers_only_for_the_network_it_was_made_of(change, monkeypatch):
    "Weights to the bit, modules, and what no list of parts shows; what has not changed is not copied again."
    net, x = create_backbone('resnet18', 5, 64).eval(), pictures(2)
    with torch.no_grad(): first = copies.prepared(net, x)
    change(net)
    with torch.no_grad(): again = copies.prepared(net, x)
    assert (again is first) == (change.__name__ == '<lambda>')
    with torch.no_grad(): assert torch.allclose(again(x), net(x), rtol=1e-3, atol=1e-4)


def test_kept_copies_go_with_their_networks():
    nets = [create_backbone('resnet18', 5, 64).eval() for _ in range(3)]
    with torch.no_grad():
        for net in nets: copies.prepared(net, pictures(2))
    assert len(copies._copies) <= 2
    del net; nets.clear(); gc.collect()
    assert len(copies._copies) == 0


def close(a, b): torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


class Capped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.deeper = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.cap, self.scale = 6., torch.tensor(20.)
    def forward(self, x):
        return self.head(self.deeper(self.conv(x).relu().clamp(max=self.cap)).relu().mean((2, 3))*self.scale)


@pytest.mark.parametrize('change', (dict(cap=.3), dict(scale=torch.tensor(5.))), ids=('number', 'tensor'))
def test_attributes_of_a_network_belong_to_it(change):
    "The first image is too dark for the change to be seen in it."
    net, x = seeded(Capped), torch.rand(10, 3, 64, 64)*3
    x[0] = 0
    insertion(net, x, torch.rand(10, 64, 64), 1)
    for k, v in change.items(): setattr(net, k, v)
    close(insertion(net, x, torch.rand(10, 64, 64), 1).curve[:, -1], net(x).softmax(1)[:, 1].detach())


class Normalised(timm.models.resnet.ResNet):
    "What comes before timm's two halves."
    def forward(self, x): return super().forward((x - .5)/.1)


def hooked(module, images): return ((images[0] - .5)/.1,)


@pytest.mark.parametrize('how', ('subclass', 'hook'))
def test_what_comes_before_timm_s_halves_counts(how):
    torch.manual_seed(0)
    make = Normalised if how == 'subclass' else timm.models.resnet.ResNet
    net = make(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=7, channels=(8, 16, 32, 64)).eval()
    if how == 'hook': net.register_forward_pre_hook(hooked)
    x = torch.rand(2, 3, 64, 64)
    close(explain(net, x, 3), explain(net, x, 3, layer='layer4'))


@pytest.mark.parametrize('columns, shape', ((1, (-1, 1)), (1, (-1,)), (5, (-1, 5))))
def test_a_sigmoid_s_answer_is_probabilities(columns, shape):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, columns),
                        nn.Sigmoid())
    whole, x, saliency = nn.Sequential(net, Shaped(shape)), pictures(2), torch.rand(2, 16, 16)
    with torch.no_grad(): net[4].bias.fill_(-6); p = net(x)
    wanted = torch.cat([1 - p, p], 1)[:, 0] if columns == 1 else p[:, 0]
    assert p.max() < .1
    close(insertion(whole, x, saliency, 0).curve[:, -1], wanted)
    if columns == 1: close(explain(whole, x, None, 'smoothgrad', seed=1), explain(whole, x, 0, 'smoothgrad', seed=1))


class Shaped(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
    def forward(self, p): return p.view(self.shape)


@pytest.mark.parametrize('method', METHODS)
def test_classes_that_were_predicted_in_inference_mode(method):
    net, x = small(), pictures(2)
    with torch.inference_mode(): y = net(x).argmax(1)
    close(*(explain(net, x, of, method, **FAST.get(method, {})) for of in (y, y.tolist())))


def test_tf32_is_off_while_a_network_is_looked_at():
    seen, before = [], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        with undisturbed(small()): seen.append(torch.get_float32_matmul_precision())
        seen.append(torch.get_float32_matmul_precision())
    finally: torch.set_float32_matmul_precision(before)
    assert seen == ['highest', 'high']


@pytest.mark.parametrize('name, layer, says', [
    ('swin_tiny_patch4_window7_224', 'layers.0.blocks.0.attn', 'gives 64 sets of maps for one image, as inside'),
    ('hiera_tiny_224', 'blocks.3.norm1', r'features \[1, 784, 192\], which are no grid of places')])
def test_tokens_in_windows_and_in_an_order_of_their_own_are_refused(name, layer, says):
    net = seeded(timm.create_model, name, num_classes=5).eval()
    with pytest.raises(ValueError, match=says): explain(net, torch.zeros(1, 3, 224, 224), 0, layer=layer)


class Squash(nn.Module):
    "Dynamic tanh in place of a normalisation."
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
    def forward(self, x): return torch.tanh(.5*x)*self.weight


class Mixed(nn.Module):
    "A transformer, of mean pooling or with a class token, whose normalisations are called otherwise."
    def __init__(self, with_class):
        super().__init__()
        self.proj, self.mix = nn.Conv2d(3, 16, 8, 8), nn.MultiheadAttention(16, 2, batch_first=True)
        self.before, self.after, self.fc, self.with_class = Squash(16), Squash(16), nn.Linear(16, 5), with_class
    def forward(self, x):
        t = self.before(self.proj(x).flatten(2).mT)
        if self.with_class: t = torch.cat([t.mean(1, keepdim=True), t], 1)
        t = self.after(t + self.mix(t, t, t, need_weights=False)[0])
        return self.fc(t[:, 0] if self.with_class else t.mean(1))


def test_the_last_tokens_are_found_whatever_normalises_them():
    x = torch.randn(1, 3, 32, 32)
    assert default_layer(seeded(Mixed, False), x) == 'after'
    assert default_layer(seeded(Mixed, True), x) == 'before', 'the class depends on no place after it'
    assert default_layer(timm.create_model('resmlp_12_224', num_classes=5), torch.randn(1, 3, 224, 224)) == 'norm'
