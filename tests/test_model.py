"The readings of manifold matching that lico.model prepares, on a three-layer network and prompts from a table."
import pytest, torch
from torch import nn
from lico.losses import LossOptions, log_adjacency, manifold_matching, row_entropy
from lico.model import LICO

torch.set_num_threads(1)
K, M, d = 5, 3, 6


class Net(nn.Module):
    "A classifier with timm's protocol; its feature rows are its 4 channels at 9 positions."
    num_classes, image_size, feature_shape = K, 3, (4, 9)
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()), nn.Linear(4, K)
    def forward_features(self, x): return self.body(x)
    def forward_head(self, maps, pre_logits=False): return maps.mean((2, 3)) if pre_logits else self.head(maps.mean((2, 3)))


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
    return LICO(Net(), Prompts(), LossOptions(**{**dict(mm_features='pooled', mm_rows='class', mm_text='raw', tau='fixed', tau_init=0.4), **options})).double()


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
    each = [(model.mapping(r) if text == 'mapped' else r)[slice(None) if rows == 'all' else -1] for r in model.prompts.rows]
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
        centred.matching(maps, maps.flatten(2), *centred.text(y))


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
    assert out.loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()) and torch.isclose(out.stats['entropy_text'], torch.ones(()).double())


def test_without_the_diagonal():
    model, (x, y) = lico(mm_diagonal='out'), batch()
    out, texts = model(x, y), model.prompts.rows[y, -1]
    torch.testing.assert_close(out.mm, manifold_matching(features(model, x), texts, 0.4, diagonal='out'))
    torch.testing.assert_close(out.stats['entropy_text'].double(), row_entropy(log_adjacency(texts, 0.4, diagonal='out'))/torch.tensor(7.).double().log())
    for B in (1, 2):
        out = model(*batch(B))
        out.loss.backward()
        assert out.mm == 0 and out.stats['entropy_image'].isnan() and out.stats['entropy_text'].isnan()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
