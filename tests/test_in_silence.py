"Ordinary calls that once went wrong without a word: now they are right, or refused in one sentence."
import contextlib, copy, dataclasses, json, math, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from torch import nn

from lico import data as data_module
from lico.backbones import adapt, create_backbone
from lico.batches import augment, test_batches as batches_of, training_batch
from lico.cams import imagenet_classifier
from lico.config import derive_seed, root
from lico.data import Files, box_masks, load
from lico.encoders import BERTText
from lico.evidence.arms import compare
from lico.evidence.cases import Cases, Network, coco_in
from lico.evidence.embeddings import order_sentences
from lico.evidence.looking import collect_looking
from lico.evidence.map_scores import SCORERS, saliency_options, scores
from lico.evidence.pages import parameters
from lico.evidence.pictures import scene_runs
from lico.evidence.programme import asked_of_block, contrast_rows
from lico.evidence.recipe import grid_side, hold_out
from lico.evidence.stats import sign_flip
from lico.evidence.store import image_rows, processes, read_results, write_results
from lico.experiments import TRAINING_METHODS, Run, start
from lico.losses import LossOptions, adjacency, cost_matrix, manifold_matching, ot_alignment, sinkhorn
from lico.metrics import blur, deletion, energy_pointing_game, insertion, pointing_game
from lico.model import LICO, CrossEntropy, refuse_other_forward
from lico.pixels import as_input, read_image, whole_square
from lico.rivals import CGC, GCC, SupCon, cgc_loss
from lico.scenes import digit_scenes
from lico.sensitivity import random_affine, sanity_check
from lico.shipping import load_network, loading_lines, preprocessing_of, save_network
from lico.saliency import METHODS, explain, overlay
from lico.temperatures import calibrated_taus
from lico.text import PromptLearner, load_text_encoder
from lico.training import accuracy, fit, predict


@pytest.fixture(scope='module')
def digits(): return load('digits', labels=40)


@pytest.fixture(scope='module')
def encoder(): return load_text_encoder('minilm')


def net_for(data): return create_backbone('wrn_10_1', len(data.class_names), data.image_size)


def test_a_seed_is_a_number_whatever_its_kind(digits, tmp_path):
    "NumPy's whole numbers are Python's: the same images, the same training; what is no number is refused."
    assert derive_seed(7, 'batch') == derive_seed(np.int64(7), 'batch') != derive_seed(8, 'batch')
    assert torch.equal(load('digits', labels=40, seed=np.int64(0)).train.x, digits.train.x)
    def weights(seed, **more):
        torch.manual_seed(0)
        fit(CrossEntropy(net := net_for(digits)), digits, seed=seed, progress=False, **more)
        return net.fc.weight
    assert torch.equal(weights(1, steps=2), weights(np.int64(1), steps=np.int64(2), folder=tmp_path/'run'))
    for seed in (None, 'a', 1.5):
        with pytest.raises(ValueError, match=f'seed = {seed!r}: expected a whole number'): weights(seed, steps=1)


def test_a_hook_is_seen_beside_a_new_last_layer_of_zeros():
    "Logits that are zero on both ways agree on nothing: networks that are tested as something else are refused."
    net = create_backbone('tf_efficientnet_lite0', 10, 32, pretrained=True)
    x = torch.randn(2, 3, 32, 32)
    refuse_other_forward(net, x)
    net.register_forward_pre_hook(lambda m, args: (args[0]*3 - 5,))
    with pytest.raises(ValueError, match='gives other logits than its forward_head'): refuse_other_forward(net, x)
    assert not net.get_classifier().weight.any()


def test_a_cut_is_tried_with_a_last_layer_of_zeros_too():
    "torchvision's transformers begin so: their logits cannot be had from a layer before the class token is read."
    import torchvision
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5)
    assert not vit.heads.head.weight.any()
    with torch.no_grad(): vit.heads.head.weight.normal_()
    layer = 'encoder.layers.encoder_layer_1.ln_1'
    with pytest.raises(ValueError, match='logits cannot be had') as other: adapt(vit, layer, 5, 32)
    with torch.no_grad(): vit.heads.head.weight.zero_()
    with pytest.raises(ValueError) as zero: adapt(vit, layer, 5, 32)
    assert str(zero.value) == str(other.value) and not vit.heads.head.weight.any()


def test_names_in_another_order_are_no_lico(digits, encoder):
    "Each text would be another class's, which is the control; a set has no order at all."
    prompts = PromptLearner(encoder, digits.class_names[::-1], n_context=2)
    with pytest.raises(ValueError, match="another order, such as '9' for class 0, which is '0': give data.class_"):
        fit(LICO(net_for(digits), prompts), digits, steps=1)
    with pytest.raises(ValueError, match='expected a list of names, class 0 first'):
        PromptLearner(encoder, {*digits.class_names})
    other = PromptLearner(encoder, [f'the digit {o}' for o in digits.class_names], n_context=2)
    fit(LICO(net_for(digits), other), digits, steps=1, progress=False)


def test_matching_needs_two_images_a_batch(digits, encoder):
    "A batch of one has nothing to match: trained so, LICO would be transport alone."
    prompts = PromptLearner(encoder, digits.class_names, n_context=2)
    with pytest.raises(ValueError, match='a batch of one image: manifold matching compares the images of a batch'):
        fit(LICO(net_for(digits), prompts), digits, steps=1, batch_size=1)
    for model in (LICO(net_for(digits), prompts, LossOptions(alpha=0.)), CrossEntropy(net_for(digits))):
        fit(model, digits, steps=1, batch_size=1, progress=False)


def test_a_network_is_shipped_by_its_name_only_if_it_is_that_network(tmp_path):
    about = dict(preprocessing_of(load('digits', image_size=64)), image_size=64)
    ship = lambda net, name: save_network(net, tmp_path/'net', list('abcdefghij'), about, name)
    net = create_backbone('resnet10t', 10, 64)
    ship(net, 'resnet10t')
    random = torch.get_rng_state()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): assert torch.equal(load_network(tmp_path/'net').net(x), net.eval()(x))
    assert torch.equal(random, torch.get_rng_state())
    net.reset_classifier(10, 'max')
    small, other = create_backbone('wrn_10_1', 10, 64), create_backbone('resnet10t', 10, 64, act_layer=nn.SiLU)
    for net, name in ((net, 'resnet10t'), (small, 'wrn_10_2'), (small, 'WRN_10_1'), (other, 'resnet10t')):
        with pytest.raises(ValueError, match=f"not what create_backbone.'{name}'. makes .*: leave backbone out"):
            ship(net, name)
    assert load_network(tmp_path/'net').class_names == tuple('abcdefghij')  # what was there is there still


def test_a_shipped_graph_is_a_network_like_others(tmp_path, digits):
    "One that was adapted: in evaluation mode for good; CAMs say in one sentence that it has no layers."
    net = adapt(timm.create_model('resnet10t', num_classes=10), 'layer4', 10, 32)
    about = dict(preprocessing_of(load('digits', image_size=32)), image_size=32)
    save_network(net, tmp_path/'net', list('abcdefghij'), about)
    net, x = load_network(tmp_path/'net').net, torch.rand(2, 3, 32, 32)
    assert net.eval() is net.train() is net and not any(m.training for m in net.modules())
    for layer in (None, 'program'):
        with pytest.raises(ValueError, match='written by torch.export, whose layers cannot .* such as rise'):
            explain(net, x, layer=layer)
    assert explain(net, x, method='rise', n_masks=8).shape == (2, 32, 32)


def test_a_hook_that_came_between_two_curves_counts():
    "Deletion ends at zero, which a mask leaves as it is: the copy that answered before must not answer now."
    torch.manual_seed(0)
    net = create_backbone('resnet18', 10, 128).eval()
    nn.init.normal_(net.fc.weight)
    x, maps, mask = torch.randn(1, 3, 128, 128), torch.rand(1, 128, 128), (torch.rand(1, 1, 128, 128) > .5).float()
    curve = lambda: deletion(net, x, maps, 3, step=512).curve
    plain = curve()
    handle = net.register_forward_pre_hook(lambda m, args: (args[0]*mask,))
    masked = curve()
    with torch.no_grad(): torch.testing.assert_close(masked[:, 0], net(x).softmax(1)[:, 3], rtol=1e-3, atol=1e-5)
    handle.remove()
    torch.testing.assert_close(curve(), plain)
    assert not torch.allclose(masked, plain, rtol=1e-2)


def test_half_the_bits_do_not_overflow_in_transport():
    g = torch.Generator().manual_seed(0)
    F, G = 10*torch.rand(2, 8, 1024, generator=g), 10*torch.randn(2, 5, 1024, generator=g).abs()
    whole = ot_alignment(F, G)
    for f, g in ((F.half(), G.half()), (F.half(), G), (F.bfloat16(), G.bfloat16())):
        torch.testing.assert_close(ot_alignment(f, g), whole, rtol=2e-2, atol=1e-3)
        assert cost_matrix(f, g).dtype == torch.float32


@pytest.mark.parametrize('mode', ['P', 'CMYK', 'YCbCr', 'HSV', 'LA', 'RGBA', '1', 'I;16'])
def test_a_picture_of_any_mode_is_shown_as_the_network_saw_it(mode):
    from lico.pixels import as_rgb
    g = np.random.default_rng(0)
    picture = Image.fromarray(g.integers(0, 255, (8, 6, 3), np.uint8))
    if mode == 'I;16': picture = Image.fromarray(g.integers(0, 2**16, (8, 6), np.uint16))
    elif mode == 'LA': picture = Image.merge('LA', picture.split()[:2])
    elif mode == 'RGBA': picture.putalpha(picture.split()[0])
    else: picture = picture.convert(mode)
    shown = overlay(picture, torch.zeros(8, 6), alpha=0)
    assert np.array_equal(shown, np.asarray(as_rgb(picture.copy())))


def test_a_photograph_is_shown_upright(tmp_path):
    picture = Image.new('RGB', (6, 8))
    exif = picture.getexif()
    exif[274] = 6  # a telephone that was held upright
    picture.save(tmp_path/'x.jpg', exif=exif)
    assert overlay(Image.open(tmp_path/'x.jpg'), torch.zeros(6, 8), alpha=0).shape == (6, 8, 3)


def test_maps_that_were_changed_in_place_give_other_logits():
    "An ablation of channels is seen by an adapted network as by timm's."
    net = adapt(timm.create_model('resnet10t', num_classes=3).eval(), 'layer4', 3, 32)
    with torch.no_grad():
        maps = net.forward_features(torch.rand(2, 3, 32, 32))
        before = net.forward_head(maps)
        maps[:] = 0
        after = net.forward_head(maps)
        assert torch.allclose(after, net.forward_head(maps.clone())) and not torch.allclose(after, before)


def test_what_load_gave_is_ones_own():
    "Noise on the labels of one experiment is not in the next one's."
    first = load('digits')
    y, x = first.train.y.clone(), first.test.x.clone()
    first.train.y[:] = 0
    first.test.x[:] = 0
    again = load('digits')
    assert torch.equal(again.train.y, y) and torch.equal(again.test.x, x)
    np.random.default_rng(0).shuffle(again.train.y.numpy())  # of which torch knows nothing
    assert torch.equal(load('digits').train.y, y)


def test_a_layer_on_which_only_the_class_token_counts_is_refused():
    torch.manual_seed(0)
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=4, img_size=64, depth=2).eval()
    x = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="depends on no place of layer 'blocks.1', only .* class token: choose an"):
        explain(vit, x, layer='blocks.1')
    assert explain(vit, x, layer='blocks.1.norm1').any()


def test_one_model_in_half_leaves_the_others_text_alone(encoder, digits):
    one, other = (PromptLearner(encoder, digits.class_names, n_context=2) for _ in range(2))
    ids, seal = torch.arange(10), encoder.digest()
    with torch.no_grad(): before = other.eval()(ids)
    one.half()
    with torch.no_grad(): assert torch.equal(other(ids), before)
    assert encoder.digest() == seal


def test_weights_that_are_computed_can_be_averaged_and_shipped(tmp_path, digits):
    "Spectral normalisation writes its weight into the module at each pass: no tensor that can be copied as it is."
    net = net_for(digits)
    nn.utils.spectral_norm(net.fc)
    log = fit(CrossEntropy(net), digits, steps=2, ema=.9, progress=False)
    assert np.isfinite(log[-1]['test_accuracy'])
    save_network(net, tmp_path/'net', digits.class_names, preprocessing_of(digits))
    x = digits.normalise(digits.test.x[:3])
    shipped = load_network(tmp_path/'net').net
    with torch.no_grad(): torch.testing.assert_close(shipped(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_both_heads_of_a_distilled_network_begin_at_zero(tmp_path, monkeypatch):
    make = timm.create_model
    def no_download(name, pretrained=False, **options): return make(name, False, **options)
    monkeypatch.setattr(timm, 'create_model', no_download)
    net = create_backbone('deit_tiny_distilled_patch16_224', 7, 224, pretrained=True)
    assert [h.weight.any().item() for h in net.get_classifier()] == [False, False]


def test_what_cannot_be_trained_or_measured_is_said_first(digits, encoder):
    prompts = PromptLearner(encoder, digits.class_names, n_context=2)
    with pytest.raises(ValueError, match='made for images of 32 pixels and those of digits have 16: create it'):
        fit(LICO(create_backbone('wrn_10_1'), prompts), digits, steps=1)
    with pytest.raises(ValueError, match='holds torch.float16: training keeps weights in float32, so call .float'):
        fit(CrossEntropy(net_for(digits).half()), digits, steps=1)
    with pytest.raises(ValueError, match='option in_chans: a backbone is a classifier of images of 3 channels'):
        create_backbone('resnet10t', 10, 32, in_chans=1)
    with pytest.raises(ValueError, match='target is None: expected class indices'):
        insertion(net_for(digits).eval(), torch.rand(1, 3, 16, 16), torch.rand(1, 16, 16), None)
    x, maps, net = torch.rand(1, 3, 16, 16), torch.rand(1, 16, 16), net_for(digits)
    for ask in (lambda net: explain(net, x), lambda net: insertion(net, x, maps, 0)):
        with pytest.raises(ValueError, match='CrossEntropy trains a network and wants labels: pass the network, model'):
            ask(CrossEntropy(net))
    with pytest.raises(ValueError, match='n_masks = 10.5: expected a whole number'):
        explain(net, x, method='rise', n_masks=10.5)
    with pytest.raises(ValueError, match='batch_size = 1.5: expected a whole number'): explain(net, x, batch_size=1.5)
    for baseline, why in ((float('nan'), 'not finite'), ([.1, .2, .3], 'expected a number or what broadcasts')):
        with pytest.raises(ValueError, match=f'baseline .*{why}'): deletion(net, x, maps, 0, baseline=baseline)
    assert deletion(net, x, maps, 0, step=np.int64(64)).curve.shape == (1, 5)


def test_what_is_no_number_is_no_distance():
    "A value that is not finite in one sample stays seen in Eq. 1, and no temperature is found for it."
    torch.manual_seed(0)
    x, g, y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 0, 1, 1])
    for bad in (math.nan, math.inf):
        broken = x.clone(); broken[1, 2] = bad
        for kind in ('euclidean', 'cosine'):
            for normalise in (True, False):
                A = adjacency(broken, 1., kind, normalise)
                assert A[1].isnan().all(), (bad, kind, normalise)
                assert ((A[:, 1] == 0) | A[:, 1].isnan()).all(), "nobody is near it"
        assert manifold_matching(broken, g, 1.).isnan() and manifold_matching(g, broken, 1.).isnan()
        with pytest.raises(ValueError, match='image features hold values that are not finite'):
            calibrated_taus(broken, g, y)
        with pytest.raises(ValueError, match='prompt features hold values that are not finite'):
            calibrated_taus(g, broken, y)
    with pytest.raises(ValueError, match=r'samples of shape \[4\]: expected \[B, ...\]'): adjacency(x[:, 0], 1.)
    with pytest.raises(ValueError, match='n_iter = -1: expected a whole'): sinkhorn(torch.rand(1, 2, 3), n_iter=-1)
    with pytest.raises(ValueError, match='n_iter = 5.0: expected a whole'): sinkhorn(torch.rand(1, 2, 3), n_iter=5.)
    with pytest.raises(ValueError, match=r'tau of shape \[4\]: expected one'): adjacency(x, torch.ones(4))
    assert adjacency(x, torch.ones(1)).equal(adjacency(x, 1.))


def test_whole_numbers_of_what_is_built_and_asked():
    "No network without classes, none for half a pixel, no batches of nothing, no check of no layer."
    for classes in (0, 2., True):
        with pytest.raises(ValueError, match=f'num_classes = {classes}: expected a whole number of at least 1'):
            create_backbone('wrn_16_1', num_classes=classes)
    with pytest.raises(ValueError, match='image_size = 16.0: expected'): create_backbone('wrn_16_1', image_size=16.)
    data = load('digits')
    with pytest.raises(ValueError, match='batch_size = 0: expected'): next(batches_of(data, data.test, 0))
    assert sanity_check(lambda net: torch.rand(2, 16, 16), nn.Linear(2, 2), layers=[]) == []


class Last(torch.nn.Module):
    "A network and what somebody wrote behind it."
    def __init__(self, net, last):
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x): return self.last(self.net(x))


WAYS = dict(clone=lambda p: p.clone(), half=lambda p: p.half().float(), clamp=lambda p: p.clamp(1e-6, 1 - 1e-6),
            turned=lambda p: p.T.clone().T, joined=lambda p: torch.cat([p, p[:0]]), piled=lambda p: torch.stack([p])[0],
            copied=lambda p: p.contiguous().double().float())


@pytest.mark.parametrize('classes', [1, 3])
@pytest.mark.parametrize('way', WAYS)
def test_a_sigmoid_is_known_behind_what_only_moves_numbers(classes, way):
    torch.manual_seed(0)
    net, x, maps = net_for_classes(classes), torch.randn(2, 3, 16, 16), torch.rand(2, 16, 16)
    plain, moved = (insertion(Last(net, last), x, maps, 0).auc for last in (
        torch.sigmoid, lambda z: WAYS[way](torch.sigmoid(z))))
    assert torch.allclose(plain, moved, atol=2e-3)
    logits = insertion(net, x, maps, 0).auc
    assert classes == 1 or (plain - logits).abs().min() > 1e-2


def net_for_classes(classes): return create_backbone('wrn_10_1', classes, 16).eval()


def test_probabilities_in_half_precision_are_no_logits():
    torch.manual_seed(0)
    net, x, maps = net_for_classes(10), torch.randn(2, 3, 16, 16), torch.rand(2, 16, 16)
    sharp = lambda z: (6*z).softmax(1)
    plain = insertion(Last(net, sharp), x, maps, 0).auc
    for kind in (torch.float16, torch.bfloat16):
        rounded = insertion(Last(net, lambda z, kind=kind: (6*z).to(kind).softmax(1).float()), x, maps, 0).auc
        assert torch.allclose(plain, rounded, atol=2e-2)


def test_numbers_from_0_to_1_without_a_gradient_are_asked_about():
    "What runs elsewhere may end in a sigmoid or not: nobody can see, so the caller says."
    torch.manual_seed(0)
    net, x, maps = net_for_classes(1), torch.randn(2, 3, 16, 16), torch.rand(2, 16, 16)
    elsewhere = Last(net, lambda z: torch.sigmoid(z).detach())
    with pytest.raises(ValueError, match='without a gradient, which may be probabilities or logits: say which'):
        insertion(elsewhere, x, maps, 0)
    said = insertion(elsewhere, x, maps, 0, score=lambda out: out).auc
    assert torch.allclose(said, 1 - insertion(Last(net, torch.sigmoid), x, maps, 0).auc, atol=1e-5)
    three = Last(net_for_classes(3), lambda z: z.detach().softmax(1))
    assert explain(three, x, method='rise', n_masks=4).isfinite().all()  # these say themselves what they are


def test_a_network_of_no_numbers_is_not_tested(digits, tmp_path):
    "The step before the last test is the one that nothing else looks at."
    torch.manual_seed(0)
    with pytest.raises(FloatingPointError, match='answers to 1?[0-9]+ of .* images are not finite: train it anew'):
        fit(CrossEntropy(net_for(digits)), digits, steps=1, lr=1e9, progress=False)
    net = net_for(digits)
    net.fc.weight.data[3, 0] = math.nan
    with pytest.raises(FloatingPointError, match='images are not finite'): predict(net, digits, digits.test)
    with pytest.raises(ValueError, match='fc.weight of PreActResNet holds values that are not finite'):
        save_network(net, tmp_path/'net', digits.class_names, preprocessing_of(digits))
    assert not (tmp_path/'net').exists()


def test_a_curve_through_what_the_network_cannot_answer_is_refused():
    "A network that standardises each picture knows nothing of a grey one."
    net, x = net_for_classes(3), torch.randn(3, 3, 16, 16)
    class Standardising(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, x): return self.net((x - x.mean((1, 2, 3), True))/x.std((1, 2, 3), keepdim=True))
    with pytest.raises(ValueError, match='answer to image 0 with 100% of its pixels exchanged is not finite'):
        deletion(Standardising(), x, torch.rand(3, 16, 16), 0)
    assert insertion(Standardising(), x, torch.rand(3, 16, 16), 0).auc.isfinite().all()


def test_a_refusal_leaves_the_model_as_it_was(digits, tmp_path):
    fit(CrossEntropy(net_for(digits)), digits, steps=1, folder=tmp_path, progress=False)
    net, bad = net_for(digits), 'a checkpoint of another run|the checkpoint of another run'
    net.bn.momentum = .37
    with pytest.raises(ValueError, match=bad):
        fit(CrossEntropy(net), digits, steps=1, seed=1, folder=tmp_path, progress=False)
    assert net.bn.momentum == .37
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model, x = CrossEntropy(net.train()), digits.normalise(digits.train.x[:4])
    for y, why in ((torch.tensor([0, 1, 2, 10]), 'label 10 is out of range: the network has 10 classes, 0 to 9'),
                   (torch.tensor([0, -1, 2, 3]), 'label -1 is out of range'),
                   (torch.zeros(4, dtype=torch.int32), r'labels of shape \[4\] and torch.int32: expected int64 \[4\]'),
                   (torch.zeros(3, dtype=torch.int64), r'labels of shape \[3\]')):
        with pytest.raises(ValueError, match=why): model(x, y)
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())


def test_an_average_leaves_frozen_weights_alone(digits):
    net = net_for(digits)
    net.stem.requires_grad_(False)
    before = net.stem.weight.clone()
    fit(CrossEntropy(net), digits, preset='released', steps=7, progress=False)
    assert net.stem.weight.equal(before)


@pytest.mark.parametrize('given, says', [
    (dict(data='digits'), 'data is str: expected what lico.data.load gives'),
    (dict(on_epoch=3), 'on_epoch is 3: expected a function'),
    (dict(off=True), 'gradients are off')])
def test_what_fit_cannot_train_with_is_said_first(digits, given, says):
    net = net_for(digits)
    before = net.fc.weight.clone()
    grad = torch.no_grad() if given.pop('off', False) else contextlib.nullcontext()
    with pytest.raises(ValueError, match=says), grad:
        fit(CrossEntropy(net), **(dict(data=digits, steps=1, progress=False) | given))
    assert net.fc.weight.equal(before)


@pytest.mark.parametrize('given, says', [
    (dict(method='smoothgrad', noise=math.nan), 'smoothgrad.noise = nan: expected a number'),
    (dict(method='smoothgrad', noise=math.inf), 'smoothgrad.noise = inf: expected a number'),
    (dict(method='rise', p='a'), "p = 'a': expected a number"), (dict(method='rise', seed=1.5), 'seed = 1.5: expected'),
    (dict(method='random', cells=0), 'cells = 0: expected a whole number of at least 1'),
    (dict(method='random', cells=2.5), 'cells = 2.5: expected'),
    (dict(reshape='a'), "reshape is 'a': expected a function"),
    (dict(target=torch.tensor(1j)), 'expected one class index')])
def test_options_of_maps_are_numbers(given, says):
    with pytest.raises(ValueError, match=says): explain(net_for_classes(3), torch.randn(1, 3, 16, 16), **given)


def test_numpys_seeds_are_seeds_of_maps_and_controls():
    x, net = torch.randn(1, 3, 16, 16), net_for_classes(3)
    for method, few in (('rise', dict(n_masks=8)), ('smoothgrad', dict(samples=2)), ('random', {})):
        a, b = (explain(net, x, method=method, seed=s, **few) for s in (3, np.int64(3)))
        assert a.equal(b)
    enc, names = load_text_encoder('minilm'), ['cat', 'dog', 'horse']
    for control in ('shuffled', 'random'):
        a, b = (PromptLearner(enc, names, class_text=control, seed=s) for s in (3, np.int64(3)))
        assert all(i.equal(j) for i, j in zip(a.ids, b.ids))
    with pytest.raises(ValueError, match="seed = 'a': expected a whole number"):
        PromptLearner(enc, names, class_text='shuffled', seed='a')
    with pytest.raises(ValueError, match='class_names is None: expected a list'): PromptLearner(enc, None)
    with pytest.raises(ValueError, match='class_ids is list: expected a tensor'): PromptLearner(enc, names)([0, 1])


@pytest.mark.parametrize('given, says', [
    (dict(x=np.zeros((1, 3, 16, 16), 'float32')), 'images ndarray: expected a tensor'),
    (dict(target='a'), "target 'a': expected one class index"), (dict(baseline=None), 'baseline is NoneType: expected'),
    (dict(saliency=[torch.zeros(16, 16), 3]), 'saliency is list: expected maps')])
def test_what_no_curve_can_be_made_of(given, says):
    ok = dict(x=torch.randn(1, 3, 16, 16), saliency=torch.rand(1, 16, 16), target=0)
    with pytest.raises(ValueError, match=says): deletion(net_for_classes(3), **ok | given)


def test_maps_of_any_number_point():
    maps, box = torch.rand(2, 16, 16), [torch.tensor([[2., 2, 9, 9]])]*2
    plain = pointing_game(maps.bfloat16().float(), box, 2)
    assert pointing_game(maps.bfloat16(), box, 2).equal(plain)
    assert pointing_game(maps.bfloat16().float().requires_grad_(), [b.requires_grad_() for b in box], 2).equal(plain)
    assert not energy_pointing_game(maps.requires_grad_(), box).requires_grad
    for bad, says in ((dict(tolerance='a'), "tolerance = 'a': expected"), (dict(regions=None), 'regions is NoneType')):
        with pytest.raises(ValueError, match=says): pointing_game(**dict(saliency=maps, regions=box) | bad)


@pytest.mark.parametrize('name, size', [('botnet26t_256', 33), ('nest_tiny', 33), ('gmlp_s16_224', 8)])
def test_images_that_a_backbone_cannot_take(name, size):
    with pytest.raises(ValueError, match=f'{name} cannot take images of {size} pixels .*: give a larger image_size'):
        create_backbone(name, 3, size)


def test_white_that_is_zero_in_16_bits(tmp_path):
    "A grey TIFF whose white is zero, and a grey value that a PNG calls transparent, also in 16 bits."
    tifffile, ramp = pytest.importorskip('tifffile'), np.arange(65536, dtype=np.uint16).reshape(256, 256)
    tifffile.imwrite(tmp_path/'black.tif', ramp, photometric='minisblack')
    tifffile.imwrite(tmp_path/'white.tif', ramp, photometric='miniswhite')
    black, white = (np.asarray(read_image(tmp_path, o)) for o in ('black.tif', 'white.tif'))
    assert np.array_equal(black, 255 - white) and black[0, 0, 0] == 0
    Image.fromarray(ramp).save(tmp_path/'seen.png')
    Image.fromarray(ramp).save(tmp_path/'through.png', transparency=0)
    seen, through = (np.asarray(read_image(tmp_path, o)) for o in ('seen.png', 'through.png'))
    assert (through[0, 0] == 255).all() and np.array_equal(seen.reshape(-1, 3)[1:], through.reshape(-1, 3)[1:])


@pytest.mark.parametrize('given, says', [
    (dict(preprocessing={}), 'preprocessing lacks'), (dict(preprocessing=None), 'preprocessing lacks'),
    (dict(class_names=None), 'class_names is None'), (dict(net=None), 'net is NoneType'),
    (dict(class_names={k: str(k) for k in range(10)}), 'class_names is {0: '),
    (dict(class_names='0123456789'), "class_names is '01"),
    (dict(folder='file'), 'is a file'),
    (dict(net=Last(net_for_classes(10), lambda z: dict(logits=z))), r'gives dict, and what is shipped gives a')])
def test_what_cannot_be_shipped(digits, tmp_path, given, says):
    (tmp_path/'file').touch()
    about = dict(net=net_for_classes(10), class_names=digits.class_names, preprocessing=preprocessing_of(digits),
                 folder='net') | given
    with pytest.raises(ValueError, match=says): save_network(**about | dict(folder=tmp_path/about['folder']))
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_sign_flips_of_what_is_no_number(): assert math.isnan(sign_flip([1, 2, math.nan, 4, 5, 6, 7, 8]))


def test_comparing_with_a_table_that_is_none():
    with pytest.raises(ValueError, match='99'): compare(pd.DataFrame(), 99)
    with pytest.raises(ValueError, match='the results have no .*arm.*: expected read'): compare(pd.DataFrame(), 3)
    with pytest.raises(ValueError, match='metric is empty'): compare(pd.DataFrame(), 3, metric=[])


def scored(net, lico_root, saliency='random'):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cases = Cases(Network('n', net, lambda image: image, tuple('abc'), 32), x, torch.tensor([0, 1]), ('p', 'q'))
    return scores(cases, saliency, progress=False)


def test_scores_are_of_the_network_that_is_asked(lico_root):
    "The same weights at another stride, a network that was trained on, and one in training mode."
    torch.manual_seed(0)
    coarse, fine = (create_backbone('test_resnet', 3, 32, output_stride=s) for s in (None, 16))
    fine.load_state_dict(coarse.state_dict())
    first, other = scored(coarse.eval(), lico_root), scored(fine.eval(), lico_root)
    assert not np.allclose(first.probability, other.probability, atol=1e-3)
    before = {k: v.clone() for k, v in coarse.state_dict().items()}
    assert scored(coarse.train(), lico_root).equals(first) and coarse.training
    fresh = scored(coarse, lico_root, 'edges')  # which nobody measured before
    assert fresh.probability.equals(first.probability)
    assert all(torch.equal(v, before[k]) for k, v in coarse.state_dict().items())
    with torch.no_grad(): coarse.fc.bias += torch.tensor([3., 0., 0.])
    assert scored(coarse.eval(), lico_root).probability[0] > first.probability[0] + 10


class Normalised(nn.Module):
    "A network of which the weights are the lesser part."
    def __init__(self, mean=0., act=torch.relu, scale=1.):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.end, self.act, self.options = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), act, dict(scale=scale)
        self.register_buffer('mean', torch.tensor(mean), persistent=False)

    def forward(self, x):
        return self.end(self.act(self.conv(x - self.mean)).mean((2, 3)))*self.options['scale']


@pytest.mark.parametrize('other', [dict(mean=1.), dict(act=torch.tanh), dict(act=lambda x: 2*x), dict(scale=3.)])
def test_a_network_is_more_than_its_weights(digits, tmp_path, lico_root, other):
    "A buffer that is not kept, a function, a dictionary: scores and checkpoints are of the network that has them."
    one, two = Normalised().eval(), Normalised(**other).eval()
    assert not scored(one, lico_root).probability.equals(scored(two, lico_root).probability)
    data = dataclasses.replace(digits, class_names=tuple('abc'), train=digits.train[digits.train.y < 3],
                               test=digits.test[digits.test.y < 3])
    train = lambda net: fit(CrossEntropy(adapt(net, 'conv', 3, 16)), data, steps=1, folder=tmp_path, progress=False)
    train(one)
    with pytest.raises(ValueError, match='is the checkpoint of another run, which differs in'): train(two)


def test_a_method_of_ones_own_may_change(lico_root, monkeypatch):
    torch.manual_seed(0)
    net = create_backbone('wrn_10_1', 3, 32).eval()
    areas = []
    for sign in (1, -1):
        monkeypatch.setitem(METHODS, 'mine', lambda net, x, target: sign*x.mean(1))
        areas.append(scored(net, lico_root, 'mine').insertion)
    assert not areas[0].equals(areas[1])


def test_a_checkpoint_of_other_words_or_other_frozen_weights_is_refused(digits, encoder, tmp_path):
    def model(class_text='names', frozen=False):
        torch.manual_seed(0)
        net = net_for(digits)
        net.stem.requires_grad_(not frozen)
        prompts = PromptLearner(encoder, digits.class_names, n_context=1, class_text=class_text)
        return LICO(net, prompts, LossOptions())
    train = lambda *of: fit(model(*of), digits, steps=1, folder=tmp_path/'run', progress=False)
    log = train()
    assert train() == log
    with pytest.raises(ValueError, match='tokens of the names'): train('shuffled')
    with pytest.raises(ValueError, match='frozen'): train('names', True)


def test_what_is_freed_while_training_is_not_left_out(digits, tmp_path):
    net = net_for(digits)
    net.stem.requires_grad_(False)
    with pytest.raises(ValueError, match=r'changed during fit \(requires_grad of backbone.stem.weight\): end fit'):
        fit(CrossEntropy(net), digits, epochs=2, folder=tmp_path/'run', progress=False,
            on_epoch=lambda row: net.stem.requires_grad_())
    assert len(pd.read_csv(tmp_path/'run'/'log.csv')) == 1, 'the epoch that was computed is kept'
    net.stem.requires_grad_(False)
    fit(CrossEntropy(net), digits, epochs=1, progress=False, on_epoch=lambda row: net.stem.requires_grad_())  # the last


@pytest.mark.parametrize('end', [nn.Softmax(1), nn.Sigmoid()], ids=['softmax', 'sigmoid'])
def test_probabilities_are_neither_trained_nor_shipped(digits, tmp_path, end):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10), end)
    with pytest.raises(ValueError, match='gives probabilities, .*: leave the softmax or sigmoid'):
        fit(CrossEntropy(adapt(net, '0', 10, digits.image_size)), digits, steps=1, progress=False)
    with pytest.raises(ValueError, match='gives probabilities'):
        save_network(net.eval(), tmp_path/'shipped', digits.class_names, preprocessing_of(digits))


def test_32_bits_a_pixel_are_refused_by_what_is_shipped_too(digits, tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path/'deep.tiff')
    save_network(net_for(digits).eval(), tmp_path/'shipped', digits.class_names, preprocessing_of(digits))
    exec(loading_lines(tmp_path/'shipped'), lines := {})
    shipped = load_network(tmp_path/'shipped')
    for ask in (lines['classify'], lambda path: shipped.prepare(Image.open(path))):
        with pytest.raises(OSError, match='mode F has 32 bits a pixel'): ask(tmp_path/'deep.tiff')


def test_two_trainings_do_not_share_a_folder(digits, tmp_path):
    def train(**more):
        fit(CrossEntropy(net_for(digits)), digits, steps=1, folder=tmp_path/'run', progress=False, **more)
    with pytest.raises(ValueError, match='another training is at work in .*run: give this one a folder of its own'):
        train(on_epoch=lambda row: train())


@pytest.mark.parametrize('part', ['train', 'test'])
def test_no_images_are_no_data(digits, part):
    bare = dataclasses.replace(digits, **{part: getattr(digits, part)[:0]})
    with pytest.raises(ValueError, match=f'has no images in data.{part}'):
        fit(CrossEntropy(net_for(digits)), bare, steps=1, progress=False)


def test_not_all_can_be_held_out(digits):
    with pytest.raises(ValueError, match='images = 21 to hold out: expected at most 20'): hold_out(digits, 21)


def test_a_block_has_one_dataset(tmp_path):
    given = dict(profile='smoke', out=str(tmp_path/'out'), block='A', datasets='digits, cifar10')
    with pytest.raises(ValueError, match='datasets = digits, cifar10: a block has one'):
        asked_of_block(parameters('language', given))


def test_what_is_measured_anew_takes_the_place_of_the_old(tmp_path):
    "Without options of the map, of which a file says nothing and a new row says ''."
    scored = lambda value: pd.DataFrame([dict(id='a', saliency='random', saliency_options='', insertion=value)])
    images = lambda value: scored(value).assign(image=['3'])
    for value in (50., 51.): df = write_results(tmp_path, scored(value), images(value), keep=True)
    assert df.insertion.tolist() == [51] and image_rows(tmp_path).insertion.tolist() == [51]


def test_what_is_measured_besides_leaves_the_rest(tmp_path):
    "Other metrics of the same maps stand beside those of before, on the same images only."
    row = lambda n, **found: pd.DataFrame([dict(id='a', saliency='random', images=n, **found)])
    image = lambda **found: pd.DataFrame([dict(id='a', saliency='random', image='3', **found)])
    write_results(tmp_path, row(4, insertion=50.), image(insertion=50.))
    df = write_results(tmp_path, row(4, deletion=10.), image(deletion=10.), keep=True)
    assert df[['insertion', 'deletion']].values.tolist() == [[50, 10]]
    assert image_rows(tmp_path)[['insertion', 'deletion']].values.tolist() == [[50, 10]]
    df = write_results(tmp_path, row(8, energy=1.), image(energy=1.), keep=True)
    assert df.energy.tolist() == [1] and df[['insertion', 'deletion']].isna().all(None)


def test_a_page_of_one_block_takes_no_other(tmp_path):
    "Networks of another block, seed or dataset stand in a folder of their own."
    for file in ('results.csv', 'SHA256SUMS'):
        (tmp_path/file).write_bytes((root()/'figures'/'looking'/file).read_bytes())
    p = parameters('looking', dict(profile='smoke', out=str(tmp_path), block='A', datasets='digits',
                                   stored='add', arms=''))
    with pytest.raises(ValueError, match='shows other networks .block E there, A here, dataset .* there, digits here'):
        collect_looking(p)


def test_no_verdict_by_a_reference_that_failed():
    "Right names at 45 %, shuffled ones at chance: that says nothing of names."
    runs = [dict(id=f'{a}{s}', arm=a, method='LICO', preset='repaired', seed=s, split=s, accuracy_last=mean + s/10,
                 classes=10, dataset='cifar10', labels='40', backbone='wrn_28_2', text_encoder='minilm')
            for a, mean in (('repaired', 45), ('repaired-shuffled', 10)) for s in range(8)]
    found = contrast_rows({'A': pd.DataFrame(runs)})
    assert set(found.verdict.dropna()) == {'training failed (100%)'} and found.failed.iloc[0] == 1


@pytest.mark.parametrize('given, says', [
    (dict(options='epochs=5'), 'epochs=5 among the options, and steps=2: give one of'),
    (dict(options='alpha=1, alpha=5'), 'alpha has more than one value there')])
def test_options_that_would_not_be_read_are_refused(tmp_path, given, says):
    with pytest.raises(ValueError, match=says):
        p = parameters('table3', dict(profile='smoke', out=str(tmp_path)) | given)
        Run(steps=2, options=p.options)
    with pytest.raises(ValueError, match='rise.n_masks has more than one value there'):
        saliency_options('rise.n_masks=5, rise.n_masks=50')


def test_table_8_has_the_labels_that_it_is_asked_for(tmp_path):
    given = dict(profile='smoke', out=str(tmp_path), datasets='digits', labels='40, 250', evaluations=5)
    runs = scene_runs(parameters('table8', given), 8)
    assert {r.labels for r in runs} == {40, 250} and {r.evaluations for r in runs} == {5}


def test_of_what_is_one_no_second_is_ignored(tmp_path):
    for notebook, name, values in (('figure4', 'saliency', 'grad-cam, rise'), ('study', 'labels', '250, 40')):
        with pytest.raises(ValueError, match=f'{name} = {values}: {notebook} takes one of them, so give one'):
            parameters(notebook, {'profile': 'smoke', 'out': str(tmp_path), name: values}, one=(name,))


@pytest.fixture
def boxed(tmp_path):
    "Two classes of pictures of 90 x 30 pixels, in network's eyes 30 x 30; boxes of the test images at the left edge."
    rng, rows = np.random.default_rng(0), ['file,x0,y0,x1,y1']
    for part, k in (('train', 5), ('test', 2)):
        for name in ('cat', 'dog'):
            (tmp_path/'mine'/part/name).mkdir(parents=True)
            for i in range(k):
                path = f'{part}/{name}/{i}.png'
                Image.fromarray(rng.integers(0, 255, (30, 90, 3), np.uint8)).save(tmp_path/'mine'/path)
                rows.append(f'{path},0,0,7,7')
    (tmp_path/'mine'/'boxes.csv').write_text('\n'.join(rows) + '\n', encoding='utf-8')
    return f"folder:{tmp_path/'mine'}"


@pytest.mark.parametrize('size', [32, 96])
def test_boxes_are_of_the_test_images_alone(boxed, size):
    data = load(boxed, image_size=size)
    assert data_module.test_boxes(boxed).tolist() == [[0, 0, 7, 7]]*4
    assert not np.any(box_masks(boxed, data, [0, 3])), 'out of sight'
    for other in (load(boxed, image_size=size, validation=2), hold_out(data), dataclasses.replace(
            data, test=data.test[torch.tensor([3, 2, 1, 0])])):
        with pytest.raises(ValueError, match='image 0 of data.test is not test image 0 of folder:'):
            box_masks(boxed, other, [0])


def test_an_object_out_of_sight_has_no_score():
    maps, seen = torch.rand(2, 8, 8), np.zeros((1, 8, 8), bool)
    seen[:, :4] = True
    c = SimpleNamespace(maps=maps, regions=[np.zeros((1, 8, 8), bool), seen])
    for metric in ('pointing_game', 'pointing_mask', 'energy', 'sch'):
        first, second = SCORERS[metric](c).tolist()
        assert math.isnan(first) and 0 <= second <= 100


@pytest.mark.parametrize('box', ['0,0,90,7', '9,0,7,7', '-1,0,7,7'])
def test_a_box_that_is_not_in_its_image_is_refused_at_once(boxed, box):
    folder = boxed.removeprefix('folder:')
    table = Path(folder, 'boxes.csv')
    text = table.read_text(encoding='utf-8').replace('test/cat/1.png,0,0,7,7', f'test/cat/1.png,{box}')
    table.write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match='test/cat/1.png, which has 90 x 30 pixels: expected 0 <= x0 <= x1 < width'):
        data_module.test_boxes(boxed)


@pytest.mark.slow
def test_a_kernel_behind_a_shell_goes_on():
    "As a cluster starts it: a shell stands between Jupyter and the kernel."
    code = ('import sys; sys.modules["ipykernel"] = sys; from lico.together import end_with_parent; end_with_parent(); '
            'import time; time.sleep(3); print("alive")')
    env = dict(os.environ, JPY_PARENT_PID=str(os.getpid()))
    shell = f"{sys.executable} -c '{code}'; exit $?"
    said = subprocess.run(['sh', '-c', shell], env=env, text=True, capture_output=True)
    assert said.stdout.strip() == 'alive', said.stderr
    gone = dict(env, JPY_PARENT_PID='4194304')  # no process has this number
    assert subprocess.run([sys.executable, '-c', code], env=gone).returncode == 1


def test_annotations_that_were_mended_are_read_again(tmp_path):
    (tmp_path/'images').mkdir(); (tmp_path/'annotations').mkdir()
    Image.new('RGB', (64, 64)).save(tmp_path/'images'/'a.png')
    def annotate(x):
        corners = [x, 10, x + 20, 10, x + 20, 30, x, 30]
        cat = dict(id=1, image_id=1, category_id=1, iscrowd=0, area=400, bbox=[x, 10, 20, 20], segmentation=[corners])
        (tmp_path/'annotations'/'instances.json').write_text(json.dumps(dict(
            images=[dict(id=1, file_name='a.png', width=64, height=64)], categories=[dict(id=1, name='cat')],
            annotations=[cat])), encoding='utf-8')
        return coco_in(tmp_path, 64)[0].boxes[0, 0].item()
    assert annotate(2) != annotate(40)


def test_names_of_images_are_text(lico_root):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net = create_backbone('wrn_10_1', 3, 32).eval()
    cases = Cases(Network('n', net, lambda image: image, tuple('abc'), 32), x, torch.tensor([0, 1]), ('NA', '07'))
    assert scores(cases, 'random', progress=False).image.tolist() == ['NA', '07']


def test_what_is_compared_needs_another(digits):
    "An image or a class alone: those terms would be zero from the first step to the last."
    for kind in (SupCon, CGC):
        with pytest.raises(ValueError, match='a batch of one image: .* compares the images of a batch'):
            fit(kind(net_for(digits)), digits, steps=1, batch_size=1, progress=False)
    with pytest.raises(ValueError, match='one image of each class: the supervised contrast'):
        fit(SupCon(net_for(digits)), load('digits', shots=1), steps=1, progress=False)


def test_images_that_are_floats_are_not_normalised_again(digits):
    with pytest.raises(ValueError, match='images of torch.float32: expected uint8'):
        digits.normalise(digits.test.x[:2].float()/255)


def test_a_home_is_a_home(digits, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    fit(CrossEntropy(net_for(digits)), digits, steps=1, folder='~/run', progress=False)
    assert (tmp_path/'run'/'log.csv').is_file() and not Path('~').exists()


def test_what_is_transparent_lies_on_white():
    picture = np.zeros((8, 8, 4), np.uint8)
    seen = overlay(picture, torch.zeros(8, 8), alpha=0)
    assert (seen == 255).all() and np.array_equal(seen, overlay(Image.fromarray(picture), torch.zeros(8, 8), alpha=0))


def test_a_score_that_fails_is_not_the_images_fault():
    net, x = net_for_classes(10), torch.rand(2, 3, 16, 16)
    for score, says in ((lambda out: out.softmax('a'), 'TypeError'), (lambda out: out['logits'], 'IndexError')):
        with pytest.raises(ValueError, match=f'score stops with {says}: .*expected a function from the output'):
            explain(net, x, score=score)


def test_options_that_a_backbone_cannot_have():
    with pytest.raises(ValueError, match='option img_size: give it as image_size'):
        create_backbone('test_vit', 5, 64, img_size=160)
    with pytest.raises(ValueError, match='resnet18 does not take output_stride=4 .*or give another value'):
        create_backbone('resnet18', 10, 64, output_stride=4)


def test_what_is_made_for_a_network_lies_where_it_does(tmp_path):
    "On another device than the processor: `meta`, which all machines have."
    assert grid_side(create_backbone('wrn_10_1', 3, 16).to('meta')) == 4


def test_printed_numbers_stand_beside_results_that_pandas_read():
    df = read_results(root()/'figures'/'table3-digits')
    own = df[df.labels.isin(['40', '250'])]
    as_numbers = compare(own.assign(labels=own.labels.astype(int)), 3)
    assert as_numbers.printed_value.notna().any() and as_numbers.printed_value.equals(compare(own, 3).printed_value)


def test_networks_are_not_mixed_in_one_sentence():
    df = pd.DataFrame([dict(dataset='digits', backbone=b, labels='40', arm='CE', preset='paper', text_encoder=None,
                            ordinal=.5) for b in ('wrn_16_1', 'wrn_10_1')])
    with pytest.raises(ValueError, match='results of the networks wrn_16_1, wrn_10_1, which pictures and means would'):
        order_sentences(df)


@pytest.mark.parametrize('wrong', [-100, -1, 10])
def test_labels_that_are_none_are_refused_by_every_method(digits, encoder, wrong):
    y = torch.tensor([0, 1, 2, wrong])
    for method in TRAINING_METHODS:
        model = start(Run(method=method, backbone='wrn_10_1'), digits, encoder)
        with pytest.raises(ValueError, match=f'label {wrong} is out of range: the network has 10 classes'):
            model(torch.rand(4, 3, 16, 16), y)


@pytest.mark.parametrize('workers, sentence', [
    ('local: tasks_per_node', 'expected NAME=VALUE, NAME=VALUE, such as slurm: gpus_per_node=4'),
    ('local: timeout_min=5, timeout_min=9', 'timeout_min has more than one value there')])
def test_what_a_cluster_is_told_is_understood(lico_root, workers, sentence):
    "An option without a value was none of submitit's, and of two values the last one counted."
    pytest.importorskip('submitit')
    with pytest.raises(ValueError, match=sentence), processes(workers): pass


def test_images_of_twelve_bits_kept_in_sixteen_are_said_to_be_nearly_black(tmp_path, capsys):
    def load_with(brightest, depth='uint16'):
        for part, k in ((p, k) for p in ('train', 'test') for k in 'ab'):
            (tmp_path/depth/f'{brightest}'/part/k).mkdir(parents=True)
            picture = np.linspace(0, brightest, 64).reshape(8, 8).astype(depth)
            for i in range(2): Image.fromarray(picture).save(tmp_path/depth/f'{brightest}'/part/k/f'{i}.png')
        capsys.readouterr()
        load(f'folder:{tmp_path}/{depth}/{brightest}')
        return capsys.readouterr().err
    assert 'brightest of 4 images of 16 bits uses 6.2% of their range' in load_with(4080)
    assert 'range' not in load_with(65535) and 'range' not in load_with(20, 'uint8')


def test_a_part_that_is_split_while_another_lies_beside_it_is_said(tmp_path, capsys):
    for part, k in ((p, k) for p in ('train', 'test') for k in 'ab'):
        (tmp_path/part/k).mkdir(parents=True)
        for i in range(5): Image.new('RGB', (8, 8), (9*i, 0, 0)).save(tmp_path/part/k/f'{i}.png')
    load(f'folder:{tmp_path}/train')
    assert "is split 80/20 and test beside it is not used: if these belong together, give the folder" in (
        capsys.readouterr().err)
    load(f'folder:{tmp_path}')
    assert '80/20' not in capsys.readouterr().err


def test_a_folder_that_lies_here_is_told_from_a_name(tmp_path, monkeypatch):
    (tmp_path/'pets').mkdir(); (tmp_path/'digits').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'pets' looks like a path: a folder of images is folder:pets"): load('pets')
    assert load('digits', labels=40).name == 'digits'


def test_a_batch_is_looked_at_before_the_network_is(digits, encoder):
    "Lists, arrays, raw pixels; and one image, which matching compares with nothing."
    model = LICO(net_for(digits), PromptLearner(encoder, digits.class_names, n_context=1), LossOptions())
    x, y = digits.normalise(digits.train.x[:2]), digits.train.y[:2]
    for images, labels, wrong in ((x, y.tolist(), 'labels are a list: expected a tensor int64'),
                                  (x.numpy(), y, 'images ndarray: expected a tensor'),
                                  (digits.train.x[:2], y, r'uint8: expected a tensor \[B, C, H, W\] of floats')):
        with pytest.raises(ValueError, match=wrong): model(images, labels)
    with pytest.warns(UserWarning, match='a batch of one image: matching has no other'): model(x[:1], y[:1])
    with pytest.warns(UserWarning, match=r'images from 0 to 2\d\d look like raw levels'):
        explain(model.backbone.eval(), digits.train.x[:2].float(), method='grad-cam')


class Clip(nn.Module):
    "Cuts its own input to [0, 1], in place."
    def forward(self, x): return x.clamp_(0, 1)


@pytest.mark.parametrize('method', ['edges', 'smoothgrad', 'grad-cam', 'score-cam', 'rise'])
def test_a_network_that_writes_into_some_of_its_images_gets_copies(method):
    "The first image is within the bounds, so it is not changed by being shown."
    torch.manual_seed(0)
    rest = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    net, x = nn.Sequential(Clip(), *rest).eval(), torch.stack([torch.rand(3, 16, 16), torch.rand(3, 16, 16)*3 - 1])
    given, own = x.clone(), dict(n_masks=50) if method == 'rise' else {}
    classes = nn.Sequential(*rest)(x.clamp(0, 1)).argmax(1)
    maps = explain(net, x, None, method, **own)
    assert torch.equal(x, given) and torch.equal(maps, explain(net, x, classes, method, **own))


def test_a_seed_draws_the_same_under_any_default_type(digits):
    net, x = create_backbone('wrn_10_1', 10, 16).eval(), digits.test[[0, 1]].x[..., :16, :16].float()/255
    def drawn():
        maps = [explain(net, x, 0, m, **o) for m, o in (('rise', dict(n_masks=20)), ('random', {}), ('smoothgrad', {}))]
        noisy = training_batch(digits, torch.arange(2), torch.Generator().manual_seed(0), noise=.1)[0]
        points = pointing_game(maps[1], [torch.tensor([[0, 0, 4, 4]])]*2)
        shipped = as_input(Image.new('RGB', (8, 8)), whole_square, 8, [.5]*3, [.2]*3)
        return [*maps, noisy, random_affine(3), points, shipped]
    usual = drawn()
    torch.set_default_dtype(torch.float64)
    try: other = drawn()
    finally: torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype == torch.float32 and a.equal(b) for a, b in zip(usual, other))


def test_maps_changed_in_inference_mode_give_other_logits():
    net, x = adapt(create_backbone('wrn_10_1', 10, 16), 'bn', 10, 16).eval(), torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        maps = net.forward_features(x)
        whole = net.forward_head(maps)
        maps[:, :4] = 0
        assert not torch.allclose(net.forward_head(maps), whole)


@pytest.mark.parametrize('given', [dict(tau_form='raw', tau_init=2.), dict(tau='calibrated')])
def test_a_diagnostic_stays_what_it_was(digits, encoder, given):
    model = LICO(net_for(digits), PromptLearner(encoder, digits.class_names), LossOptions(**given))
    x, y = training_batch(digits, torch.arange(8), torch.Generator().manual_seed(0))
    kept = {k: v for k, v in model(x, y).stats.items() if k.startswith('tau')}
    before = {k: v.item() for k, v in kept.items()}
    with torch.no_grad():
        for t in (*model.tau.parameters(), *model.tau.buffers()): t += 1
    assert before and {k: v.item() for k, v in kept.items()} == before


def test_an_encoder_leaves_the_model_it_was_made_of_alone(encoder):
    model = copy.deepcopy(encoder.model).train().requires_grad_(True)
    own = BERTText(model, encoder.tokenizer)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not own.training and not any(p.requires_grad for p in own.parameters())


def test_a_slice_of_scenes_is_no_scene():
    with pytest.raises(TypeError, match='slice'): digit_scenes(3)[0:2]
    assert torch.equal(digit_scenes(3, objects=np.int64(2))[np.int64(1)].masks, digit_scenes(3, objects=2)[1].masks)


def test_anyones_autocast_leaves_plans_and_blur_alone():
    torch.manual_seed(0)
    rows, x = torch.randn(2, 6, 16), torch.rand(1, 3, 32, 32)
    def found():
        C = cost_matrix(F=rows, G=rows)
        return C, sinkhorn(C), ot_alignment(rows, rows), blur(x)
    usual = found()
    with torch.autocast('cpu', torch.bfloat16): other = found()
    assert all(torch.equal(a, b) for a, b in zip(usual, other))


def test_whole_numbers_keep_their_order_as_a_map():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(1, 1, 4, 4)
    order = torch.arange(16).view(1, 4, 4)
    curves = [deletion(net, x, order + o, 0, step=1).curve for o in (0, 2**24, 2**40)]
    assert torch.equal(curves[0], curves[1]) and torch.equal(curves[0], curves[2])


def test_mirrored_arrays_are_arrays():
    net, x, m = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(1, 1, 4, 4), np.arange(16.).reshape(1, 4, 4)
    turned, plain = m[:, :, ::-1], m[:, :, ::-1].copy()
    for a in (dict(saliency=turned), dict(saliency=turned, baseline=turned),
              dict(saliency=turned, target=np.array([1])[::-1])):
        b = {k: v.copy() for k, v in a.items()}
        assert torch.equal(deletion(net, x, **dict(target=0) | a).curve, deletion(net, x, **dict(target=0) | b).curve)
    assert np.array_equal(overlay(x[0], turned[0]/16), overlay(x[0], plain[0]/16))


@pytest.mark.parametrize('call, says', [
    (lambda d: augment(torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.Generator()), 'expected square ones'),
    (lambda d: adjacency(torch.eye(3), 1., normalise='no'), "normalise 'no'"),
    (lambda d: accuracy(torch.tensor([1, 2, 3]), torch.tensor([1])), 'expected one each'),
    (lambda d: training_batch(SimpleNamespace(train=d), torch.arange(2), torch.Generator()), 'training_batches')])
def test_what_was_taken_for_something_else(call, says):
    with pytest.raises(ValueError, match=says): call(Files(Path('.'), np.array([b'a']), torch.zeros(1)))


@pytest.mark.parametrize('method', [CGC, GCC])
def test_maps_need_gradients(digits, method):
    x, y = training_batch(digits, torch.arange(4), torch.Generator().manual_seed(0))
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(ValueError, match=f'the loss of {method.__name__} compares maps'):
            method(create_backbone('wrn_10_1', 10, 32)).eval()(x, y)


def test_losses_take_keywords():
    u, v = torch.rand(2, 4, 3, 3).unbind()
    assert torch.equal(cgc_loss(seen=u, wanted=v, temperature=.5), cgc_loss(u, v, .5))


def test_loading_draws_nothing():
    state = torch.get_rng_state()
    imagenet_classifier()
    assert torch.equal(state, torch.get_rng_state())
