"""L2: what torch's optimizers call weight decay, coupled or not."""

import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.l2_penalty import L2Penalty, l2_penalty
from tests.engine.simple import Host, fit, weights
from tests.techniques.weights.penalty import check_closed_form, check_proximal, matrix


class Optimized(Host):
    def __init__(self, optimizer, decay=0.0):
        super().__init__()
        self.optimizer, self.decay = optimizer, decay

    def configure_optimizers(self):
        kernels = [p for p in self.parameters() if p.ndim > 1]
        biases = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": kernels, "weight_decay": self.decay}, {"params": biases}]
        return self.optimizer(groups, lr=0.01, weight_decay=0.0)


def test_value_is_half_the_sum_of_squares():
    assert l2_penalty(torch.tensor([[3.0, -1.0], [2.0, 0.0]])) == 7.0


def test_closed_form_is_the_gradient_of_the_value():
    check_closed_form(L2Penalty(), [matrix(), matrix(2, 5), matrix(seed=1)])


def test_proximal_step_is_the_minimum():
    w = matrix()
    torch.testing.assert_close(check_proximal(L2Penalty(), w, 0.25, l2_penalty), w / 1.25)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_gradient_is_the_optimizers_weight_decay(optimizer):
    decayed, _ = fit(module=Optimized(optimizer, 0.1))
    ours, _ = fit([L2Penalty(0.1)], module=Optimized(optimizer))
    torch.testing.assert_close(weights(ours), weights(decayed), rtol=0, atol=2e-6)


def test_proximal_step_is_decoupled_decay_to_first_order():
    # AdamW: w - lr (adam + s w); here (w - lr adam) / (1 + lr s). Both in 8 steps of lr 0.01.
    gaps = []
    for strength in (0.1, 0.2):
        decayed, _ = fit(module=Optimized(torch.optim.AdamW, strength))
        ours, _ = fit([L2Penalty(strength, mode="proximal")], module=Optimized(torch.optim.AdamW))
        gaps.append((weights(ours) - weights(decayed)).abs().max())
        plain, _ = fit(module=Optimized(torch.optim.AdamW))
        assert gaps[-1] < 0.05 * (weights(plain) - weights(decayed)).abs().max()
    coupled, _ = fit([L2Penalty(0.2)], module=Optimized(torch.optim.Adam))
    assert (weights(coupled) - weights(decayed)).abs().max() > 10 * gaps[1]


def test_negative_strength_is_refused():
    with pytest.raises(ArgumentError, match="L2Penalty"):
        L2Penalty(-0.1)
