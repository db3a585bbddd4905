"""Max norm: rows in the ball, and nothing else changed."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.max_norm import MaxNorm, max_norm
from tests.engine.simple import Host, fit


def test_long_rows_are_shortened_and_short_ones_kept():
    w = torch.tensor([[3.0, 4.0], [0.3, -0.4], [0.0, 0.0]])
    assert max_norm(w, 2.5).tolist() == [
        [1.5, 2.0],
        [pytest.approx(0.3), pytest.approx(-0.4)],
        [0, 0],
    ]


def test_filters_of_a_convolution_are_rows():
    kernel = torch.full((2, 3, 2, 2), 1.0)
    torch.testing.assert_close(max_norm(kernel, 1.0).flatten(1).norm(dim=1), torch.ones(2))


def test_projection_is_the_nearest_point_of_the_ball_and_idempotent():
    w = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    found = max_norm(w, 2.0)
    torch.testing.assert_close(max_norm(found, 2.0), found)
    # The angle between the way to the projection and the way on to any point of the ball is obtuse.
    others = max_norm(torch.randn(200, 5, 4, dtype=torch.float64).flatten(0, 1), 2.0)
    inner = ((w - found) * (others.view(200, 5, 4) - found)).sum(-1)
    assert (inner <= 1e-12).all()


class Largest(Callback):
    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        norms = [p.detach().norm(dim=1).max() for p in pl_module.parameters() if p.ndim > 1]
        self.norms.append(float(max(norms)))


def test_no_row_leaves_the_ball_at_a_large_learning_rate():
    free, held = Largest(), Largest()
    fit([free], module=Host(lr=2.0))
    fit([MaxNorm(radius=1.5), held], module=Host(lr=2.0))
    assert max(free.norms) > 3
    assert max(held.norms) <= 1.5 * (1 + 1e-6)


def test_log_shows_the_largest_norm_before():
    module = Host(lr=0.0)
    largest = max(float(p.detach().norm(dim=1).max()) for p in module.parameters() if p.ndim > 1)
    _, run = fit([MaxNorm(radius=0.1)], module=module, batch_size=64, max_epochs=1)
    assert run.callback_metrics["reg/max_norm"] == pytest.approx(largest)


def test_output_channels_of_a_transposed_convolution_are_rows():
    class Up(Host):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net = nn.Sequential(
                nn.Unflatten(1, (2, 4)),
                nn.ConvTranspose1d(2, 4, 4, bias=False),
                nn.Flatten(),
                nn.Linear(28, 4, bias=False),
            )

    module = Up()
    before = module.net[1].weight.detach().clone()
    fit([MaxNorm(radius=0.2)], module=module, max_epochs=1)
    expected = max_norm(before.transpose(0, 1), 0.2).transpose(0, 1)
    torch.testing.assert_close(module.net[1].weight.detach(), expected)


@pytest.mark.parametrize("arguments", [{"strength": 1.5}, {"radius": 0.0}, {"radius": -1.0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="MaxNorm"):
        MaxNorm(**arguments)
