"""The second pass: where it is taken, what it may not touch, how it is undone."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision

from lightning_reg.engine import ArgumentError, ConflictError, UnsupportedError
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, fit, weights


def reference(rho: float, epochs: int = 2, size: int = 16) -> torch.Tensor:
    """SAM as a plain loop."""
    module = Host()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    for _ in range(epochs):
        for x, y in zip(INPUTS.split(size), LABELS.split(size), strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(module(x), y), parameters)
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            kept = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p += rho * g / norm
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            with torch.no_grad():
                for p, k in zip(parameters, kept, strict=True):
                    p.copy_(k)
            optimizer.step()
    return weights(module)


@pytest.mark.parametrize("sharpness", ["micro", "rank", "global"])
def test_equals_a_plain_loop(sharpness):
    module, _ = fit([Ascent(0.1, sharpness=sharpness)])
    torch.testing.assert_close(weights(module), reference(0.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sharpness", ["rank", "global"])
def test_window_of_micro_batches_equals_one_batch(sharpness):
    technique = Ascent(0.1, sharpness=sharpness)
    module, _ = fit([technique], batch_size=4, accumulate_grad_batches=4)
    torch.testing.assert_close(weights(module), reference(0.1), rtol=0, atol=1e-6)


def test_micro_sharpness_perturbs_each_micro_batch():
    module, _ = fit([Ascent(0.1)], batch_size=4, accumulate_grad_batches=4)
    assert (weights(module) - reference(0.1)).abs().max() > 1e-3


def test_short_last_window_is_closed():
    technique = Ascent(0.1, sharpness="rank")
    module, run = fit([technique], batch_size=16, accumulate_grad_batches=3)
    assert run.global_step == 4
    assert technique._window == []
    assert torch.isfinite(weights(module)).all()


def test_statistics_metrics_and_logs_count_one_pass():
    def run(callbacks):
        module = Host(batch_norm=True, dropout=0.3, lr=0.0)
        _, trainer = fit(callbacks, module=module)
        return module, trainer.callback_metrics

    plain, plain_metrics = run([])
    ours, metrics = run([Ascent(0.3)])
    assert ours.net[1].num_batches_tracked == plain.net[1].num_batches_tracked == 8
    assert torch.equal(ours.net[1].running_mean, plain.net[1].running_mean)
    assert torch.equal(ours.net[1].running_var, plain.net[1].running_var)
    assert metrics["loss"] == plain_metrics["loss"]
    assert metrics["accuracy"] == plain_metrics["accuracy"]


def test_both_passes_drop_the_same_units():
    class Records(Host):
        masks = []

        def forward(self, x):
            dropped = F.dropout(torch.ones(16), 0.5, self.training)
            self.masks.append(dropped)
            return self.net(x) * dropped.mean()

    fit([Ascent(0.1)], module=Records(), max_epochs=1, batch_size=64)
    clean, check, perturbed = Records.masks
    assert torch.equal(clean, check)
    assert torch.equal(clean, perturbed)


def test_zero_learning_rate_restores_the_weights_bit_for_bit():
    module = Host(lr=0.0)
    start = weights(module)
    fit([Ascent(0.5)], module=module)
    assert torch.equal(weights(module), start)


def test_fp16_scaler_does_not_change_the_perturbation():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module, _ = fit([Ascent(0.1)], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert (weights(module) - reference(0.1)).abs().max() < 2e-3


def test_step_that_keeps_state_is_refused():
    class Stateful(Host):
        hidden = 0.0

        def training_step(self, batch, batch_idx):
            self.hidden = self.hidden + 1.0
            return super().training_step(batch, batch_idx) * self.hidden

    with pytest.raises(UnsupportedError, match="keeps state"):
        fit([Ascent()], module=Stateful())


def test_step_that_cannot_run_twice_is_refused():
    class Once(Host):
        seen = None

        def training_step(self, batch, batch_idx):
            if self.seen is batch[0]:
                raise RuntimeError("this batch is used up")
            self.seen = batch[0]
            return super().training_step(batch, batch_idx)

    with pytest.raises(UnsupportedError, match="second run failed"):
        fit([Ascent()], module=Once())


def test_two_perturbations_are_refused():
    with pytest.raises(ConflictError, match="second time"):
        fit([Ascent(), Ascent(name="other")])


@pytest.mark.parametrize("arguments", [{"sharpness": "all"}, {"steps": 0}, {"rho": float("nan")}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError):
        Ascent(**arguments)
