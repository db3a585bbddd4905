"""LAWN: a free phase, then norms that neither optimizer, decay nor resume can move."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.logit_attenuating_weight_norm import (
    LogitAttenuatingWeightNorm,
    logit_attenuating_weight_norm,
)
from tests.engine.simple import INPUTS, LABELS, Host, fit, loader, trainer, weights

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
}


def host(kind, **options):
    class Optimized(Host):
        def configure_optimizers(self):
            return OPTIMIZERS[kind](self.parameters())

    return Optimized(**options)


def norms(module):
    return torch.stack([p.detach().norm() for p in module.parameters() if p.ndim > 1])


class Watch(Callback):
    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.norms.append(norms(pl_module))


def test_weight_lands_on_the_sphere_and_gradient_in_its_tangent():
    w, g = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projected, tangent = logit_attenuating_weight_norm(w, g, 1.5)
    torch.testing.assert_close(projected, 1.5 * w / w.norm())
    assert (tangent * w).sum().abs() < 1e-14
    torch.testing.assert_close(tangent.norm() ** 2, g.norm() ** 2 - ((g * w).sum() / w.norm()) ** 2)


def test_weight_of_zeros_stays_free():
    projected, tangent = logit_attenuating_weight_norm(torch.zeros(3), torch.ones(3), 0.0)
    assert torch.equal(projected, torch.zeros(3))
    assert torch.equal(tangent, torch.ones(3))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_norms_are_constant_after_the_free_phase(kind):
    watch = Watch()
    fit([LogitAttenuatingWeightNorm(free_epochs=1), watch], module=host(kind), max_epochs=20)
    free, held = watch.norms[:4], watch.norms[4:]
    assert (free[-1] - free[0]).abs().max() > 1e-3
    for now in held:
        torch.testing.assert_close(now, free[-1], rtol=1e-6, atol=0)


def test_free_phase_is_plain_training():
    ours, _ = fit([LogitAttenuatingWeightNorm(free_epochs=2)], max_epochs=2)
    plain, _ = fit(max_epochs=2)
    assert torch.equal(weights(ours), weights(plain))


def test_gradient_has_no_radial_part_when_the_optimizer_steps():
    # One step of plain SGD from w: the norm grows by lr |g| squared over 2 |w|, not by lr |g|.
    class Records(LogitAttenuatingWeightNorm):
        radial = 1.0

        def edit_gradients(self, update):
            super().edit_gradients(update)
            w = update.module.net[4].weight
            Records.radial = float((w.detach() * w.grad).sum() / w.norm() / w.grad.norm())

    fit([Records(free_epochs=0)], max_epochs=1)
    assert abs(Records.radial) < 1e-6


def test_log_shows_how_far_the_step_left_the_sphere():
    key = "reg/logit_attenuating_weight_norm"
    lawn = LogitAttenuatingWeightNorm(free_epochs=0)
    _, run = fit([lawn], module=Host(lr=0.0), max_epochs=1)
    assert run.callback_metrics[key] == pytest.approx(1.0)
    # A step across the radius lengthens the weight: sqrt(c^2 + d^2) / c > 1.
    _, run = fit([lawn], module=Host(), batch_size=64, max_epochs=1)
    module = Host()
    torch.nn.functional.cross_entropy(module(INPUTS), LABELS).backward()
    ratios = []
    for w in (module.net[0].weight, module.net[4].weight):
        across = w.grad - (w.detach() * w.grad).sum() / w.detach().square().sum() * w.detach()
        ratios.append(float((1 + (0.1 * across).square().sum() / w.detach().square().sum()).sqrt()))
    assert run.callback_metrics[key] == pytest.approx(sum(ratios) / 2, abs=1e-6)
    assert min(ratios) > 1 + 1e-5


def test_logits_stay_bounded_where_plain_training_lets_them_grow():
    # Separable data: labels that a linear map gives. Bound: prod_l c_l |x| without biases.
    class Homogeneous(Host):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)
            )

        def training_step(self, batch, batch_idx):
            x = batch[0]
            return super().training_step((x, x[:, :4].argmax(1)), batch_idx)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    lawn = LogitAttenuatingWeightNorm(free_epochs=0)
    start = norms(Homogeneous())
    ours, _ = fit([lawn], module=Homogeneous(), max_epochs=40)
    plain, _ = fit(module=Homogeneous(), max_epochs=40)
    bound = start.prod() * INPUTS.norm(dim=1)
    with torch.no_grad():
        assert (ours(INPUTS).abs().amax(1) <= bound * (1 + 1e-5)).all()
        assert (plain(INPUTS).abs().amax(1) > bound).any()


def test_resume_keeps_the_radii(tmp_path):
    path = tmp_path / "stopped.ckpt"
    module, run = fit([LogitAttenuatingWeightNorm(free_epochs=0)], max_epochs=1)
    run.save_checkpoint(path)
    before = norms(module)
    stretched = torch.load(path, weights_only=True)
    for value in stretched["state_dict"].values():
        value.mul_(1.5 if value.ndim > 1 else 1.0)
    torch.save(stretched, path)
    resumed = Host()
    trainer([LogitAttenuatingWeightNorm(free_epochs=0)], max_epochs=2).fit(
        resumed, loader(), ckpt_path=path, weights_only=True
    )
    torch.testing.assert_close(norms(resumed), before, rtol=1e-6, atol=0)


def test_second_fit_takes_radii_anew():
    lawn = LogitAttenuatingWeightNorm(free_epochs=0)
    fit([lawn], max_epochs=1)
    module = Host()
    with torch.no_grad():
        module.net[4].weight.mul_(3)
    before = norms(module)
    fit([lawn], module=module, max_epochs=1)
    torch.testing.assert_close(norms(module), before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("arguments", [{"free_epochs": -1}, {"free_epochs": 1.5}, {"strength": 2}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="LogitAttenuatingWeightNorm"):
        LogitAttenuatingWeightNorm(**arguments)
