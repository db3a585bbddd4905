"""What the metrics of token sequences share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import AdditiveMetric
from lightning_reg.metrics.blocks import split_alike
from lightning_reg.metrics.inputs import check_arguments, check_probabilities, high_dtype


class SequenceMetric(AdditiveMetric):
    """Base of metrics that need the tokens of a sequence together.

    A subclass gives one number per token in :meth:`values`, whose tokens come in blocks, and adds
    whole sequences to its states in :meth:`accumulate`: what is made on the way is as large as a
    block and as the (N, T) numbers, and never as the logits. A sequence in which a token that
    counts holds NaN or infinity is left out whole.

    Args:
        from_logits: whether predictions are logits (``True``) or probabilities.
        ignore_index: tokens with this target, such as padding, do not count.
        validate_args: check values, which costs a host sync a block of a batch.
        kwargs: those of ``torchmetrics.Metric``.
    """

    def __init__(
        self,
        *,
        from_logits: bool,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_arguments(self, "multiclass", from_logits)
        self.from_logits = from_logits
        self.ignore_index = ignore_index
        self.validate_args = validate_args

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """One number per token, in high precision.

        Args:
            scores: (n, V) of tokens that count.
            targets: (n,) int64, or ``None``.
        """
        raise NotImplementedError

    def per_token(self, preds: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Check a batch and give one number per token.

        Args:
            preds: (N, T, V) predictions.
            target: (N, T) token indices, or ``None``.

        Returns:
            The numbers (N, T), 0 where a token does not count; which tokens count (N, T); which
            sequences are valid (N,).
        """
        self._check(preds, target)
        shape = preds.shape[:2]
        numbers = torch.zeros(shape, dtype=high_dtype(preds), device=preds.device)
        valid = torch.ones(shape, dtype=torch.bool, device=preds.device)
        counted = torch.ones_like(valid)
        if target is not None and self.ignore_index is not None:
            counted = target != self.ignore_index
        given = [preds.detach(), numbers, valid, counted]
        for block in split_alike(given if target is None else [*given, target.detach()], 2):
            self._fill(block)
        return numbers, counted, valid.all(1)

    def _fill(self, block: list[Tensor]) -> None:
        """Write a block's numbers and its validity into the views that it holds."""
        preds, numbers, valid, counted = block[:4]
        scores = preds[counted]
        finite = torch.isfinite(scores.amax(1)) if len(scores) else counted[counted]
        valid[counted] = finite
        use = counted.clone()
        use[counted] = finite
        scores = scores[finite]
        targets = block[4][use].long() if len(block) > 4 else None
        if self.validate_args and len(scores):
            if not self.from_logits:
                check_probabilities(self, scores, "multiclass")
            if targets is not None:
                self._check_tokens(targets, scores.shape[1])
        if len(scores):
            numbers[use] = self.values(scores, targets)

    def _check(self, preds: Tensor, target: Tensor | None) -> None:
        if not preds.is_floating_point() or preds.ndim != 3 or min(preds.shape[1:]) < 1:
            raise ArgumentError(
                self,
                f"needs float predictions (N, T, V), got {preds.dtype} of shape "
                f"{tuple(preds.shape)}",
                cure="metric.update(logits, tokens)",
            )
        if target is None:
            if self.ignore_index is None:
                return
            raise ArgumentError(
                self,
                "with `ignore_index` the targets say which tokens count",
                cure="metric.update(logits, tokens)",
            )
        if target.shape != preds.shape[:2] or target.is_floating_point():
            raise ArgumentError(
                self,
                f"predictions {tuple(preds.shape)} need token indices {tuple(preds.shape[:2])}, "
                f"got {target.dtype} of shape {tuple(target.shape)}",
                cure="metric.update(logits[:, :-1], tokens[:, 1:])",
            )

    def _check_tokens(self, targets: Tensor, size: int) -> None:
        low, high = (int(v) for v in torch.aminmax(targets))
        if low < 0 or high >= size:
            raise ArgumentError(
                self,
                f"token indices are outside the vocabulary of {size}: {low} to {high}",
                cure="ignore_index=-100, where a token index marks what is not to count",
            )
