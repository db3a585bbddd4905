"""Pulls the distribution of each layer's weights to the one that it was initialized with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, ParameterUpdate, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.anchor import WeightAnchor
from lightning_reg.mechanisms.selected_weights import EVERYTHING

__all__ = ["WassersteinInit", "wasserstein_init"]


def wasserstein_init(weight: Tensor, start: Tensor) -> Tensor:
    """``1/d ||sort(w) - sort(w_0)||^2``, the squared 2-Wasserstein distance of their values.

    The gradient of the weight of rank ``i`` is ``2/d (w_(i) - w_0(i))``.

    Args:
        weight: ``w``, ``d`` entries in any shape.
        start: ``w_0``, of as many entries in any order.

    Returns:
        A scalar, at least 0; 0 where the entries are the same up to a permutation.
    """
    distance = weight.flatten().sort().values - start.flatten().sort().values
    return distance.square().mean()


class WassersteinInit(WeightAnchor):
    """Pulls the distribution of each layer's weights to the one that it was initialized with.

    Lewandowski, Bortkiewicz, Kumar, György, Schuurmans, Ostaszewski, Machado (2024), Learning
    Continually by Spectral Regularization, arXiv:2406.06811 (its first version has this penalty
    beside the spectral one).

    ``R = sum_l 1/d_l ||sort(w_l) - sort(w_l(0))||^2`` over the tensors of ``d_l`` parameters: the
    squared 2-Wasserstein distance in one dimension between the weights of now and of the start.
    Keeping the initial distribution keeps a network trainable where data or labels change; unlike a
    pull to the initial weights it lets single weights go anywhere, as long as others take their
    places.

    The formula is from memory of the paper, not checked against code, of which none was found. The
    default strength is ours; with ``1/d_l`` the pull on one weight is ``2 strength / d_l`` of its
    distance, so it is large.

    Args:
        strength: ``lambda``, at least 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes everything, biases and normalization layers too.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or if no parameter is chosen.
        UnsupportedError: where FSDP2 shards weights.

    Note:
        Over ranks: replica; nothing is communicated, and every rank computes the whole. Cost per
        optimizer step: a sort of every tensor, and a copy of the weights in memory and in
        checkpoints (sorted; they are not taken again on a resume). The closed form is added once
        per optimizer step. A layer that starts constant (biases, scales) is pulled to that
        constant. A second fit with the same instance pulls to the start of the first.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import WassersteinInit
        >>> trainer = L.Trainer(callbacks=[WassersteinInit(1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Learning Continually by Spectral Regularization",
            "Lewandowski et al.",
            2024,
            "2406.06811",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(wasserstein_init)
    explanation: ClassVar[str] = "pulls each layer's weights to their initial distribution"
    default_selection = EVERYTHING
    # Sorting needs whole weights, of which each would be gathered for it.
    sharded: ClassVar[bool | None] = False

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="WassersteinInit(1.0)")

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the sorted start, unless a checkpoint brought it."""
        super().on_reference(trainer, pl_module)
        if self.references_taken == 0:
            self.take_reference(pl_module)
            self._reference = {
                name: start.flatten().sort().values.view_as(start)
                for name, start in self._reference.items()
            }

    def parameter_gradient(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 6."""
        chosen = update.trainable(self.selected(update))
        names = [name for name in chosen if name in self._reference]
        if not names:
            return None
        weights = [chosen[name] for name in names]
        value, gradients = _pull(weights, [self._reference[name] for name in names])
        update.add_gradients(self, weights, gradients)
        return value


def _pull(weights: Sequence[Tensor], starts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The penalty over all weights and the gradient by each, from sorted starts."""
    distances = []
    for weight, start in zip(weights, starts, strict=True):
        ordered, order = weight.detach().flatten().sort()
        distance = torch.empty_like(ordered)
        distance[order] = ordered - start.flatten()
        distances.append(distance.view_as(weight))
    sizes = [float(d.numel()) for d in distances]
    squares = torch.stack(torch._foreach_norm(distances)).square()
    value = (squares / squares.new_tensor(sizes)).sum()
    return value, list(torch._foreach_mul(distances, [2 / size for size in sizes]))
