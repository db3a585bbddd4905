"""Soft-binned ECE: the released formula in NumPy, hard bins as its limit, and overconfidence."""

import numpy as np
import pytest
import torch

from lightning_reg.metrics import calibration_error
from lightning_reg.techniques.outputs.soft_binned_ece import SoftBinnedECE, soft_binned_ece
from tests.engine.simple import INPUTS, LABELS, Host, fit
from tests.techniques.outputs.noisy import overconfidence, plain_overconfidence

_draws = torch.Generator().manual_seed(0)
R = torch.rand(50, dtype=torch.float64, generator=_draws)
C = (torch.rand(50, generator=_draws) < 0.5 * R).double()


def soft(r, lowest, bins, temperature):
    edges = np.linspace(lowest, 1, bins + 1)
    weights = np.exp(-((r[:, None] - (edges[1:] + edges[:-1]) / 2) ** 2) / temperature)
    return weights / weights.sum(1, keepdims=True)


def test_binned_value_is_equation_11():
    # google/uncertainty-baselines@12e1627, experimental/caltrain/secondary_losses.py.
    r, c = R.numpy(), C.numpy()
    s = soft(r, 0.0, 15, 0.01)
    total = s.sum(0)
    gap = (s * r[:, None]).sum(0) / np.maximum(total, 1e-5)
    gap = gap - (s * c[:, None]).sum(0) / np.maximum(total, 1e-5)
    expected = np.sqrt((total / total.sum() * gap**2).sum())
    assert float(soft_binned_ece(R, C)) == pytest.approx(expected, rel=1e-12)


def test_label_binned_value_is_equation_12():
    r, c = R.numpy(), C.numpy()
    s = (1 - 1e-5) * soft(r, 0.25, 15, 0.02) + 1e-5 / 15
    mean = (s * c[:, None]).sum(0) / s.sum(0)
    expected = np.sqrt((s * (mean - r[:, None]) ** 2).sum() / len(r))
    found = soft_binned_ece(R, C, 15, 0.02, "label_binned", 0.25)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_cold_bins_are_hard_ones():
    logits = torch.stack([R.logit(), torch.zeros(50).double()], 1)
    hard = calibration_error(logits[:, 0], C, from_logits=True, task="binary", n_bins=15, norm="l2")
    assert float(soft_binned_ece(R, C, 15, 1e-7)) == pytest.approx(float(hard), abs=1e-9)


def test_bins_without_any_weight_count_for_nothing():
    # At this temperature the weights of all but the middle bin underflow.
    r = torch.full((10,), 0.5, dtype=torch.float64, requires_grad=True)
    value = soft_binned_ece(r, (torch.arange(10) < 4).double(), 5, 1e-6)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.1, rel=1e-12)
    assert torch.isfinite(r.grad).all()


def test_label_binned_bins_begin_at_the_least_confidence_of_the_classes():
    ours = SoftBinnedECE(1.0, variant="label_binned", temperature=0.05)
    module = Host(lr=0.0)
    _, run = fit([ours], module=module, max_epochs=1)
    with torch.no_grad():
        confidence, top = module(INPUTS[-16:]).softmax(1).max(1)
    right = (top == LABELS[-16:]).float()
    expected = soft_binned_ece(confidence, right, 15, 0.05, "label_binned", 0.25)
    found = float(run.callback_metrics["reg/soft_binned_ece"])
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_nothing_wrong_and_nothing_at_all_give_zero_without_nan():
    for r, c in ((torch.ones(4), torch.ones(4)), (torch.ones(0), torch.ones(0))):
        r = r.double().requires_grad_()
        value = soft_binned_ece(r, c.double(), variant="binned")
        value.backward()
        assert float(value.detach()) == 0
        assert torch.isfinite(r.grad).all()


def test_gradient_lowers_a_confidence_above_its_accuracy():
    r = torch.full((10,), 0.8, dtype=torch.float64, requires_grad=True)
    soft_binned_ece(r, (torch.arange(10) < 5).double()).backward()
    assert (r.grad > 0).all()


@pytest.mark.parametrize("variant", ["binned", "label_binned"])
def test_overconfidence_falls(variant):
    # Held-out confidence minus accuracy, two seeds: 0.22 to 0.23 without, 0.09 to 0.11 with it.
    for seed in range(2):
        with_it = overconfidence([SoftBinnedECE(4.0, variant=variant)], seed)
        assert with_it < plain_overconfidence(seed) - 0.06
