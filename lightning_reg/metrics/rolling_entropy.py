"""The entropy of next-token predictions, averaged over the last few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.entropy import entropy_of_rows
from lightning_reg.metrics.inputs import high_precision
from lightning_reg.metrics.sequences import SequenceMetric

_PAPER = Paper(
    "Entropy Adaptive Decoding: Dynamic Model Switching for Efficient Inference",
    "Simonds",
    2025,
    "2502.06833",
)

__all__ = ["HighEntropyShare", "RollingEntropy", "high_entropy_share", "rolling_entropy"]


def rolling_entropy(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    from_logits: bool,
    window: int,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The mean over tokens of ``1/w sum_{k<w} H_{t-k}``, the entropy of the last w predictions.

    ``H_t = -sum_v p_tv log p_tv``, in nats. At the start of a sequence, and across tokens that do
    not count, the mean is over the tokens of the window that there are.

    Args:
        preds: (N, T, V) predictions of each token.
        target: (N, T) token indices, only needed to say with ``ignore_index`` which tokens count.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        window: w, in positions.
        ignore_index: tokens with this index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> preds = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])  # log 2 and 0: means log 2, log 2 / 2
        >>> rolling_entropy(preds, from_logits=False, window=2)
        tensor(0.5199, dtype=torch.float64)
    """
    metric = RollingEntropy(
        from_logits=from_logits,
        window=window,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def high_entropy_share(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    from_logits: bool,
    window: int,
    threshold: float,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The share of tokens whose rolling entropy is above a threshold.

    The tokens that Entropy Adaptive Decoding would have a larger model write, before its rule of
    staying with a model for a while. See :func:`rolling_entropy`.

    Args:
        preds: (N, T, V) predictions of each token.
        target: (N, T) token indices, only needed to say with ``ignore_index`` which tokens count.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        window: w, in positions.
        threshold: tau, in nats.
        ignore_index: tokens with this index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar; NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> preds = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
        >>> high_entropy_share(preds, from_logits=False, window=2, threshold=0.5)
        tensor(0.5000, dtype=torch.float64)
    """
    metric = HighEntropyShare(
        from_logits=from_logits,
        window=window,
        threshold=threshold,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def rolling_mean(values: Tensor, counted: Tensor, window: int) -> Tensor:
    """(N, T) the mean over the tokens that count among the last ``window`` positions.

    Args:
        values: (N, T), 0 where a token does not count.
        counted: (N, T) which tokens count.
        window: in positions.

    Returns:
        (N, T); NaN where the window holds no token that counts.
    """
    pairs = torch.stack([values, counted.to(values)])
    sums = torch.nn.functional.pad(pairs, (window - 1, 0)).unfold(-1, window, 1).sum(-1)
    return sums[0] / sums[1]


class _WindowMetric(SequenceMetric):
    """What both metrics of the rolling entropy share."""

    plot_lower_bound = 0.0
    count: Tensor

    def __init__(self, *, from_logits: bool, window: int, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ArgumentError(
                self, f"`window` must be a whole number from 1, got {window!r}", cure="window=5"
            )
        self.window = window
        self.add_count("count")

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """The entropy of each token's prediction."""
        return entropy_of_rows(scores, self.from_logits)

    def accumulate(self, means: Tensor) -> None:
        """Add the rolling means (n,) of the tokens that count."""
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            preds: (N, T, V) predictions of each token.
            target: (N, T) token indices; only ``ignore_index`` asks for them.

        Raises:
            ArgumentError: if shapes or values are not these.
        """
        entropies, counted, valid = self.per_token(preds, target)
        self.invalid = self.invalid + (~valid).sum()
        use = counted & valid.unsqueeze(1)
        self.count = self.count + use.sum()
        self.accumulate(rolling_mean(entropies, counted, self.window)[use])


class RollingEntropy(_WindowMetric):
    """The entropy of the last few next-token predictions, in nats.

    Simonds, Entropy Adaptive Decoding, 2025. See :func:`rolling_entropy`; formula from the
    abstract, not checked against code. The state is a float64 sum (float32 on MPS) and a count. A
    sequence with NaN or infinity is left out whole.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        window: how many positions are averaged.
        kwargs: ``ignore_index``, ``validate_args``, and those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import RollingEntropy
        >>> metric = RollingEntropy(from_logits=True, window=5)
        >>> metric.update(torch.zeros(2, 10, 8))
        >>> metric.compute()
        tensor(2.0794, dtype=torch.float64)
    """

    papers = (_PAPER,)
    function = staticmethod(rolling_entropy)
    total: Tensor

    def __init__(self, *, from_logits: bool, window: int, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, window=window, **kwargs)
        self.add_total("total")

    def accumulate(self, means: Tensor) -> None:
        """Add their sum."""
        self.total = self.total + means.sum().to(self.total)

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.total / self.count


class HighEntropyShare(_WindowMetric):
    """The share of tokens whose rolling entropy is above a threshold.

    Simonds, Entropy Adaptive Decoding, 2025. See :func:`high_entropy_share`. The state is two
    int64 counts.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        window: how many positions are averaged.
        threshold: in nats.
        kwargs: ``ignore_index``, ``validate_args``, and those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import HighEntropyShare
        >>> metric = HighEntropyShare(from_logits=True, window=5, threshold=1.0)
        >>> metric.update(torch.zeros(2, 10, 8))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    papers = (_PAPER,)
    function = staticmethod(high_entropy_share)
    plot_upper_bound = 1.0
    above: Tensor

    def __init__(self, *, from_logits: bool, window: int, threshold: float, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, window=window, **kwargs)
        check_range(self, "threshold", threshold, 0, cure="threshold=1.0")
        self.threshold = threshold
        self.add_count("above")

    def accumulate(self, means: Tensor) -> None:
        """Count those above the threshold."""
        self.above = self.above + (means > self.threshold).sum()

    def value(self) -> Tensor:
        """The share over everything that was counted."""
        return high_precision(self.above) / self.count
