"""Vector, matrix and Dirichlet: the optimum of their objective, their closed forms, state."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from lightning_reg.calibrators.dirichlet import DirichletCalibration
from lightning_reg.calibrators.matrix import MatrixScaling
from lightning_reg.calibrators.vector import VectorScaling
from lightning_reg.engine import ArgumentError
from lightning_reg.engine.communicator import Communicator

_draws = torch.Generator().manual_seed(0)
_TRUE = 1.5 * torch.randn(1500, 4, dtype=torch.float64, generator=_draws)
LABELS = torch.multinomial(_TRUE.softmax(1), 1, generator=_draws).squeeze(1)
# What a classifier might say: distorted per class, and a little mixed.
LOGITS = 3 * (_TRUE * torch.tensor([0.5, 1.0, 1.5, 1.0]) + torch.tensor([1.0, 0.0, 0.0, -1.0]))
LOGITS = (LOGITS @ (torch.eye(4) + 0.1 * torch.ones(4, 4)).double()).contiguous()


def nll(outputs):
    t = LABELS.numpy()
    return -scipy.special.log_softmax(outputs, 1)[np.arange(len(t)), t].mean()


def objective(features, w, b, off_diagonal, bias):
    k = len(b)
    off = w - np.diag(np.diag(w))
    value = nll(features @ w.T + b)
    return value + off_diagonal * (off**2).sum() / (k * (k - 1)) + bias * (b**2).sum() / k


def minimum(features, off_diagonal, bias):
    """Plain BFGS from zero with numerical gradients, in NumPy."""
    k = features.shape[1]

    def of(x):
        return objective(features, x[: k * k].reshape(k, k), x[k * k :], off_diagonal, bias)

    return scipy.optimize.minimize(of, np.zeros(k * (k + 1)), method="BFGS").fun


@pytest.mark.parametrize("cls", [MatrixScaling, DirichletCalibration])
@pytest.mark.parametrize(("off_diagonal", "bias"), [(0.3, 0.05), (1e-3, 2.0)])
def test_matrix_is_the_minimum_of_the_papers_objective(cls, off_diagonal, bias):
    scaling = cls(off_diagonal, bias).fit(LOGITS, LABELS)
    features = LOGITS.numpy()
    if cls is DirichletCalibration:
        features = scipy.special.log_softmax(features, 1)
    found = objective(features, scaling.weight.numpy(), scaling.bias.numpy(), off_diagonal, bias)
    assert found == pytest.approx(minimum(features, off_diagonal, bias), abs=1e-7)
    outputs = features @ scaling.weight.numpy().T + scaling.bias.numpy()
    np.testing.assert_allclose(
        scaling.probabilities(LOGITS).numpy(), scipy.special.softmax(outputs, 1), atol=1e-12
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_vector_is_the_minimum_at_any_scale(scale):
    scaling = VectorScaling().fit(scale * LOGITS, LABELS)
    z = LOGITS.numpy()

    def of(x):
        return nll(z * x[:4] + x[4:])

    expected = scipy.optimize.minimize(of, np.ones(8), method="BFGS", options={"gtol": 1e-7})
    assert nll(scaling.calibrate(scale * LOGITS).numpy()) == pytest.approx(expected.fun, abs=1e-9)
    np.testing.assert_allclose(scale * scaling.weight.numpy(), expected.x[:4], rtol=1e-4)
    assert float(scaling.bias.sum()) == pytest.approx(0, abs=1e-12)


def test_vector_scaling_of_two_points_has_a_closed_form():
    # Logit 2 is right 3 times of 4, logit -1 once of 4: w 2 + b = log 3, -w + b = -log 3.
    logits = torch.tensor([2.0, -1.0], dtype=torch.float64).repeat_interleave(4)
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    scaling = VectorScaling(task="binary").fit(logits, labels)
    weight = 2 * math.log(3) / 3
    assert float(scaling.weight) == pytest.approx(weight, rel=1e-7)
    assert float(scaling.bias) == pytest.approx(math.log(3) - 2 * weight, rel=1e-6)


def test_strong_regularization_of_the_bias_and_the_off_diagonal_leaves_a_diagonal():
    scaling = MatrixScaling(1e8, 1e8).fit(LOGITS, LABELS)
    off = scaling.weight - torch.diag(scaling.weight.diagonal())
    assert off.abs().max() < 1e-6
    assert scaling.bias.abs().max() < 1e-6
    assert (scaling.weight.diagonal() > 0.05).all()


def test_dirichlet_sees_nothing_but_probabilities():
    shifted = LOGITS + 100 * torch.randn(1500, 1, dtype=torch.float64, generator=_draws)
    plain = DirichletCalibration().fit(LOGITS, LABELS)
    moved = DirichletCalibration().fit(shifted, LABELS)
    torch.testing.assert_close(plain.weight, moved.weight, rtol=1e-4, atol=1e-4)


def test_vector_scaling_repairs_a_distortion_per_class():
    distorted = _TRUE * torch.tensor([0.5, 1.0, 2.0, 4.0]) + torch.tensor([0.0, 1.0, -1.0, 0.0])
    scaling = VectorScaling().fit(distorted, LABELS)
    error = (scaling.probabilities(distorted) - _TRUE.softmax(1)).abs().mean()
    assert error < 0.02
    assert (distorted.softmax(1) - _TRUE.softmax(1)).abs().mean() > 0.15


@pytest.mark.parametrize("cls", [VectorScaling, MatrixScaling, DirichletCalibration])
def test_soft_labels_of_one_class_equal_hard_ones(cls):
    soft = torch.nn.functional.one_hot(LABELS, 4).double()
    hard = cls().fit(LOGITS, LABELS)
    torch.testing.assert_close(cls().fit(LOGITS, soft).weight, hard.weight, rtol=1e-5, atol=1e-7)


def _on_rank(cls, parts):
    rank = torch.distributed.get_rank()
    own = parts[rank]
    scaling = cls().fit(LOGITS[own], LABELS[own], comm=Communicator(rank, 2))
    return {name: value.clone() for name, value in scaling.named_buffers()}


@pytest.mark.parametrize("cls", [VectorScaling, DirichletCalibration])
def test_two_ranks_have_the_result_of_one_bit_for_bit(ranks, cls):
    order = torch.randperm(1500, generator=_draws)
    for found in ranks.run(_on_rank, cls, [order[:600], order[600:]]):
        for name, value in cls().fit(LOGITS, LABELS).named_buffers():
            assert torch.equal(found[name], value), name


def test_what_has_no_sense_is_refused():
    with pytest.raises(ArgumentError, match="off_diagonal"):
        MatrixScaling(-1.0)
    with pytest.raises(ArgumentError, match="task"):
        MatrixScaling(task="binary")
    masked = torch.cat([LOGITS, torch.full((1500, 1), -math.inf)], 1)
    with pytest.raises(ArgumentError, match=r"VectorScaling.*-inf"):
        VectorScaling().fit(masked, LABELS)
