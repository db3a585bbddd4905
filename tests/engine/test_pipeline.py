"""What the pipeline does to a user's run, and what it leaves alone."""

import copy
import inspect
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_reg.engine import (
    MissingSignalError,
    RegularizationError,
    RegularizeMixin,
    Regularizer,
    Signals,
    UnsupportedError,
)
from tests.engine.simple import (
    INPUTS,
    LABELS,
    Ascent,
    Confidence,
    Host,
    Smoothing,
    fit,
    loader,
    trainer,
    weights,
)


def attributes(module):
    """What the pipeline may not change; `_hparams` is Lightning's own doing."""
    kept = {k: v for k, v in vars(module).items() if k not in ("_hparams", "_trainer")}
    hooks = [len(m._forward_hooks) for m in module.modules()]
    return set(kept), hooks


def test_strength_zero_trains_the_same_bits():
    plain, _ = fit()
    neutral, _ = fit([Confidence(0.0), Smoothing(0.0), Ascent(0.0)])
    assert torch.equal(weights(plain), weights(neutral))


def test_penalty_is_the_gradient_of_loss_plus_strength_times_penalty():
    module, _ = fit([Confidence(0.3)], max_epochs=1, batch_size=64)
    reference = Host()
    logits = reference(INPUTS)
    p = logits.softmax(-1)
    total = F.cross_entropy(logits, LABELS) + 0.3 * (p * p.log()).sum(-1).mean()
    total.backward()
    expected = torch.cat([(w - 0.1 * w.grad).detach().flatten() for w in reference.parameters()])
    torch.testing.assert_close(weights(module), expected)


def test_target_transform_equals_torch_label_smoothing():
    class Smoothed(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y, label_smoothing=0.1)

    ours, _ = fit([Smoothing(0.1)])
    torchs, _ = fit(module=Smoothed())
    torch.testing.assert_close(weights(ours), weights(torchs), rtol=0, atol=1e-6)


def test_users_logged_loss_stays_the_clean_one():
    _, plain = fit(module=Host(lr=0.0))
    _, ours = fit([Confidence(0.3), Smoothing(0.2), Ascent(0.1)], module=Host(lr=0.0))
    assert ours.callback_metrics["loss"] == plain.callback_metrics["loss"]
    assert ours.callback_metrics["accuracy"] == plain.callback_metrics["accuracy"]


def test_each_technique_logs_its_value():
    _, run = fit([Confidence(0.3), Ascent(0.1)])
    assert {"reg/confidence", "reg/ascent"} <= set(run.callback_metrics)


def test_logs_only_on_the_trainers_logging_steps():
    calls = []

    class Counting(Host):
        def log(self, name, *args, **kwargs):
            calls.append(name)
            super().log(name, *args, **kwargs)

    fit([Confidence(0.3)], module=Counting(), log_every_n_steps=4)
    assert calls.count("reg/confidence") == 2  # 8 steps


def test_any_order_of_callbacks_gives_the_same_bits():
    techniques = lambda: [Confidence(0.3), Smoothing(0.1), Ascent(0.05)]  # noqa: E731
    first, _ = fit(techniques())
    for order in ((2, 1, 0), (1, 0, 2)):
        listed = techniques()
        other, _ = fit([listed[i] for i in order])
        assert torch.equal(weights(first), weights(other))


def test_module_is_as_before_after_fit_and_after_a_second_fit():
    module = Host()
    before = attributes(module)
    for _ in range(2):
        trainer([Confidence(0.1), Ascent()]).fit(module, loader())
        assert attributes(module) == before


@pytest.mark.parametrize("when", ["step", "backward", "val"])
def test_module_is_as_before_after_an_exception(when):
    class Failing(Host):
        def training_step(self, batch, batch_idx):
            if when == "step":
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

        def on_after_backward(self):
            if when == "backward":
                raise ZeroDivisionError

        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    module = Failing()
    before, start = attributes(module), weights(module)
    with pytest.raises(ZeroDivisionError):
        trainer([Confidence(0.1), Ascent()]).fit(module, loader(), loader())
    assert attributes(module) == before
    assert torch.equal(weights(module), start)


def test_exception_between_the_passes_restores_the_weights():
    class FailsPerturbed(Host):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            if self.calls == 3:  # 1: clean, 2: the check of the first step, 3: perturbed
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = FailsPerturbed()
    start = weights(module)
    with pytest.raises(ZeroDivisionError):
        trainer([Ascent(0.5)]).fit(module, loader())
    assert torch.equal(weights(module), start)


def test_training_step_keeps_the_users_signature():
    class OneArgument(Host):
        def training_step(self, batch):
            x, y = batch
            return F.cross_entropy(self(x), y)

    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(inspect.signature(pl_module.training_step))
            seen.append(
                is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
            )

    fit([Confidence(0.1), Look()], module=OneArgument())
    assert list(seen[0].parameters) == ["batch"]
    assert not seen[1]


def test_copies_made_during_training_have_the_users_own_step():
    losses = []

    class Copying(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]
            for twin in copies:
                twin.accuracy.reset()
                losses.append(float(twin.training_step((INPUTS, LABELS), 0).detach()))
            losses.append(float(F.cross_entropy(pl_module(INPUTS), LABELS).detach()))
            trainer.should_stop = True

    fit([Confidence(0.5), Copying()])
    assert losses[0] == losses[1] == losses[2]


def test_dict_outputs_come_back_with_the_new_loss_and_the_other_keys():
    class Returns(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self.net(x) * 1.0
            return {"loss": F.cross_entropy(logits, y), "logits": logits, "note": "kept"}

    outputs = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, out, batch, batch_idx):
            outputs.append(out)

    ours, _ = fit([Confidence(0.3), Look()], module=Returns())
    forward, _ = fit([Confidence(0.3)])
    assert outputs[0]["note"] == "kept"
    assert torch.equal(weights(ours), weights(forward))


def test_step_that_skips_a_batch_is_left_alone():
    class Skipping(Host):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    ours, _ = fit([Confidence(0.0)], module=Skipping())
    theirs, _ = fit(module=Skipping())
    assert torch.equal(weights(ours), weights(theirs))
    fit([Confidence(0.1), Ascent()], module=Skipping())


def test_accumulated_micro_batches_equal_one_batch():
    one, _ = fit([Confidence(0.3), Smoothing(0.1)], batch_size=16)
    four, _ = fit([Confidence(0.3), Smoothing(0.1)], batch_size=4, accumulate_grad_batches=4)
    torch.testing.assert_close(weights(one), weights(four), rtol=0, atol=1e-6)


def test_logits_of_a_child_network_are_found():
    class CallsChild(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

    child, _ = fit([Confidence(0.3)], module=CallsChild())
    own, _ = fit([Confidence(0.3)])
    assert torch.equal(weights(child), weights(own))


def test_missing_logits_name_the_technique_what_was_seen_and_the_cure():
    class Twice(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(-x), y)

    with pytest.raises(MissingSignalError) as error:
        fit([Confidence(0.3)], module=Twice())
    message = str(error.value)
    assert message.startswith("Confidence: needs `logits`")
    assert '"module.net" -> Tensor(16, 4), Tensor(16, 4)' in message
    assert "Signals(logits=" in message


def test_signals_of_technique_and_module_are_followed():
    class Head(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch["pair"]
            return F.cross_entropy(self.net(x), y)

    class Declares(Head):
        regularization_signals = {"logits": "module.net.4", "targets": "batch.pair.1"}

    def wrapped():
        return torch.utils.data.DataLoader(
            [{"pair": (x, y)} for x, y in zip(INPUTS, LABELS, strict=True)], batch_size=16
        )

    signals = Signals(logits="module.net.4", targets=lambda step: step.batch["pair"][1])
    by_argument, by_module = Head(), Declares()
    trainer([Smoothing(0.1, signals=signals)]).fit(by_argument, wrapped())
    trainer([Smoothing(0.1)]).fit(by_module, wrapped())
    plain, _ = fit([Smoothing(0.1)])
    assert torch.equal(weights(by_argument), weights(plain))
    assert torch.equal(weights(by_module), weights(plain))


def test_loss_that_is_not_the_cross_entropy_is_refused_with_the_choices():
    class Plus(Host):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.5 * self.net[0].weight.square().sum()

    with pytest.raises(RegularizationError, match='replaces="term"'):
        fit([Smoothing(0.1)], module=Plus())


def test_replaces_term_keeps_the_other_terms():
    class Plus(Host):
        extra = 0.05

        def training_step(self, batch, batch_idx):
            x, y = batch
            smoothed = F.cross_entropy(self(x), y, label_smoothing=self.smoothing)
            return smoothed + self.extra * self.net[0].weight.square().sum()

    ours, theirs = Plus(), Plus()
    ours.smoothing, theirs.smoothing = 0.0, 0.2
    fit([Smoothing(0.2, replaces="term")], module=ours)
    fit(module=theirs)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)


def test_replaces_loss_drops_the_users_loss():
    class Other(Host):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    ours, _ = fit([Smoothing(0.2, replaces="loss")], module=Other())
    theirs, _ = fit([Smoothing(0.2)])
    assert torch.equal(weights(ours), weights(theirs))


class Manual(RegularizeMixin, Host):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        logits = self.net(x)
        loss = self.regularize(F.cross_entropy(logits, y), logits=logits)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_manual_optimization_gives_the_same_weights():
    automatic, _ = fit([Confidence(0.3), Smoothing(0.1)])
    manual, _ = fit([Confidence(0.3), Smoothing(0.1)], module=Manual())
    assert torch.equal(weights(automatic), weights(manual))


def test_manual_optimization_without_the_mixin_is_refused():
    class Bare(Host):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(UnsupportedError, match=r"self\.regularize"):
        fit([Confidence(0.3)], module=Bare())


def test_manual_step_that_hands_over_nothing_is_named():
    class Forgetful(Manual):
        def regularize(self, loss, **signals):
            return super().regularize(loss)

    with pytest.raises(RegularizationError, match=r"was not applied.*logits"):
        fit([Confidence(0.3)], module=Forgetful())


def test_perturbation_under_manual_optimization_is_refused():
    with pytest.raises(UnsupportedError, match="manually"):
        fit([Ascent()], module=Manual())


def test_random_streams_leave_the_users_dropout_alone():
    class Draws(Regularizer):
        def transform_batch(self, step):
            torch.rand(3, generator=step.rng(self))

    plain, _ = fit(module=Host(dropout=0.5))
    drawn, _ = fit([Draws()], module=Host(dropout=0.5))
    assert torch.equal(weights(plain), weights(drawn))


def test_streams_differ_by_batch_and_agree_within_an_optimizer_step():
    draws = {"micro_batch": [], "step": []}

    class Draws(Regularizer):
        def transform_batch(self, step):
            for per, values in draws.items():
                values.append(float(torch.rand((), generator=step.rng(self, per=per))))

    fit([Draws()], batch_size=8, accumulate_grad_batches=2, max_epochs=1)
    assert len(set(draws["micro_batch"])) == 8
    assert len(set(draws["step"])) == 4
    assert draws["step"][0] == draws["step"][1]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precisions_agree_within_rounding(precision):
    full, _ = fit([Confidence(0.3), Smoothing(0.1), Ascent(0.05)])
    other, _ = fit([Confidence(0.3), Smoothing(0.1), Ascent(0.05)], precision=precision)
    travelled = (weights(full) - weights(Host())).norm()
    apart = (weights(full) - weights(other).float()).norm() / travelled
    # Eight steps; a bf16 number has 8 bits, so one rounding is 0.4 %.
    assert apart < {"64-true": 1e-5, "bf16-mixed": 0.04, "bf16-true": 0.15}[precision]


def test_penalty_runs_in_full_precision_under_autocast():
    seen = []

    class Look(Regularizer):
        def penalty(self, step):
            seen.append((step.logits.dtype, (step.logits @ step.logits.T).dtype))
            return step.logits.sum() * 0

    fit([Look()], precision="bf16-mixed", max_epochs=1)
    assert set(seen) == {(torch.float32, torch.float32)}
