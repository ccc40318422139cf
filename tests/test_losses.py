"The losses against reference libraries, float64 gradients and properties that hold for every input."
import math
import numpy as np, ot, pandas as pd, pytest, scipy.optimize, scipy.stats, torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from lico.losses import (LossOptions, adjacency, cost_matrix, kl_rows, log_adjacency, manifold_matching, mean_cosine,
                         ot_alignment, row_entropy, sinkhorn)
from lico.temperatures import calibrated_taus, inactive, other_mass

torch.set_num_threads(1)

def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def feature_rows(B=16, N=128, M=13, width=64, dtype=torch.float32):
    """Rows as in training: feature maps after a leaky ReLU, one of them dead, and prompts whose rows share most of
    what they say."""
    F = torch.nn.functional.leaky_relu(normal(B, N, width, dtype=dtype) + normal(1, N, 1, seed=1, dtype=dtype), 0.1)
    F[:, 0] = 0
    return F, normal(1, M, width, seed=2, dtype=dtype) + 0.3*normal(B, M, width, seed=3, dtype=dtype)

# manifold matching

@pytest.mark.parametrize('diagonal', ('in', 'out'))
@pytest.mark.parametrize('sign', (-1, 1))
@pytest.mark.parametrize('normalise', (True, False))
@pytest.mark.parametrize('distance', ('euclidean', 'cosine'))
def test_manifold_matching_is_what_a_loop_gives(distance, normalise, sign, diagonal):
    F, G, tau = normal(7, 5, 3).numpy(), normal(7, 2, 3, seed=1).numpy(), 0.4
    def matrix(x):
        x = [v.ravel()/(np.linalg.norm(v) if normalise else 1) for v in x]
        D = (lambda a, b: np.sqrt(((a - b)**2).sum()) if distance == 'euclidean'
             else 1 - a@b/np.linalg.norm(a)/np.linalg.norm(b))
        E = np.array([[math.exp(sign*D(a, b)/tau)*(a is not b or diagonal == 'in') for b in x] for a in x])
        return E/E.sum(1, keepdims=True)
    AF, AG = matrix(F), matrix(G)
    choice = dict(distance=distance, normalise=normalise, sign=sign, diagonal=diagonal)
    assert np.allclose(adjacency(torch.tensor(F), tau, **choice), AF, rtol=1e-9)
    expected = sum(AG[i, j]*math.log(AG[i, j]/AF[i, j]) for i in range(7) for j in range(7) if AG[i, j])/7
    got = manifold_matching(torch.tensor(F), torch.tensor(G), tau, **choice)
    assert math.isclose(got, expected, rel_tol=1e-9)
    with np.errstate(divide='ignore'): AF = np.where(AG > 0, np.log(AF), 0)
    assert math.isclose(got, torch.nn.functional.kl_div(torch.tensor(AF), torch.tensor(AG), reduction='batchmean'),
                        rel_tol=1e-9)
    assert math.isclose(row_entropy(log_adjacency(torch.tensor(G), tau, **choice)),
                        scipy.stats.entropy(AG, axis=1).mean(), rel_tol=1e-9)

def test_entropy_and_cosine_against_loops():
    x = normal(6, 4)
    A, u = adjacency(x, 0.5).numpy(), x.numpy()/np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    assert math.isclose(row_entropy(log_adjacency(x, 0.5)), -(A*np.log(A)).sum()/6, rel_tol=1e-9)
    assert math.isclose(mean_cosine(x), np.mean([u[i]@u[j] for i in range(6) for j in range(6) if i != j]),
                        abs_tol=1e-6)

@pytest.mark.parametrize('distance', ('euclidean', 'cosine'))
def test_gradients_of_manifold_matching(distance):
    F, G, tau = (normal(5, 3, 2).requires_grad_(), normal(5, 4, seed=1).requires_grad_(),
                 torch.tensor(0.6, dtype=torch.float64, requires_grad=True))
    torch.autograd.gradcheck(lambda *a: manifold_matching(*a, distance=distance), (F, G, tau))
    torch.autograd.gradcheck(lambda *a: manifold_matching(*a, distance=distance, normalise=False, sign=1), (F, G, tau))
    torch.autograd.gradcheck(lambda *a: manifold_matching(*a, distance=distance, diagonal='out'), (F, G, tau))

def test_second_derivatives_of_manifold_matching():
    F, G = normal(4, 3, 2).requires_grad_(), normal(4, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda F, G: manifold_matching(F, G, 0.5), (F, G))


def test_the_same_prompt_twice_in_a_batch():
    "As in every batch with two images of a class: the gradient is that of the distances which are not zero."
    G = normal(3, 4)
    F = normal(4, 4, seed=1)
    twice = lambda G: manifold_matching(F, G[[0, 1, 2, 0]], 0.5)
    torch.autograd.gradcheck(twice, (G.requires_grad_(),))
    torch.autograd.gradcheck(lambda G: manifold_matching(F, G[[0, 1, 2, 0]], 0.5, diagonal='out'), (G,))

@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize('x',
                         (torch.ones(4, 3, 2), torch.zeros(4, 3, 2), torch.cat([torch.zeros(2, 6), torch.eye(2, 6)]),
                          torch.ones(1, 5), 1e-30*torch.ones(3, 2)),
                         ids=('identical', 'zero', 'some zero', 'one', 'tiny'))
@pytest.mark.parametrize('diagonal', ('in', 'out'))
@pytest.mark.parametrize('distance', ('euclidean', 'cosine'))
def test_degenerate_samples_have_finite_values_and_gradients(x, distance, diagonal, dtype):
    x = x.to(dtype, copy=True).requires_grad_()
    tau = torch.tensor(0.01, requires_grad=True)
    log_p = log_adjacency(x, tau, distance=distance, diagonal=diagonal)
    if diagonal == 'out':
        assert (log_p.diagonal() == -math.inf).all()
        assert torch.allclose(log_p.exp().sum(1), torch.tensor(float(len(x) > 1), dtype=log_p.dtype))
        loss = kl_rows(log_p, log_p.detach()) + row_entropy(log_p)
        loss.backward(retain_graph=True)
        assert loss.isfinite() and x.grad.isfinite().all() and tau.grad.isfinite()
        assert (len(x) > 1 or loss == 0 == x.grad.abs().max())
        log_p = log_p.masked_fill(torch.eye(len(x), dtype=torch.bool), 0)
    assert log_p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (log_p*torch.arange(len(x))).sum().backward()
    assert (log_p.isfinite().all() and tau.grad.isfinite() and x.grad.isfinite().all()
            and x.grad.abs().max()*(x.detach().abs().max() or 1) < 1e4)
    if distance == 'euclidean' and diagonal == 'in': assert torch.equal(log_p.diagonal(), log_p.max(1)[0])

def test_without_the_diagonal_a_loss_of_two_samples_is_zero_whatever_they_are():
    F, G = normal(2, 3), normal(2, 3, seed=1)
    assert manifold_matching(F, G, 0.1, diagonal='out') == 0 == row_entropy(log_adjacency(F, 0.1, diagonal='out'))
    assert manifold_matching(F, G, 0.1) > 0.001

@pytest.mark.filterwarnings('ignore:Anomaly Detection')
def test_without_the_diagonal_a_batch_of_one_passes_where_nan_is_looked_for():
    x = normal(1, 3).requires_grad_()
    with torch.autograd.detect_anomaly(): manifold_matching(x, normal(1, 2), 0.5, diagonal='out').backward()
    assert (x.grad == 0).all()

def test_without_the_diagonal_class_blind_images_are_not_pulled():
    "All at one cosine c: the loss does not depend on c, and with the diagonal it does."
    G = normal(3, 4)[[0, 0, 1, 1, 2]]
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    blind = torch.cat([c.sqrt().expand(5, 1), (1 - c).sqrt()*torch.eye(5, dtype=torch.float64)], 1)
    pull = {d: torch.autograd.grad(manifold_matching(blind, G, 0.3, diagonal=d), c, retain_graph=True)[0].abs()
            for d in ('in', 'out')}
    assert pull['out'] < 1e-12 < 0.1 < pull['in']

def test_distance_zero_is_zero_and_small_distances_are_right_in_float32():
    x = normal(6, 8192, dtype=torch.float32)
    x[1], x[2] = x[0], x[0] + 1e-4*x[2]
    log_p = log_adjacency(x, 1., normalise=False).double()
    D = log_p.diagonal()[:, None] - log_p
    true = torch.tensor([[(a - b).norm() for b in x.double()] for a in x.double()])
    assert D[0, 1] == 0 and (D.diagonal() == 0).all()
    log_p = log_adjacency(x, 1e-3, normalise=False).double()
    assert torch.allclose((log_p.diagonal()[:, None] - log_p)*1e-3, true, rtol=1e-4)

vectors = st.integers(2, 6).flatmap(lambda B: st.tuples(st.just(B), st.integers(1, 5), st.integers(1, 4),
                                                        st.integers(0, 10**6)))
choices = st.fixed_dictionaries(dict(distance=st.sampled_from(('euclidean', 'cosine')), normalise=st.booleans(),
                                     sign=st.sampled_from((-1, 1)),
                                    diagonal=st.sampled_from(('in', 'out'))))

@settings(deadline=None, max_examples=60)
@given(vectors, st.floats(0.01, 100), choices)
def test_properties_of_manifold_matching(shape, tau, choice):
    B, n, m, seed = shape
    F, G = normal(B, n, 3, seed=seed), normal(B, m, 2, seed=seed + 1)
    A, loss = adjacency(F, tau, **choice), manifold_matching(F, G, tau, **choice)
    assert torch.allclose(A.sum(1), torch.ones(B, dtype=A.dtype)) and (A >= 0).all() and loss >= -1e-12
    assert manifold_matching(F, F.clone(), tau, **choice) == 0
    assert row_entropy(log_adjacency(F, tau, **choice)) <= math.log(B - (choice['diagonal'] == 'out')) + 1e-9
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(adjacency(F[order], tau, **choice), A[order][:, order])
    assert torch.isclose(manifold_matching(F[order], G[order], tau, **choice), loss)
    if choice['normalise']:
        assert torch.allclose(adjacency(F*torch.arange(1, B + 1)[:, None, None], tau, **choice), A, atol=1e-6)

def test_a_large_tau_empties_the_loss():
    F, G = normal(8, 3), normal(8, 3, seed=1)
    assert manifold_matching(F, G, 1e3) < 1e-6 < 1e-3 < manifold_matching(F, G, 1.)

# calibration

def labelled(B=12, K=4):
    y = torch.arange(B) % K
    return normal(B, 5), normal(K, 6, seed=1)[y], y

@pytest.mark.parametrize('diagonal', ('in', 'out'))
@pytest.mark.parametrize('distance, normalise', (('euclidean', True), ('euclidean', False), ('cosine', True)))
@pytest.mark.parametrize('share', (0.01, 0.25, 0.6))
def test_calibrated_temperatures_solve_their_equations(share, distance, normalise, diagonal):
    "Against scipy's root finder over a loop, and by what they shall bring about, at every scale."
    F, G, y = labelled()
    for scale in (1., 1e-3, 1e3):
        image, text = calibrated_taus(scale*F, scale*G, y, share, distance, normalise, diagonal)
        A = adjacency(scale*G, text, distance, normalise, diagonal=diagonal).numpy()
        assert math.isclose(np.mean([sum(A[i, j] for j in range(12) if y[j] != y[i]) for i in range(12)]), share,
                            rel_tol=1e-6)
        assert math.isclose(scipy.stats.entropy(A, axis=1).mean(),
            row_entropy(log_adjacency(scale*F, image, distance, normalise, diagonal=diagonal)), rel_tol=1e-6)
    solve = lambda log_tau: other_mass(log_adjacency(scale*G, math.exp(log_tau), distance, normalise,
                                                     diagonal=diagonal), y).item() - share
    assert math.isclose(math.exp(scipy.optimize.brentq(solve, math.log(text) - 5, math.log(text) + 5, xtol=1e-12)),
                        text, rel_tol=1e-6)

def test_a_sample_alone_in_its_class_says_nothing_of_tau_without_the_diagonal():
    F, G, y = labelled()
    y[0], G[0] = 9, normal(6, seed=7)
    alone = [other_mass(log_adjacency(G, t, diagonal='out'), y) for t in (1e-3, 1.)]
    assert alone[0] < 1e-3 < 0.1 < alone[1]
    A = adjacency(G, 0.5, diagonal='out')
    assert torch.isclose(other_mass(A.log(), y), torch.stack([A[i, y != y[i]].sum() for i in range(1, 12)]).mean())
    A = adjacency(G, 0.5)
    assert torch.isclose(other_mass(A.log(), y), torch.stack([A[i, y != y[i]].sum() for i in range(12)]).mean())

@pytest.mark.parametrize('case, message', [
    (lambda F, G, y: (F, G[:1].expand(12, 6), 0*y), "of 12 samples of 1 classes a share from 0 to 0 of the text's mass "
                                                    "can lie on other classes, not tau_share = 0.25: use larger"),
    (lambda F, G, y: (F, G[:1].expand(12, 6), y), 'of 12 samples of 4 classes a share from 0.75 to 0.75 of'),
    (lambda F, G, y: (F[:2], G[:2], y[:2], 0.6),
     'of 2 samples of 2 classes a share from 0 to 0.5 of .*, not tau_share = 0.6'),
    (lambda F, G, y: (F[:4], G[:4], y[:4], 0.25, 'euclidean', True, 'out'),
     r'of 4 samples of 4 classes a share from nan to nan of .*\(nan: no sample has another of its class\)'),
    (lambda F, G, y: (F[:1], G[:1], y[:1]), 'of 1 samples of 1 classes a share from 0 to 0'),
    (lambda F, G, y: (F[:1].expand(12, 5), G, y), "the images' rows can have a mean entropy from 2.48 to 2.48 nats, "
                                                  "not the text's .*: their features are too much alike")])
def test_what_cannot_be_calibrated_is_refused(case, message):
    with pytest.raises(ValueError, match=message) as e: calibrated_taus(*case(*labelled()))
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('image, text, cosine, reason', [
    (0.5, 0.5, 0.5, None), (0.995, 0.005, 0.98, None), (0.9951, 0.5, 0.5, 'uniform'), (0.5, 0.9951, 0.5, 'uniform'),
    (0.0049, 0.5, 0.5, 'identity'), (0.5, 0.0049, 0.5, 'identity'),
    (0.0049, 0.9951, 0.5, 'uniform'), (0.9951, 0.9951, 0.981, 'collapsed'), (0.5, 0.5, 0.981, 'collapsed'),
    (0.0005, 0.6, 0.5, 'identity'),
    (math.nan, 0.999, 0.99, None), (0.5, None, 0.99, None), (0.999, 0.5, None, 'uniform'),
    (0.999, 0.5, math.nan, 'uniform')])
def test_what_counts_as_inactive(image, text, cosine, reason):
    row = dict(entropy_image=image, entropy_text=text, cosine=cosine)
    assert inactive(row) == reason == inactive(pd.Series(row, dtype=object))
    assert inactive(dict(cosine=cosine)) is None, 'without matching there is nothing that could be inactive'

# optimal transport

def references(C, eps):
    return torch.stack([torch.tensor(ot.bregman.sinkhorn(np.full(len(c), 1/len(c)), np.full(len(c.T), 1/len(c.T)), c,
                                                         eps, method='sinkhorn_log',
                                                         numItermax=20000, stopThr=1e-13)) for c in C.numpy()])

def test_cost_matrix_against_pot_and_zero_rows():
    F, G = normal(3, 5, 4), normal(3, 2, 4, seed=1)
    unit = lambda x: (x/x.norm(dim=2, keepdim=True)).numpy()
    assert np.allclose(cost_matrix(F, G), [ot.dist(f, g, metric='sqeuclidean') for f, g in zip(unit(F), unit(G))],
                       atol=1e-12)
    F[0, 0] = 0
    F.requires_grad_()
    cost_matrix(F, G).sum().backward()
    assert (cost_matrix(F, G)[0, 0].tolist() == pytest.approx([1, 1], abs=1e-12) and (F.grad[0, 0] == 0).all()
            and F.grad.isfinite().all())

@pytest.mark.parametrize('eps', (0.05, 0.1, 0.5))
@pytest.mark.parametrize('shape', ((3, 16, 13), (2, 5, 9), (2, 1, 6), (2, 6, 1), (1, 1, 1)))
def test_sinkhorn_plan_by_plan_against_pot(shape, eps):
    B, N, M = shape
    C = cost_matrix(normal(B, N, 8), normal(B, M, 8, seed=1))
    assert torch.allclose(sinkhorn(C, eps, n_iter=20000, tol=1e-13), references(C, eps), rtol=1e-6, atol=1e-10)

def logarithmic(C, eps, n_iter, tol):
    "What `sinkhorn` computes, in logarithms throughout; the plan, and how many updates it took."
    N, M = C.shape[1:]
    log_p = (-C/eps).log_softmax(2) - math.log(N)
    for k in range(n_iter):
        excess = log_p.logsumexp(1, keepdim=True) + math.log(M)
        if tol and excess.expm1().abs().mean((1, 2)).max() < tol: return log_p.exp(), k
        log_p = (log_p - excess).log_softmax(2) - math.log(N)
    return log_p.exp(), n_iter

@pytest.mark.parametrize('eps', (1, 0.1, 0.01, 1e-3))
@pytest.mark.parametrize('shape, n_iter, tol', (((3, 40, 13), 1, 0), ((3, 40, 13), 7, 0), ((3, 40, 13), 500, 1e-4),
                                                ((2, 1, 5), 9, 0), ((2, 6, 1), 9, 0), ((2, 300, 2), 60, 0)))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_the_kernel_says_what_logarithms_say(shape, n_iter, tol, eps, dtype):
    "Also where the kernel alone would underflow, and in columns that next to nothing goes to at first."
    C = 4*torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    C[:, :, 0] = C[:, :, 0]/4 + 3  # far from every row
    before, (plan, updates) = C.clone(), logarithmic(C, eps, n_iter, tol)
    ours, NM = sinkhorn(C, eps, n_iter, tol), C[0].numel()
    tolerance = 3e-6/eps if dtype == torch.float32 else 1e-9  # C/eps is rounded
    assert (ours - plan).abs().max()*NM < tolerance*max(1, NM/8) and torch.equal(C, before)
    assert torch.allclose(ours.sum(2), torch.tensor(1/C.shape[1], dtype=dtype))
    if tol: assert torch.equal(sinkhorn(C, eps, updates, tol), ours)

def test_the_kernel_s_gradient_is_that_of_logarithms():
    C = 4*torch.rand(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for eps in (0.5, 2e-3):
        ours, theirs = C.clone().requires_grad_(), C.clone().requires_grad_()
        weight = normal(2, 6, 4, seed=2)
        (sinkhorn(ours, eps, 8, 0)*weight).sum().backward()
        (logarithmic(theirs, eps, 8, 0)[0]*weight).sum().backward()
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)

def test_iterations_are_those_of_the_paper():
    "k iterations with no early stop are k pairs of updates of Eq. 7, and a last one of the rows."
    C = cost_matrix(normal(1, 6, 4), normal(1, 5, 4, seed=1))
    K, N, M = (-C[0]/0.1).exp().numpy(), 6, 5
    v = np.ones(M)
    for k in range(4):
        u = 1/N/(K@v)
        assert np.allclose(sinkhorn(C, 0.1, n_iter=k, tol=0)[0], u[:, None]*K*v, rtol=1e-9)
        v = 1/M/(K.T@u)

def test_transport_value_against_linear_programming():
    F, G = normal(3, 6, 4), normal(3, 4, 4, seed=1)
    C = cost_matrix(F, G).numpy()
    rows, columns = np.kron(np.eye(6), np.ones(4)), np.kron(np.ones(6), np.eye(4))
    exact = [scipy.optimize.linprog(c.ravel(), A_eq=np.vstack([rows, columns]), b_eq=[1/6]*6 + [1/4]*4).fun for c in C]
    assert math.isclose(ot_alignment(F, G, eps=1e-3, n_iter=20000, tol=1e-12), np.mean(exact), rel_tol=1e-3)

def test_regularised_value_against_pot():
    F, G = normal(2, 6, 4), normal(2, 4, 4, seed=1)
    C = cost_matrix(F, G)
    P = references(C, 0.2)
    expected = (P*C).sum((1, 2)) + 0.2*(P*P.log()).sum((1, 2))
    assert math.isclose(ot_alignment(F, G, 0.2, 5000, 1e-13, value='regularised'), expected.mean(), rel_tol=1e-9)

@pytest.mark.parametrize('value', ('transport', 'regularised'))
def test_unrolled_gradient(value):
    F, G = normal(2, 4, 3).requires_grad_(), normal(2, 3, 3, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda *a: ot_alignment(*a, eps=0.2, n_iter=7, tol=0, grad='unrolled', value=value),
                             (F, G))
    torch.autograd.gradcheck(lambda F, G: sinkhorn(cost_matrix(F, G), 0.2, 7, 0), (F, G))

def test_envelope_gradient_is_that_of_the_converged_regularised_value():
    "Whichever value is told."
    F, G, h = normal(2, 4, 3), normal(2, 3, 3, seed=1), 1e-5
    solve = dict(eps=0.1, n_iter=20000, tol=1e-13)
    def gradients(value):
        x, y = F.clone().requires_grad_(), G.clone().requires_grad_()
        return torch.autograd.grad(ot_alignment(x, y, **solve, value=value), (x, y))
    def difference(side, k):
        step = torch.zeros_like(side).flatten(); step[k] = h; step = step.view_as(side)
        f = lambda s: ot_alignment(F + s*step if side is F else F, G + s*step if side is G else G, **solve,
                                   value='regularised')
        return ((f(1) - f(-1))/2/h).item()
    for side, *got in zip((F, G), *map(gradients, ('transport', 'regularised'))):
        wanted = [difference(side, k) for k in range(side.numel())]
        for gradient in got: assert np.allclose(gradient.flatten(), wanted, atol=1e-7)

def test_gradient_none_is_a_constant():
    F, G = normal(2, 4, 3).requires_grad_(), normal(2, 3, 3, seed=1)
    for value in ('transport', 'regularised'):
        free = ot_alignment(F, G, grad='none', value=value)
        assert not free.requires_grad and torch.equal(free, ot_alignment(F, G, value=value))

def test_marginals_at_the_defaults():
    """Rows to rounding, columns of the worst sample within 1e-3 (L1), for costs as in training; and it stops as
    soon as that holds."""
    C = cost_matrix(*feature_rows())
    violation = lambda P: (P.sum(1) - 1/13).abs().sum(1).max()
    P = sinkhorn(C)
    assert (P.sum(2) - 1/128).abs().max() < 1e-7 and violation(P) < 1e-3
    stopped = next(k for k in range(101) if torch.equal(sinkhorn(C, n_iter=k, tol=0), P))
    assert 1 < stopped < 100 and violation(sinkhorn(C, n_iter=stopped - 1, tol=0)) > 1e-3

def test_the_worst_sample_decides_when_to_stop():
    C = cost_matrix(normal(2, 6, 4), normal(2, 5, 4, seed=1))
    C[0] = 1
    assert torch.equal(sinkhorn(C, 0.1)[1], sinkhorn(C[1:], 0.1)[0])

@pytest.mark.parametrize('eps', np.geomspace(1e-3, 1, 7))
@pytest.mark.parametrize('grad', ('envelope', 'unrolled'))
@pytest.mark.parametrize('value', ('transport', 'regularised'))
def test_float32_is_stable(eps, grad, value):
    F, G = feature_rows(B=4)
    F.requires_grad_(); G.requires_grad_()
    loss = ot_alignment(F, G, eps=eps, grad=grad, value=value, n_iter=30)
    loss.backward()
    assert F.grad.isfinite().all() and G.grad.isfinite().all()
    assert math.isclose(loss.detach(), ot_alignment(F.detach().double(), G.detach().double(), eps=eps, value=value,
                                                    n_iter=30), rel_tol=1e-3, abs_tol=1e-4)

@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.floats(0.5, 2), st.integers(0, 10**6))
def test_properties_of_plans(B, N, M, eps, seed):
    F, G = normal(B, N, 3, seed=seed), normal(B, M, 3, seed=seed + 1)
    C = cost_matrix(F, G)
    P = sinkhorn(C, eps, n_iter=20000, tol=1e-9)
    assert (C >= 0).all() and (C <= 4 + 1e-12).all() and (P >= 0).all()
    assert (torch.allclose(P.sum(2), torch.tensor(1/N).double(), atol=1e-12)
            and ((P.sum(1) - 1/M).abs().sum(1) < 1e-9).all())
    assert torch.allclose(cost_matrix(F*3, G*torch.arange(1, M + 1)[:, None]), C, atol=1e-9)
    g = torch.Generator().manual_seed(seed)
    n, m = torch.randperm(N, generator=g), torch.randperm(M, generator=g)
    assert torch.allclose(sinkhorn(C[:, n][:, :, m], eps, n_iter=20000, tol=1e-9), P[:, n][:, :, m], atol=1e-8)
    assert ot_alignment(F, G, eps) >= ot_alignment(F, G, eps, value='regularised')

class Largest(TorchDispatchMode):
    "The number of elements of the largest tensor that any operation makes."
    size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size,
                         *(o.numel() for o in torch.utils._pytree.tree_leaves(out) if isinstance(o, torch.Tensor))])
        return out

def test_memory():
    "No [B, N, M, d'] and no [B, B, n] in forward or backward."
    F, G = normal(8, 32, 24).requires_grad_(), normal(8, 16, 24, seed=1).requires_grad_()
    with Largest() as seen: ot_alignment(F, G).backward()
    assert seen.size == 8*32*24
    with Largest() as seen: manifold_matching(F, G, 1.).backward()
    assert seen.size == 8*32*24

# options and errors

@pytest.mark.parametrize('call, message', [
    (lambda x: cost_matrix(x, x[:, :, 1:]), r"features \[2, 3, 4\] and prompts \[2, 3, 3\]: expected \[B, N, "
                                            r"d'\] and \[B, M, d'\] of one batch and one width"),
    (lambda x: cost_matrix(x, x[:1]), r"features \[2, 3, 4\] and prompts \[1, 3, 4\]"),
    (lambda x: cost_matrix(x, x[0]), r"prompts \[3, 4\]"),
    (lambda x: sinkhorn(x[0]), r"cost of shape \[3, 4\]: expected \[B, N, M\]"),
    (lambda x: sinkhorn(x, eps=-1), "eps is -1: expected a positive number"),
    (lambda x: ot_alignment(x, x, grad='implicit'), "unknown grad 'implicit': choose one of envelope, unrolled, none"),
    (lambda x: ot_alignment(x, x, value='dual'), "unknown value 'dual': choose one of transport, regularised"),
    (lambda x: adjacency(x, 0.), "tau is 0: expected a positive number"),
    (lambda x: adjacency(x, torch.tensor(float('nan'))), "tau is nan: expected a positive number"),
    (lambda x: adjacency(x, 1, distance='manhattan'), "unknown distance 'manhattan': choose one of euclidean, cosine"),
    (lambda x: adjacency(x, 1, diagonal='none'), "unknown diagonal 'none': choose one of in, out"),
    (lambda x: adjacency(x, 1, sign=2), "unknown sign 2: choose one of -1, 1"),
    (lambda x: manifold_matching(x, x[:1], 1), "1 samples on one side and 2 on the other"),
    (lambda x: LossOptions(tau='calibrated', mm_sign='plus'),
     "tau = calibrated with mm_sign = plus: most of the mass is on other classes at every τ"),
    (lambda x: LossOptions(tau_share=1), "option tau_share = 1: expected a number from 0.001 to 0.999"),
    (lambda x: LossOptions(tau_init=0), "option tau_init = 0: expected a number"),
    (lambda x: LossOptions(ot_grad='implicit'), "unknown value of option ot_grad: 'implicit'")])
def test_errors_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as e: call(torch.ones(2, 3, 4))
    assert '\n' not in str(e.value)
