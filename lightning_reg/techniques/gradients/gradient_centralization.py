"""Takes the mean out of the gradient of every unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.mechanisms.gradient_transform import GradientTransform

__all__ = ["GradientCentralization", "gradient_centralization"]


def gradient_centralization(gradient: Tensor) -> Tensor:
    """``g_i - mean(g_i)`` for every row ``i``.

    Args:
        gradient: (out, ...) of two or more dimensions; everything behind the first belongs to one
            row. Of fewer dimensions it comes back as it is.

    Returns:
        The new gradient, of the same shape; each row sums to 0.
    """
    return gradient - _mean(gradient) if gradient.ndim > 1 else gradient


class GradientCentralization(GradientTransform):
    """Takes the mean out of the gradient of every unit.

    Yong, Huang, Hua, Zhang (2020), Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks, arXiv:2004.01461.

    ``Phi(g_i) = g_i - mean(g_i)`` over the incoming weights of each output unit ``i``: the gradient
    projected on the hyperplane whose normal is the vector of ones. Under plain SGD the sum of a
    unit's weights then stays what it was at the start, which regularizes the weights, and the
    output's shift by a constant in the input (after a ReLU: always there) no longer drives them.

    Confirmed against Yonghongwei/Gradient-Centralization@012791d, GC_code/CIFAR100/algorithm/SGD.py
    (``SGD_GC``: convolutions and linear layers). There weight decay is part of what is centralized;
    here an optimizer adds it afterwards, and :class:`L2Penalty` before.

    Args:
        strength: the share of the mean that is taken out, in [0, 1].
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers. Convolutions alone, as in
            the code's ``SGD_GCC``: ``ParameterSelection(types=["_ConvNd"])``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], or if no parameter is chosen.

    Note:
        Over ranks: replica; it edits the reduced gradients, and nothing is communicated. Once per
        optimizer step. Cost: a mean a unit and a pass over gradients. The log shows the share of
        the squared gradient norm that was taken out. Vectors are left alone, and so is a unit of a
        single weight only by excluding it: its gradient would be 0.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import GradientCentralization
        >>> trainer = L.Trainer(callbacks=[GradientCentralization()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
            "Yong et al.",
            2020,
            "2004.01461",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(gradient_centralization)
    explanation: ClassVar[str] = "takes the mean out of each unit's gradient"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)

    def transform(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Centered gradients, and the share of the squared norm that was the mean's."""
        centered = [gradient_centralization(g) for g in gradients]
        before = torch.stack(torch._foreach_norm(list(gradients))).square().sum()
        after = torch.stack(torch._foreach_norm(centered)).square().sum()
        return centered, 1 - after / before.clamp_min(torch.finfo(before.dtype).tiny)


def _mean(gradient: Tensor) -> Tensor:
    return gradient.mean(tuple(range(1, gradient.ndim)), keepdim=True)
