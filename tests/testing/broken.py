"""One technique that keeps every promise, and techniques that each break one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Regularizer, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Technique
from lightning_reg.engine.update import ParameterUpdate
from lightning_reg.testing import ClassifierHost, ContractCase, HostOptions, Probe


def confidence(logits: Tensor) -> Tensor:
    """The mean negative entropy of (B, C) logits."""
    p = logits.softmax(-1)
    return (p * p.clamp_min(1e-12).log()).sum(-1).mean()


class Good(Regularizer):
    """A penalty on logits with a state: the mean of its past values."""

    needs = ("logits",)
    semantics = "global"
    function = staticmethod(confidence)

    def __init__(self, strength: float = 0.5, *, name: str | None = None) -> None:
        super().__init__(strength, name=name)
        check_range(self, "strength", strength, 0, cure=f"{type(self).__name__}(0.5)")
        self.mean = torch.zeros(())

    def penalty(self, step: Step) -> Tensor:
        value = confidence(step.logits)
        self.learn(step, value)
        return value * (1 + 0 * self.mean.to(value))

    def learn(self, step: Step, value: Tensor) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def good_value(probe: Probe) -> Tensor:
    p = torch.softmax(probe.logits, 1)
    return -torch.distributions.Categorical(p).entropy().mean()


def good_gradcheck() -> tuple[Any, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    return confidence, (logits.requires_grad_(),)


GOOD = ContractCase(
    args={"strength": 0.5},
    neutral={"strength": 0.0},
    bad=[{"strength": -1.0}],
    expected=good_value,
    gradcheck=good_gradcheck,
)


class DrawsFromTheGlobalGenerator(Good):
    def active(self, context: Any) -> bool:
        return True

    def transform_batch(self, step: Step) -> None:
        torch.rand(1)


class DoesNothing(Good):
    def penalty(self, step: Step) -> Tensor:
        return super().penalty(step).detach()


class FlipsTheSign(Good):
    def penalty(self, step: Step) -> Tensor:
        return -super().penalty(step)


class ForgetsManualOptimization(Good):
    def penalty(self, step: Step) -> Tensor:
        value = super().penalty(step)
        return value if step.module.automatic_optimization else 2 * value


def detached(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return (p.detach() * p.log()).sum(-1).mean()


def detached_gradcheck() -> tuple[Any, tuple[Tensor, ...]]:
    return detached, good_gradcheck()[1]


class NoiseOfItsOwnOnEachRank(Good):
    def project(self, update: ParameterUpdate) -> None:
        generator = torch.Generator().manual_seed(update.comm.rank)
        for weight in update.module.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)


class StateOfItsOwnOnEachRank(Good):
    def learn(self, step: Step, value: Tensor) -> None:
        self.mean = 0.5 * self.mean + 0.5 * value.detach()


class LogsALocalValue(Good):
    def penalty(self, step: Step) -> Tensor:
        value = super().penalty(step)
        return value + (step.logits.var(0).mean() - value).detach()


class LocalStatisticDeclaredGlobal(Good):
    def penalty(self, step: Step) -> Tensor:
        return step.logits.var(0).log().mean()


class CountsEveryMicroBatch(Good):
    def penalty(self, step: Step) -> Tensor:
        return super().penalty(step) * step.trainer.accumulate_grad_batches


class LosesItsStateOnResume(Good):
    def penalty(self, step: Step) -> Tensor:
        value = super().penalty(step)
        self.mean = 0.5 * self.mean.to(value) + 0.5 * value.detach()
        return value * self.mean

    def state_dict(self) -> dict[str, Any]:
        return {}


class SavesTheStateOfOneRank(Good):
    def learn(self, step: Step, value: Tensor) -> None:
        self.mean = value.detach().clone()

    def penalty(self, step: Step) -> Tensor:
        before = self.mean
        return super().penalty(step) * (1 + before)


class HidesThatItHasAState(Good):
    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean} if hasattr(self, "started") else {}


class TakesItsReferenceAgain(Good):
    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.anchor = next(pl_module.parameters()).detach().clone()

    def penalty(self, step: Step) -> Tensor:
        return (next(step.module.parameters()) - self.anchor).square().sum() + step.logits.sum() * 0

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": getattr(self, "anchor", None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.anchor = state["anchor"]


class AddsToScaledGradients(Good):
    def penalty(self, step: Step) -> None:
        return None

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        for weight in pl_module.parameters():
            if weight.grad is not None:
                weight.grad += self.strength * weight.detach()


class ForgetsThatFusedOptimizersUnscaleLater(Good):
    def penalty(self, step: Step) -> None:
        return None

    def edit_gradients(self, update: ParameterUpdate) -> None:
        for weight in update.module.parameters():
            if weight.grad is not None:
                weight.grad.clamp_(-0.05, 0.05)


class DependsOnThePlaceInTheList(Good):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for weight in pl_module.parameters():
            if weight.grad is not None:
                weight.grad += self.strength * weight.detach()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


class LeavesAHookBehind(Good):
    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.encoder.register_forward_hook(_look)


def _look(module: nn.Module, args: Any, output: Any) -> None:
    pass


class FreezesForGood(Good):
    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        next(pl_module.parameters()).requires_grad_(False)


class LeavesWeightsMoved(Good):
    """Moves weights for the second pass and comes back only if that pass succeeds."""

    reads = frozenset({"losses"})
    writes = frozenset({"weights"})

    def restore(self) -> None:
        pass

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        weight = next(step.module.parameters())
        kept = weight.detach().clone()
        with torch.no_grad():
            weight += 0.5
        second = step.rerun()
        weight.data = kept
        return second


class RemembersInTheClass(Good):
    runs = 0

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        type(self).runs += 1

    def penalty(self, step: Step) -> Tensor:
        return super().penalty(step) * self.runs


class SwallowsExceptions(Good):
    def forward_context(self, step: Step) -> Any:
        return _Swallowing()


class _Swallowing(nullcontext):
    def __exit__(self, *error: object) -> bool:
        return True


class CannotBePickled(Good):
    def __init__(self, strength: float = 0.5) -> None:
        super().__init__(strength)
        self.shape = lambda x: x


class CopiesKeepTheRun(Good):
    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "mean": self.mean + 1}
        state["_pipeline"] = None
        return state


class CannotBeWrittenToYaml(Good):
    def __init__(self, strength: float = 0.5, power: int = 1) -> None:
        super().__init__(strength)
        self.power = power


class OtherArgumentsFromYaml(Good):
    """Keeps a tuple, which YAML makes a list."""

    def __init__(self, strength: float = 0.5, layers: Any = ()) -> None:
        super().__init__(strength)
        self.layers = layers


class AcceptsAnyStrength(Good):
    def _check_strength(self, strength: Any) -> None:
        pass

    def __init__(self, strength: float = 0.5) -> None:
        Regularizer.__init__(self, strength)
        self.mean = torch.zeros(())


class SwallowsArguments(Good):
    def __init__(self, strength: float = 0.5, **kwargs: Any) -> None:
        super().__init__(strength)


class NamesNoCure(Good):
    def __init__(self, strength: float = 0.5) -> None:
        if not 0 <= strength < 10:
            raise ArgumentError(self, f"`strength` is {strength}")
        super().__init__(strength)


class RefusesLate(Good):
    def __init__(self, strength: float = 0.5, layer: str = "encoder") -> None:
        super().__init__(strength)
        self.layer = layer

    def penalty(self, step: Step) -> Tensor:
        if self.layer != "encoder":
            raise ArgumentError(self, f"there is no layer {self.layer!r}", cure='layer="encoder"')
        return super().penalty(step)


class GoesOnWithoutItsSignal(Good):
    def penalty(self, step: Step) -> Tensor | None:
        return super().penalty(step) if step.records.get("") else None


class LearnsFromNan(Good):
    def learn(self, step: Step, value: Tensor) -> None:
        self.mean = 0.5 * self.mean + 0.5 * step.comm.reduce(value.detach(), "mean")


class LearnsOnTheRanksThatCan(Good):
    """Each rank skips what is not finite on its own."""

    def learn(self, step: Step, value: Tensor) -> None:
        if torch.isfinite(value):
            self.mean = self.mean + 1.0


class LearnsInSkippedSteps(Good):
    def learn(self, step: Step, value: Tensor) -> None:
        self.mean = self.mean + 1.0


class CrashesOnNan(Good):
    def penalty(self, step: Step) -> Tensor:
        if not torch.isfinite(step.logits).all():
            raise ValueError("the eigenvalues did not converge")
        return super().penalty(step)


class WritesNanWeights(Good):
    def project(self, update: ParameterUpdate) -> None:
        for weight in update.module.parameters():
            if weight.grad is not None:
                weight -= 1e-3 * weight.grad


class LogsNothing(Good):
    def penalty(self, step: Step) -> None:
        return None

    def parameter_gradient(self, update: ParameterUpdate) -> None:
        return None


class LogsOverTheUsersLoss(Good):
    def penalty(self, step: Step) -> Tensor:
        value = super().penalty(step)
        assert step.loss is not None
        step.module.log("loss", step.loss + value)
        return value


class CountsTwice(Good):
    def penalty(self, step: Step) -> Tensor:
        labels = step.logits.argmax(1)
        step.module.counted.update(labels, labels)
        return super().penalty(step)


class ExemptsFromNothing(Good):
    exemptions = {"no_such_check": "because it cannot be so"}


class ExemptsWithoutReason(Good):
    exemptions = {"resume": " "}


# ---------------------------------------------------------------------- in trainer.test


class GoodInTest(Good):
    """Moves the head's bias with what it sees in a test, and back at its end."""

    needs = ()

    def __init__(self, strength: float = 0.5, *, name: str | None = None) -> None:
        super().__init__(strength, name=name)
        self.kept: Tensor | None = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.kept = pl_module.head.bias.detach().clone()

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        seen = trainer.strategy.reduce(pl_module.seen[-1][1].mean(0), reduce_op="mean")
        if seen.isfinite().all():
            pl_module.head.bias.data -= self.strength * seen

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.put_back(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.put_back(pl_module)

    def put_back(self, module: Any) -> None:
        if self.kept is not None:
            module.head.bias.data.copy_(self.kept)
            self.kept = None


class AdaptsEachRankByItself(GoodInTest):
    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        pl_module.head.bias.data -= self.strength * pl_module.seen[-1][1].mean(0)


class LeavesAMarkAfterATest(GoodInTest):
    def put_back(self, module: Any) -> None:
        super().put_back(module)
        module.adapted = True


class StopsAfterATest(GoodInTest):
    """Does not adapt when it is used again."""

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        type(self).runs = getattr(type(self), "runs", 0) + 1

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if type(self).runs == 1:
            super().on_test_batch_end(trainer, pl_module, *args)


GOOD_IN_TEST = ContractCase(
    args={"strength": 0.5},
    neutral={"strength": 0.0},
    bad=[{"strength": -1.0}],
    gradcheck=good_gradcheck,
    stage="test",
    logs=(),
    joint={},
)


# ---------------------------------------------------------------------- mixins


class GoodMixin(Technique):
    """Adds the penalty to a host's own loss."""

    semantics = "global"
    function = staticmethod(confidence)

    def __init__(self, options: HostOptions, strength: float = 0.5) -> None:
        if not 0 <= strength < float("inf"):
            raise ArgumentError("GoodMixin", f"`strength` is {strength}", cure="strength=0.5")
        super().__init__(options)
        self.strength = strength

    def compute(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        loss, signals = super().compute(batch)
        return (loss + self.extra(signals) if self.strength else loss), signals

    def extra(self, signals: dict[str, Any]) -> Tensor:
        return self.strength * confidence(signals["logits"])


class GoodMixinHost(GoodMixin, ClassifierHost):
    pass


class OtherWeights(GoodMixin):
    def build(self, options: HostOptions) -> None:
        self.extra_head = nn.Linear(16, 4)
        super().build(options)


class OtherWeightsHost(OtherWeights, ClassifierHost):
    pass


class LocalMixin(GoodMixin):
    def extra(self, signals: dict[str, Any]) -> Tensor:
        return signals["logits"].var(0).log().mean()


class LocalMixinHost(LocalMixin, ClassifierHost):
    pass


def good_mixin(options: HostOptions, args: Any) -> Any:
    return GoodMixinHost(options, **args)


def other_weights(options: HostOptions, args: Any) -> Any:
    return OtherWeightsHost(options, **args)


def local_mixin(options: HostOptions, args: Any) -> Any:
    return LocalMixinHost(options, **args)


GOOD_MIXIN = ContractCase(
    args={"strength": 0.5},
    neutral={"strength": 0.0},
    bad=[{"strength": -1.0}],
    gradcheck=good_gradcheck,
    mixin=good_mixin,
)
