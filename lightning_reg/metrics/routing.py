"""How a router spreads tokens over experts."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.classes import ClassesMetric
from lightning_reg.metrics.entropy import entropy_of_logs, entropy_of_shares
from lightning_reg.metrics.inputs import Rows, high_precision, log_probabilities

Of = Literal["load", "importance"]
_OF = ("load", "importance")

__all__ = [
    "ExpertLoadEntropy",
    "RouterEntropy",
    "RoutingInformation",
    "expert_load_entropy",
    "router_entropy",
    "routing_information",
]


def router_entropy(
    preds: Tensor,
    mask: Tensor | None = None,
    *,
    num_experts: int,
    from_logits: bool,
    normalized: bool = False,
    class_dim: int = -1,
    validate_args: bool = True,
) -> Tensor:
    r"""The mean over tokens of the entropy of the router's choice, in nats.

    Low if the router is sure of each token. It says nothing about balance: a router that sends
    everything to one expert has a router entropy of 0, and one that knows nothing has
    ``log E``; see :func:`expert_load_entropy`.

    Args:
        preds: (N, T, E) or (N, E) router scores.
        mask: (N, T) or (N,) bool, ``True`` where a token counts.
        num_experts: E.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        normalized: divide by ``log E``.
        class_dim: the dimension of the experts.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> router_entropy(torch.eye(4), num_experts=4, from_logits=False)
        tensor(0., dtype=torch.float64)
    """
    metric = RouterEntropy(
        num_experts=num_experts,
        from_logits=from_logits,
        normalized=normalized,
        class_dim=class_dim,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, mask)
    return value


def expert_load_entropy(
    preds: Tensor,
    mask: Tensor | None = None,
    *,
    num_experts: int,
    from_logits: bool,
    top_k: int = 1,
    of: Of = "load",
    normalized: bool = False,
    class_dim: int = -1,
    validate_args: bool = True,
) -> Tensor:
    r"""The entropy of how the tokens are spread over the experts, in nats.

    ``"load"``: of the shares of the tokens that each expert gets, each token going to its
    ``top_k`` experts; ``"importance"``: of the mean router probabilities, which change where the
    counts do not. ``log E`` is perfect balance, 0 is one expert for all. The value of joint
    shares, over batches and ranks: small batches' loads are uneven by chance, and the mean of
    their entropies is too low.

    Args:
        preds: (N, T, E) or (N, E) router scores.
        mask: (N, T) or (N,) bool, ``True`` where a token counts.
        num_experts: E.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        top_k: to how many experts a token goes.
        of: ``"load"`` or ``"importance"``.
        normalized: divide by ``log E``.
        class_dim: the dimension of the experts.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> expert_load_entropy(torch.eye(4), num_experts=4, from_logits=False)
        tensor(1.3863, dtype=torch.float64)
    """
    metric = ExpertLoadEntropy(
        num_experts=num_experts,
        from_logits=from_logits,
        top_k=top_k,
        of=of,
        normalized=normalized,
        class_dim=class_dim,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, mask)
    return value


def routing_information(
    preds: Tensor,
    mask: Tensor | None = None,
    *,
    num_experts: int,
    from_logits: bool,
    class_dim: int = -1,
    validate_args: bool = True,
) -> Tensor:
    r"""The mutual information of token and expert, in nats: how specialised experts are.

    The entropy of the mean router probabilities less :func:`router_entropy`: ``log E`` if every
    token has one sure expert and all experts the same share, 0 if the router does not look at the
    token, be that because it knows nothing or because it always takes the same expert.

    Args:
        preds: (N, T, E) or (N, E) router scores.
        mask: (N, T) or (N,) bool, ``True`` where a token counts.
        num_experts: E.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        class_dim: the dimension of the experts.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> routing_information(torch.eye(4), num_experts=4, from_logits=False)
        tensor(1.3863, dtype=torch.float64)
    """
    metric = RoutingInformation(
        num_experts=num_experts,
        from_logits=from_logits,
        class_dim=class_dim,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, mask)
    return value


class _RoutingMetric(ClassesMetric):
    """What the metrics of routing count; with one ``top_k`` they share the update."""

    load: Tensor
    importance: Tensor
    entropy_total: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        num_experts: int,
        from_logits: bool,
        top_k: int = 1,
        normalized: bool = False,
        class_dim: int = -1,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes=num_experts,
            from_logits=from_logits,
            class_dim=class_dim,
            validate_args=validate_args,
            **kwargs,
        )
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= num_experts:
            raise ArgumentError(
                self,
                f"`top_k` must be a whole number from 1 to {num_experts}, got {top_k!r}",
                cure="top_k=2",
            )
        self.top_k = top_k
        self.normalized = normalized
        self.add_count("load", num_experts)
        self.add_total("importance", num_experts)
        self.add_total("entropy_total")
        self.add_count("count")

    def update_settings(self) -> tuple[Any, ...]:
        """The same for all metrics of routing."""
        return (
            "routing",
            self.num_classes,
            self.from_logits,
            self.top_k,
            self.class_dim,
            self.validate_args,
        )

    def update(self, preds: Tensor, mask: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            preds: (N, T, E) or (N, E) router scores.
            mask: (N, T) or (N,) bool, ``True`` where a token counts.

        Raises:
            ArgumentError: if shapes or values are not these.
        """
        if mask is not None and mask.dtype != torch.bool:
            raise ArgumentError(
                self, f"the mask must be bool, got {mask.dtype}", cure="mask=tokens != padding"
            )
        # Padding is read as a label that does not count.
        self.ignore_index = None if mask is None else -1
        super().update(preds, None if mask is None else mask.long() - 1)

    def accumulate(self, rows: Rows) -> None:
        """Add the block."""
        self.refuse_other_width(rows)
        logs = log_probabilities(rows.scores, self.from_logits)
        chosen = logs.topk(self.top_k, dim=1).indices.flatten()
        self.load = self.load.index_add(0, chosen, torch.ones_like(chosen))
        self.importance = self.importance + logs.exp().sum(0).to(self.importance)
        self.entropy_total = self.entropy_total + entropy_of_logs(logs).sum().to(self.importance)
        self.count = self.count + len(logs)

    def scaled(self, entropy: Tensor) -> Tensor:
        """In nats, or in units of ``log E``."""
        return entropy / math.log(self.num_classes) if self.normalized else entropy

    def mean_entropy(self) -> Tensor:
        """The mean entropy of the router's choice."""
        return self.entropy_total / self.count

    def entropy_of_importance(self) -> Tensor:
        """The entropy of the mean router probabilities."""
        return entropy_of_shares(self.importance / self.count)


class RouterEntropy(_RoutingMetric):
    """The mean entropy of a router's choice for a token, in nats.

    See :func:`router_entropy`. The state is E int64 counts, E + 1 float64 sums (float32 on MPS)
    and a count; the metrics of routing share it in a collection.

    Args:
        num_experts: E.
        from_logits: whether ``update`` gets logits or probabilities; never guessed.
        normalized: divide by ``log E``.
        kwargs: ``top_k`` (of the shared state), ``class_dim``, ``validate_args``, and those of
            ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import RouterEntropy
        >>> metric = RouterEntropy(num_experts=4, from_logits=True)
        >>> metric.update(torch.zeros(2, 5, 4))
        >>> metric.compute()
        tensor(1.3863, dtype=torch.float64)
    """

    function = staticmethod(router_entropy)

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.scaled(self.mean_entropy())


class ExpertLoadEntropy(_RoutingMetric):
    """The entropy of how tokens are spread over experts, in nats.

    See :func:`expert_load_entropy`. The state is that of :class:`RouterEntropy`; :meth:`shares`
    gives the loads.

    Args:
        num_experts: E.
        from_logits: whether ``update`` gets logits or probabilities; never guessed.
        top_k: to how many experts a token goes.
        of: ``"load"`` or ``"importance"``.
        normalized: divide by ``log E``.
        kwargs: ``class_dim``, ``validate_args``, and those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ExpertLoadEntropy
        >>> metric = ExpertLoadEntropy(num_experts=4, from_logits=False, normalized=True)
        >>> metric.update(torch.eye(4))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    function = staticmethod(expert_load_entropy)
    higher_is_better = True

    def __init__(
        self, *, num_experts: int, from_logits: bool, of: Of = "load", **kwargs: Any
    ) -> None:
        super().__init__(num_experts=num_experts, from_logits=from_logits, **kwargs)
        if of not in _OF:
            raise ArgumentError(
                self, f"`of` must be one of {', '.join(_OF)}, got {of!r}", cure='of="load"'
            )
        self.of: Of = of

    def shares(self) -> Tensor:
        """(E,) each expert's share of the tokens; NaN before anything was counted."""
        return high_precision(self.load) / self.load.sum()

    def value(self) -> Tensor:
        """The entropy over everything that was counted."""
        if self.of == "importance":
            return self.scaled(self.entropy_of_importance())
        return self.scaled(entropy_of_shares(self.shares()))


class RoutingInformation(_RoutingMetric):
    """The mutual information of token and expert, in nats: how specialised experts are.

    See :func:`routing_information`. The state is that of :class:`RouterEntropy`.

    Args:
        num_experts: E.
        from_logits: whether ``update`` gets logits or probabilities; never guessed.
        kwargs: ``top_k`` (of the shared state), ``class_dim``, ``validate_args``, and those of
            ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import RoutingInformation
        >>> metric = RoutingInformation(num_experts=4, from_logits=True)
        >>> metric.update(torch.zeros(2, 5, 4))
        >>> round(float(metric.compute()), 9)
        0.0
    """

    function = staticmethod(routing_information)

    def value(self) -> Tensor:
        """The information over everything that was counted."""
        return self.scaled(self.entropy_of_importance() - self.mean_entropy())
