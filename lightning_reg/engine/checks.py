"""What a run must be like for techniques to be right in it, checked before or in the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning.pytorch as pl
from torch import Tensor

from lightning_reg.engine.errors import RegularizationError, UnsupportedError
from lightning_reg.engine.regularizer import (
    CRITERION_PHASES,
    WEIGHT_PHASES,
    Regularizer,
    overrides,
)
from lightning_reg.engine.step import Step

_SHARDED = ("FSDP", "ModelParallel", "DeepSpeed", "XLA")
_LOSS_PHASES = (*CRITERION_PHASES, "penalty")


def acts_in_loss(technique: Regularizer) -> bool:
    """Whether a technique changes the loss."""
    return any(overrides(technique, phase) for phase in _LOSS_PHASES)


def check_strategy(trainer: pl.Trainer, techniques: Sequence[Regularizer]) -> None:
    """Refuse whole-weight techniques where weights are split over ranks."""
    strategy = type(trainer.strategy).__name__
    if not any(word in strategy for word in _SHARDED):
        return
    for technique in techniques:
        in_forward = overrides(technique, "forward_context") and "weights" in technique.writes
        if in_forward or any(overrides(technique, phase) for phase in WEIGHT_PHASES):
            raise UnsupportedError(
                technique,
                f"acts on whole weights, which {strategy} splits over ranks",
                cure='Trainer(strategy="ddp_reg")',
            )


def check_manual(module: pl.LightningModule, techniques: Sequence[Regularizer]) -> None:
    """Refuse what manual optimization keeps out of a technique's reach."""
    if module.automatic_optimization:
        return
    for technique in techniques:
        if overrides(technique, "perturb"):
            raise UnsupportedError(
                technique,
                "needs the Trainer's own backward; this module optimizes manually",
                cure="self.automatic_optimization = True",
            )
        if acts_in_loss(technique) and not hasattr(module, "regularize"):
            raise UnsupportedError(
                technique,
                "changes the loss, which only your step knows under manual optimization",
                cure="class Module(RegularizeMixin, LightningModule) and "
                "self.manual_backward(self.regularize(loss, logits=logits))",
            )


def check_applied(
    module: pl.LightningModule, step: Step, active: Sequence[Regularizer], applied: set[str]
) -> None:
    """Under manual optimization: did each technique find its tensors in some call?"""
    if module.automatic_optimization:
        return
    if step.mixes and step.target_distribution is None:
        raise RegularizationError(
            step.mixers[0],
            "mixed the samples of the batch, and no `self.regularize` call of the first "
            "training step mixed their labels",
            cure="self.manual_backward(self.regularize(loss, logits=logits))",
        )
    for technique in active:
        if acts_in_loss(technique) and technique.name not in applied:
            raise RegularizationError(
                technique,
                "was not applied by any `self.regularize` call of the first training step; "
                f"it needs {', '.join(technique.needs) or 'one call'}",
                cure="self.regularize(loss, "
                + ", ".join(f"{need}=..." for need in technique.needs)
                + ")",
            )


def check_rerun(technique: Regularizer, total: Tensor, rerun: Callable[[], Tensor]) -> None:
    """On the first step: is a second pass of the user's step the same as the first?"""
    name = type(technique).__name__
    try:
        again = float(rerun().detach())
    except RegularizationError:
        raise
    except Exception as error:
        raise UnsupportedError(
            technique,
            f"runs training_step twice per batch, and the second run failed with {error!r}",
            cure=f"remove {name}, or keep no graph or state between calls of training_step",
        ) from error
    first = float(total.detach())
    if abs(first - again) > 1e-3 * max(1.0, abs(first)):
        raise UnsupportedError(
            technique,
            "runs training_step twice per batch, but with the same weights, batch and random "
            f"numbers the second run gave loss {again:.6f} after {first:.6f}: the step keeps "
            "state between calls (a hidden state, a counter) or writes into its batch",
            cure=f"make training_step repeatable, or remove {name}",
        )
