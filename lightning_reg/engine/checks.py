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
from lightning_reg.engine.sharding import is_sharded, shards_weights
from lightning_reg.engine.step import Step
from lightning_reg.engine.technique import Technique

_SHARDED = ("FSDP", "DeepSpeed", "XLA")
_REPLICAS = 'Trainer(strategy="ddp_reg")'
_LOSS_PHASES = (*CRITERION_PHASES, "scale_loss", "penalty")


def acts_in_loss(technique: Regularizer) -> bool:
    """Whether a technique changes the loss."""
    return any(overrides(technique, phase) for phase in _LOSS_PHASES)


def check_strategy(trainer: pl.Trainer, techniques: Sequence[Regularizer]) -> None:
    """Refuse what cannot be right where weights are sharded over ranks."""
    strategy = type(trainer.strategy).__name__
    if shards_weights(trainer):
        _check_pure_data_parallel(trainer, techniques)
        refused = [t for t in techniques if not right_when_sharded(type(t))]
    elif any(word in strategy for word in _SHARDED):
        refused = [t for t in techniques if acts_on_weights(type(t))]
    else:
        return
    if refused:
        raise UnsupportedError(
            refused[0],
            f"acts on whole weights, which {strategy} splits over ranks",
            cure=_REPLICAS,
        )


def acts_on_weights(cls: type[Technique]) -> bool:
    """Whether a class acts on weights or their gradients."""
    if not issubclass(cls, Regularizer):
        return False
    phases = WEIGHT_PHASES if "weights" not in cls.writes else (*WEIGHT_PHASES, "forward_context")
    return any(getattr(cls, phase) is not getattr(Regularizer, phase) for phase in phases)


def right_when_sharded(cls: type[Technique]) -> bool:
    """Whether a class is right where FSDP2 shards weights; see :class:`Technique`."""
    return cls.sharded if cls.sharded is not None else not acts_on_weights(cls)


def check_sharded(
    trainer: pl.Trainer, technique: Regularizer, refused: bool, problem: str, cure: str = _REPLICAS
) -> None:
    """Refuse an argument of a technique where weights are sharded over ranks.

    Args:
        trainer: the Trainer.
        technique: whose argument.
        refused: whether it has the value that cannot be right there.
        problem: why.
        cure: what to use in its place.
    """
    if refused and shards_weights(trainer):
        strategy = type(trainer.strategy).__name__
        raise UnsupportedError(
            technique, f"{problem}, and {strategy} shards the weights over ranks", cure=cure
        )


def _check_pure_data_parallel(trainer: pl.Trainer, techniques: Sequence[Regularizer]) -> None:
    mesh = getattr(trainer.strategy, "device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    size = mesh["tensor_parallel"].size() if "tensor_parallel" in names else 1  # type: ignore[index]
    if size > 1 and techniques:
        raise UnsupportedError(
            techniques[0],
            f"takes every rank for one with samples of its own, and here {size} ranks share theirs "
            "(tensor parallelism)",
            cure="ModelParallelStrategy(data_parallel_size=<all ranks>, tensor_parallel_size=1)",
        )


def check_sharded_alike(module: pl.LightningModule, techniques: Sequence[Regularizer]) -> None:
    """Refuse a module of which FSDP2 shards a part only: nobody averages the rest over ranks."""
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    plain = [name for name, parameter in learned.items() if not is_sharded(parameter)]
    if techniques and 0 < len(plain) < len(learned):
        raise UnsupportedError(
            techniques[0],
            f"needs all weights that learn to be sharded, or none, and {plain[0]} is not: its "
            "gradient is not averaged over ranks",
            cure='fully_shard(self, mesh=self.device_mesh["data_parallel"])  '
            "# last in configure_model",
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
