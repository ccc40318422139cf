"Figure 10 against independent references: scipy's softmax and KL, the records of `run`, factors by hand."
import math, numpy as np, pandas as pd, pytest, torch

from scipy import stats
from scipy.special import log_softmax, rel_entr

from lico.backbones import create_backbone
from lico.config import root
from lico.evidence.divergence import (Snapshots, compose, curves, divergence_sentences, draw_curves, ends, gap,
                                      map_batches, weights_along)
from lico.evidence.store import write_results
from lico.experiments import Run, build, load_data, runs_folder
from lico.records import run
from lico.text import load_text_encoder

TOP = root()


@pytest.fixture(scope='module')
def encoder(): return load_text_encoder('minilm')


@pytest.mark.filterwarnings('ignore::lico.watch.InactiveMatchingWarning')
@pytest.mark.parametrize('method', ['CE', 'LICO'])
def test_weights_along_are_those_of_the_record(lico_root, encoder, method):
    """Watching changes nothing: the last weights are those that `run` stores, the first those of `build`, in
    between all differ."""
    from safetensors.torch import load_file
    r = Run(labels=40, backbone='wrn_10_1', method=method, steps=3, seed=4)
    data, record = load_data(r), run(r, progress=False)
    kept = weights_along(r, (0, 2, 3), data, encoder)
    stored = load_file(runs_folder()/record['id']/'model.safetensors')
    assert list(kept) == [0, 2, 3] and kept[3].keys() == stored.keys()
    for k, v in stored.items(): assert torch.equal(v, kept[3][k]), k
    for k, v in build(r, data, encoder).state_dict().items(): assert torch.equal(v, kept[0][k]), k
    assert all(not torch.equal(kept[a]['backbone.fc.weight'], kept[b]['backbone.fc.weight'])
               for a, b in ((0, 2), (2, 3)))


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(1, 1)

    def forward(self, x, y): return self.backbone(x)


def test_snapshots_do_not_move():
    kept = Snapshots(Tiny(), {1})
    before = kept.backbone.weight.detach().clone()
    for _ in range(3):
        kept(torch.zeros(1, 1), None)
        with torch.no_grad(): kept.backbone.weight += 1
    assert kept.step == 3 and list(kept.weights) == [1] and torch.equal(kept.weights[1]['backbone.weight'], before + 1)


def eq2(F, G, tau):
    "Eq. 2 with scipy."
    logs = []
    for x in (F, G):
        x = x.reshape(len(x), -1).astype(float)
        x = x/np.linalg.norm(x, axis=1, keepdims=True)
        logs.append(log_softmax(-np.linalg.norm(x[:, None] - x[None], axis=2)/tau, axis=1))
    return rel_entr(np.exp(logs[1]), np.exp(logs[0])).sum(1).mean()


@pytest.mark.parametrize('preset', ['paper', 'repaired'])
def test_gap_is_eq2(encoder, preset):
    r = Run(labels=40, backbone='wrn_10_1', method='LICO', preset=preset)
    data = load_data(r)
    model = build(r, data, encoder).eval()
    batches = map_batches(model.backbone, data, images=150)
    other = map_batches(create_backbone('wrn_10_1', image_size=16).eval(), data)
    assert [len(y) for _, y in batches] == [64, 64] and torch.equal(batches[0][1], other[0][1])
    assert len(batches[0][1].unique()) > 7, 'batches are of mixed classes'
    wanted = []
    for maps, y in batches:
        with torch.no_grad(): text = model.prompts(y)
        F, G = (maps, model.mapping(text).detach()) if preset == 'paper' else (maps.mean((2, 3)), text[:, -1])
        wanted.append(eq2(F.numpy(), G.numpy(), model.tau().item()))
    assert gap(model, batches)['kl'] == pytest.approx(np.mean(wanted), rel=1e-3)


def test_gap_subtracts_the_mean_of_all_classes(encoder):
    r = Run(labels=40, backbone='wrn_10_1', method='LICO', preset='repaired', options=dict(mm_centre=True))
    data = load_data(r)
    model, wanted = build(r, data, encoder).eval(), []
    batches = map_batches(model.backbone, data, images=128)
    with torch.no_grad(): rows = model.prompts(torch.arange(10))[:, -1]
    for maps, y in batches:
        wanted.append(eq2(maps.mean((2, 3)).numpy(), (rows - rows.mean(0))[y].numpy(), model.tau().item()))
    assert gap(model, batches)['kl'] == pytest.approx(np.mean(wanted), rel=1e-3)


def test_temperatures_that_are_not_known_yet_are_refused_before_training(lico_root):
    with pytest.raises(ValueError, match='preset semantic: its temperatures are not known before the first batch'):
        curves(Run(labels=40, backbone='wrn_10_1', method='LICO', preset='semantic', steps=2))
    assert not (lico_root/'data'/'curves').exists()


@pytest.mark.filterwarnings('ignore::lico.watch.InactiveMatchingWarning')
def test_curves_exchange_one_thing_at_a_time(encoder, lico_root):
    r = Run(labels=40, backbone='wrn_10_1', method='LICO', steps=4, seed=1, options=dict(tau_init=0.5))
    df, data = curves(r, points=2, images=64), load_data(r)
    assert sorted(df.step.unique()) == [0, 1, 4] and (df.seed == 1).all()
    end = df[df.step == 4].set_index(['method', 'prompts', 'tau_of'])
    lico, ce = (weights_along(r, (0, 4), data, encoder),
                weights_along(Run(**{**r.__dict__, 'method': 'CE', 'options': r.options}), (0, 4), data))
    model, places = build(r, data, encoder).eval(), {'first': 0, 'learned': 4}
    for (method, prompts, tau), row in end.iterrows():
        text = {k: v for k, v in lico[places[prompts]].items() if k.startswith(('prompts', 'mapping'))}
        state = {**(lico if method == 'LICO' else ce)[4], **text, 'tau.value': lico[places[tau]]['tau.value']}
        model.load_state_dict(state)
        assert row.kl == pytest.approx(gap(model, map_batches(model.backbone, data, 64))['kl'],
                                       rel=1e-4), (method, prompts, tau)
    tau = end.tau
    assert tau[('CE', 'first', 'first')] == pytest.approx(0.5)
    assert tau[('CE', 'first', 'learned')] == tau[('LICO', 'learned', 'learned')] != 0.5
    assert end.kl.nunique() == 5


def test_compose_takes_each_part_from_its_place():
    a, b, c = ({f'{k}.w': (n, k) for k in ('backbone', 'prompts', 'mapping', 'tau')} for n in 'abc')
    assert compose(a, b, c) == {'backbone.w': ('a', 'backbone'), 'prompts.w': ('b', 'prompts'),
                                'mapping.w': ('b', 'mapping'), 'tau.w': ('c', 'tau')}


def toy():
    "Five views of three seeds, two steps; KL after training differs by known factors."
    views = [('CE', 'first', 'first'), ('CE', 'first', 'learned'), ('CE', 'learned', 'learned'),
             ('LICO', 'learned', 'learned'), ('LICO', 'first', 'first')]
    rows = [dict(method=m, prompts=p, tau_of=t, step=k, seed=s, kl=1. if k == 0 else [2, 1, 1, .5 + .1*s, 4][i],
                 tau=1. if k == 0 or t == 'first' else 3., cosine=.5, dataset='digits', labels='all',
                 backbone='wrn_10_1', preset='paper', id=f'{s}-p1')
            for i, (m, p, t) in enumerate(views) for s in range(3) for k in (0, 9)]
    return pd.DataFrame(rows)


def test_factors_are_geometric_means_over_pairs():
    c = ends(toy()).set_index('view')
    lico = c.loc["LICO, learned prompts, learned τ (the paper's curve)"]
    assert (lico['KL after'] == pytest.approx(stats.gmean([.5, .6, .7])) == pytest.approx(lico['factor'])
            and lico['% of looks that fall'] == 100)
    assert c.loc["CE, first prompts, first τ (the paper's curve)"].factor == pytest.approx(2) and (c.n == 3).all()
    d = np.log(np.array([.5, .6, .7])/2)
    low, high = (math.exp(d.mean() + s*stats.t.ppf(.975, 2)*stats.sem(d)) for s in (-1, 1))
    said = divergence_sentences(toy())
    assert f"LICO's KL ends at {math.exp(d.mean()):.3g} ({low:.3g} to {high:.3g}) of the baseline's: 0.5 from τ" in said
    features = f"{2*math.exp(d.mean()):.3g} ({2*low:.3g} to {2*high:.3g}) from the features"
    assert f": 0.5 from τ, 1 from the prompts, {features}." in said, 'no interval where all pairs agree'
    assert "the features alone make it 2." in said
    one = divergence_sentences(toy()[lambda o: o.seed == 0])
    assert "ends at 0.25 of the baseline's: 0.5 from τ, 1 from" in one, 'no interval of one seed'


def test_a_fixed_tau_is_not_exchanged():
    "The view that only exchanges it would repeat the baseline's, and hide it in the picture."
    import matplotlib.pyplot as plt
    fixed = toy().assign(tau=.1, preset='repaired')
    fixed = fixed.assign(kl=fixed.kl.where((fixed.method != 'CE') | (fixed.prompts != 'first') | (fixed.step == 0), 2.))
    both = pd.concat([toy(), fixed]).assign(entropy_image=.5, entropy_text=.5)
    exchanged = 'CE, first prompts, learned τ'
    c = ends(both)
    assert c[c['view'] == exchanged].preset.tolist() == ['paper'] and len(c) == 9
    assert ("of the baseline's: 0.5 from the prompts, "
            in divergence_sentences(both).splitlines()[1] == divergence_sentences(fixed))
    fig = draw_curves(both)
    drawn = [{line.get_color() for line in ax.lines} for ax in fig.axes[:2]]
    assert len(drawn[0]) == 5 and len(drawn[1]) == 4 and drawn[1] < drawn[0]
    plt.close(fig)


def test_rows_of_other_seeds_are_kept(tmp_path):
    "Views and steps share a run's id: none of them may take another's place."
    df = toy()
    write_results(tmp_path, df[df.seed < 2])
    both = write_results(tmp_path, df[df.seed > 0], keep=True)
    assert len(both) == len(df) == 30 and sorted(both.seed.unique()) == [0, 1, 2]


def test_few_images_are_one_batch_and_one_is_none(lico_root):
    data = load_data(Run(dataset='digits', labels=10))
    net = create_backbone('wrn_10_1', 10, 16).eval()
    assert [len(y) for _, y in map_batches(net, data, 12)] == [12]
    with pytest.raises(ValueError, match='images = 1: Eq. 2 compares images with each other'):
        curves(Run(dataset='digits', labels=10, method='LICO', steps=1), images=1)
