"""Takes out of each gradient the part that only rescales its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.mechanisms.gradient_transform import GradientTransform, radial_parts
from lightning_reg.mechanisms.selected_weights import EVERYTHING

__all__ = ["OrthoGrad", "ortho_grad"]


def ortho_grad(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rescale: bool = True
) -> list[Tensor]:
    """``g - <w, g> / <w, w> w``, with the norm of ``g`` if it is rescaled.

    A weight of zeros keeps its gradient. So does one of a single element: nothing is orthogonal
    to it but zero, which would freeze it. A rest that is only the rounding of a gradient along
    the weight is not rescaled.

    Args:
        weights: tensors ``w``, each taken as one vector.
        gradients: their gradients ``g``, of the same shapes.
        rescale: multiply the result by ``||g|| / ||g_orth||``.

    Returns:
        New gradients, of the same shapes.
    """
    return _project(weights, gradients, rescale)[0]


class OrthoGrad(GradientTransform):
    """Takes out of each gradient the part along its weight, which only scales the logits.

    Prieto, Barsbey, Mediano, Birdal (2025), Grokking at the Edge of Numerical Stability,
    arXiv:2501.04697, where it is called perpGrad.

    For every parameter tensor, taken as one vector: ``g_orth = g - <w, g> / <w, w> w``, then
    ``g_orth ||g|| / ||g_orth||``. Once a network fits its training set, a growing share of the
    gradient lies along the weights: it lowers the loss by scaling the logits and changes no
    prediction, until the softmax saturates in float32 and learning stops.

    The projection is the paper's; the rescaling is in the released code (orthograd.py) and not in
    the paper's equation. Three things differ from that code: tensors of one element are left
    alone, a rest that is nothing but rounding is not blown up to the old norm, and the projection
    is made before gradients are clipped.

    Args:
        strength: the share of the radial part that is taken out, in [0, 1]; with less than 1 the
            result lies between the old and the new gradient. A Schedule lets it come in later.
        rescale: give the new gradient the old one's norm, as the released code does; ``False`` is
            the paper's equation.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes every parameter, biases and normalization layers too, as the released code does.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], or no parameter is chosen.

    Note:
        Over ranks: replica; it edits the reduced gradients, and nothing is communicated. Once per
        optimizer step. Cost: two dot products and three passes over gradients. The log shows the
        share of the squared gradient norm that lay along the weights.

        Set ``weight_decay`` to 0: it moves weights radially again. Momentum and Adam's
        preconditioner bring back a small radial part as well, since weights turn from step to
        step. It hurts early in training, where growing logits are what a classifier has to learn,
        and wherever the scale of a weight matters.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import OrthoGrad
        >>> trainer = L.Trainer(callbacks=[OrthoGrad()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Grokking at the Edge of Numerical Stability", "Prieto et al.", 2025, "2501.04697"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(ortho_grad)
    explanation: ClassVar[str] = "takes the part along the weight out of its gradient"
    default_selection = EVERYTHING

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        rescale: bool = True,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        self.rescale = rescale

    def transform(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """New gradients, and the share of the squared norm that was radial."""
        return _project(weights, gradients, self.rescale)


def _project(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rescale: bool
) -> tuple[list[Tensor], Tensor]:
    """New gradients, and the radial share of the squared norm."""
    radial = radial_parts(weights, gradients)
    single = [part for part in radial if part.numel() == 1]
    if single:
        torch._foreach_zero_(single)
    result = list(torch._foreach_sub(list(gradients), radial))
    lengths = torch.stack(torch._foreach_norm(list(gradients)))
    share = torch.stack(torch._foreach_norm(radial)).square().sum()
    share = share / lengths.square().sum().clamp_min(torch.finfo(lengths.dtype).tiny)
    if rescale:
        rests = torch.stack(torch._foreach_norm(result))
        # Below this the rest is what rounding left of a gradient along the weight.
        real = rests > 8 * torch.finfo(rests.dtype).eps * lengths
        factors = torch.where(real, lengths / rests, 1.0)
        result = list(torch._foreach_mul(result, list(factors.unbind())))
    return result, share
