import pytest, timm, torch
import torch.nn.functional as F

from lico.backbones import create_backbone, feature_rows, features

CNNS = ['wrn_10_1', 'wrn_28_2', 'parn_18', 'resnet18', 'convnext_atto']


@pytest.mark.parametrize('name', CNNS + ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_protocol(name):
    size = 224 if name.startswith('swin') else 64
    torch.manual_seed(0)
    net = create_backbone(name, num_classes=7, image_size=size).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        maps, rows = net.forward_features(x), features(net, x)
        assert rows.shape == (2, *net.feature_shape) and torch.equal(rows, feature_rows(net, maps))
        torch.testing.assert_close(net.forward_head(maps), net(x))
        pooled = net.forward_head(maps, pre_logits=True)
    assert net(x).shape == (2, 7) and pooled.shape == (2, net.num_features) and net.image_size == size
    if name in CNNS:
        assert net.feature_shape == (maps.shape[1], maps.shape[2]*maps.shape[3])
        assert torch.equal(rows[1, 3], maps[1, 3].flatten()), 'a row is a channel, its entries are positions'
    else: assert rows.shape[-1] == net.num_features, 'a row is a token'


def test_vit_rows_hold_the_class_token():
    net = create_backbone('vit_tiny_patch16_224', image_size=64)
    assert net.feature_shape == ((64//16)**2 + 1, 192)


def test_parn_18_written_with_functions():
    "The network again, in functions, from its own weights."
    torch.manual_seed(0)
    net = create_backbone('parn_18').eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(.5, 2), torch.nn.init.normal_(m.bias)
    w, x = net.state_dict(), torch.randn(2, 3, 32, 32)
    bn = lambda x, k: F.relu(F.batch_norm(x, w[f'{k}.running_mean'], w[f'{k}.running_var'], w[f'{k}.weight'],
                                          w[f'{k}.bias']))
    h = F.conv2d(x, w['stem.weight'], padding=1)
    for i in range(8):
        stride, k = 2 if i in (2, 4, 6) else 1, f'blocks.{i}'
        a = bn(h, f'{k}.bn1')
        skip = F.conv2d(a, w[f'{k}.shortcut.weight'], stride=stride) if stride == 2 else h
        h = F.conv2d(bn(F.conv2d(a, w[f'{k}.conv1.weight'], stride=stride, padding=1), f'{k}.bn2'),
                     w[f'{k}.conv2.weight'], padding=1) + skip
    torch.testing.assert_close(net(x), F.linear(F.adaptive_avg_pool2d(bn(h, 'bn'), 1).flatten(1), w['fc.weight'],
                                                w['fc.bias']), rtol=1e-4, atol=1e-5)


def test_making_a_backbone_leaves_no_trace():
    "The dry forward neither draws random numbers nor moves the running statistics."
    torch.manual_seed(3)
    net, after = create_backbone('resnet18', image_size=64), torch.rand(1)
    torch.manual_seed(3)
    plain = timm.create_model('resnet18', num_classes=10)
    assert torch.equal(after, torch.rand(1)) and net.training
    for a, b in zip(net.state_dict().values(), plain.state_dict().values()): assert torch.equal(a, b)


@pytest.mark.parametrize('name, first', [('resnet18', 0), ('tf_efficientnet_lite0', 1)])
def test_output_stride_gives_finer_maps_of_the_same_weights(name, first):
    """Every second position of the finer maps is a coarse one: from the first on, and from the second where images
    are padded as TensorFlow does it, at their right and lower edges alone."""
    torch.manual_seed(0)
    coarse = create_backbone(name, 7, 128).eval()
    fine = create_backbone(name, 7, 128, output_stride=16).eval()
    fine.load_state_dict(coarse.state_dict())
    assert fine.feature_shape == (coarse.feature_shape[0], 4*coarse.feature_shape[1])
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad(): a, b = coarse.forward_features(x), fine.forward_features(x)[..., first::2, first::2]
    assert torch.allclose(a, b, atol=1e-4*a.abs().max().item())


@pytest.mark.parametrize('name', ['wrn_10_1', 'vit_tiny_patch16_224', 'mobilenetv3_small_050'])
def test_a_network_that_takes_no_output_stride_is_refused(name):
    with pytest.raises(ValueError, match=f'{name} (has no output_stride: |does not take output_stride=16 \\()'):
        create_backbone(name, 7, 224, output_stride=16)


def test_pre_activation_resnet_18_has_its_size():
    "11.17 M parameters with ten classes, as public implementations for CIFAR-10 state."
    assert round(sum(p.numel() for p in create_backbone('parn_18').parameters())/1e6, 2) == 11.17


def test_image_too_small_is_one_sentence():
    with pytest.raises(ValueError, match='cannot take images of 8 pixels'):
        create_backbone('vit_tiny_patch16_224', image_size=8)


def test_several_feature_maps_are_refused():
    with pytest.raises(ValueError, match='coat_tiny gives list of several feature maps'):
        create_backbone('coat_tiny', image_size=224)
