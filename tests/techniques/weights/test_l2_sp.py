"""L2-SP: to the start, not to zero; new layers to zero; coupled and decoupled."""

import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.l2_sp import L2SP, l2_sp
from tests.engine.simple import Host, fit, loader, trainer, weights
from tests.techniques.weights.penalty import Still

LAYERS = "net.[04].weight"


def test_value_is_half_the_squared_distance():
    w = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    value = l2_sp(w, torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert value.item() == 2.125
    assert torch.autograd.grad(value, w)[0].tolist() == [0.5, 2.0]


@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
def test_weights_that_are_moved_come_back_to_their_start_and_new_ones_go_to_zero(mode):
    module = Still()
    start = [module.net[i].weight.detach().clone() for i in (0, 4)]

    class Moved(L2SP):
        def on_reference(self, trainer, pl_module):
            super().on_reference(trainer, pl_module)
            with torch.no_grad():
                pl_module.net[0].weight.add_(1.0)

    fit([Moved(1.0, new="net.4", new_ratio=0.5, mode=mode)], module=module, max_epochs=1)
    # Four steps of lr 0.1 and strengths 1 and 0.5.
    rates = [0.9**4, 0.95**4] if mode == "gradient" else [1.1**-4, 1.05**-4]
    torch.testing.assert_close(module.net[0].weight.detach(), start[0] + rates[0])
    torch.testing.assert_close(module.net[4].weight.detach(), start[1] * rates[1])


def test_decoupled_pull_is_not_rescaled_by_adam():
    # Adam's step from a gradient is lr in every entry, however strong the pull.
    class Adam(Still):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    moves = []
    for mode in ("gradient", "decoupled"):
        module = Adam()
        before = module.net[4].weight.detach().clone()
        technique = L2SP(2.0, new="net.4", new_ratio=1.0, parameters=LAYERS, mode=mode)
        fit([technique], module=module, batch_size=64, max_epochs=1)
        moves.append((module.net[4].weight.detach() - before).abs())
    torch.testing.assert_close(moves[0], torch.full_like(moves[0], 0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close(moves[1], before.abs() * (0.02 / 1.02))


def test_a_strong_pull_holds_weights_at_the_start_where_decay_loses_them():
    start = weights(Host())
    plain, _ = fit(max_epochs=5)
    ours, _ = fit([L2SP(3.0, parameters="net")], max_epochs=5)
    kept = [(weights(m) - start).norm() for m in (plain, ours)]
    assert kept[1] < 0.5 * kept[0]


def test_logged_value_weighs_new_layers_by_their_ratio():
    module = Host(lr=0.0)
    new = float(module.net[4].weight.detach().square().sum() / 2)
    for mode in ("gradient", "decoupled"):
        _, run = fit(
            [L2SP(1.0, new="net.4", new_ratio=0.3, mode=mode)], module=module, max_epochs=1
        )
        assert run.callback_metrics["reg/l2_sp"] == pytest.approx(0.3 * new, rel=1e-6)


def test_start_is_not_taken_again_on_a_resume(tmp_path):
    _, run = fit([L2SP(0.1)], max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    start = Host().net[0].weight.detach()
    resumed = L2SP(0.1)
    trainer([resumed], max_epochs=2).fit(
        Host(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    torch.testing.assert_close(resumed.reference["net.0.weight"], start, rtol=0, atol=0)


@pytest.mark.parametrize("arguments", [{"strength": -1.0}, {"new_ratio": -1.0}, {"mode": "loss"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="L2SP"):
        L2SP(**arguments)
