"""Penalties on weights alone, from their closed form.

A technique supplies two methods over a list of matrices, one matrix a weight and one row an output
unit: :meth:`WeightPenalty.values`, the penalty of each, and :meth:`WeightPenalty.closed_form`,
the same values with their gradients. It may supply :meth:`WeightPenalty.cost`, and
:meth:`WeightPenalty.gradients` where gradients cost less without the values.

The mechanism takes care of

- which weights count: tied ones once, frozen ones and other optimizers' never;
- the matrix form of convolutions, transposed and grouped ones too, in float32 at least;
- the place in the step. ``mode="gradient"``: without autograd, once per optimizer step, when
  gradients are summed, reduced over ranks and unscaled, so that neither accumulation nor AMP
  changes the effective strength; ``mode="loss"``: a term of the loss, for those who differentiate
  through it. The two are equal to rounding;
- the ranks. Under ``ddp_reg`` each computes the penalty of its share of the weights, balanced by
  :meth:`WeightPenalty.cost`, and brings the gradients into the last backward of the optimizer
  step, where DDP sums the shares: equal to the undivided penalty to rounding, without further
  communication. Every rank computes the whole under plain ``ddp``, with a communication hook
  (which may send less than the gradients), under manual optimization, and, in ``mode="loss"``,
  beside a technique that follows the gradient of each rank's own loss (SAM);
- weights that FSDP2 shards: they are gathered, some at a time, and each rank keeps its part of
  the gradients;
- the log, which shows the sum over weights without the strength; no value is computed on other
  steps;
- memory traffic, the cost of cheap penalties: a technique whose rows do not know of each other
  says ``by_rows = True``, and its gradients are made and added on a CPU in pieces that its cache
  holds.

A technique whose closed form keeps a state for each weight sets ``splits = False``. One that needs
more than a matrix (a stride, a bias, the name) derives from :class:`NamedPenalty`, the part of the
mechanism that knows nothing of matrices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine import ParameterSelection, ParameterUpdate, Schedule, Step
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.sharding import gathered_together, whole
from lightning_reg.engine.step import RunContext, full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import SelectedWeights

Mode = Literal["gradient", "loss"]
Piece = tuple[list[Tensor], list[Tensor]]

# Elements of a piece: a few of them fit into a second-level cache, and the calls for one cost
# little beside its arithmetic.
_PIECE = 2**18


class NamedPenalty(SelectedWeights):
    """Base of penalties on weights that are known by their names.

    Args:
        strength: the multiplier.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the value to the loss of every micro-batch.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "replica"
    sharded: ClassVar[bool | None] = True
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients"})
    splits: ClassVar[bool] = True
    modes: ClassVar[tuple[str, ...]] = ("gradient", "loss")

    def __init__(
        self,
        strength: float | Schedule,
        *,
        parameters: str | ParameterSelection | None = None,
        mode: str = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        if mode not in self.modes:
            raise ArgumentError(
                self,
                f"`mode` must be one of {', '.join(self.modes)}, got {mode!r}",
                cure=f'{type(self).__name__}(mode="gradient")',
            )
        self.mode = mode

    @abstractmethod
    def values_of(self, context: RunContext, weights: Mapping[str, nn.Parameter]) -> Tensor:
        """The penalties (N,) of some of the weights, differentiable."""

    @abstractmethod
    def closed_form_of(
        self, context: RunContext, weights: Mapping[str, nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """The penalties (N,), and the gradient by each weight, of its shape."""

    def gradients_of(
        self, context: RunContext, weights: Mapping[str, nn.Parameter]
    ) -> list[Tensor]:
        """The gradients of :meth:`closed_form_of`, where no value is wanted."""
        return self.closed_form_of(context, weights)[1]

    def cost(self, weight: Tensor) -> float:
        """The relative cost of one weight, for sharing the work out over ranks."""
        return float(weight.numel())

    def acts_in(self, phase: str) -> bool:
        """Each mode has a phase of its own, and only the loss is the user's business."""
        modes = {"penalty": "loss", "parameter_gradient": "gradient"}
        return phase not in modes or self.mode == modes[phase]

    def penalty(self, step: Step) -> Tensor | None:
        """Phase 4, in ``mode="loss"``."""
        if self.mode != "loss":
            return None
        weights = {n: w for n, w in self.selected(step).items() if w.requires_grad}
        share = step.share(weights, self.cost)
        value = self.values_of(step, share.own).sum() if share.own else _zero(step)
        return share.whole(value) if weights else None

    def parameter_gradient(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 6, in ``mode="gradient"``."""
        weights = update.trainable(self.selected(update)) if self.mode == "gradient" else {}
        share = update.share(weights, self.cost)
        value = _zero(update)
        for group in gathered_together(share.own):
            if update.logging:
                values, gradients = self.closed_form_of(update, group)
                value = value + values.sum()
                update.add_gradients(self, list(group.values()), gradients)
            else:
                self.add_gradients(update, group)
        return share.whole(value) if weights and update.logging else None

    def add_gradients(self, update: ParameterUpdate, weights: Mapping[str, nn.Parameter]) -> None:
        """Add the gradients of some weights, where no value is wanted."""
        update.add_gradients(self, list(weights.values()), self.gradients_of(update, weights))


class WeightPenalty(NamedPenalty):
    """Base of penalties that are a sum over weights, each of them as a matrix.

    Args:
        strength: the multiplier.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the value to the loss of every micro-batch.
        name: the name in logs and checkpoints.
    """

    by_rows: bool = False

    @abstractmethod
    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty (N,) of each of N matrices (out, in), differentiable."""

    @abstractmethod
    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The penalties (N,) and their gradients, of the shapes of the matrices."""

    def gradients(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of :meth:`closed_form`, without the values."""
        return self.closed_form(matrices)[1]

    def values_of(self, context: RunContext, weights: Mapping[str, nn.Parameter]) -> Tensor:
        """The penalty of each weight."""
        return self.values(as_matrices(context.module, weights))

    def closed_form_of(
        self, context: RunContext, weights: Mapping[str, nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """The penalty and the gradient of each weight."""
        values, gradients = self.closed_form(as_matrices(context.module, weights))
        return values, as_weights(context.module, weights, gradients)

    def gradients_of(
        self, context: RunContext, weights: Mapping[str, nn.Parameter]
    ) -> list[Tensor]:
        """The gradient of each weight."""
        gradients = self.gradients(as_matrices(context.module, weights))
        return as_weights(context.module, weights, gradients)

    def add_gradients(self, update: ParameterUpdate, weights: Mapping[str, nn.Parameter]) -> None:
        """Add the gradients of some weights, piece by piece where that saves memory traffic."""
        pieces = self._pieces(update, weights) if self.by_rows else None
        if pieces is None:
            super().add_gradients(update, weights)
            return
        strength = update.strength(self)
        for rows, gradients in pieces:
            torch._foreach_add_(gradients, self.gradients(rows), alpha=strength)

    def _pieces(
        self, update: ParameterUpdate, weights: Mapping[str, nn.Parameter]
    ) -> list[Piece] | None:
        """Rows of the weights and of their gradients, which are views of both."""
        if any(_transposed_groups(update.module, name) for name in weights):
            return None
        gradients = update.plain_gradients(list(weights.values()))
        return None if gradients is None else _pieces(list(weights.values()), gradients)


def as_matrices(module: nn.Module, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Whole weights as matrices (out, in), in float32 at least; gradients pass."""
    return [
        full_precision(_as_matrix(whole(weight), _transposed_groups(module, name)))
        for name, weight in weights.items()
    ]


def as_weights(
    module: nn.Module, weights: Mapping[str, Tensor], matrices: Sequence[Tensor]
) -> list[Tensor]:
    """Matrices in the shapes of the weights that they belong to."""
    return [
        _as_weight(matrix, weight, _transposed_groups(module, name))
        for matrix, (name, weight) in zip(matrices, weights.items(), strict=True)
    ]


def _pieces(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Piece]:
    """Some rows at a time, of as many weights as fit into a piece."""
    pieces: list[Piece] = []
    room = 0
    for weight, gradient in zip(weights, gradients, strict=True):
        matrix, into = _as_matrix(weight.detach()), _as_matrix(gradient)
        count = max(_PIECE // matrix.shape[1], 1)
        for rows, target in zip(matrix.split(count), into.split(count), strict=True):
            if not pieces or room < rows.numel():
                pieces.append(([], []))
                room = _PIECE
            pieces[-1][0].append(rows)
            pieces[-1][1].append(target)
            room -= rows.numel()
    return pieces


def _zero(context: RunContext) -> Tensor:
    return torch.zeros((), device=context.device)


def _transposed_groups(module: nn.Module, name: str) -> int:
    """The groups of a transposed convolution, whose first dimension is its input; else 0."""
    holder: Any = module.get_submodule(name.rpartition(".")[0])
    is_kernel = name.endswith("weight") and getattr(holder, "transposed", False)
    return int(holder.groups) if is_kernel else 0


def _as_matrix(weight: Tensor, transposed_groups: int = 0) -> Tensor:
    """(out, ...) to (out, in); (in, out / groups, ...) of a transposed convolution as well."""
    if not transposed_groups:
        return weight.reshape(weight.shape[0] if weight.ndim else 1, -1)
    grouped = weight.unflatten(0, (transposed_groups, -1))
    matrix: Tensor = grouped.transpose(1, 2).flatten(0, 1).flatten(1)
    return matrix


def _as_weight(matrix: Tensor, weight: Tensor, transposed_groups: int = 0) -> Tensor:
    """The inverse of :func:`_as_matrix`."""
    if not transposed_groups:
        return matrix.view(weight.shape)
    inputs = weight.shape[0] // transposed_groups
    grouped = matrix.view(transposed_groups, weight.shape[1], inputs, *weight.shape[2:])
    return grouped.transpose(1, 2).flatten(0, 1)


__all__ = ["Mode", "NamedPenalty", "WeightPenalty", "as_matrices", "as_weights"]
