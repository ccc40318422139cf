"Times taken in turn, the rows they make, and the notebook; never an absolute time."
import math, re, sys
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd, pytest, torch
from torch import nn

from lico.evidence.pages import parameters
from lico.evidence import benchmark as b, passes
from lico.evidence.timing import alternate, benchmark_table, best_of, best_passes, draw_benchmark, exponent, missing, \
    peak_memory, row
from lico.backbones import create_backbone
from lico.losses import sinkhorn
from lico.runs import Run, build, load_data
from test_notebooks import run

CPU = torch.device('cpu')


def test_candidates_take_turns_and_the_first_round_does_not_count():
    called, now = [], iter(range(100))
    times = alternate(dict(a=lambda: called.append('a'), b=lambda: called.append('b')), 3, clock=lambda: next(now))
    assert called == ['a', 'b']*4 and times.shape == (3, 2) and (times.to_numpy() == 1).all()


@pytest.mark.parametrize('values, sense, met', [([.9, .8, .7], '≥', 'no'), ([.9, .85, .7], '≥', 'yes'),
                                                ([.9, .8, .7], '≤', 'yes'), ([.9, .86, .7], '≤', 'no'),
                                                ([], '≥', ''), ([.9], '', '')])
def test_the_median_decides(values, sense, met):
    r = row(1, 'a', 'b', values, .85, sense)
    assert r['met'] == met and (not values or r['low'] <= r['value'] <= r['high'])


def test_the_power_of_a_growth():
    assert exponent([1, 10, 100], [2., 20., 200.]) == pytest.approx(1)
    assert exponent([2, 4, 8], [4., 16., 64.]) == pytest.approx(2)


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.zeros(1000, 1000)
    assert peak_memory(lambda: x + 1 + 1, CPU) == pytest.approx(2*x.nbytes, rel=1e-3)
    assert peak_memory(lambda: [x.add_(1) for _ in range(5)], CPU) < 0.01*x.nbytes


@pytest.mark.parametrize('shape', [(64, 128, 13), (8, 2048, 13)])
@pytest.mark.parametrize('eps', [0.1, 0.003])
def test_transport_holds_at_most_four_cost_matrices(shape, eps):
    C = 4*torch.rand(shape)
    assert peak_memory(lambda: sinkhorn(C, eps, n_iter=20), CPU) <= 4*C.numel()*4


def test_the_best_forward_pass_is_of_the_same_network():
    net = create_backbone('wrn_10_1', 10, 16).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    passes = best_passes(net, 16, CPU, 2)
    [forward() for forward, _ in passes.values()]
    assert len(passes) == 4 and all(name.startswith(f'{images} images, ') for name, (_, images) in passes.items())
    assert all(re.match('[12] images, (plain|folded), (contiguous_format|channels_last)', name) for name in passes)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_no_one_moment_decides_which_pass_is_the_best():
    times = pd.DataFrame(dict(a=[4., 1., 4.], b=[3., 3., 9.], other=[0., 0., 0.]))
    each, name = best_of(dict(a=(None, 2), b=(None, 2)), times)
    assert name == 'b' and each.tolist() == [1.5, 1.5, 4.5]


def test_what_cannot_be_measured_is_a_row_that_says_why(monkeypatch):
    monkeypatch.setattr(b, 'has_bfloat16', lambda where: False)
    monkeypatch.setitem(sys.modules, 'torchcam.metrics', None)
    o = SimpleNamespace(where=CPU, network='wrn_10_1', image_size=16, rounds=1, command=False)
    rows = [*b.precisions(o), *passes.other_libraries(o), *b.first_command(o)]
    told = [r for r in rows if r['number'] != 2]  # pytorch-grad-cam comes with the package
    assert len(told) == 4 and all(r['note'].startswith('not measured: ') and r['met'] == '' for r in told)
    assert benchmark_table(pd.DataFrame(rows)).count('not measured') == 4


def test_products_of_runs_counted_layer_by_layer():
    "Three passes' worth of each layer's, but for the gradient of the images, and cosines; text takes more."
    runs = [Run(labels=40, steps=2, backbone='wrn_10_1', seed=s) for s in (0, 1)]
    net, each = build(runs[0], data := load_data(runs[0])).backbone.eval(), []
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)): m.register_forward_hook(
            lambda m, _, out: each.append(2*out.numel()*m.weight[0].numel()))
    net(data.normalise(data.train.x))
    step = 3*sum(each) - each[0] + 2*40**2*math.prod(net.feature_shape)
    assert len(data.train) == 40 and b._products(runs) == 2*2*step
    assert b._products([*runs, replace(runs[0], preset='repaired')]) == b._products(runs), 'the same run again'
    assert b._products([replace(runs[0], method='LICO')]) > 5*b._products(runs[:1])


def test_a_picture_of_rows_that_are_and_are_not_reached():
    df = pd.DataFrame([row(1, 'a', 'b', [2.], 1, '≥'), row(2, 'c', 'd', [2.], 1, '≤'),
                       row(10, 'e', 'f', [0.], 0.3, '≤'), missing(5, 'g', 'h', 'why')])
    (ax,) = draw_benchmark(df).axes
    at = ax.collections[0].get_offsets()[:, 0].tolist()
    assert at == pytest.approx([2, 0.5, 10])
    assert [t.get_text() for t in ax.get_yticklabels()] == ['a / b', 'c / d', 'e / f']


@pytest.mark.slow
def test_smoke(lico_root):
    run('benchmark', profile='smoke')
    df = pd.read_csv(lico_root/'data'/'smoke'/'benchmark'/'results.csv')
    assert {1, 2, 3, 4, 6, 7, 8, 12, 13} == set(df.number) and df.hardware.notna().all() and df.id.is_unique
    assert df.value.notna().sum() > 15 and df[df.value.isna()].note.str.startswith('not measured').all()


def test_rows_are_added_to_those_of_before(lico_root, monkeypatch):
    monkeypatch.setattr(b, 'has_bfloat16', lambda where: False)  # where there is one, row 5 brings rows 4
    def measure(**o):
        return b.benchmark(parameters('benchmark', dict(profile='smoke', out=str(lico_root/'x'), **o)))
    first, both = measure(rows='8', stored=''), measure(rows='5', stored='add')
    assert set(first.number) == {8} and set(both.number) == {5, 8}
