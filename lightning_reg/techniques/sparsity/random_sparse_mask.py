"""Trains a random sparse subnetwork: most weights are zero from the start and stay so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, ParameterSelection
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.sharding import parts
from lightning_reg.mechanisms.masked_weights import MaskedWeights

__all__ = ["RandomSparseMask", "random_sparse_mask"]

Distribution = Literal["balanced", "pyramidal", "erk", "uniform"]


def random_sparse_mask(
    shapes: Sequence[Sequence[int]],
    density: float,
    generator: torch.Generator,
    *,
    distribution: Distribution = "balanced",
    groups: Sequence[int] | None = None,
) -> list[Tensor]:
    """Random masks of layers with ``round(density * sum_l m_l)`` ones in all.

    The density ``p_l`` of layer ``l``, which has ``m_l`` weights:

    - ``"balanced"``: ``min(1, x / m_l)``, the same number of weights in each layer;
    - ``"pyramidal"``: ``x^l`` for l = 1, 2, ..., thinner with depth;
    - ``"erk"``: ``min(1, x * sum(shape) / prod(shape))``, Erdos-Renyi with kernel sizes;
    - ``"uniform"``: ``density`` in each layer;

    with ``x`` such that the densities add up. Within a layer the ones are uniformly random, but
    for units that would be left without any input or any output: those keep one weight, and
    another one goes instead.

    Args:
        shapes: (out, in, ...) of each layer, in the order of the network.
        density: the share of ones, in (0, 1].
        generator: what they are drawn from; masks lie on its device.
        distribution: how the ones are spread over layers.
        groups: the groups of each layer, for grouped convolutions.

    Returns:
        One bool tensor a layer, true where a weight is kept.
    """
    sizes = [math.prod(shape) for shape in shapes]
    counts = _counts(_DISTRIBUTIONS[distribution](shapes, density), sizes, density)
    split = [1] * len(sizes) if groups is None else groups
    return [
        _mask(shape, count, group, generator)
        for shape, count, group in zip(shapes, counts, split, strict=True)
    ]


class RandomSparseMask(MaskedWeights):
    """Trains a random sparse subnetwork: most weights are zero from the start and stay so.

    Gadhikar, Mukherjee, Burkholz (2022), Why Random Pruning Is All We Need to Start Sparse,
    arXiv:2210.02412.

    Each layer gets a random mask of density ``p_l``, drawn once before training, such that the
    masks keep the share ``density`` of all chosen weights: ``p_l = min(1, x / m_l)`` for layers of
    ``m_l`` weights (``"balanced"``), ``p_l = x^l`` (``"pyramidal"``),
    ``p_l = min(1, x sum(shape) / prod(shape))`` (``"erk"``) or ``p_l = density`` (``"uniform"``,
    the paper's plain Erdos-Renyi network). Weights that are kept start ``1 / sqrt(p_l)`` larger,
    which keeps the variance of activations, as the released code's initialization does.

    The distributions are those of the released code (sparse_to_sparse). It differs in that it
    draws each entry independently, so that counts vary, where here they are exact; its balanced
    form falls short of the density where a layer is full, where here the others get the rest; and
    it adds a weight to units that were left without any, where here another weight makes room.

    Args:
        density: the share of chosen weights that is kept, in (0, 1]; 1 keeps all.
        distribution: ``"balanced"``, ``"pyramidal"``, ``"erk"`` or ``"uniform"``.
        rescale: whether weights that are kept start ``1 / sqrt(p_l)`` larger. ``False`` for
            weights that come from a training.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers. Biases stay dense.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``density`` is outside (0, 1], ``distribution`` is none of those, or no
            parameter is chosen.

    Note:
        Over ranks: replica; masks come from a shared stream and are equal everywhere without
        communication. They are part of checkpoints. Cost per optimizer step: one product over
        gradients and one over weights, and a bool a weight of memory; the network computes as if
        it were dense, with zeros in it.

        The log shows the share of weights that is kept. At a very low density some units of a
        layer have to go without any input: there are fewer weights than units. It hurts where
        the dense network is small: by the paper's theory a sparse one has to be wider by about
        ``1 / log(1 / (1 - density))``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import RandomSparseMask
        >>> trainer = L.Trainer(callbacks=[RandomSparseMask(0.1)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Why Random Pruning Is All We Need to Start Sparse",
            "Gadhikar et al.",
            2022,
            "2210.02412",
        ),
    )
    exemptions = {"gradient": "the masks are drawn once, and nothing is differentiated"}
    function: ClassVar[Callable[..., Any] | None] = staticmethod(random_sparse_mask)
    explanation: ClassVar[str] = "holds a random part of the weights at zero"

    def __init__(
        self,
        density: float = 0.1,
        *,
        distribution: Distribution = "balanced",
        rescale: bool = True,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(parameters=parameters, name=name)
        check_range(self, "density", density, 0, 1, low_open=True, cure="RandomSparseMask(0.1)")
        if distribution not in _DISTRIBUTIONS:
            raise ArgumentError(
                self,
                f"`distribution` must be one of {', '.join(_DISTRIBUTIONS)}, got {distribution!r}",
                cure='RandomSparseMask(distribution="balanced")',
            )
        self.density = density
        self.distribution = distribution
        self.rescale = rescale

    def masks(
        self, weights: Mapping[str, nn.Parameter], module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random masks, one a weight."""
        holders: list[Any] = [module.get_submodule(name.rpartition(".")[0]) for name in weights]
        drawn = random_sparse_mask(
            [tuple(weight.shape) for weight in weights.values()],
            self.density,
            generator,
            distribution=self.distribution,
            groups=[int(getattr(holder, "groups", 1)) for holder in holders],
        )
        return dict(zip(weights, drawn, strict=True))

    def on_new_masks(
        self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]
    ) -> None:
        """Weights that are kept make up for those that are not."""
        if not self.rescale:
            return
        kept = [
            int(masks[name].count_nonzero()) / weight.numel() for name, weight in weights.items()
        ]
        factors = [share**-0.5 if share > 0 else 1.0 for share in kept]
        torch._foreach_mul_(parts(list(weights.values())), factors)


# ---------------------------------------------------------------------- over layers


def _uniform(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    return [density] * len(shapes)


def _balanced(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    return _capped([1 / math.prod(shape) for shape in shapes], shapes, density)


def _erk(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    return _capped([sum(shape) / math.prod(shape) for shape in shapes], shapes, density)


def _pyramidal(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Powers of the root of ``sum_l m_l x^l = density * sum_l m_l`` in (0, 1]."""
    sizes = [math.prod(shape) for shape in shapes]
    low, high = 0.0, 1.0
    for _ in range(100):
        x = (low + high) / 2
        kept = sum(size * x**depth for depth, size in enumerate(sizes, 1))
        low, high = (x, high) if kept < density * sum(sizes) else (low, x)
    return [high**depth for depth in range(1, len(sizes) + 1)]


def _capped(
    weights: Sequence[float], shapes: Sequence[Sequence[int]], density: float
) -> list[float]:
    """``min(1, x * weight_l)``; what full layers cannot take goes to the others."""
    sizes = [math.prod(shape) for shape in shapes]
    rest = density * sum(sizes)
    shares = [1.0] * len(sizes)
    # The layers with the largest weight fill up first.
    order = sorted(range(len(sizes)), key=lambda i: -weights[i])
    for position, layer in enumerate(order):
        open_layers = order[position:]
        x = rest / sum(weights[i] * sizes[i] for i in open_layers)
        if x * weights[layer] <= 1:
            for i in open_layers:
                shares[i] = x * weights[i]
            break
        rest -= sizes[layer]
    return shares


_DISTRIBUTIONS: dict[str, Callable[[Sequence[Sequence[int]], float], list[float]]] = {
    "balanced": _balanced,
    "pyramidal": _pyramidal,
    "erk": _erk,
    "uniform": _uniform,
}


def _counts(shares: Sequence[float], sizes: Sequence[int], density: float) -> list[int]:
    """Whole numbers of weights with the right sum: the largest remainders are rounded up."""
    exact = [share * size for share, size in zip(shares, sizes, strict=True)]
    counts = [min(math.floor(e + 1e-9), size) for e, size in zip(exact, sizes, strict=True)]
    missing = round(density * sum(sizes)) - sum(counts)
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for layer in [i for i in by_remainder if counts[i] < sizes[i]][: max(missing, 0)]:
        counts[layer] += 1
    return counts


# ---------------------------------------------------------------------- within a layer


def _mask(shape: Sequence[int], count: int, groups: int, generator: torch.Generator) -> Tensor:
    """The ``count`` entries with the highest random scores."""
    scores = torch.rand(tuple(shape), generator=generator, device=generator.device)
    if len(shape) > 1:
        # A unit has an entry among the highest if and only if its own highest is among them, so
        # this changes nothing but for units that would have none.
        scores = scores + _is_highest_of_unit(scores, groups)
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().topk(count).indices] = True
    return kept.view(tuple(shape))


def _is_highest_of_unit(scores: Tensor, groups: int) -> Tensor:
    """Where an entry is the highest of its output unit or of its input unit."""
    grouped = scores.view(groups, scores.shape[0] // groups, scores.shape[1], -1)
    of_outputs = grouped == grouped.amax((2, 3), keepdim=True)
    of_inputs = grouped == grouped.amax((1, 3), keepdim=True)
    return (of_outputs | of_inputs).view_as(scores)
