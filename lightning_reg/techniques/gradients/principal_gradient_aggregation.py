"""Brings the gradients of ranks with different data together along their common directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.gradient_aggregation import GradientAggregation

__all__ = ["PrincipalGradientAggregation", "principal_gradient_aggregation"]


def principal_gradient_aggregation(
    gradients: Tensor, proportion: float = 0.8, rescale: bool = True
) -> Tensor:
    """One gradient for the gradients ``g_1 .. g_R`` of R clients.

    With the singular value decomposition ``G = sum_j sigma_j e_j u_j^T`` of the matrix of
    gradients and the first ``K = floor(R * proportion)`` directions ``u_j`` (at least one):
    ``(1/R) sum_i ||g_i|| sum_j (sigma_j^2 / sum_l sigma_l^2) sign(<g_i, u_j>) u_j``. Without
    rescaling the mean of the projections, ``(1/R) sum_i sum_j <g_i, u_j> u_j``.

    Args:
        gradients: ``G`` (R, P).
        proportion: in (0, 1].
        rescale: whether directions count by their energy and clients by their norm.

    Returns:
        (P,). A single client's gradient comes back as it is, and the mean of scalars (P = 1).
    """
    gram = (gradients @ gradients.T)[None]
    found: Tensor = _weights(gram, proportion, rescale)[0] @ gradients
    return found


class PrincipalGradientAggregation(GradientAggregation):
    """Brings the gradients of ranks with different data together along their common directions.

    Zeng et al. (2023), Tackling Data Heterogeneity in Federated Learning via Loss Decomposition:
    the aggregation on the server. (:class:`MarginControl` is its regularization of clients.)

    Where ranks hold data of different kinds (a hospital each, a user each), the mean of their
    gradients holds what single ranks want against all others. For every parameter tensor the
    ranks' gradients are decomposed, ``G = U diag(sigma) V^T``, and each is replaced by its
    directions among the first ``K`` principal ones, each with the client's whole norm and the
    share ``sigma_j^2 / sum sigma^2``; then their mean is taken. The result is a combination of the
    gradients, whose weights follow from their R x R Gram matrix alone.

    Formula and default (``k_proportion`` 0.8) confirmed against Zeng-Shuang/FedLD@9440494,
    svd_tools.py: pcgrad_svd, whose value is in the tests. There a client's gradient is the change
    of its weights over a local epoch, and the first round takes the mean; here it is the gradient
    of an optimizer step, in every step. There K may be 0, which sets gradients to 0; here it is
    at least 1. ``rescale=False`` is the plain projection, of which ``proportion=1`` is the mean.

    Args:
        strength: the share of the way from the mean to the aggregate, in [0, 1].
        proportion: of the directions that are kept, in (0, 1]; ``K = max(1, floor(R *
            proportion))``.
        rescale: as in the released code, or the plain projection.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` or ``proportion`` is outside its range.
        UnsupportedError: where gradients are not reduced by DDP (weights that are sharded), or its
            reduction has a hook already.

    Note:
        Over ranks: local; ranks are the clients, so give each rank its own kind of data (a
        sampler of your own and ``use_distributed_sampler=False``). In one process, and for tensors
        of one number, it does nothing. Cost: gradients of all ranks are gathered in place of
        reduced, which sends R / 2 times the bytes and holds R buckets of DDP, then R^2 products a
        number and an eigendecomposition (R, R) a tensor; it does not overlap with the backward.
        Under ``ddp_reg`` penalties on weights are not split over ranks. Techniques that bring
        statistics of all ranks together count on the mean: beside this one their gradient is
        weighted like the rest. The log shows the cosine between the aggregate and the mean.

        With rescaling the length of a step changes: where clients disagree it is longer than the
        mean's, so lower the learning rate. It hurts where ranks draw from the same data, whose
        mean is the better estimate.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PrincipalGradientAggregation
        >>> trainer = L.Trainer(callbacks=[PrincipalGradientAggregation()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
            "Zeng et al.",
            2023,
            None,
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        "acts": "in one process there is one client, whose gradient stays as it is",
        "precision": "the check measures what one process trains, where it does nothing",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(principal_gradient_aggregation)
    explanation: ClassVar[str] = "brings ranks' gradients together along common directions"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        proportion: float = 0.8,
        rescale: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, name=name)
        cure = "PrincipalGradientAggregation(proportion=0.8)"
        check_range(self, "proportion", proportion, 0, 1, low_open=True, cure=cure)
        self.proportion = proportion
        self.rescale = rescale

    def client_weights(self, grams: Tensor) -> Tensor:
        """Those of the principal directions."""
        return _weights(grams, self.proportion, self.rescale)


def _weights(grams: Tensor, proportion: float, rescale: bool) -> Tensor:
    """The share of each client (T, R)."""
    clients = grams.shape[-1]
    kept = max(1, int(clients * proportion))
    energies, vectors = torch.linalg.eigh(grams)
    energies, vectors = energies[..., -kept:].clamp_min(0), vectors[..., -kept:]
    if not rescale:
        projected: Tensor = (vectors @ vectors.mT).mean(-1)
        return projected
    total = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    sigmas = energies.sqrt()
    # <g_i, u_j> = sigma_j e_ij, which is 0 where it is nothing but rounding.
    parts = sigmas[..., None, :] * vectors
    rounding = 1e-6 * norms[..., None]
    signs = parts.sign().where(parts.abs() > rounding, 0.0)
    lengths = (norms[..., None] * signs).mean(-2)
    # u_j = sum_i e_ij g_i / sigma_j, times sigma_j^2 / sum sigma^2.
    shares = sigmas / total.where(total > 0, 1.0)[..., None] * lengths
    weights: Tensor = (vectors @ shares[..., None]).squeeze(-1)
    return weights
