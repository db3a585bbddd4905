"""The second pass: where it is taken, what it may not touch, how it is undone."""

import pickle

import lightning as L
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


@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_trainer_and_callbacks_see_the_clean_loss(sharpness):
    class Losses(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(float(outputs["loss"]))

    plain, ours = Losses(), Losses()
    settings = {"batch_size": 8, "accumulate_grad_batches": 2}
    fit([plain], module=Host(lr=0.0), **settings)
    fit([ours, Ascent(0.5, sharpness=sharpness)], module=Host(lr=0.0), **settings)
    assert ours.seen == plain.seen


@pytest.mark.parametrize("fails_at", [1, 2, 5])
@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_exception_in_any_pass_restores_the_weights(sharpness, fails_at):
    """At learning rate 0, in the first pass, the repeatability check, or a second pass."""

    class Fails(Host):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == fails_at:
                raise OSError("the disk is full")
            return super().forward(x)

    module, technique = Fails(lr=0.0), Ascent(0.5, sharpness=sharpness)
    start = weights(module)
    with pytest.raises((OSError, UnsupportedError), match="the disk is full"):
        fit([technique], module=module, batch_size=8, accumulate_grad_batches=2)
    assert torch.equal(weights(module), start)
    assert technique._window == technique._saved == technique._moved == []


def test_window_keeps_batches_but_no_outputs():
    class Watches(Ascent):
        kept = []

        def perturb(self, step, total):
            loss = super().perturb(step, total)
            self.kept.append([earlier.outputs is None for earlier in self._window])
            return loss

    fit([Watches(sharpness="rank")], batch_size=16, accumulate_grad_batches=4, max_epochs=1)
    assert Watches.kept == [[False], [True, False], [True, True, False], []]


def test_window_is_finished_when_the_strength_falls_to_zero_inside_it():
    class TurnsOff(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            technique.strength = 0.5 if batch_idx == 0 else 0.0

    technique = Ascent(0.5, sharpness="rank")
    settings = {"batch_size": 16, "accumulate_grad_batches": 4, "max_epochs": 1}
    module, _ = fit([TurnsOff(), technique], **settings)
    plain, _ = fit([], **settings)
    # All four gradients arrive; the perturbation has the strength of the window's end.
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-7)


def test_copy_in_the_middle_of_a_run_is_a_fresh_technique():
    class Copies(Ascent):
        copies = []

        def perturb(self, step, total):
            loss = super().perturb(step, total)
            self.copies.append(pickle.loads(pickle.dumps(self)))
            return loss

    # Pickle looks the class up by name.
    globals()["Copies"] = Copies
    Copies.__qualname__ = "Copies"
    fit([Copies(sharpness="rank")], accumulate_grad_batches=2, max_epochs=1)
    assert len(Copies.copies) == 4
    for copied in Copies.copies:
        assert copied._window == copied._moved == copied._ascent == []


def test_sparse_gradients_are_followed_as_dense_ones():
    class Embeds(Host):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(1)
            self.embed = torch.nn.Embedding(4, 4, sparse=sparse)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x) + self.embed(y), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    settings = {"batch_size": 8, "accumulate_grad_batches": 2}
    for sharpness in ("micro", "rank"):
        found = [
            weights(fit([Ascent(0.1, sharpness=sharpness)], module=Embeds(sparse), **settings)[0])
            for sparse in (True, False)
        ]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_layers_that_no_micro_batch_reaches_are_left_to_themselves(sharpness):
    """A gradient of zeros in place of none would let weight decay shrink them."""

    class Partly(Host):
        def __init__(self):
            super().__init__()
            self.never = torch.nn.Linear(2, 2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.5)

    module = Partly()
    start = module.never.weight.detach().clone()
    fit([Ascent(sharpness=sharpness)], module=module, batch_size=8, accumulate_grad_batches=2)
    assert torch.equal(module.never.weight, start)


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
    with pytest.raises(ConflictError, match="run the step again"):
        fit([Ascent(), Ascent(name="other")])


@pytest.mark.parametrize("arguments", [{"sharpness": "all"}, {"steps": 0}, {"rho": float("nan")}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError):
        Ascent(**arguments)
