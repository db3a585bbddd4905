"""The resolved plan of a Trainer's techniques, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_reg.engine.planner import Plan
from lightning_reg.engine.regularizer import Regularizer, overrides

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from rich.table import Table

_PHASE_TITLES = {
    "prepare": "0 prepare",
    "transform_batch": "1 transform batch",
    "forward_context": "2 forward",
    "transform_targets": "3 targets",
    "per_sample_loss": "3 loss",
    "sample_weights": "3 sample weights",
    "scale_loss": "3 factor of the loss",
    "penalty": "4 penalty",
    "perturb": "5 second pass",
    "parameter_gradient": "6 closed-form gradient",
    "edit_gradients": "7 edit gradients",
    "project": "8 project",
}
_LOSS_NOTE = (
    "your labels stay in the batch; the loss is the cross-entropy of the captured logits with "
    "the changed targets"
)


def explain(trainer: pl.Trainer) -> Table:
    """Print what the techniques of ``trainer`` do, in the order in which they do it.

    Works before, during and after a fit.

    Args:
        trainer: a Trainer with techniques among its callbacks.

    Returns:
        The table that was printed.

    Raises:
        ConflictError: if two techniques exclude each other.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SAM, explain
        >>> table = explain(L.Trainer(callbacks=[SAM(rho=0.05)], logger=False))  # doctest: +SKIP
    """
    from rich.console import Console
    from rich.table import Table

    plan = Plan.of(trainer.callbacks)  # type: ignore[attr-defined]
    table = Table(title="Regularization of a training step")
    for column in ("phase", "technique", "strength", "over ranks", "reads", "writes", "note"):
        table.add_column(column)
    for phase, title in _PHASE_TITLES.items():
        for technique in plan.phases[phase]:
            table.add_row(title, *_row(technique, phase))
    Console().print(table)
    return table


def _row(technique: Regularizer, phase: str) -> tuple[str, ...]:
    return (
        technique.name,
        str(technique.strength),
        technique.semantics,
        ", ".join(sorted({*technique.reads, *technique.needs})),
        ", ".join(sorted(technique.writes)),
        _note(technique, phase),
    )


def _note(technique: Regularizer, phase: str) -> str:
    if technique.explanation:
        return technique.explanation
    if phase in ("transform_targets", "per_sample_loss", "sample_weights"):
        return _LOSS_NOTE
    if phase == "transform_batch" and overrides(technique, "transform_batch"):
        return _LOSS_NOTE if "targets" in technique.writes else ""
    return ""
