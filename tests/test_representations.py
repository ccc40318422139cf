"Figures 9 and 10 against independent references: scipy's softmax and KL, the records of `run`, and splits whose answer is known."
import os, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from scipy.special import log_softmax, rel_entr

from lico.backbones import create_backbone
from lico.config import root
from lico.curves import Kept, composed, curves, gap, kept_along, test_maps as maps_of
from lico.data import load
from lico.experiments import Run, build, load_data, run, runs_folder
from lico.representations import centroids, describe, easier_than, embed, linear_probe, ordinal, pooled
from lico.text import load_text_encoder

TOP = root()
rng = np.random.default_rng(0)
y = np.repeat(np.arange(10), 20)


@pytest.fixture(scope='module')
def encoder(): return load_text_encoder('minilm')


@pytest.mark.parametrize('name', ['wrn_10_1', 'resnet10t', 'vit_tiny_patch16_224'])
def test_pooled_is_what_the_last_layer_reads(name):
    "Heard at the last layer's input by a hook, with a batch that does not divide the images; the mode is left alone."
    data, heard = load('digits', image_size=32), []
    net = create_backbone(name, image_size=32)
    net.get_classifier().register_forward_hook(lambda module, args, out: heard.append(args[0]))
    with torch.no_grad(): net.eval()(data.normalise(data.test.x[:10]))
    net.train()
    out = pooled(net, data, data.test[:10], batch_size=4)
    assert net.training and out.shape == (10, net.num_features)
    torch.testing.assert_close(out, heard[0], rtol=1e-4, atol=1e-5)


def test_centroids_and_order():
    features = rng.normal(size=(200, 4))
    np.testing.assert_allclose(centroids(features, y), pd.DataFrame(features).groupby(y).mean())
    place = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    assert ordinal(place[y][:, None]*np.ones((1, 3)), y, place) == pytest.approx(1) and abs(ordinal(place[y][:, None], y, range(10))) < 0.9
    mixed = rng.permutation(200)
    assert ordinal(features[mixed], torch.tensor(y[mixed]), range(10)) == pytest.approx(ordinal(torch.tensor(features), y, range(10)))


def test_a_plane_splits_what_it_can():
    far = 30*np.eye(10)[y] + rng.normal(size=(200, 10))
    group = np.arange(10) < 4
    assert linear_probe(far, group[y]) > 99, 'classes in sorted order must not fall into folds one by one'
    xor = rng.choice([-1, 1], (200, 2))
    assert linear_probe(xor + rng.normal(0, .1, (200, 2)), xor[:, 0] == xor[:, 1]) < 70
    assert easier_than(far, y, group, n=5) == 50
    assert easier_than(y[:, None] + rng.normal(0, .1, (200, 1)), y, group, n=5) == 100
    assert easier_than(y[:, None] + rng.normal(0, .1, (200, 1)), y, np.arange(10) % 5 < 2, n=8) < 75


def test_describe_measures_what_the_names_allow():
    features = rng.normal(size=(200, 5)) + 5*y[:, None]
    digits, points = describe(features, y, tuple('0123456789'))
    assert points.shape == (200, 2) and digits['ordinal'] > 0.95 > digits['ordinal_0_as_10'] and not any('vehicles' in k for k in digits)
    names = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
    cifar = describe(features, y, names)[0]
    assert not any('ordinal' in k for k in cifar) and cifar['vehicles'] < 90 and np.isfinite(list(cifar.values())).all()
    assert {'trustworthiness', 'silhouette', 'silhouette_embedded'} == set(describe(features, y, tuple('abcdefghij'))[0])
    np.testing.assert_array_equal(embed(features[:40], 3), embed(features[:40], 3))


@pytest.mark.filterwarnings('ignore::lico.training.DegenerateLossWarning')
@pytest.mark.parametrize('method', ['CE', 'LICO'])
def test_kept_weights_are_those_of_the_record(lico_root, encoder, method):
    "Watching changes nothing: the last weights are those that `run` stores, the first those of `build`, in between all differ."
    from safetensors.torch import load_file
    r = Run(labels=40, backbone='wrn_10_1', method=method, steps=3, seed=4)
    data, record = load_data(r), run(r, progress=False)
    kept = kept_along(r, (0, 2, 3), data, encoder)
    stored = load_file(runs_folder()/record['id']/'model.safetensors')
    assert list(kept) == [0, 2, 3] and kept[3].keys() == stored.keys()
    for k, v in stored.items(): assert torch.equal(v, kept[3][k]), k
    for k, v in build(r, data, encoder).state_dict().items(): assert torch.equal(v, kept[0][k]), k
    assert all(not torch.equal(kept[a]['backbone.fc.weight'], kept[b]['backbone.fc.weight']) for a, b in ((0, 2), (2, 3)))


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(1, 1)

    def forward(self, x, y): return self.backbone(x)


def test_kept_copies_do_not_move():
    kept = Kept(Tiny(), {1})
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
    batches = maps_of(model.backbone, data, images=150)
    assert [len(y) for _, y in batches] == [64, 64] and torch.equal(batches[0][1], maps_of(create_backbone('wrn_10_1', image_size=16).eval(), data)[0][1])
    assert len(batches[0][1].unique()) > 7, 'batches are of mixed classes'
    wanted = []
    for maps, y in batches:
        with torch.no_grad(): text = model.prompts(y)
        F, G = (maps, model.mapping(text).detach()) if preset == 'paper' else (maps.mean((2, 3)), text[:, -1])
        wanted.append(eq2(F.numpy(), G.numpy(), model.tau().item()))
    assert gap(model, batches)['kl'] == pytest.approx(np.mean(wanted), rel=1e-3)


@pytest.mark.filterwarnings('ignore::lico.training.DegenerateLossWarning')
def test_curves_exchange_one_thing_at_a_time(encoder, lico_root):
    r = Run(labels=40, backbone='wrn_10_1', method='LICO', steps=4, seed=1, options=dict(tau_init=0.5))
    df, data = curves(r, points=2, images=64), load_data(r)
    assert sorted(df.step.unique()) == [0, 1, 4] and (df.seed == 1).all()
    end = df[df.step == 4].set_index(['method', 'prompts', 'tau_of'])
    lico, ce = kept_along(r, (0, 4), data, encoder), kept_along(Run(**{**r.__dict__, 'method': 'CE', 'options': r.options}), (0, 4), data)
    model, places = build(r, data, encoder).eval(), {'first': 0, 'learned': 4}
    for (method, prompts, tau), row in end.iterrows():
        state = {**(lico if method == 'LICO' else ce)[4], **{k: v for k, v in lico[places[prompts]].items() if k.startswith(('prompts', 'mapping'))}, 'tau.value': lico[places[tau]]['tau.value']}
        model.load_state_dict(state)
        assert row.kl == pytest.approx(gap(model, maps_of(model.backbone, data, 64))['kl'], rel=1e-4), (method, prompts, tau)
    assert end.loc[('CE', 'first', 'first')].tau == pytest.approx(0.5) and end.loc[('CE', 'first', 'learned')].tau == end.loc[('LICO', 'learned', 'learned')].tau != 0.5
    assert end.kl.nunique() == 5


def test_composed_takes_each_part_from_its_place():
    a, b, c = ({f'{k}.w': (n, k) for k in ('backbone', 'prompts', 'mapping', 'tau')} for n in 'abc')
    assert composed(a, b, c) == {'backbone.w': ('a', 'backbone'), 'prompts.w': ('b', 'prompts'), 'mapping.w': ('b', 'mapping'), 'tau.w': ('c', 'tau')}


@pytest.mark.parametrize('name, files', [('figure9', {'points.csv'}), ('figure10', set())])
def test_smoke_and_drawn_again_from_files(tmp_path, name, files):
    "The smoke profile from any folder; then, without data or records, the same table from the stored files alone."
    env = {**os.environ, 'LICO_ROOT': str(tmp_path), 'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    mill = lambda *args: subprocess.run([Path(sys.executable).with_name('papermill'), TOP/'nbs'/f'{name}.ipynb', 'x.ipynb', '-p', 'profile', 'smoke', *args], cwd=tmp_path, env=env, capture_output=True, text=True)
    p = mill()
    assert p.returncode == 0, p.stderr[-3000:]
    out = tmp_path/'data'/'smoke'/name
    assert {f.name for f in out.iterdir()} == {'results.csv', 'table.md', 'figure.png', 'figure.svg'} | files
    df, table = pd.read_csv(out/'results.csv'), (out/'table.md').read_text()
    assert {'seed', 'code', 'hardware', 'torch', 'commit', 'profile'} <= set(df) and 'digits' in table and 'smoke' in table
    shutil.move(out, tmp_path/'kept'); shutil.rmtree(tmp_path/'data')
    p = mill('-p', 'stored', 'only', '-p', 'out', str(tmp_path/'kept'))
    assert p.returncode == 0, p.stderr[-3000:]
    assert (tmp_path/'kept'/'table.md').read_text() == table and not (tmp_path/'data').exists()
