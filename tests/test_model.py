"The readings of manifold matching that lico.model prepares, on a three-layer network and prompts from a table."
import pytest, torch
from torch import nn
from lico.backbones import adapt, create_backbone
from lico.losses import LossOptions, log_adjacency, manifold_matching, row_entropy
from lico.temperatures import calibrated_taus
from lico.data import load
from lico.model import LICO, CrossEntropy
from lico.rivals import SupCon
from lico.training import fit
from group import in_group

torch.set_num_threads(1)
K, M, d = 5, 3, 6


class Net(nn.Module):
    "A classifier with timm's protocol; its feature rows are its 4 channels at 9 positions."
    num_classes, image_size, feature_shape = K, 3, (4, 9)
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()), nn.Linear(4, K)
    def forward_features(self, x): return self.body(x)
    def forward_head(self, maps, pre_logits=False):
        pooled = maps.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)


class Prompts(nn.Module):
    "Prompt rows that are learned themselves, and how many classes were asked for."
    class_names, rolled, dim, n_rows = list('abcde'), False, d, M
    def __init__(self):
        super().__init__()
        self.rows, self.asked = nn.Parameter(torch.randn(K, M, d) + 2), []
    def forward(self, ids):
        self.asked.append(len(ids))
        return self.rows[ids]


def lico(seed=0, **options):
    torch.manual_seed(seed)
    usual = dict(mm_features='pooled', mm_rows='class', mm_text='raw', tau='fixed', tau_init=0.4)
    return LICO(Net(), Prompts(), LossOptions(**{**usual, **options})).double()


def batch(B=8, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, 3, 3, generator=g, dtype=torch.float64), torch.arange(B) % classes


def features(model, x, kind='pooled'):
    maps = model.backbone.forward_features(x)
    return maps.flatten(2) if kind == 'maps' else maps.mean((2, 3))


@pytest.mark.parametrize('text', ('raw', 'mapped'))
@pytest.mark.parametrize('rows', ('class', 'all'))
@pytest.mark.parametrize('detach', (False, True))
def test_the_centre_is_the_mean_over_all_classes(text, rows, detach):
    model, (x, y) = lico(mm_centre=True, mm_text=text, mm_rows=rows, detach_text=detach), batch()
    each = [(model.mapping(r) if text == 'mapped' else r)[slice(None) if rows == 'all' else -1]
            for r in model.prompts.rows]
    mean = sum(each)/K
    expected = manifold_matching(features(model, x), torch.stack([each[c] - mean for c in y]), 0.4)
    out = model(x, y)
    torch.testing.assert_close(out.mm, expected)
    assert not torch.isclose(out.mm, lico(mm_text=text, mm_rows=rows)(x, y).mm)
    parts = (model.backbone.body[0].weight, model.prompts.rows)
    got = torch.autograd.grad(out.mm, parts, allow_unused=True)
    wanted = torch.autograd.grad(expected, parts)
    torch.testing.assert_close(got[0], wanted[0])
    if detach: assert got[1] is None
    else: torch.testing.assert_close(got[1], wanted[1])
    if not detach: assert got[1][4].abs().sum() > 0, "a class that is not in the batch moves the centre"


def test_the_centre_leaves_transport_alone_and_encodes_each_class_once():
    (x, y), plain, centred = batch(), lico(), lico(mm_centre=True)
    torch.testing.assert_close(plain(x, y).ot, centred(x, y).ot)
    assert plain.prompts.asked == [3] and centred.prompts.asked == [K]
    one, two = centred(x, y).mm, centred(x[[*range(8), 0]], y[[*range(8), 0]]).mm
    assert not torch.isclose(one, two)
    with pytest.raises(ValueError, match='prompt rows of 8 classes for 8 images: mm_centre needs those of asked'):
        maps = centred.backbone.forward_features(x)
        centred.matching(centred.pooled(maps), maps.flatten(2), *centred.text(y))


def test_gradients_with_every_control():
    model, (x, y) = lico(mm_centre=True, mm_diagonal='out'), batch()
    own = model.prompts.rows.detach()
    def mm(rows):
        return torch.func.functional_call(model, {'prompts.rows': rows}, (x, y)).mm
    torch.autograd.gradcheck(mm, (own.clone().requires_grad_(),))


def test_centred_texts_that_are_all_equal_are_zero_and_harmless():
    model, (x, y) = lico(mm_centre=True), batch()
    with torch.no_grad(): model.prompts.rows[:] = model.prompts.rows[0]
    out = model(x, y)
    out.loss.backward()
    assert out.loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert torch.isclose(out.stats['entropy_text'], torch.ones(()).double())


def test_without_the_diagonal():
    model, (x, y) = lico(mm_diagonal='out'), batch()
    out, texts = model(x, y), model.prompts.rows[y, -1]
    torch.testing.assert_close(out.mm, manifold_matching(features(model, x), texts, 0.4, diagonal='out'))
    torch.testing.assert_close(out.stats['entropy_text'].double(),
                               row_entropy(log_adjacency(texts, 0.4, diagonal='out'))/torch.tensor(7.).double().log())
    for B in (1, 2):
        out = model(*batch(B))
        out.loss.backward()
        assert out.mm == 0 and out.stats['entropy_image'].isnan() and out.stats['entropy_text'].isnan()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('reading', (dict(), dict(mm_centre=True, mm_diagonal='out', detach_text=True),
                                     dict(mm_features='maps', mm_rows='all', mm_text='mapped'),
                                     dict(distance='cosine', mm_normalise=False, tau_share=0.1)), ids=str)
def test_the_first_batch_in_train_mode_calibrates(reading):
    model, (x, y) = lico(tau='calibrated', **reading), batch()
    o = model.options
    assert not list(model.tau.parameters()) and list(model.tau.state_dict()) == ['value']
    with pytest.raises(ValueError, match='not known yet: with tau = calibrated a batch in train mode must come first'):
        model.eval()(x, y)
    out = model.train()(x, y)
    out.loss.backward()
    each = [(model.mapping(r) if o.mm_text == 'mapped' else r)[slice(None) if o.mm_rows == 'all' else -1]
            for r in model.prompts.rows]
    text = torch.stack([each[c] - (sum(each)/K if o.mm_centre else 0) for c in y])
    same = dict(distance=o.distance, normalise=o.mm_normalise, diagonal=o.mm_diagonal)
    image = features(model, x, o.mm_features)
    taus = calibrated_taus(image, text, y, o.tau_share, **same)
    assert model.tau.value.tolist() == pytest.approx(taus, rel=1e-5)
    assert (out.stats['tau_image'], out.stats['tau']) == model.tau()
    log_f, log_g = (log_adjacency(f, t, **same) for f, t in zip((image, text), taus))
    torch.testing.assert_close(out.mm, (log_g.exp()*(log_g - log_f).masked_fill(log_g == -torch.inf, 0)).sum(1).mean())
    torch.testing.assert_close(out.stats['entropy_image'], out.stats['entropy_text'], atol=1e-6, rtol=0)
    before = model.tau.value.clone()
    model(*batch(6, 2, seed=1)), model.eval()(*batch(6, 2, seed=1))
    assert torch.equal(model.tau.value, before), 'fixed from then on'


def test_calibration_is_kept_by_checkpoints_and_decided_by_nothing_but_the_batch():
    (x, y), one, two = batch(), lico(tau='calibrated'), lico(tau='calibrated')
    one(x, y), torch.manual_seed(9), two(x, y)
    assert torch.equal(one.tau.value, two.tau.value)
    later = lico(seed=1, tau='calibrated')
    later.load_state_dict(one.state_dict())
    assert torch.equal(later(*batch(seed=2)).stats['tau_image'], one.tau.value[0])
    off = lico(tau='calibrated', alpha=0.)
    assert off(x, y).loss.isfinite() and not off.tau.known, 'not needed, not computed'


def test_a_batch_of_one_class_is_refused_before_anything_is_set():
    model, (x, y) = lico(tau='calibrated'), batch(classes=1)
    with pytest.raises(ValueError, match='of 8 samples of 1 classes a share from 0 to 0'): model(x, y)
    assert not model.tau.known and model(*batch()).loss.isfinite()


def test_gradients_with_calibrated_temperatures():
    "Of Eq. 2 with both temperatures held, which is what the loss says: they are no function of anything."
    model, (x, y) = lico(tau='calibrated', mm_centre=True, mm_diagonal='out'), batch()
    model(x, y)
    torch.autograd.gradcheck(lambda rows: torch.func.functional_call(model, {'prompts.rows': rows}, (x, y)).mm,
                             (model.prompts.rows.detach().requires_grad_(),))


def test_two_processes_calibrate_alike(tmp_path):
    def work():
        model = lico(tau='calibrated')
        model(*batch(seed=torch.distributed.get_rank()))
        return model.tau.value.tolist()
    one, other = in_group(2, work, tmp_path)
    alone = lico(tau='calibrated')
    alone(*map(torch.cat, zip(batch(seed=0), batch(seed=1))))  # of the batch of both together
    assert one == other == pytest.approx(alone.tau.value.tolist(), rel=1e-5)


class Foreign(nn.Module):
    "A classifier that knows nothing of protocols, but for what it is given."
    def __init__(self, **more):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, K)
        for k, v in more.items(): setattr(self, k, v)

    def forward(self, x): return self.fc(self.body(x).relu().mean((2, 3)))


NEEDED = ('forward_features', 'forward_head', 'num_classes', 'image_size', 'feature_shape')


@pytest.mark.parametrize('has', [{}, dict(num_classes=K), dict(forward_features=len, forward_head=len, num_classes=3),
                                 dict(forward_features=len, forward_head=len, num_classes=K, feature_shape=(8, 64))])
def test_all_that_a_foreign_network_lacks_is_said_at_once(has):
    "And who gives it; what it has is not listed."
    with pytest.raises(ValueError) as e: LICO(Foreign(**has), Prompts())
    listed, who = str(e.value).split('of a backbone: ')[1].split('; lico.backbones has ')
    assert [k for k in NEEDED if f'{k} (' in listed] == [k for k in NEEDED if k not in has]
    assert who.startswith('adapt(net, layer, num_classes, image_size)') and '\n' not in str(e.value)
    if 'forward_head' not in has:
        with pytest.raises(ValueError, match=r'forward_features \(.*forward_head \(.*adapt'):
            CrossEntropy(Foreign(**has))


def test_adapt_gives_all_that_it_lacks():
    model = LICO(adapt(Foreign(), 'body', K, 16), Prompts())
    model(torch.rand(4, 3, 16, 16), torch.arange(4)).loss.backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_two_misfits_are_said_at_once():
    with pytest.raises(ValueError, match=f'the backbone has 10 classes and the prompts {K}: .*; the feature maps have '
                                         'one position at 32 pixels'):
        LICO(create_backbone('resnet18', 10, 32), Prompts())


class Plain(nn.Module):
    "A network of somebody's, whose last block normalises."
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.layer4 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, K)
    def forward(self, x): return self.fc(self.layer4(self.stem(x).relu()).mean((2, 3)))


@pytest.mark.parametrize('name', ('adapted', 'mobilenetv4_conv_small'))
@pytest.mark.parametrize('bf16', (False, True), ids=('fp32', 'autocast'))
def test_normalisations_see_a_batch_once_whatever_the_loss_reads(name, bf16):
    states = {}
    for kind in ('CE', 'LICO', 'SupCon'):
        torch.manual_seed(0)
        net = adapt(Plain(), 'layer4', K, 16) if name == 'adapted' else create_backbone(name, K, 32)
        model = {'CE': CrossEntropy, 'SupCon': SupCon}.get(kind, lambda net: LICO(net, Prompts(), LossOptions(
            mm_features='pooled', mm_rows='class', mm_text='raw', tau='fixed', beta=0)))(net.train()).train()
        x = torch.rand(8, 3, net.image_size, net.image_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            for _ in range(3): model(x, torch.arange(8) % 3)
        states[kind] = dict(net.named_buffers())
    for k, v in states['CE'].items(): assert all(torch.equal(v, states[o][k]) for o in ('LICO', 'SupCon')), k


def test_a_network_that_is_tested_as_something_else_is_refused_before_training():
    net = create_backbone('resnet10t', 10, 32)
    net.register_forward_pre_hook(lambda m, images: (images[0]*0,))
    data, before = load('digits', labels=40), net.conv1[0].weight.detach().clone()
    with pytest.raises(ValueError, match='ResNet gives other logits than its forward_head'):
        fit(CrossEntropy(net), data, steps=1, progress=False)
    assert torch.equal(before, net.conv1[0].weight)
