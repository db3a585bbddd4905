"""Entropy of a batch, and a shift that is undone without labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.techniques.adaptation.tent import Tent, tent
from tests.engine.simple import trainer
from tests.techniques.adaptation.digits import accuracy, shifted, trained


def test_loss_is_the_entropy_in_nats():
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
    p = np.exp([1.0, 0.0, -1.0]) / np.exp([1.0, 0.0, -1.0]).sum()
    expected = [np.log(3), -(p * np.log(p)).sum()]
    assert tent(logits).tolist() == pytest.approx(expected, abs=1e-12)


def test_logged_value_is_the_mean_entropy_before_the_updates():
    module, (_, test) = trained(0)
    x, y = shifted(test)
    run = trainer([Tent(lr=0.0)])
    run.test(module, DataLoader(TensorDataset(x, y), batch_size=len(x)), verbose=False)
    with torch.no_grad():
        copy = nn.Sequential(*module.net)
        copy.train()
        expected = tent(copy(x)).mean().item()
    assert run.callback_metrics["reg/tent"].item() == pytest.approx(expected, rel=1e-5)
    assert run.callback_metrics["reg/tent_kept"].item() == 1


def test_it_recovers_accuracy_under_a_shift_in_every_seed():
    # The shift changes contrast and offset of every image, which batch statistics see, and adds
    # noise, which they do not.
    gains = []
    for seed in range(3):
        module, (_, test) = trained(seed)
        clean = accuracy(module, test)
        source = accuracy(module, shifted(test))
        statistics = accuracy(module, shifted(test), Tent(lr=0.0))
        gains.append(accuracy(module, shifted(test), Tent(lr=0.1), passes=3) - statistics)
        assert clean > 0.9
        assert source < clean - 0.5
        assert statistics > source + 0.3
    assert min(gains) > 0, gains
    assert sum(gains) / 3 > 0.003, gains


def test_gradient_pushes_the_largest_logit_up():
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(tent(logits).sum(), logits)
    assert gradient[0, 0] < 0
    assert F.softmax(logits - 0.1 * gradient, 1)[0, 0] > F.softmax(logits, 1)[0, 0]
