"""Gradient centralization: rows that sum to zero, and weights whose sums stay."""

import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.gradients.gradient_centralization import (
    GradientCentralization,
    gradient_centralization,
)
from tests.engine.simple import Host, fit


def test_equals_the_released_code():
    # Yonghongwei/Gradient-Centralization@012791d, GC_code/CIFAR100/algorithm/SGD.py, SGD_GC at
    # lr 1 without momentum: the step of a linear layer from zero weights.
    g = torch.tensor([[1.0, 2.0, 6.0], [-1.0, 0.5, 0.5]])
    released = torch.tensor([[-2.0, -1.0, 3.0], [-1.0, 0.5, 0.5]])
    torch.testing.assert_close(gradient_centralization(g), released)


def test_it_is_the_projection_off_the_vector_of_ones():
    g = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gradient_centralization(g).flatten(1)
    ones = torch.full((12, 1), 12**-0.5, dtype=torch.float64)
    torch.testing.assert_close(found, g.flatten(1) @ (torch.eye(12) - ones @ ones.T))
    assert torch.equal(gradient_centralization(g[0, 0, 0]), g[0, 0, 0])


def test_sums_of_weights_stay_what_they_were():
    start = [p.detach().sum(1) for p in Host().parameters() if p.ndim > 1]
    ours, _ = fit([GradientCentralization()], max_epochs=5)
    plain, _ = fit(max_epochs=5)
    for module, same in ((ours, True), (plain, False)):
        sums = [p.detach().sum(1) for p in module.parameters() if p.ndim > 1]
        for now, before in zip(sums, start, strict=True):
            assert ((now - before).abs().max() < 1e-5) == same
    assert (ours.net[4].bias - Host().net[4].bias).abs().max() > 1e-3


def test_log_shows_the_share_of_the_mean():
    module = Host()
    torch.manual_seed(0)
    from tests.engine.simple import INPUTS, LABELS

    torch.nn.functional.cross_entropy(module(INPUTS), LABELS).backward()
    grads = [p.grad for p in module.parameters() if p.ndim > 1]
    means = sum((g.mean(1).square() * g.shape[1]).sum() for g in grads)
    share = float(means / sum(g.square().sum() for g in grads))
    _, run = fit([GradientCentralization()], batch_size=64, max_epochs=1)
    assert run.callback_metrics["reg/gradient_centralization"] == pytest.approx(share, rel=1e-4)


def test_bad_strength_is_refused():
    with pytest.raises(ArgumentError, match="GradientCentralization"):
        GradientCentralization(1.5)
