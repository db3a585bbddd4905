"""What the metrics share in reading predictions and targets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError

Task = Literal["binary", "multiclass"]
TASKS = ("binary", "multiclass")
AnyTask = Literal["binary", "multiclass", "multilabel"]
LEFT_OUT = -1
"""What a multilabel target that is not to count is read as."""

BLOCK = 2**18
"""Scores in a block that is worked on in float64: 2 MiB."""
WIDE_BLOCK = 2**22
"""Scores in a block of which only a few numbers for each row are worked on in float64."""
_DEVICE_BLOCK = 2**25
_CHUNK_OF_LOGS = 2**17
_NARROW = 32
_PART = 64


class Rows(NamedTuple):
    """Predictions as rows, whatever their layout was.

    Attributes:
        scores: (N, C) logits or probabilities; (N,) for a binary task.
        targets: (N,) class indices, or floats of the shape of ``scores``; ``None`` without.
        invalid: the number of rows that were left out for a score or target of NaN or infinity.
        maxima: the largest scores of each part of long rows, if they are known.
    """

    scores: Tensor
    targets: Tensor | None
    invalid: Tensor
    maxima: Tensor | None = None

    def top(self) -> Tensor:
        """The index (N,) of the largest score of each row; the first one among equals."""
        return top_class(self.scores, self.maxima)


def read_rows(
    owner: object,
    preds: Tensor,
    target: Tensor | None,
    *,
    task: AnyTask,
    from_logits: bool,
    ignore_index: int | None,
    validate: bool,
) -> Rows:
    """All of a batch as rows: see :func:`read_blocks`."""
    check_shapes(owner, preds, target, task)
    rows, targets = _flat(preds.detach(), target, task)
    return _clean(owner, rows, targets, task, from_logits, ignore_index, validate)


def read_blocks(
    owner: object,
    preds: Tensor,
    target: Tensor | None,
    *,
    task: AnyTask,
    from_logits: bool,
    ignore_index: int | None,
    validate: bool,
    block: int = BLOCK,
) -> Iterator[Rows]:
    """Check predictions and targets, lay them out as rows, and drop what does not count.

    The rows come in blocks that fit into the processor's cache, so that what is computed from
    them, in float64 too, never takes up the memory of the whole. On other devices the blocks
    are large.

    Args:
        owner: who is named in errors.
        preds: (N, C, ...) for a multiclass or multilabel task, (N, ...) for a binary one.
        target: (N, ...) class indices, or soft targets of the shape of ``preds``. For a
            multilabel task zeros and ones, or soft ones, of the shape of ``preds``.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        from_logits: whether ``preds`` are scores before the softmax (the sigmoid).
        ignore_index: positions with this class index are left out; of a multilabel target,
            entries with this number become :data:`LEFT_OUT`.
        validate: check values too, which costs a host sync.
        block: scores in a block on the CPU.
    """
    check_shapes(owner, preds, target, task)
    for rows, targets in _pieces(preds.detach(), target, task, _block_size(preds, block)):
        yield _clean(owner, rows, targets, task, from_logits, ignore_index, validate)


def check_arguments(
    owner: object, task: AnyTask, from_logits: bool, tasks: tuple[str, ...] = TASKS
) -> None:
    """Refuse an unknown task, and a ``from_logits`` that is not said."""
    if task not in tasks:
        raise ArgumentError(
            owner, f"`task` must be one of {', '.join(tasks)}, got {task!r}", cure='task="binary"'
        )
    if not isinstance(from_logits, bool):
        raise ArgumentError(
            owner,
            f"`from_logits` must be True or False, got {from_logits!r}: it is never guessed",
            cure="from_logits=True",
        )


def check_shapes(owner: object, preds: Tensor, target: Tensor | None, task: AnyTask) -> None:
    """Refuse predictions and targets that do not belong together."""
    least = 1 if task == "binary" else 2
    if not preds.is_floating_point() or preds.ndim < least:
        shape = "(N, ...)" if task == "binary" else "(N, C, ...)"
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
    per_row = preds.shape[:1] + preds.shape[2:]
    hard = per_row if task == "multiclass" else preds.shape
    wanted = preds.shape if target.is_floating_point() else hard
    if target.shape != wanted:
        raise ArgumentError(
            owner,
            f"predictions of shape {tuple(preds.shape)} need class indices {tuple(hard)} or soft "
            f"targets {tuple(preds.shape)}, got {target.dtype} of shape {tuple(target.shape)}",
            cure="metric.update(logits, target)",
        )


def check_probabilities(owner: object, scores: Tensor, task: AnyTask) -> None:
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
    if task == "multiclass":
        worst = float((scores.sum(1, dtype=high_dtype(scores)) - 1).abs().max())
        if worst > tolerance:
            raise ArgumentError(
                owner,
                f"with from_logits=False each row must sum to one, one is off by {worst:.4g}",
                cure="probabilities / probabilities.sum(1, keepdim=True)",
            )


def high_dtype(like: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (MPS)."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def high_precision(value: Tensor) -> Tensor:
    """``value`` in float64, or in float32 on a device that has no float64 (MPS)."""
    return value.to(high_dtype(value))


def probabilities(scores: Tensor, from_logits: bool) -> Tensor:
    """Probabilities in high precision, of the shape of ``scores``: (N, C), or (N,) if binary."""
    if not from_logits:
        return high_precision(scores)
    if scores.ndim == 1:
        return high_precision(scores).sigmoid()
    return _over_classes(torch.softmax, scores)


def log_probabilities(scores: Tensor, from_logits: bool) -> Tensor:
    """(N, C) log-probabilities in high precision; a binary score gives two classes.

    Args:
        scores: (N, C), or (N,) of the positive class.
        from_logits: whether they are logits.
    """
    if scores.ndim == 2:
        if from_logits:
            return _over_classes(torch.log_softmax, scores)
        return high_precision(scores).log()
    scores = high_precision(scores)
    if from_logits:
        positive = torch.nn.functional.logsigmoid(scores)
        return torch.stack([torch.nn.functional.logsigmoid(-scores), positive], 1)
    return torch.stack([torch.log1p(-scores), scores.log()], 1)


def probability_of(scores: Tensor, index: Tensor, from_logits: bool) -> Tensor:
    """The probability (N,) of one class of each row (N, C), in high precision."""
    if not from_logits:
        return high_precision(scores.gather(1, index.unsqueeze(1))).squeeze(1)
    return log_probability_of(scores, index, from_logits).exp()


def log_probability_of(scores: Tensor, index: Tensor, from_logits: bool) -> Tensor:
    """The log-probability (N,) of one class of each row (N, C), in high precision."""
    index = index.unsqueeze(1)
    if not from_logits:
        return high_precision(scores.gather(1, index)).log().squeeze(1)
    if scores.device.type != "cpu":
        return _over_classes(torch.log_softmax, scores).gather(1, index).squeeze(1)
    # Chunks that stay in the cache nearest to the processor.
    rows = max(1, _CHUNK_OF_LOGS * torch.get_num_threads() // scores.shape[1])
    parts = [
        _over_classes(torch.log_softmax, chunk).gather(1, own)
        for chunk, own in zip(scores.split(rows), index.split(rows), strict=True)
    ]
    return torch.cat(parts).squeeze(1)


def top_class(scores: Tensor, maxima: Tensor | None = None) -> Tensor:
    """The index (N,) of the largest score (N, C) of each row; the first one among equals.

    Args:
        scores: logits or probabilities.
        maxima: the maxima of their parts, if they are known.
    """
    maxima = _maxima_of_parts(scores) if maxima is None else maxima
    if maxima.shape[1] == 1:
        return scores.max(1).indices
    # A maximum without its index is found several times as fast: first in which part of the row
    # it lies, then where in that part.
    classes = scores.shape[1]
    start = (maxima.max(1).indices * _PART).clamp_max(classes - _PART).unsqueeze(1)
    part = scores.gather(1, start + torch.arange(_PART, device=scores.device))
    within: Tensor = part.max(1).indices
    return start.squeeze(1) + within


def _maxima_of_parts(scores: Tensor) -> Tensor:
    """The largest score of each part of a row (N, parts); short rows are one part."""
    classes = scores.shape[1]
    if classes < 4 * _PART or scores.stride(1) != 1:
        return scores.amax(1, keepdim=True)
    whole = classes // _PART * _PART
    maxima = scores[:, :whole].unflatten(1, (-1, _PART)).amax(2)
    if whole < classes:
        maxima = torch.cat([maxima, scores[:, whole:].amax(1, keepdim=True)], 1)
    return maxima


def _over_classes(function: Any, scores: Tensor) -> Tensor:
    dtype = high_dtype(scores)
    if scores.shape[1] > _NARROW and scores.stride(1) == 1:
        result: Tensor = function(scores, 1, dtype=dtype)
        return result
    # Vectorized over rows: several times as fast where there are few classes.
    transposed: Tensor = function(scores.t().contiguous(), 0, dtype=dtype)
    return transposed.t()


def _block_size(preds: Tensor, block: int) -> int:
    if preds.device.type != "cpu":
        return _DEVICE_BLOCK
    _keep_freed_memory()
    return block * torch.get_num_threads()


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    # glibc gives the memory of each block back to the system and takes it again for the next, at
    # five times the cost of the computation, until the process has freed something larger once.
    # This is never written to, and so takes no memory.
    torch.empty(28 * 2**20, dtype=torch.uint8)


def _flat(preds: Tensor, target: Tensor | None, task: AnyTask) -> tuple[Tensor, Tensor | None]:
    """Predictions (N, C) or (N,), and targets like them or (N,)."""
    if task == "binary":
        return preds.reshape(-1), None if target is None else target.reshape(-1)
    rows = preds.movedim(1, -1).reshape(-1, preds.shape[1])
    if target is None:
        return rows, None
    if target.shape == preds.shape and _like_preds(target, task):
        return rows, target.movedim(1, -1).reshape(-1, preds.shape[1])
    return rows, target.reshape(-1)


def _like_preds(target: Tensor, task: AnyTask) -> bool:
    return task == "multilabel" or target.is_floating_point()


def _pieces(
    preds: Tensor, target: Tensor | None, task: AnyTask, limit: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows of at most ``limit`` numbers; views where the layout allows."""
    size = preds[:1].numel()
    if len(preds) > 1 and size <= limit:
        step = max(1, limit // max(size, 1))
        for start in range(0, len(preds), step):
            part = slice(start, start + step)
            yield _flat(preds[part], None if target is None else target[part], task)
        return
    for i in range(len(preds)):
        sample = preds[i : i + 1]
        rows, targets = _flat(sample, None if target is None else target[i : i + 1], task)
        if task != "binary":
            # Without a copy, unlike the rows of _flat.
            rows = sample[0].flatten(1).t() if sample.ndim > 2 else sample
        step = max(1, limit * len(rows) // max(size, 1))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            yield rows[part], None if targets is None else targets[part]


def _clean(
    owner: object,
    scores: Tensor,
    targets: Tensor | None,
    task: AnyTask,
    from_logits: bool,
    ignore_index: int | None,
    validate: bool,
) -> Rows:
    if targets is not None:
        targets = targets.detach()
        hard = not targets.is_floating_point()
        targets = targets.to(torch.int64) if hard else targets
        if hard and ignore_index is not None and task == "multilabel":
            targets = targets.masked_fill(targets == ignore_index, LEFT_OUT)
        elif hard and ignore_index is not None:
            scores, targets = _select(targets != ignore_index, scores, targets)
    maxima = _maxima_of_parts(scores) if task == "multiclass" else None
    finite = _finite_scores(scores, maxima)
    if targets is not None and targets.is_floating_point():
        finite &= _finite_targets(targets)
    invalid = (~finite).sum()
    scores, targets, maxima = _select(finite, scores, targets, maxima)
    if validate and len(scores):
        if not from_logits:
            check_probabilities(owner, scores, task)
        if targets is not None:
            _check_targets(owner, scores, targets, task, ignore_index)
    return Rows(scores, targets, invalid, maxima)


def _select(keep: Tensor, *rows: Any) -> tuple[Any, ...]:
    if bool(keep.all()):  # the usual case needs no copy
        return rows
    return tuple(None if part is None else part[keep] for part in rows)


def _finite_scores(scores: Tensor, maxima: Tensor | None) -> Tensor:
    # Of several classes one at minus infinity was masked out: its probability is 0.
    finite = torch.isfinite(scores if maxima is None else maxima.amax(1))
    return finite if finite.ndim == 1 else finite.all(1)


def _finite_targets(targets: Tensor) -> Tensor:
    finite = torch.isfinite(targets)
    return finite if targets.ndim == 1 else finite.all(1)


def _check_targets(
    owner: object, scores: Tensor, targets: Tensor, task: AnyTask, ignore_index: int | None
) -> None:
    classes = scores.shape[1] if task == "multiclass" else 2
    low, high = (float(v) for v in torch.aminmax(targets))
    top = 1.0 if targets.is_floating_point() else classes - 1
    least = LEFT_OUT if task == "multilabel" and ignore_index is not None else 0
    if low < least or high > top + (1e-3 if targets.is_floating_point() else 0):
        kind = "soft targets lie in [0, 1]" if targets.is_floating_point() else "class indices"
        raise ArgumentError(
            owner,
            f"targets are outside their range ({kind}, {classes} classes): {low:g} to {high:g}",
            cure="ignore_index=-100, where a class index marks what is not to count",
        )
