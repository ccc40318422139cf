"Ordinary calls that once went wrong without a word: now they are right, or refused in one sentence."
import numpy as np, pytest, timm, torch
from PIL import Image
from torch import nn

from lico.backbones import adapt, create_backbone
from lico.config import derive_seed
from lico.data import load
from lico.losses import LossOptions, cost_matrix, ot_alignment
from lico.metrics import deletion, insertion
from lico.model import LICO, CrossEntropy, refuse_other_forward
from lico.shipping import load_network, preprocessing_of, save_network
from lico.saliency import explain, overlay
from lico.text import PromptLearner, load_text_encoder
from lico.training import fit


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
        with pytest.raises(ValueError, match=f'seed={seed!r}: expected a whole number'): weights(seed, steps=1)


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
    with pytest.raises(ValueError, match='batch_size is 1.5: expected a whole number'): explain(net, x, batch_size=1.5)
    for baseline, why in ((float('nan'), 'not finite'), ([.1, .2, .3], 'expected a number or what broadcasts')):
        with pytest.raises(ValueError, match=f'baseline .*{why}'): deletion(net, x, maps, 0, baseline=baseline)
    assert deletion(net, x, maps, 0, step=np.int64(64)).curve.shape == (1, 5)
