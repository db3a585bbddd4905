"""How much the members of an ensemble, or passes of one model, disagree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import AdditiveMetric, evaluate
from lightning_reg.metrics.blocks import split_alike
from lightning_reg.metrics.entropy import entropy_of_logs, entropy_of_shares
from lightning_reg.metrics.inputs import check_arguments, check_probabilities, log_probabilities

__all__ = [
    "EnsembleEntropy",
    "ExpectedEntropy",
    "MutualInformation",
    "VariationRatio",
    "ensemble_entropy",
    "expected_entropy",
    "mutual_information",
    "variation_ratio",
]


def expected_entropy(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    from_logits: bool,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The mean entropy of the members' own predictions, in nats: what no member knows.

    ``1/N sum_i 1/M sum_m H(p_mi)``, the aleatoric part of :func:`ensemble_entropy`.

    Args:
        preds: (M, N, C, ...): members or passes first, then samples, then classes.
        target: (N, ...) class indices, only needed to say with ``ignore_index`` what counts.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if there is no row.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> members = torch.stack([torch.eye(2), torch.full((2, 2), 0.5)])
        >>> expected_entropy(members, from_logits=False)  # log(2) / 2
        tensor(0.3466, dtype=torch.float64)
    """
    metric = ExpectedEntropy(
        from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def ensemble_entropy(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    from_logits: bool,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The entropy of the members' mean prediction, in nats: all of the uncertainty.

    ``1/N sum_i H(1/M sum_m p_mi)``. Probabilities are averaged, not logits.

    Args:
        preds: (M, N, C, ...): members or passes first, then samples, then classes.
        target: (N, ...) class indices, only needed to say with ``ignore_index`` what counts.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if there is no row.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> members = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two that disagree on one sample
        >>> ensemble_entropy(members, from_logits=False)
        tensor(0.6931, dtype=torch.float64)
    """
    metric = EnsembleEntropy(
        from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def mutual_information(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    from_logits: bool,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The mutual information of prediction and member (BALD), in nats: what members disagree on.

    ``1/N sum_i [H(1/M sum_m p_mi) - 1/M sum_m H(p_mi)]``: :func:`ensemble_entropy` less
    :func:`expected_entropy`, at most ``log M``. Houlsby et al., Bayesian Active Learning for
    Classification and Preference Learning, 2011 (1112.5745). Equal to ``torch_uncertainty``'s
    ``MutualInformation``, whose layout is (N, M, C).

    Args:
        preds: (M, N, C, ...): members or passes first, then samples, then classes.
        target: (N, ...) class indices, only needed to say with ``ignore_index`` what counts.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if there is no row. Not clamped: members that agree
        give 0 up to rounding.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> members = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> mutual_information(members, from_logits=False)
        tensor(0.6931, dtype=torch.float64)
    """
    metric = MutualInformation(
        from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def variation_ratio(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    from_logits: bool,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The share of members that do not vote for the class with most votes.

    ``1/N sum_i (1 - max_k votes_ik / M)``, each member voting for its top class: 0 if all agree.
    Freeman, Elementary Applied Statistics, 1965; for passes of dropout Gal, 2016. It differs from
    ``torch_uncertainty``'s ``VariationRatio``, which asks how many voted for the top class of the
    mean prediction, a class that may have few votes, and by default averages probabilities in
    place of votes: neither is the ratio of those who are not in the mode.

    Args:
        preds: (M, N, C, ...): members or passes first, then samples, then classes.
        target: (N, ...) class indices, only needed to say with ``ignore_index`` what counts.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if there is no row.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> votes = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]], [[0.2, 0.8]]])
        >>> variation_ratio(votes, from_logits=False)
        tensor(0.3333, dtype=torch.float64)
    """
    metric = VariationRatio(
        from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class _MemberMetric(AdditiveMetric):
    """What the metrics of members count; in a collection they share the update.

    Batches are read in blocks, so that no float64 copy of all members' predictions is made.
    """

    plot_lower_bound = 0.0
    ensemble_total: Tensor
    expected_total: Tensor
    dissent_total: Tensor
    count: Tensor

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
        self.add_total("ensemble_total")
        self.add_total("expected_total")
        self.add_total("dissent_total")
        self.add_count("count")

    def update_settings(self) -> tuple[Any, ...]:
        """The same for all metrics of members."""
        return ("members", *super().update_settings()[1:])

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            preds: (M, N, C, ...): members or passes first, then samples, then classes.
            target: (N, ...) class indices; only ``ignore_index`` asks for them.

        Raises:
            ArgumentError: if shapes or values are not these.
        """
        self._check(preds, target)
        # (N, ..., M, C): what counts first.
        preds = preds.detach().movedim(2, -1).movedim(0, -2)
        given = [preds] if target is None else [preds, target]
        for block in split_alike(given, preds.ndim - 2):
            members = block[0].reshape(-1, *preds.shape[-2:])
            if target is not None and self.ignore_index is not None:
                members = members[block[1].reshape(-1) != self.ignore_index]
            self._accumulate(members)

    def _accumulate(self, members: Tensor) -> None:
        finite = torch.isfinite(members.amax(2)).all(1)
        members = members[finite]
        if self.validate_args and not self.from_logits and len(members):
            check_probabilities(self, members.flatten(0, 1), "multiclass")
        shape = members.shape
        logs = log_probabilities(members.reshape(-1, shape[2]), self.from_logits).view(shape)
        most = _votes(members).amax(1)
        dissent = 1 - most.to(logs.dtype) / shape[1]
        ensemble = entropy_of_shares(logs.exp().mean(1))
        self.invalid = self.invalid + (~finite).sum()
        self.ensemble_total = self.ensemble_total + ensemble.sum().to(self.ensemble_total)
        expected = entropy_of_logs(logs).mean(1)
        self.expected_total = self.expected_total + expected.sum().to(self.expected_total)
        self.dissent_total = self.dissent_total + dissent.sum().to(self.dissent_total)
        self.count = self.count + len(members)

    def _check(self, preds: Tensor, target: Tensor | None) -> None:
        shape = preds.shape
        if not preds.is_floating_point() or preds.ndim < 3 or shape[2] < 2 or shape[0] < 1:
            raise ArgumentError(
                self,
                "needs float predictions (M, N, C, ...), members first and two classes or more, "
                f"got {preds.dtype} of shape {tuple(shape)}",
                cure="metric.update(torch.stack([model(x) for model in members]))",
            )
        if target is None:
            if self.ignore_index is None:
                return
            raise ArgumentError(
                self,
                "with `ignore_index` the targets say which positions count",
                cure="metric.update(logits, target)",
            )
        wanted = shape[1:2] + shape[3:]
        if target.shape != wanted:
            raise ArgumentError(
                self,
                f"predictions of shape {tuple(shape)} are (M, N, C, ...) and need targets "
                f"{tuple(wanted)}, got {tuple(target.shape)}",
                cure="preds.transpose(0, 1), if samples come first",
            )


class ExpectedEntropy(_MemberMetric):
    """The mean entropy of each member's own predictions, in nats.

    See :func:`expected_entropy`. The state is three float64 sums (float32 on MPS) and a count,
    and a collection of the metrics of members counts once.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        ignore_index: positions with this class index do not count; ``update`` then needs targets.
        validate_args: check values, which costs a host sync a block of a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ExpectedEntropy
        >>> metric = ExpectedEntropy(from_logits=True)
        >>> metric.update(torch.zeros(3, 8, 4))  # 3 members, 8 samples, 4 classes
        >>> metric.compute()
        tensor(1.3863, dtype=torch.float64)
    """

    function = staticmethod(expected_entropy)

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.expected_total / self.count


class EnsembleEntropy(_MemberMetric):
    """The entropy of the members' mean prediction, in nats.

    See :func:`ensemble_entropy`. The state is three float64 sums (float32 on MPS) and a count.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        ignore_index: positions with this class index do not count; ``update`` then needs targets.
        validate_args: check values, which costs a host sync a block of a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import EnsembleEntropy
        >>> metric = EnsembleEntropy(from_logits=False)
        >>> metric.update(torch.eye(2).view(2, 1, 2))  # 2 members, 1 sample, 2 classes
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    function = staticmethod(ensemble_entropy)

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.ensemble_total / self.count


class MutualInformation(_MemberMetric):
    """The mutual information of prediction and member (BALD), in nats.

    See :func:`mutual_information`. The state is three float64 sums (float32 on MPS) and a count.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        ignore_index: positions with this class index do not count; ``update`` then needs targets.
        validate_args: check values, which costs a host sync a block of a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import MutualInformation
        >>> metric = MutualInformation(from_logits=False)
        >>> metric.update(torch.eye(2).view(2, 1, 2))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    function = staticmethod(mutual_information)

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return (self.ensemble_total - self.expected_total) / self.count


class VariationRatio(_MemberMetric):
    """The share of members that do not vote for the class with most votes.

    See :func:`variation_ratio`. The state is three float64 sums (float32 on MPS) and a count.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        ignore_index: positions with this class index do not count; ``update`` then needs targets.
        validate_args: check values, which costs a host sync a block of a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import VariationRatio
        >>> metric = VariationRatio(from_logits=False)
        >>> metric.update(torch.eye(2).view(2, 1, 2))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    function = staticmethod(variation_ratio)
    plot_upper_bound = 1.0

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.dissent_total / self.count


def _votes(members: Tensor) -> Tensor:
    """(N, C) how many members have each class on top."""
    tops = members.argmax(2)
    votes = torch.zeros_like(members[:, 0], dtype=torch.int64)
    return votes.scatter_add(1, tops, torch.ones_like(tops))
