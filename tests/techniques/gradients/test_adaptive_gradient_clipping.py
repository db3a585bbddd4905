"""AGC: per unit, relative to its weights, and never longer."""

import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.gradients.adaptive_gradient_clipping import (
    AdaptiveGradientClipping,
    adaptive_gradient_clipping,
)
from tests.engine.simple import Host, fit


def test_units_are_clipped_one_by_one_relative_to_their_norm():
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    g = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.3, 0.4]])
    # Norms 5, 0 and 10: allowed are 0.5, 0.1 eps and 1; the last is shorter already.
    found = adaptive_gradient_clipping(w, g, clip=0.1, eps=0.5)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5], [0.05, 0.0], [0.3, 0.4]]))


def test_filters_are_units_and_vectors_are_one():
    w, g = torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    g[1] = 0.001
    found = adaptive_gradient_clipping(w, g, clip=0.01)
    torch.testing.assert_close(found[0], torch.full((3, 2, 2), 0.01))
    assert torch.equal(found[1], g[1])
    bias = adaptive_gradient_clipping(torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0]), clip=0.1)
    torch.testing.assert_close(bias, torch.tensor([0.3, 0.4]))
    assert adaptive_gradient_clipping(torch.tensor(2.0), torch.tensor(-1.0), 0.1) == pytest.approx(
        -0.2
    )


def test_gradient_of_zeros_stays_zero():
    assert not adaptive_gradient_clipping(torch.zeros(2, 2), torch.zeros(2, 2)).any()


def test_no_step_changes_a_unit_by_more_than_its_share():
    class Plain(Host):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1.0)

        def training_step(self, batch, batch_idx):
            return 1e4 * super().training_step(batch, batch_idx)

    module, start = Plain(), Plain()
    _, run = fit([AdaptiveGradientClipping(clip=0.02)], module=module, batch_size=64, max_epochs=1)
    for after, before in zip(module.parameters(), start.parameters(), strict=True):
        flat = (after - before).detach().flatten(1 if after.ndim > 1 else 0)
        size = before.detach().flatten(1 if after.ndim > 1 else 0)
        share = flat.norm(dim=-1) / size.norm(dim=-1)
        # The loss is so steep that each unit moves by all that it may, or not at all (dead ReLU).
        moved = share > 0
        torch.testing.assert_close(share[moved], torch.full_like(share[moved], 0.02))
        assert moved.any()
    assert run.callback_metrics["reg/adaptive_gradient_clipping"] > 0.7


@pytest.mark.parametrize("arguments", [{"strength": 2.0}, {"clip": 0.0}, {"eps": -1.0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="AdaptiveGradientClipping"):
        AdaptiveGradientClipping(**arguments)
