"""Leaves as many groups of weights in each layer as the user asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    ParameterSelection,
    ParameterUpdate,
    Schedule,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.proximal_penalty import ProximalMode, ProximalPenalty

__all__ = ["GroupSparseEnvelope", "group_sparse_envelope"]

Groups = Literal["rows", "columns", "elements"]
_GROUPS = ("rows", "columns", "elements")


def group_sparse_envelope(weight: Tensor, k: int, groups: Groups = "rows") -> Tensor:
    """``S_k(w) = 1/2 min_u sum_g ||w_g||^2 / u_g`` over ``0 <= u_g <= 1``, ``sum_g u_g <= k``.

    The largest convex function that is nowhere above ``||w||^2 / 2`` at weights with at most
    ``k`` nonzero groups (and infinite elsewhere); half the square of the k-support norm of the
    groups' norms. The gradient of a group is ``w_g / u_g``, and zero for a group of zeros.

    Args:
        weight: (out, ...); everything behind the first dimension belongs to one row.
        k: the number of groups, from 1; with all of them it is ``||w||^2 / 2``, with one
            ``(sum_g ||w_g||)^2 / 2``.
        groups: ``"rows"``, ``"columns"`` of the weight as a matrix (out, in), or ``"elements"``.

    Returns:
        A scalar, at least 0.
    """
    norms = _norms(weight.flatten(1), groups).flatten()
    shares = _shares(norms.detach(), k)
    # Where the share is 0 so is the norm.
    return torch.where(shares > 0, norms.square() / shares, 0.0).sum() / 2


class GroupSparseEnvelope(ProximalPenalty):
    """Leaves as many groups of weights in each layer as the user asks for (WGSEF).

    Refael, Arbel, Huleihel (2022), Learning k-Level Structured Sparse Neural Networks Using Group
    Envelope Regularization.

    ``R = sum_l S_k(W_l)``, ``S_k(w) = 1/2 min_{0 <= u <= 1, sum u <= k} sum_g ||w_g||^2 / u_g``:
    the convex envelope of ``||w||^2 / 2`` over weights with at most ``k`` nonzero groups (rows:
    neurons and filters; columns: inputs and filter shapes; single weights). The ``k`` strongest
    groups pay ordinary weight decay, the others more the weaker they are. The proximal step with
    ``t = lr strength`` multiplies a group by ``u_g / (u_g + t)`` with ``u_g = clip(c ||w_g|| - t,
    0, 1)``, where ``c`` makes ``sum_g u_g = k``; it never makes one of the last ``k`` groups zero.

    Where ``strength`` exceeds what the ``k + 1``-th group is worth, training ends with ``k`` groups
    by itself. A weaker one leaves more, of which at ``finish`` the ``k`` strongest are kept, and
    the rest of the run trains those: the number at the end is ``k``, whatever the strength.

    The abstract says what the function is for; formula and proximal step are from memory of it and
    derived here, not checked against code, of which none was found. ``finish`` and the default
    strength are ours. The paper's weights ``d_g`` are 1 here: the groups of a layer have one size.

    Args:
        strength: ``lambda``, at least 0.
        k: how many groups of each layer survive: a whole number from 1, or a share in (0, 1),
            rounded up. A layer with fewer groups keeps them all.
        groups: ``"rows"``, ``"columns"``, or ``"elements"`` for unstructured sparsity.
        finish: the share of the run, in [0, 1], after which no more than ``k`` groups are left;
            ``None`` leaves the number to the strength.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        mode: ``"proximal"``, the paper's; ``"gradient"`` and ``"loss"`` follow the gradient, which
            brings groups near zero only, until ``finish``, which acts in the proximal mode alone.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, ``k`` neither a whole number from 1 nor a share,
            ``groups`` unknown, ``finish`` outside [0, 1], or no parameter is chosen.

    Note:
        Over ranks: replica; every rank steps alike, and nothing is communicated. Cost per optimizer
        step: a norm a group, a sort of the groups of each layer, and a pass over the weights. The
        proximal step is Euclidean: under Adam it leaves out the preconditioner. Biases stay, and
        an endless run (``max_epochs=-1``) never finishes. Exclude the last layer, whose rows are
        classes. It includes weight decay of the same strength, so set the optimizer's to 0.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import GroupSparseEnvelope
        >>> sparse = GroupSparseEnvelope(0.01, k=0.25, parameters="encoder")
        >>> trainer = L.Trainer(callbacks=[sparse], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Learning k-Level Structured Sparse Neural Networks Using Group Envelope "
            "Regularization",
            "Refael et al.",
            2022,
            None,
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(group_sparse_envelope)
    explanation: ClassVar[str] = "leaves k groups of weights in each layer"

    def __init__(
        self,
        strength: float | Schedule = 1e-3,
        *,
        k: int | float = 0.5,
        groups: Groups = "rows",
        finish: float | None = 0.8,
        parameters: str | ParameterSelection | None = None,
        mode: ProximalMode = "proximal",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        cure = "GroupSparseEnvelope(0.01, k=16)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        if isinstance(k, bool) or not isinstance(k, (int, float)) or not (k >= 1 or 0 < k < 1):
            raise ArgumentError(
                self,
                f"`k` must be a whole number from 1 or a share in (0, 1), got {k!r}",
                cure=cure,
            )
        if k > 1 and k != int(k):
            raise ArgumentError(self, f"`k` must be whole, got {k!r}", cure=cure)
        if groups not in _GROUPS:
            raise ArgumentError(
                self,
                f"`groups` must be one of {', '.join(_GROUPS)}, got {groups!r}",
                cure='GroupSparseEnvelope(groups="rows")',
            )
        if finish is not None:
            check_range(self, "finish", finish, 0, 1, cure="GroupSparseEnvelope(finish=0.8)")
        self.k = k
        self.groups: Groups = groups
        self.finish = finish
        self._finished = False

    def project(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 8."""
        self._finished = self.finish is not None and update.progress >= self.finish
        return super().project(update)

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack(
            [group_sparse_envelope(m, self._count(m), self.groups) for m in matrices]
        )

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The penalty and the gradient of each weight, from one norm a group and their sort."""
        values, factors = [], []
        for matrix in matrices:
            norms = _norms(matrix, self.groups)
            shares = _shares(norms.flatten(), self._count(matrix)).view(norms.shape)
            factor = torch.where(shares > 0, 1 / shares, 0.0)
            values.append((norms.square() * factor).sum() / 2)
            factors.append(factor)
        return torch.stack(values), list(torch._foreach_mul(list(matrices), factors))

    def proximal_form(self, matrices: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """Groups that are shorter, or zero."""
        factors = []
        for matrix, step in zip(matrices, steps, strict=True):
            norms = _norms(matrix, self.groups)
            factor = _proximal_factors(norms.flatten(), self._count(matrix), step)
            if self._finished:
                factor = factor * _strongest(norms.flatten(), self._count(matrix))
            factors.append(factor.view(norms.shape))
        return list(torch._foreach_mul(list(matrices), factors))

    def _count(self, matrix: Tensor) -> int:
        """``k`` of one layer."""
        groups = {"rows": matrix.shape[0], "columns": matrix.shape[1]}.get(
            self.groups, matrix.numel()
        )
        wanted = -int(-self.k * groups // 1) if self.k < 1 else int(self.k)
        return min(wanted, groups)


def _norms(matrix: Tensor, groups: Groups) -> Tensor:
    """The norm of each group, in a shape that broadcasts over the matrix."""
    if groups == "elements":
        return matrix.abs()
    dimension = 1 if groups == "rows" else 0
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=dimension, keepdim=True)
    return norms


def _shares(norms: Tensor, k: int) -> Tensor:
    """The minimizing ``u`` of norms (G,): ``min(1, ||w_g|| / theta)``, whose sum is ``k``."""
    if k >= len(norms):
        return torch.ones_like(norms)
    ordered = norms.double().sort(descending=True).values
    # theta if the r strongest have a share of 1 and the others divide k - r in proportion; the
    # first r that gives nobody more than 1.
    rest = ordered.flip(0).cumsum(0).flip(0)[:k]
    thetas = rest / torch.arange(k, 0, -1, device=norms.device)
    first = (ordered[:k] <= thetas).to(torch.uint8).argmax()
    theta = thetas.gather(0, first.view(1))
    # With k groups or fewer theta is zero, and so are all others.
    return torch.where(norms > 0, (norms / theta).clamp_max(1), 0.0).to(norms.dtype)


def _proximal_factors(norms: Tensor, k: int, step: float) -> Tensor:
    """``u / (u + t)`` of norms (G,), with ``u = clip(c ||w_g|| - t, 0, 1)`` and sum ``k``."""
    if step == 0:
        return torch.ones_like(norms)
    if k >= len(norms):
        return torch.full_like(norms, 1 / (1 + step))
    double = norms.double()
    largest = double.max().clamp_min(torch.finfo(double.dtype).tiny)
    # A group of zeros comes last, and stays zero whatever its factor.
    a = (double / largest).clamp_min(1e-30)
    # sum(u) grows piecewise linearly in c, and changes its slope where a group starts to have a
    # share and where its share is 1.
    places = torch.cat([step / a, (1 + step) / a])
    slopes = torch.cat([a, -a])
    places, order = places.sort()
    slope = slopes[order].cumsum(0)
    gained = (slope[:-1] * places.diff()).cumsum(0)
    sums = torch.cat([gained.new_zeros(1), gained])
    segment = (torch.searchsorted(sums, sums.new_full((1,), k)) - 1).clamp_(0, len(sums) - 2)
    c = places[segment] + (k - sums[segment]) / slope[segment]
    u = (c * a - step).clamp(0, 1)
    return (u / (u + step)).to(norms.dtype)


def _strongest(norms: Tensor, k: int) -> Tensor:
    """1 for the ``k`` largest of norms (G,), else 0."""
    return torch.zeros_like(norms).scatter_(0, norms.topk(k).indices, 1.0)
