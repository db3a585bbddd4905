"""Trace, eigenvalues and density of the Hessian against the dense one."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_reg.engine import ArgumentError, Communicator
from lightning_reg.metrics import (
    HessianTopEigenvalue,
    HessianTrace,
    hessian_eigenvalues,
    hessian_spectrum,
    hessian_trace,
)

_generator = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, dtype=torch.float64, generator=_generator)
Y = torch.randint(0, 3, (24,), generator=_generator)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def loss_of(net, rows=slice(None)):
    return F.cross_entropy(net(X[rows]), Y[rows])


def dense(net, rows=slice(None)):
    """The Hessian by torch.func, over all parameters as one vector."""
    named = dict(net.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat):
        parts = [f.view_as(p) for f, p in zip(flat.split(sizes), named.values(), strict=True)]
        output = functional_call(net, dict(zip(named, parts, strict=True)), X[rows])
        return F.cross_entropy(output, Y[rows])

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    return torch.func.hessian(loss)(flat).numpy()


def test_lanczos_finds_the_dense_eigenvalues_at_both_ends():
    net = network()
    parameters, values = list(net.parameters()), np.linalg.eigvalsh(dense(net))
    top = hessian_eigenvalues(loss_of(net), parameters, 4, tolerance=1e-10)
    np.testing.assert_allclose(top.values.numpy(), values[::-1][:4], rtol=1e-9)
    low = hessian_eigenvalues(loss_of(net), parameters, 2, which="smallest", tolerance=1e-10)
    np.testing.assert_allclose(low.values.numpy(), values[:2], rtol=1e-8)
    assert low.values[0] < 0


def test_an_eigenvalue_lies_within_each_residual():
    net = network()
    values = np.linalg.eigvalsh(dense(net))
    found = hessian_eigenvalues(loss_of(net), list(net.parameters()), 3, iterations=6)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert residual > 1e-6
        assert np.abs(values - float(value)).min() <= float(residual) * (1 + 1e-9)


def test_no_ghosts_after_many_iterations():
    """Without full orthogonalization the largest eigenvalue would appear several times."""
    diagonal = torch.cat([torch.linspace(0, 1, 60), torch.tensor([50.0, 80.0])])
    w = torch.zeros(62, requires_grad=True)
    found = hessian_eigenvalues((diagonal * w * w).sum() / 2, [w], 3, iterations=62, tolerance=0.0)
    np.testing.assert_allclose(found.values.numpy(), [80, 50, 1], rtol=1e-4)


def test_trace_is_within_its_standard_error():
    net = network()
    exact = np.trace(dense(net))
    for distribution in ("rademacher", "gaussian"):
        found = hessian_trace(
            loss_of(net), list(net.parameters()), probes=400, distribution=distribution
        )
        assert abs(float(found.value) - exact) < 3 * float(found.standard_error)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_standard_error_is_that_of_the_textbook(distribution):
    """Variance 2 (|H|^2 - sum h_ii^2) / m for signs, 2 |H|^2 / m for Gaussians."""
    net = network()
    h = dense(net)
    variance = 2 * (h**2).sum()
    if distribution == "rademacher":
        variance -= 2 * (np.diag(h) ** 2).sum()
    found = hessian_trace(
        loss_of(net), list(net.parameters()), probes=600, distribution=distribution
    )
    # A sample variance of 600 is good to about 10 percent.
    assert float(found.standard_error) == pytest.approx(math.sqrt(variance / 600), rel=0.15)


def test_signs_are_exact_on_a_diagonal_hessian():
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    found = hessian_trace((w**3).sum(), [w], probes=2)
    assert (float(found.value), float(found.standard_error)) == (36.0, 0.0)


def test_hutch_plus_plus_is_exact_where_the_rank_is_small():
    basis = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64, generator=_generator)).Q
    w = torch.ones(40, dtype=torch.float64, requires_grad=True)
    loss = ((basis.T @ w).square() * torch.tensor([5.0, 3.0, 1.0])).sum() / 2
    found = hessian_trace(loss, [w], probes=12, method="hutch++")
    assert float(found.value) == pytest.approx(9.0, abs=1e-10)
    plain = hessian_trace(loss, [w], probes=12)
    assert abs(float(plain.value) - 9.0) > 1e-3


def test_hutch_plus_plus_is_unbiased_where_it_is_not():
    net = network()
    parameters, exact = list(net.parameters()), np.trace(dense(net))
    runs = [
        float(hessian_trace(loss_of(net), parameters, probes=9, method="hutch++", seed=s).value)
        for s in range(60)
    ]
    assert abs(np.mean(runs) - exact) < 3 * np.std(runs) / math.sqrt(60)


def test_batches_join_as_their_mean_loss_does():
    net = network()
    parameters = list(net.parameters())
    parts = [slice(0, 4), slice(4, 24)]
    losses = [lambda rows=rows: loss_of(net, rows) for rows in parts]
    joint = hessian_trace(losses, parameters, probes=5, weights=[4, 20])
    whole = hessian_trace(loss_of(net), parameters, probes=5)
    assert float(joint.value) == pytest.approx(float(whole.value), rel=1e-12)
    top = hessian_eigenvalues(losses, parameters, weights=[4, 20], tolerance=1e-9).values
    assert float(top) == pytest.approx(np.linalg.eigvalsh(dense(net))[-1], rel=1e-9)


def test_density_has_the_moments_of_the_hessian():
    net = network()
    h = dense(net)
    found = hessian_spectrum(loss_of(net), list(net.parameters()), probes=200, iterations=8)
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    mean = float((found.weights * found.nodes).sum()) * len(h)
    # The same number from Hutchinson's estimator with the same vectors.
    same = hessian_trace(loss_of(net), list(net.parameters()), probes=200)
    assert mean == pytest.approx(float(same.value), rel=1e-9)
    square = float((found.weights * found.nodes**2).sum()) * len(h)
    assert square == pytest.approx((h**2).sum(), rel=0.2)


def test_frozen_and_unreached_parameters_and_linear_losses_have_no_curvature():
    w, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    frozen = torch.ones(4)
    found = hessian_trace((w**2).sum() * frozen.sum(), [w, unused, frozen], probes=3)
    assert float(found.value) == 16.0
    assert float(hessian_trace(w.sum(), [w], probes=3).value) == 0.0
    assert float(hessian_eigenvalues(w.sum(), [w]).values) == 0.0


def test_attention_is_differentiated_twice():
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 5, 4, generator=_generator)

    def loss():
        return layer(x, x, x, need_weights=False)[0].square().mean()

    assert torch.isfinite(hessian_trace(loss, list(layer.parameters()), probes=2).value)


# ---------------------------------------------------------------------- metrics


def filled(metric, net, parts):
    for rows in parts:
        count = len(range(*rows.indices(24)))
        metric.update(lambda rows=rows: loss_of(net, rows), list(net.parameters()), count)
    return metric


def test_metrics_equal_the_functions_on_all_batches():
    net = network()
    parameters, parts = list(net.parameters()), [slice(0, 10), slice(10, 24)]
    metric = filled(HessianTrace(7, seed=3), net, parts)
    whole = hessian_trace(loss_of(net), parameters, probes=7, seed=3)
    assert float(metric.compute()) == pytest.approx(float(whole.value), rel=1e-12)
    assert float(metric.standard_error) == pytest.approx(float(whole.standard_error), rel=1e-9)
    top = filled(HessianTopEigenvalue(2, tolerance=1e-9), net, parts)
    values = np.linalg.eigvalsh(dense(net))
    np.testing.assert_allclose(top.compute().numpy(), values[::-1][:2], rtol=1e-8)
    top.reset()
    assert torch.isnan(top.compute()).all()


def test_copies_of_metrics_hold_no_batches():
    metric = filled(HessianTopEigenvalue(), network(), [slice(0, 8)])
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.isnan(twin.compute())
    assert torch.isfinite(metric.compute())


def on_ranks():
    rank = torch.distributed.get_rank()
    net, rows = network(), [slice(0, 6), slice(6, 24)][rank]
    trace = filled(HessianTrace(6), net, [rows])
    top = filled(HessianTopEigenvalue(tolerance=1e-9), net, [rows])
    size = 6 if rank == 0 else 18
    direct = hessian_trace(
        [lambda: loss_of(net, rows)],
        list(net.parameters()),
        probes=6,
        weights=[size],
        comm=Communicator(rank, 2),
    )
    return float(trace.compute()), float(top.compute()), float(direct.value)


def test_ranks_together_measure_the_joint_loss(ranks):
    net = network()
    one, other = ranks.run(on_ranks)
    assert one == other
    whole = float(hessian_trace(loss_of(net), list(net.parameters()), probes=6).value)
    assert one[0] == pytest.approx(whole, rel=1e-10)
    assert one[2] == pytest.approx(whole, rel=1e-10)
    assert one[1] == pytest.approx(np.linalg.eigvalsh(dense(net))[-1], rel=1e-8)


@pytest.mark.parametrize(
    "call",
    [
        lambda loss, w: hessian_trace(loss, w, probes=0),
        lambda loss, w: hessian_trace(loss, w, distribution="cauchy"),
        lambda loss, w: hessian_trace(loss, w, method="exact"),
        lambda loss, w: hessian_trace(loss, w, probes=2, method="hutch++"),
        lambda loss, w: hessian_trace(loss, w, weights=[1, 2]),
        lambda loss, w: hessian_trace(loss, [torch.ones(2)]),
        lambda loss, w: hessian_trace(torch.ones(()), w),
        lambda loss, w: hessian_eigenvalues(loss, w, 0),
        lambda loss, w: hessian_eigenvalues(loss, w, which="middle"),
        lambda loss, w: hessian_eigenvalues(loss, w, iterations=0),
        lambda loss, w: hessian_eigenvalues(loss, w, tolerance=-1.0),
        lambda loss, w: HessianTrace(0),
        lambda loss, w: HessianTopEigenvalue().update(loss, w),
    ],
)
def test_bad_arguments_are_refused_with_a_cure(call):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ArgumentError, match="Try: "):
        call((w**2).sum(), [w])
