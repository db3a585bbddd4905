"""Penalizes how strongly the outputs change with the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.mechanisms.gradient_penalty import (
    GradientPenalty,
    Projections,
    check_projections,
    squared_jacobian,
)

__all__ = ["JacobianPenalty", "jacobian_penalty"]


def jacobian_penalty(
    outputs: Tensor,
    inputs: Tensor,
    projections: Projections = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(1/2) ||J||_F^2`` of each sample, with ``J_ci = dz_c/dx_i``.

    Args:
        outputs: ``z`` (B, ...): logits, a differentiable function of ``inputs``.
        inputs: ``x`` (B, ...), which requires a gradient.
        projections: ``"exact"``, or the number of random projections: then the result is an
            unbiased estimate, ``(C/2) ||v^T J||^2`` averaged over unit vectors ``v``.
        generator: where the projections are drawn from.

    Returns:
        (B,), with a graph, in the squared unit of an output per unit of an input.
    """
    return 0.5 * squared_jacobian(outputs, inputs, projections, generator)


class JacobianPenalty(GradientPenalty):
    """Flattens the network around the training samples, which widens classification margins.

    Hoffman, Roberts, Yaida (2019), Robust Learning with Jacobian Regularization,
    arXiv:1908.02729.

    The loss becomes ``L + (lambda/2) E ||J||_F^2`` with the Jacobian ``J`` of the logits by the
    inputs, of each sample. ``||J||_F^2 = C E ||v^T J||^2`` for ``v`` uniform on the unit sphere
    of the ``C`` outputs, so one backward pass per random ``v`` estimates it without bias; the
    paper finds one enough. The log shows the penalty with its factor 1/2.

    Values and gradients are those of facebookresearch/jacobian_regularizer
    (``jacobian/jacobian.py``), as are the default strength 0.01 (its README) and one projection.

    Args:
        strength: ``lambda``.
        projections: random directions per sample and step, or ``"exact"`` for the full Jacobian.
        layer: differentiate by this submodule's output instead of the inputs, for example an
            embedding where inputs are tokens.
        signals: where ``inputs`` and ``logits`` are, if not in the usual places.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``projections`` is neither, or the module has no such layer.
        UnsupportedError: in the first step, if inputs are integers or the network is compiled.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks, for one all-reduce of two
        numbers a step. Random projections are each rank's and micro-batch's own; with
        ``projections="exact"`` N ranks, or N micro-batches, equal the joint batch. BatchNorm in
        training mode makes outputs depend on the other samples' inputs; the derivative is then
        that of the batch.

        Cost: per projection one backward pass through the network and a second one through that,
        and the activations of both; ``"exact"`` takes C. Attention runs without fused kernels.
        ReLU networks have a Jacobian and can be trained with it; its own derivative is that of
        each linear piece. It hurts clean accuracy at large strengths.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import JacobianPenalty
        >>> trainer = L.Trainer(callbacks=[JacobianPenalty(0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Robust Learning with Jacobian Regularization", "Hoffman et al.", 2019, "1908.02729"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(jacobian_penalty)
    explanation: ClassVar[str] = "adds the derivative of the logits by the inputs to the loss"

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        projections: Projections = 1,
        layer: str | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layer=layer, signals=signals, name=name)
        check_projections(self, projections)
        self.projections = projections

    def values(self, outputs: Tensor, points: Tensor, generator: torch.Generator | None) -> Tensor:
        """Half the squared norm of each sample's Jacobian."""
        return jacobian_penalty(outputs, points, self.projections, generator)
