"""What the metrics share in reading predictions and targets."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError

Task = Literal["binary", "multiclass"]
TASKS = ("binary", "multiclass")


class Rows(NamedTuple):
    """Predictions as rows, whatever their layout was.

    Attributes:
        scores: (N, C) logits or probabilities; (N,) for a binary task.
        targets: (N,) class indices, or floats of the shape of ``scores``; ``None`` without.
        invalid: the number of rows that were left out for a score or target of NaN or infinity.
    """

    scores: Tensor
    targets: Tensor | None
    invalid: Tensor


def read_rows(
    owner: object,
    preds: Tensor,
    target: Tensor | None,
    *,
    task: Task,
    from_logits: bool,
    ignore_index: int | None,
    validate: bool,
) -> Rows:
    """Check predictions and targets, lay them out as rows, and drop what does not count.

    Args:
        owner: who is named in errors.
        preds: (N, C, ...) for a multiclass task, (N, ...) for a binary one.
        target: (N, ...) class indices, or soft targets of the shape of ``preds``.
        task: ``"multiclass"`` or ``"binary"``.
        from_logits: whether ``preds`` are scores before the softmax (the sigmoid).
        ignore_index: positions with this class index are left out.
        validate: check values too, which costs a host sync.
    """
    check_shapes(owner, preds, target, task)
    if target is not None and target.dtype == torch.bool:
        target = target.to(torch.int64)
    scores, targets = _as_rows(preds.detach(), target, task)
    if targets is not None and not targets.is_floating_point() and ignore_index is not None:
        keep = targets != ignore_index
        scores, targets = scores[keep], targets[keep]
    finite = _finite_scores(scores)
    if targets is not None:
        finite &= _finite_targets(targets)
    invalid = (~finite).sum()
    scores, targets = scores[finite], None if targets is None else targets[finite]
    if validate and len(scores):
        if not from_logits:
            check_probabilities(owner, scores)
        if targets is not None:
            _check_targets(owner, scores, targets)
    return Rows(scores, targets, invalid)


def check_arguments(owner: object, task: Task, from_logits: bool) -> None:
    """Refuse an unknown task, and a ``from_logits`` that is not said."""
    if task not in TASKS:
        raise ArgumentError(
            owner, f"`task` must be one of {', '.join(TASKS)}, got {task!r}", cure='task="binary"'
        )
    if not isinstance(from_logits, bool):
        raise ArgumentError(
            owner,
            f"`from_logits` must be True or False, got {from_logits!r}: it is never guessed",
            cure="from_logits=True",
        )


def check_shapes(owner: object, preds: Tensor, target: Tensor | None, task: Task) -> None:
    """Refuse predictions and targets that do not belong together."""
    least = 2 if task == "multiclass" else 1
    if not preds.is_floating_point() or preds.ndim < least:
        shape = "(N, C, ...)" if task == "multiclass" else "(N, ...)"
        raise ArgumentError(
            owner,
            f"needs float predictions {shape} for the {task} task, got {preds.dtype} of shape "
            f"{tuple(preds.shape)}",
            cure="metric.update(logits, target)",
        )
    if task == "multiclass" and preds.shape[1] < 2:
        raise ArgumentError(
            owner,
            f"needs two classes or more on dimension 1, got shape {tuple(preds.shape)}",
            cure='task="binary", and predictions of shape (N,)',
        )
    if target is None:
        return
    hard = preds.shape if task == "binary" else preds.shape[:1] + preds.shape[2:]
    wanted = preds.shape if target.is_floating_point() else hard
    if target.shape != wanted:
        raise ArgumentError(
            owner,
            f"predictions of shape {tuple(preds.shape)} need class indices {tuple(hard)} or soft "
            f"targets {tuple(preds.shape)}, got {target.dtype} of shape {tuple(target.shape)}",
            cure="metric.update(logits, target)",
        )


def check_probabilities(owner: object, scores: Tensor) -> None:
    """Refuse numbers that cannot be probabilities."""
    tolerance = 1e-3 if scores.dtype in (torch.float32, torch.float64) else 2e-2
    low, high = (float(v) for v in torch.aminmax(scores))
    if low < -tolerance or high > 1 + tolerance:
        raise ArgumentError(
            owner,
            f"with from_logits=False predictions are probabilities, got values from {low:.4g} to "
            f"{high:.4g}",
            cure="from_logits=True",
        )
    if scores.ndim == 2:
        worst = float((high_precision(scores).sum(1) - 1).abs().max())
        if worst > tolerance:
            raise ArgumentError(
                owner,
                f"with from_logits=False each row must sum to one, one is off by {worst:.4g}",
                cure="probabilities / probabilities.sum(1, keepdim=True)",
            )


def high_precision(value: Tensor) -> Tensor:
    """``value`` in float64, or in float32 on a device that has no float64 (MPS)."""
    return value.float() if value.device.type == "mps" else value.double()


def log_probabilities(scores: Tensor, from_logits: bool) -> Tensor:
    """(N, C) log-probabilities in high precision; a binary score gives two classes.

    Args:
        scores: (N, C), or (N,) of the positive class.
        from_logits: whether they are logits.
    """
    scores = high_precision(scores)
    if scores.ndim == 1 and from_logits:
        positive = torch.nn.functional.logsigmoid(scores)
        return torch.stack([torch.nn.functional.logsigmoid(-scores), positive], 1)
    if scores.ndim == 1:
        return torch.stack([torch.log1p(-scores), scores.log()], 1)
    return scores.log_softmax(1) if from_logits else scores.log()


def _as_rows(preds: Tensor, target: Tensor | None, task: Task) -> tuple[Tensor, Tensor | None]:
    if task == "binary":
        return preds.reshape(-1), None if target is None else target.detach().reshape(-1)
    classes = preds.shape[1]
    scores = preds.movedim(1, -1).reshape(-1, classes)
    if target is None:
        return scores, None
    if target.is_floating_point():
        return scores, target.detach().movedim(1, -1).reshape(-1, classes)
    return scores, target.reshape(-1)


def _finite_scores(scores: Tensor) -> Tensor:
    # A single class at minus infinity is one that was masked out: its probability is 0.
    return torch.isfinite(scores if scores.ndim == 1 else scores.amax(1))


def _finite_targets(targets: Tensor) -> Tensor:
    finite = torch.isfinite(targets)
    return finite if targets.ndim == 1 else finite.all(1)


def _check_targets(owner: object, scores: Tensor, targets: Tensor) -> None:
    classes = scores.shape[1] if scores.ndim == 2 else 2
    low, high = (float(v) for v in torch.aminmax(targets))
    top = 1.0 if targets.is_floating_point() else classes - 1
    if low < 0 or high > top + (1e-3 if targets.is_floating_point() else 0):
        kind = "soft targets lie in [0, 1]" if targets.is_floating_point() else "class indices"
        raise ArgumentError(
            owner,
            f"targets are outside their range ({kind}, {classes} classes): {low:g} to {high:g}",
            cure="ignore_index=-100, where a class index marks what is not to count",
        )
