"""Makes predictions obey a conservation law exactly, and their uncertainty know of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Technique
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

__all__ = [
    "ConservationProjectionMixin",
    "conservation_nll",
    "conservation_projection",
    "trapezoid_weights",
]


def conservation_projection(
    mean: Tensor,
    covariance: Tensor | None,
    constraint: Tensor,
    total: Tensor,
    noise: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The normal distribution ``N(mu, S)``, given that ``G u = b`` up to noise.

    ``mu~ = mu - K (G mu - b)`` and ``S~ = S - K G S`` with ``K = S G^T (sigma^2 I + G S
    G^T)^-1``: the nearest mean in the metric of ``S^-1`` that obeys, for ``sigma`` = 0.

    Args:
        mean: ``mu`` (..., n).
        covariance: variances (..., n), of which the new variances are given back; ``S``
            (..., n, n); or ``None`` for the identity, the nearest mean in the Euclidean metric.
        constraint: ``G`` (m, n) with independent rows, or (..., m, n), or one row (n,).
        total: ``b`` (..., m), or (...) for a single row.
        noise: ``sigma``, from 0 (exact) to infinity (nothing changes).

    Returns:
        ``mu~`` and the covariance in the form that was given. Computed in float64.
    """
    if noise == math.inf:
        return mean, covariance
    mu, rows, b = _precise(mean), _law(constraint), _precise(total)
    spread = torch.ones_like(mu) if covariance is None else _precise(covariance)
    full = spread.ndim > mu.ndim
    carried, joint = _joint(spread, full, rows, noise)
    gap = _apply(rows, mu) - (b[..., None] if constraint.ndim == 1 else b)
    # For the mean and the covariance at once.
    asked = torch.cat([gap[..., None], carried.expand(*gap.shape, -1)], -1)
    solved = torch.linalg.solve_ex(joint, asked)[0]
    new_mean = mu - (carried.mT @ solved[..., :1]).squeeze(-1)
    if covariance is None:
        return new_mean.to(mean.dtype), None
    if full:
        reduced = spread - carried.mT @ solved[..., 1:]
    else:
        # Rounding may take one that the law determines below 0.
        reduced = (spread - (carried * solved[..., 1:]).sum(-2)).clamp_min(0)
    return new_mean.to(mean.dtype), reduced.to(covariance.dtype)


def conservation_nll(
    targets: Tensor,
    mean: Tensor,
    variances: Tensor,
    constraint: Tensor,
    noise: float = 0.0,
) -> Tensor:
    """``-log p(u | G u)`` for ``u ~ N(mu, diag(v))``, the loss that the projection is fitted by.

    ``-log N(u; mu, v) + log N(G u; G mu, sigma^2 I + G S G^T)``: what the conserved total says of
    ``u`` already is not asked of the network. A constant, ``log N(0; 0, sigma^2)``, is left out.

    Args:
        targets: ``u`` (..., n).
        mean: ``mu`` (..., n).
        variances: ``v`` (..., n), above 0.
        constraint: ``G`` (m, n), (..., m, n) or (n,).
        noise: ``sigma``.

    Returns:
        (...), the negative log-likelihood of each function, in float64.
    """
    u, mu, v, rows = _precise(targets), _precise(mean), _precise(variances), _law(constraint)
    given = ((u - mu).square() / v + v.log()).sum(-1)
    _, joint = _joint(v, False, rows, noise)
    gap = _apply(rows, u - mu)
    factor = torch.linalg.cholesky_ex(joint)[0]
    white = torch.linalg.solve_triangular(factor, gap[..., None], upper=False).squeeze(-1)
    known = white.square().sum(-1) + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    free = u.shape[-1] - rows.shape[-2]
    nll: Tensor = (given - known + free * math.log(2 * math.pi)) / 2
    return nll


def trapezoid_weights(points: Tensor) -> Tensor:
    """The row ``G`` with ``G u = int u(x) dx`` by the trapezoidal rule.

    Args:
        points: (..., n), ascending.

    Returns:
        (..., n).
    """
    steps = points.diff(dim=-1)
    nothing = torch.zeros_like(points[..., :1])
    return (torch.cat([steps, nothing], -1) + torch.cat([nothing, steps], -1)) / 2


class ConservationProjectionMixin(Technique, _Base):
    """Makes predictions obey a conservation law exactly, and their uncertainty know of it.

    Hansen, Maddix, Alizadeh, Gupta, Mahoney (2023), Learning Physical Models that Can Respect
    Conservation Laws (ProbConserv), arXiv:2302.11002.

    In integral form a conservation law is linear in the solution ``u`` on a grid: ``G u = b``,
    with quadrature weights ``G`` and the known total ``b`` (the mass at that time). Given a
    predicted mean ``mu`` and covariance ``S``, the distribution is conditioned on it: ``mu~ = mu -
    S G^T (sigma^2 I + G S G^T)^-1 (G mu - b)``, ``S~ = S - S G^T (sigma^2 I + G S G^T)^-1 G S``.
    What is missing goes where the prediction is least sure, such as a shock; no variance grows;
    with ``sigma`` = 0 the law holds to rounding.

    Formulas confirmed against amazon-science/probconserv@bfd388c,
    deep_pdes/attentive_neural_process/probconserv.py, whose values and gradients are in the
    tests: its projection, its limits ``physnp`` (``noise=0``) and ``hcnp``
    (``covariance=None``, covariance kept), and its training loss, :meth:`conserved_nll`, up to a
    constant. There ``sigma^-2`` starts at 100 and is learned; here it is given, with 0 as default.

    Subclass it together with a LightningModule that predicts on a grid, and call
    :meth:`conserve` on what it predicts, in training, validation and prediction alike.

    Args (of :meth:`set_conservation`, called in ``__init__``):
        constraint: ``G`` (m, n) or (n,), kept as a buffer; ``None`` if each call brings its own.
        noise: ``sigma``, from 0 to infinity, which turns it off.

    Raises:
        ArgumentError: if ``noise`` is negative, no constraint is known, or shapes do not fit.

    Note:
        Over ranks and micro-batches: global; each function is projected for itself, and nothing is
        communicated. Cost: a solve (m, m) in float64 a function, and m products with its
        covariance; ``n^2`` numbers only where full covariances are given.

        Rows of ``G`` have to be independent, and variances above 0 where a row is. Means may
        leave a range that they kept before, below 0 for instance. It hurts if ``b`` is wrong.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ConservationProjectionMixin
        >>> from lightning_reg.functional import trapezoid_weights
        >>> class Net(ConservationProjectionMixin, L.LightningModule):
        ...     def __init__(self, points):
        ...         super().__init__()
        ...         self.set_conservation(trapezoid_weights(points))
        ...     def training_step(self, batch, batch_idx):
        ...         mean, variances = self.net(batch["input"])
        ...         return self.conserved_nll(batch["u"], mean, variances).mean()
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Learning Physical Models that Can Respect Conservation Laws",
            "Hansen et al.",
            2023,
            "2302.11002",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    function: ClassVar[Callable[..., Any] | None] = staticmethod(conservation_projection)

    conservation_weights: Tensor | None
    conservation_noise: float = 0.0

    def set_conservation(self, constraint: Tensor | None = None, noise: float = 0.0) -> None:
        """Choose the law and how exactly it holds; see the class."""
        owner, cure = "ConservationProjectionMixin", "self.set_conservation(weights, noise=0.0)"
        check_range(owner, "noise", noise, 0, cure=cure)
        if constraint is not None and not (
            isinstance(constraint, Tensor) and constraint.ndim in (1, 2)
        ):
            shape = tuple(constraint.shape) if isinstance(constraint, Tensor) else constraint
            raise ArgumentError(
                owner, f"`constraint` must be a tensor (m, n) or (n,), got {shape!r}", cure=cure
            )
        self.register_buffer("conservation_weights", constraint, persistent=False)
        self.conservation_noise = noise

    def conserve(
        self,
        mean: Tensor,
        total: Tensor,
        covariance: Tensor | None = None,
        constraint: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction under the law; arguments as those of :func:`conservation_projection`."""
        rows = self._law(constraint, mean)
        return conservation_projection(mean, covariance, rows, total, self.conservation_noise)

    def conserved_nll(
        self,
        targets: Tensor,
        mean: Tensor,
        variances: Tensor,
        constraint: Tensor | None = None,
    ) -> Tensor:
        """The loss (...) of each function; arguments as those of :func:`conservation_nll`."""
        rows = self._law(constraint, mean)
        return conservation_nll(targets, mean, variances, rows, self.conservation_noise)

    def _law(self, constraint: Tensor | None, mean: Tensor) -> Tensor:
        known = getattr(self, "conservation_weights", None)
        rows = known if constraint is None else constraint
        owner, cure = (
            "ConservationProjectionMixin",
            "self.conserve(mean, total, constraint=weights)",
        )
        if rows is None:
            raise ArgumentError(owner, "knows no law: `constraint` was never given", cure=cure)
        if rows.shape[-1] != mean.shape[-1]:
            raise ArgumentError(
                owner,
                f"the constraint {tuple(rows.shape)} needs predictions at {rows.shape[-1]} points, "
                f"got {tuple(mean.shape)}",
                cure=cure,
            )
        return rows


def _precise(value: Tensor) -> Tensor:
    # MPS has no float64.
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def _law(constraint: Tensor) -> Tensor:
    """``G`` as a matrix."""
    rows = _precise(constraint)
    return rows[None] if rows.ndim == 1 else rows


def _apply(rows: Tensor, values: Tensor) -> Tensor:
    """``G u`` (..., m)."""
    found: Tensor = (rows @ values[..., None]).squeeze(-1)
    return found


def _joint(spread: Tensor, full: bool, rows: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """``G S`` (..., m, n) and ``sigma^2 I + G S G^T`` (..., m, m)."""
    carried = rows @ spread if full else rows * spread[..., None, :]
    identity = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return carried, carried @ rows.mT + noise**2 * identity
