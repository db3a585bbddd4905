"""How curved the loss is: the trace and the eigenvalues of its Hessian, by products with vectors.

No Hessian is ever formed: a product with a vector costs about two backward passes. Means over
batches and ranks are exact, since the Hessian of a mean is the mean of Hessians.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, RegularizationError, check_range
from lightning_reg.metrics.hessian_product import OWNER, HessianProduct, Loss, dot, draw_probes

__all__ = [
    "hessian_eigenvalues",
    "hessian_spectrum",
    "hessian_trace",
]

Distribution = Literal["rademacher", "gaussian"]
Method = Literal["hutchinson", "hutch++"]
End = Literal["largest", "smallest"]


class TraceEstimate(NamedTuple):
    """An estimated trace.

    Attributes:
        value: a float64 scalar.
        standard_error: of the value, from the spread of the probes; NaN for a single probe.
    """

    value: Tensor
    standard_error: Tensor


class Eigenvalues(NamedTuple):
    """Eigenvalues from one end of the spectrum.

    Attributes:
        values: (k,) float64, the outermost first.
        residuals: (k,) float64: within this distance of each value there is an eigenvalue.
    """

    values: Tensor
    residuals: Tensor


class Spectrum(NamedTuple):
    """A spectral density: point masses whose weights sum to 1.

    Attributes:
        nodes: (n,) float64 positions.
        weights: (n,) float64.
    """

    nodes: Tensor
    weights: Tensor


def hessian_trace(
    losses: Loss | Sequence[Loss],
    parameters: Sequence[Tensor],
    *,
    probes: int = 30,
    distribution: Distribution = "rademacher",
    method: Method = "hutchinson",
    weights: Sequence[float] | None = None,
    seed: int = 0,
    comm: Communicator | None = None,
) -> TraceEstimate:
    r"""The trace of the Hessian of the mean loss, estimated with random vectors.

    .. math:: \mathrm{tr} H \approx \frac{1}{m} \sum_j v_j^\top H v_j, \qquad
        \mathbb{E}\, v v^\top = I

    Hutchinson's estimator is unbiased. With Rademacher vectors its variance is
    :math:`2 (\lVert H \rVert_F^2 - \sum_i H_{ii}^2) / m`, with Gaussian ones
    :math:`2 \lVert H \rVert_F^2 / m`. Hutch++ (Meyer, Musco, Musco, Woodruff 2021) takes the trace
    on the span of :math:`H S`, of a third of its vectors, exactly, and estimates the rest only: it
    pays where few large eigenvalues hold most of the trace, as they do in trained networks.

    Args:
        losses: the mean loss of a batch, with its graph or as a function; or one for each batch.
        parameters: what the loss is differentiated by; frozen ones are left out.
        probes: the number of products with the Hessian, per batch.
        distribution: of the vectors' entries: ``"rademacher"`` (signs) or ``"gaussian"``.
        method: ``"hutchinson"``, or ``"hutch++"``, which needs three probes, and the memory of a
            third of them times the number of parameters.
        weights: how much each batch counts.
        seed: of the vectors.
        comm: the other ranks, whose batches count as well; default: this process.

    Returns:
        The estimate and its standard error. For Hutch++ that of the part that is estimated.

    Raises:
        ArgumentError: if an argument is outside its range.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_trace((3 * w[0] ** 2 + w[1] ** 2), [w], probes=2).value
        tensor(8., dtype=torch.float64)
    """
    check_probes(probes, distribution)
    if method not in ("hutchinson", "hutch++"):
        raise ArgumentError(
            OWNER,
            f"`method` must be one of hutchinson, hutch++, got {method!r}",
            cure='hessian_trace(loss, parameters, method="hutchinson")',
        )
    product = HessianProduct(losses, parameters, weights=weights, comm=comm)
    generator = product.generator(seed)
    if method == "hutchinson":
        values = []
        for _ in range(probes):
            probe = draw_probes(product, 1, distribution, generator)
            values.append(dot(probe[0], product(probe)[0]))
        return mean_of_probes(torch.stack(values))
    return _hutch_plus_plus(product, probes, distribution, generator)


def hessian_eigenvalues(
    losses: Loss | Sequence[Loss],
    parameters: Sequence[Tensor],
    k: int = 1,
    *,
    which: End = "largest",
    iterations: int = 100,
    tolerance: float = 1e-4,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    comm: Communicator | None = None,
) -> Eigenvalues:
    r"""The ``k`` largest (or smallest) eigenvalues of the Hessian of the mean loss, by Lanczos.

    Every new vector is made orthogonal to all earlier ones, twice, so that no eigenvalue appears
    a second time as a ghost. An eigenvalue that occurs several times is found once.

    Args:
        losses: the mean loss of a batch, with its graph or as a function; or one for each batch.
        parameters: what the loss is differentiated by; frozen ones are left out.
        k: how many eigenvalues.
        which: the ``"largest"`` or the ``"smallest"``, with their signs.
        iterations: products with the Hessian at most, each with one kept vector as long as all
            parameters together.
        tolerance: stop when all residuals are below this share of the largest magnitude.
        weights: how much each batch counts.
        seed: of the first vector.
        comm: the other ranks, whose batches count as well; default: this process.

    Returns:
        The eigenvalues, outermost first, and their residuals; fewer than ``k`` if the vectors
        span no more.

    Raises:
        ArgumentError: if an argument is outside its range.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_eigenvalues((3 * w[0] ** 2 + w[1] ** 2), [w]).values
        tensor([6.0000], dtype=torch.float64)
    """
    check_lanczos(k, which, iterations, tolerance)
    product = HessianProduct(losses, parameters, weights=weights, comm=comm)
    return top_of(product, k, which, iterations, tolerance, seed)


def hessian_spectrum(
    losses: Loss | Sequence[Loss],
    parameters: Sequence[Tensor],
    *,
    probes: int = 5,
    iterations: int = 50,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    comm: Communicator | None = None,
) -> Spectrum:
    """The spectral density of the Hessian, by stochastic Lanczos quadrature.

    Each probe gives a Gauss quadrature whose nodes are the Ritz values and whose weights are the
    squared first entries of their vectors; the first ``2 * iterations - 1`` moments are exact for
    the probe. ``(weights * nodes).sum() * P`` is Hutchinson's trace.

    Args:
        losses: the mean loss of a batch, with its graph or as a function; or one for each batch.
        parameters: what the loss is differentiated by.
        probes: random starting vectors.
        iterations: products with the Hessian for each of them.
        weights: how much each batch counts.
        seed: of the vectors.
        comm: the other ranks; default: this process.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> float(hessian_spectrum((w ** 2).sum(), [w]).weights.sum())
        1.0
    """
    check_probes(probes, "rademacher")
    check_lanczos(1, "largest", iterations, 0.0)
    product = HessianProduct(losses, parameters, weights=weights, comm=comm)
    generator = product.generator(seed)
    nodes, masses = [], []
    for _ in range(probes):
        start = draw_probes(product, 1, "rademacher", generator)[0]
        *_, (alpha, beta) = _lanczos(product, start, iterations)
        values, vectors = torch.linalg.eigh(_tridiagonal(alpha, beta[:-1]))
        nodes.append(values)
        masses.append(vectors[0].square() / probes)
    return Spectrum(torch.cat(nodes), torch.cat(masses))


# ---------------------------------------------------------------------- parts that metrics share


def check_probes(probes: int, distribution: str) -> None:
    """Refuse a number or a distribution of random vectors that has no meaning."""
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 1:
        raise ArgumentError(
            OWNER, f"`probes` must be a whole number from 1, got {probes!r}", cure="probes=30"
        )
    if distribution not in ("rademacher", "gaussian"):
        raise ArgumentError(
            OWNER,
            f"`distribution` must be one of rademacher, gaussian, got {distribution!r}",
            cure='distribution="rademacher"',
        )


def check_lanczos(k: int, which: str, iterations: int, tolerance: float) -> None:
    """Refuse settings of the Lanczos iteration that have no meaning."""
    for name, value in (("k", k), ("iterations", iterations)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(
                OWNER, f"`{name}` must be a whole number from 1, got {value!r}", cure=f"{name}=10"
            )
    if which not in ("largest", "smallest"):
        raise ArgumentError(
            OWNER,
            f"`which` must be one of largest, smallest, got {which!r}",
            cure='which="largest"',
        )
    check_range(OWNER, "tolerance", tolerance, 0, cure="tolerance=1e-4")


def mean_of_probes(values: Tensor) -> TraceEstimate:
    """The mean (a scalar) of what each probe gave (m,), and its standard error."""
    spread = values.std() if len(values) > 1 else values.new_tensor(math.nan)
    return TraceEstimate(values.mean(), spread / math.sqrt(len(values)))


def top_of(
    product: HessianProduct, k: int, which: str, iterations: int, tolerance: float, seed: int
) -> Eigenvalues:
    """See :func:`hessian_eigenvalues`."""
    generator = product.generator(seed)
    start = draw_probes(product, 1, "gaussian", generator)[0]
    found = Eigenvalues(torch.empty(0), torch.empty(0))
    for alpha, beta in _lanczos(product, start, iterations):
        values, vectors = torch.linalg.eigh(_tridiagonal(alpha, beta[:-1]))
        residuals = beta[-1] * vectors[-1].abs()
        order = slice(None, k) if which == "smallest" else slice(-k, None)
        values_k, residuals_k = values[order], residuals[order]
        if which == "largest":
            values_k, residuals_k = values_k.flip(0), residuals_k.flip(0)
        found = Eigenvalues(values_k, residuals_k)
        limit = tolerance * values.abs().max()
        if len(alpha) >= k and bool((residuals_k <= limit).all()):
            break
    return found


def _lanczos(
    product: HessianProduct, start: Tensor, iterations: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Diagonals (m,) and off-diagonals (m,) after each step; the last one is the remainder."""
    basis = (start / start.norm())[None]
    # On the CPU: a handful of numbers, whose eigenvalues are taken in float64.
    alpha, beta = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    rounding = torch.finfo(start.dtype).eps * math.sqrt(product.size)
    for _ in range(min(iterations, product.size)):
        image = product(basis[-1:])[0]
        if not bool(torch.isfinite(image).all()):
            raise RegularizationError(OWNER, "a product with the Hessian is not finite")
        alpha = torch.cat([alpha, dot(basis[-1], image).cpu()[None]])
        scale = image.norm()
        for _ in range(2):
            image = image - basis.T @ (basis @ image)
        rest = image.norm()
        exhausted = bool(rest <= 10 * rounding * scale) or len(basis) == product.size
        beta = torch.cat(
            [beta, torch.tensor([0.0 if exhausted else float(rest)], dtype=torch.float64)]
        )
        yield alpha, beta
        if exhausted:
            return
        basis = torch.cat([basis, (image / rest)[None]])


def _hutch_plus_plus(
    product: HessianProduct, probes: int, distribution: str, generator: torch.Generator
) -> TraceEstimate:
    third = probes // 3
    if third < 1:
        raise ArgumentError(
            OWNER, f"hutch++ needs three probes, got {probes}", cure='method="hutchinson"'
        )
    third = min(third, product.size)
    sketch = product(draw_probes(product, third, distribution, generator))
    span = torch.linalg.qr(sketch.T).Q.T
    exact = dot(span, product(span))
    rest = draw_probes(product, probes - 2 * third, distribution, generator)
    rest = rest - (rest @ span.T) @ span
    images = product(rest)
    estimate = mean_of_probes(torch.stack([dot(v, h) for v, h in zip(rest, images, strict=True)]))
    return TraceEstimate(exact + estimate.value, estimate.standard_error)


def _tridiagonal(alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
