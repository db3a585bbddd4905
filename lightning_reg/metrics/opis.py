"""Whether one distance threshold serves all classes of an embedding alike."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.inputs import high_precision
from lightning_reg.metrics.kept import KeepsSamples

__all__ = ["OperatingPointInconsistency", "operating_point_inconsistency"]

Pairs = Literal["all", "batch"]
_BLOCK = 2**21
_FARTHEST = 2.0


class PairHistogram(NamedTuple):
    """Distances of pairs by class; those of a cell lie above its lower and up to its upper edge.

    Attributes:
        positives: (C, resolution) int64, pairs within each class.
        negatives: (C, resolution) int64, pairs of one sample of the class and one of another.
    """

    positives: Tensor
    negatives: Tensor


def operating_point_inconsistency(
    embeddings: Tensor,
    target: Tensor,
    *,
    far: tuple[float, float] = (0.01, 0.1),
    resolution: int = 2048,
) -> Tensor:
    r"""The operating-point inconsistency score, OPIS, over all pairs.

    Of embeddings scaled to length 1, a pair is accepted at threshold d if its Euclidean distance is
    at most d. For class i, ``phi_i(d)`` is the share of pairs within the class that are accepted
    and ``psi_i(d)`` the share of pairs with other classes that are not;
    ``U_i = 2 phi_i psi_i / (phi_i + psi_i)``, ``U`` its mean over the T classes. Then
    ``OPIS = 1/T sum_i int (U_i(d) - U(d))^2 dd / (d_max - d_min)`` from ``d_min`` to ``d_max``.

    The range is where the share of accepted pairs of different classes goes from ``far[0]`` to
    ``far[1]``. Thresholds are the edges of ``resolution`` equal steps of [0, 2], at which all
    shares are exact; between them U is taken as linear.

    Args:
        embeddings: (N, d), not necessarily of length 1.
        target: (N,) class indices. Classes with one sample take no part.
        far: the range of false accept rates.
        resolution: the number of steps.

    Returns:
        A float64 scalar (float32 on MPS); NaN with fewer than two classes of two samples.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> embeddings, target = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> operating_point_inconsistency(embeddings, target)
        tensor(0., dtype=torch.float64)
    """
    metric = OperatingPointInconsistency(far=far, resolution=resolution)
    value: Tensor = evaluate(metric, embeddings, target)
    return value


def count_pairs(embeddings: Tensor, target: Tensor, classes: int, resolution: int) -> PairHistogram:
    """The distances of all pairs, in blocks.

    Args:
        embeddings: (N, d) of length 1.
        target: (N,) class indices below ``classes``.
        classes: the number of classes.
        resolution: the number of cells.
    """
    edges = _edges(resolution, embeddings)[1:-1]
    numbers = torch.arange(len(target), device=target.device)
    positives = torch.zeros(classes * resolution, dtype=torch.int64, device=target.device)
    negatives = torch.zeros_like(positives)
    for block in numbers.split(max(1, _BLOCK // max(1, len(target)))):
        distance = torch.cdist(
            embeddings[block], embeddings, compute_mode="donot_use_mm_for_euclid_dist"
        )
        cell = torch.bucketize(distance, edges)
        once = numbers > block.unsqueeze(1)
        same = target[block].unsqueeze(1) == target
        own = target[block].unsqueeze(1) * resolution + cell
        other = target * resolution + cell
        positives += torch.bincount(own[once & same], minlength=len(positives))
        for side in (own, other):
            negatives += torch.bincount(side[once & ~same], minlength=len(positives))
    return PairHistogram(positives.view(classes, -1), negatives.view(classes, -1))


def utilities(pairs: PairHistogram) -> tuple[Tensor, Tensor]:
    """The utility of each class that has pairs of both kinds, and the false accept rate of all.

    Returns:
        (T, resolution + 1) and (resolution + 1,), at the edges of the cells.
    """
    taking_part = (pairs.positives.sum(1) > 0) & (pairs.negatives.sum(1) > 0)
    accepted = _accepted(pairs.positives[taking_part])
    refused = 1 - _accepted(pairs.negatives[taking_part])
    both = accepted + refused
    utility = torch.where(both > 0, 2 * accepted * refused / both, 0.0)
    return utility, _accepted(pairs.negatives.sum(0, keepdim=True))[0]


def inconsistency(pairs: PairHistogram, far: tuple[float, float]) -> Tensor:
    """The variance over classes of the utility, averaged over the range of thresholds."""
    utility, accepted = utilities(pairs)
    if len(utility) < 2:
        return torch.full_like(accepted[0], float("nan"))
    variance = utility.var(0, correction=0)
    first = int((accepted < far[0]).sum())
    last = max(first, int((accepted <= far[1]).sum()) - 1)
    if first >= last:
        return variance[min(first, len(variance) - 1)]
    return torch.trapezoid(variance[first : last + 1]) / (last - first)


class OperatingPointInconsistency(KeepsSamples):
    """The operating-point inconsistency score (OPIS) of an embedding: 0 if all classes agree.

    Zhang et al. (2023), Threshold-Consistent Margin Loss for Open-World Deep Metric Learning,
    arXiv:2307.04047. See :func:`operating_point_inconsistency` for the formula. The formula is
    from memory of the paper and agrees with a third party's account of it; the authors' code was
    not found. The range of false accept rates is that account's.

    Args:
        far: the range of false accept rates over which thresholds are compared.
        pairs: ``"all"`` keeps every embedding (8 bytes a number, gathered from all ranks by
            ``compute``) and compares all pairs. ``"batch"`` counts the pairs within each
            ``update`` in a state of fixed size: an estimate, of little noise only where batches
            hold several samples of a class.
        num_classes: needed for ``pairs="batch"``, whose state holds ``2 num_classes resolution``
            counts.
        resolution: the number of steps of distance over [0, 2].
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        ``compute`` of all pairs takes time quadratic in the number of samples, in blocks.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import OperatingPointInconsistency
        >>> metric = OperatingPointInconsistency()
        >>> metric.update(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    function = staticmethod(operating_point_inconsistency)
    papers = (
        Paper(
            "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
            "Zhang et al.",
            2023,
            "2307.04047",
        ),
    )
    higher_is_better = False
    plot_lower_bound = 0.0
    positives: Tensor
    negatives: Tensor
    sample_count: Tensor

    def __init__(
        self,
        *,
        far: tuple[float, float] = (0.01, 0.1),
        pairs: Pairs = "all",
        num_classes: int | None = None,
        resolution: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check(self, far, pairs, num_classes, resolution)
        self.far = (float(far[0]), float(far[1]))
        self.pairs: Pairs = pairs
        self.num_classes = num_classes
        self.resolution = resolution
        if pairs == "batch":
            assert num_classes is not None
            self.add_count("positives", num_classes, resolution)
            self.add_count("negatives", num_classes, resolution)
            return
        self.add_count("sample_count")
        self.add_kept("embeddings")
        self.add_kept("targets")

    def update(self, embeddings: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            embeddings: (N, d).
            target: (N,) class indices.

        Raises:
            ArgumentError: if shapes or values are not these.
        """
        self._check_batch(embeddings, target)
        finite = torch.isfinite(embeddings).all(1)
        self.invalid += (~finite).sum()
        target = target[finite].long()
        unit = torch.nn.functional.normalize(high_precision(embeddings.detach()[finite]), dim=1)
        if self.pairs == "batch":
            counted = count_pairs(unit, target, self.num_classes or 0, self.resolution)
            self.positives += counted.positives
            self.negatives += counted.negatives
            return
        self.sample_count += len(unit)
        self.keep("embeddings", unit.flatten())
        self.keep("targets", target)

    def counted(self) -> PairHistogram:
        """The pairs by class and distance; of all ranks only within ``sync_context()``."""
        if self.pairs == "batch":
            return PairHistogram(self.positives, self.negatives)
        count = int(self.sample_count)
        classes, target = torch.unique(self.kept("targets"), return_inverse=True)
        if not count:
            empty = torch.zeros(0, self.resolution, dtype=torch.int64, device=target.device)
            return PairHistogram(empty, empty)
        unit = self.kept("embeddings").view(count, -1)
        return count_pairs(unit, target, len(classes), self.resolution)

    def value(self) -> Tensor:
        """The inconsistency over everything that was counted."""
        return inconsistency(self.counted(), self.far)

    def curve(self) -> tuple[Tensor, Tensor]:
        """Thresholds (resolution + 1,) and the utility of each class at them (T, ...)."""
        utility, _ = utilities(self.counted())
        return _edges(self.resolution, utility), utility

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The utility of each class against the threshold, and their mean, from the state.

        Args:
            val: thresholds and utilities to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.order_figures import draw_utilities

        return draw_utilities(*(self.curve() if val is None else val), ax=ax)

    def _check_batch(self, embeddings: Tensor, target: Tensor) -> None:
        rows = embeddings.ndim == 2 and target.shape == embeddings.shape[:1]
        floats = embeddings.is_floating_point() and not target.is_floating_point()
        if not rows or not floats:
            raise ArgumentError(
                self,
                f"needs float embeddings (N, d) and class indices (N,), got {embeddings.dtype} "
                f"{tuple(embeddings.shape)} and {target.dtype} {tuple(target.shape)}",
                cure="metric.update(embeddings, target)",
            )
        if self.num_classes is None or not len(target):
            return
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= self.num_classes:
            raise ArgumentError(
                self,
                f"targets lie outside {self.num_classes} classes: {low} to {high}",
                cure=f"num_classes={high + 1}",
            )


def _edges(resolution: int, like: Tensor) -> Tensor:
    return torch.arange(resolution + 1).to(like) * (_FARTHEST / resolution)


def _accepted(counts: Tensor) -> Tensor:
    """The share of the pairs up to each edge, from 0 at the first."""
    sums = counts.cumsum(1)
    shares = high_precision(sums) / high_precision(sums[:, -1:]).clamp_min(1)
    return torch.cat([torch.zeros_like(shares[:, :1]), shares], 1)


def _check(
    owner: object,
    far: tuple[float, float],
    pairs: str,
    num_classes: int | None,
    resolution: int,
) -> None:
    for value in far:
        check_range(owner, "far", value, 0, 1, cure="far=(0.01, 0.1)")
    if len(far) != 2 or far[0] > far[1]:
        raise ArgumentError(
            owner, f"`far` must be a range of two rates, got {far!r}", cure="far=(0.01, 0.1)"
        )
    if pairs not in ("all", "batch"):
        raise ArgumentError(
            owner, f"`pairs` must be one of all, batch, got {pairs!r}", cure='pairs="all"'
        )
    if pairs == "batch" and num_classes is None:
        raise ArgumentError(owner, 'pairs="batch" needs `num_classes`', cure="num_classes=100")
    for name, number in (("num_classes", num_classes), ("resolution", resolution)):
        if number is not None and (not isinstance(number, int) or number < 2):
            raise ArgumentError(
                owner,
                f"`{name}` must be a whole number from 2, got {number!r}",
                cure=f"{name}=2048",
            )
