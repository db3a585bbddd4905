"""Makes a ReLU network use few units, by what goes in times what comes out of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.weight_paths import Path, WeightPaths
from lightning_reg.mechanisms.weight_penalty import Mode

__all__ = ["PathNormPenalty", "path_norm_penalty"]

_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Scaling the input by a positive factor scales the output: units can be rescaled through them.
_HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)


def path_norm_penalty(w_in: Tensor, w_out: Tensor) -> Tensor:
    """``sum_k ||w_k||_2 ||v_k||_2`` over hidden units, ``w_k`` into and ``v_k`` out of unit ``k``.

    The least value of ``1/2 sum_k (||w_k||^2 + ||v_k||^2)``, weight decay, over all rescalings of
    units that leave the function as it is. The gradient by ``w_k`` is ``||v_k|| w_k / ||w_k||``,
    and zero at zero.

    Args:
        w_in: (K, ...), the weight of the layer that makes the units; a convolution's filters count
            whole.
        w_out: (out, K * S, ...), that of the layer that reads them: dimension 1 holds ``S`` inputs
            of each unit in a row (1, or the places of a channel behind a flatten).

    Returns:
        A scalar, at least 0.
    """
    outgoing = _outgoing(w_out, len(w_in))
    norms = torch.linalg.vector_norm(w_in.flatten(1), dim=1)
    total: Tensor = (norms * torch.linalg.vector_norm(outgoing, dim=(0, 2))).sum()
    return total


class PathNormPenalty(WeightPaths):
    """Makes a ReLU network use few units, by what goes in times what comes out of each.

    Parhi, Nowak (2023), Deep Learning Meets Sparse Regularization: A Signal Processing Perspective,
    arXiv:2301.09554.

    ``R = sum_k ||w_k||_2 ||v_k||_2`` for every pair of consecutive layers with a positively
    homogeneous activation between: the l1 norm of the units' sizes, which is what weight decay
    tends to and a tutorial on it calls a total variation in the Radon domain. For a shallow ReLU
    network of one input it equals the total variation of the derivative ``f'``, if no two kinks
    coincide. Unlike weight decay it sees only the function: rescaling a unit,
    ``w_k -> c w_k`` and ``v_k -> v_k / c``, changes nothing, and units that are not worth their
    size vanish.

    The formula is from memory of the paper and of its companions, not checked against code, of
    which none was found. The default strength is ours.

    Args:
        strength: ``lambda``, at least 0. Twice the ``weight_decay`` of an optimizer is the same
            pull on a balanced network.
        pairs: names of the layers, as ``[["encoder.0", "encoder.2"]]``: the one that makes the
            units, and the one that reads them. ``None`` finds linear and convolutional layers in
            ``nn.Sequential`` with nothing but ReLU, LeakyReLU, dropout, pooling, flatten and
            identity between.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the penalty to the loss of every micro-batch. Equal to rounding.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0; before training, if no pair is found, a name is
            not a layer with a weight, or the layers of a pair do not fit each other.
        UnsupportedError: where FSDP2 shards weights.

    Note:
        Over ranks: replica; nothing is communicated, and every rank computes the whole. Cost per
        optimizer step: two norms a unit and a pass over the weights of each pair. A layer between
        two others lies in two pairs. Biases are free, as in the theory. Set the optimizer's
        ``weight_decay`` to 0. It does not fit where a normalization layer or a saturating
        activation stands between: nothing can be rescaled through it.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PathNormPenalty
        >>> trainer = L.Trainer(callbacks=[PathNormPenalty(1e-4)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Deep Learning Meets Sparse Regularization: A Signal Processing Perspective",
            "Parhi et al.",
            2023,
            "2301.09554",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(path_norm_penalty)
    explanation: ClassVar[str] = "penalizes each unit's incoming times outgoing norm"

    def __init__(
        self,
        strength: float | Schedule = 1e-4,
        *,
        pairs: list[list[str]] | None = None,
        mode: Mode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, mode=mode, name=name)
        cure = 'PathNormPenalty(1e-4, pairs=[["encoder.0", "encoder.2"]])'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        if pairs is not None and not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
        ):
            raise ArgumentError(self, f"`pairs` must hold two names each, got {pairs!r}", cure=cure)
        self.pairs = pairs

    def find_paths(self, module: nn.Module) -> list[Path]:
        """Pairs of weights, given or found."""
        pairs = _pairs(module) if self.pairs is None else [(a, b) for a, b in self.pairs]
        if not pairs:
            raise ArgumentError(
                self,
                f"finds no two consecutive layers in an nn.Sequential of {type(module).__name__} "
                "with a homogeneous activation between",
                cure='PathNormPenalty(pairs=[["first_layer", "second_layer"]])',
            )
        weights = dict(module.named_parameters())
        paths: list[Path] = [(f"{a}.weight", f"{b}.weight") for a, b in pairs]
        for path in paths:
            self._check(path, weights)
        return paths

    def values(self, paths: Sequence[Sequence[Tensor]]) -> Tensor:
        """The penalty of each pair."""
        return torch.stack([path_norm_penalty(w_in, w_out) for w_in, w_out in paths])

    def closed_form(self, paths: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """The penalty and the gradients of each pair, from two norms a unit."""
        values, gradients = [], []
        for w_in, w_out in paths:
            incoming, outgoing = w_in.flatten(1), _outgoing(w_out, len(w_in))
            a = torch.linalg.vector_norm(incoming, dim=1)
            b = torch.linalg.vector_norm(outgoing, dim=(0, 2))
            values.append(torch.dot(a, b))
            pull_in = torch.where(a > 0, b / a, 0.0)[:, None] * incoming
            pull_out = torch.where(b > 0, a / b, 0.0)[:, None] * outgoing
            gradients.append([pull_in.view_as(w_in), pull_out.view_as(w_out)])
        return torch.stack(values), gradients

    def _check(self, path: Path, weights: dict[str, nn.Parameter]) -> None:
        for name in path:
            if name not in weights:
                raise ArgumentError(
                    self,
                    f"`pairs` names {name.removesuffix('.weight')}, no layer with a weight",
                    cure='PathNormPenalty(pairs=[["encoder.0", "encoder.2"]])',
                )
        units, inputs = weights[path[0]].shape[0], weights[path[1]].shape[1]
        if inputs % units:
            raise ArgumentError(
                self,
                f"{path[0]} makes {units} units, which {path[1]} with {inputs} inputs cannot read",
                cure="pairs of layers of which the second reads the first, without groups",
            )


def _outgoing(w_out: Tensor, units: int) -> Tensor:
    """(out, K * S, ...) to (out, K, S * ...)."""
    return w_out.reshape(len(w_out), units, -1)


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of consecutive layers in the Sequentials of a module."""
    found = []
    for path, sequence in module.named_modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        before: tuple[str, nn.Module] | None = None
        for key, layer in sequence.named_children():
            name = f"{path}.{key}" if path else key
            if isinstance(layer, _AFFINE):
                if before is not None and _reads(layer, before[1]):
                    found.append((before[0], name))
                before = (name, layer)
            elif not isinstance(layer, _HOMOGENEOUS):
                before = None
    return found


def _reads(layer: Any, before: Any) -> bool:
    """Whether each input of ``layer`` belongs to one unit of the layer before."""
    return getattr(layer, "groups", 1) == 1 and layer.weight.shape[1] % len(before.weight) == 0
