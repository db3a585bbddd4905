"""Makes an autoencoder's reconstruction contract, so that it learns the data's score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.mechanisms.gradient_penalty import (
    GradientPenalty,
    Projections,
    check_projections,
    squared_jacobian,
)

__all__ = ["ReconstructionContraction", "reconstruction_contraction", "reconstruction_score"]

Reduction = Literal["mean", "sum"]
_REDUCTIONS = ("mean", "sum")


def reconstruction_contraction(
    reconstruction: Tensor,
    inputs: Tensor,
    projections: Projections = "exact",
    generator: torch.Generator | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """``||dr(x)/dx||_F^2`` of each sample: the contraction of the whole reconstruction ``r``.

    Args:
        reconstruction: ``r(x)`` (B, ...), a differentiable function of ``inputs``.
        inputs: ``x`` (B, ...), of the same shape, which requires a gradient.
        projections: ``"exact"``, or the number of random projections of an unbiased estimate.
        generator: where the projections are drawn from.
        reduction: ``"sum"`` as in the paper, whose error ``||x - r(x)||^2`` is a sum over
            coordinates too; ``"mean"`` divides by their number, to go with a mean squared error.

    Returns:
        (B,), with a graph.
    """
    norms = squared_jacobian(reconstruction, inputs, projections, generator)
    return norms if reduction == "sum" else norms / inputs[0].numel()


def reconstruction_score(reconstruction: Tensor, inputs: Tensor, sigma2: float) -> Tensor:
    """``(r(x) - x) / sigma^2``: the score ``d log p(x)/dx`` that a contractive ``r`` has learned.

    Args:
        reconstruction: ``r(x)`` (B, ...).
        inputs: ``x`` (B, ...).
        sigma2: ``sigma^2``, the strength with which ``r`` was trained; the score is right up to
            terms that vanish with it.

    Returns:
        (B, ...).
    """
    return (reconstruction - inputs) / sigma2


class ReconstructionContraction(GradientPenalty):
    """Completes a reconstruction error to a criterion whose optimum knows the data's density.

    Alain, Bengio (2012), What Regularized Auto-Encoders Learn from the Data Generating
    Distribution, arXiv:1211.4246.

    The criterion has two parts, ``E ||x - r(x)||^2 + sigma^2 E ||dr(x)/dx||_F^2``: your loss is
    the first, this technique adds the second. Its optimum is ``r(x) = x + sigma^2 d log p(x)/dx +
    o(sigma^2)``, so :func:`reconstruction_score` reads the score off a trained network. The
    contraction is on the whole reconstruction, not on the encoder alone. That score holds only if
    both parts are on one scale: ``reduction`` says how your loss sums over coordinates, and the
    first step checks that the loss is that error. The result on the score is from the abstract,
    the formula from memory of the paper; not checked against official code, of which none was
    found. The default 0.01 is ours.

    Args:
        strength: ``sigma^2``, in squared units of the inputs.
        reduction: ``"mean"`` for a loss that is a mean over coordinates (``F.mse_loss``),
            ``"sum"`` for one that sums over them and takes the mean over samples.
        projections: random directions per sample and step, or ``"exact"`` for the full Jacobian.
        check_loss: whether the first step compares your loss with the reconstruction error;
            ``False`` for a loss with further terms, or of a denoising autoencoder.
        layer: contract by this submodule's output instead of the inputs. It has to have the
            inputs' shape to be read as a score.
        signals: where ``inputs`` and ``logits`` (the reconstruction) are, if not in the usual
            places: the batch, and the output of ``forward``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``reduction`` or ``projections`` is none of these, or there is no such
            layer.
        RegularizationError: in the first step, if the loss is not the reconstruction error.
        UnsupportedError: in the first step, if inputs are integers or the network is compiled.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks, for one all-reduce of two
        numbers a step. Random projections are each rank's and micro-batch's own; with
        ``projections="exact"`` N ranks, or N micro-batches, equal the joint batch. BatchNorm in
        training mode mixes samples; the derivative is then that of the batch.

        Cost: per projection one backward pass through the network and a second one through that,
        and the activations of both; ``"exact"`` takes as many as there are coordinates. It hurts
        where ``sigma^2`` is large against the data's variance along the manifold: details blur.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ReconstructionContraction
        >>> trainer = L.Trainer(callbacks=[ReconstructionContraction(0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "What Regularized Auto-Encoders Learn from the Data Generating Distribution",
            "Alain and Bengio",
            2012,
            "1211.4246",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(reconstruction_contraction)
    explanation: ClassVar[str] = "adds the derivative of the reconstruction by the inputs"

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        reduction: Reduction = "mean",
        projections: Projections = 1,
        check_loss: bool = True,
        layer: str | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layer=layer, signals=signals, name=name)
        check_projections(self, projections)
        if reduction not in _REDUCTIONS:
            raise ArgumentError(
                self,
                f"`reduction` must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}",
                cure='ReconstructionContraction(reduction="mean")',
            )
        self.reduction = reduction
        self.projections = projections
        self.check_loss = check_loss
        self._loss_checked = False

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the loss anew in every fit."""
        super().validate(trainer, pl_module)
        self._loss_checked = not self.check_loss

    def values(self, outputs: Tensor, points: Tensor, generator: torch.Generator | None) -> Tensor:
        """The contraction of each sample."""
        return reconstruction_contraction(
            outputs, points, self.projections, generator, self.reduction
        )

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        if not self._loss_checked:
            self._check_loss(step)
            self._loss_checked = True
        return super().penalty(step)

    def _check_loss(self, step: Step) -> None:
        assert step.loss is not None
        inputs, reconstruction = step.inputs, step.logits
        if inputs.shape != reconstruction.shape:
            raise RegularizationError(
                self,
                f"needs a reconstruction of the inputs' shape, got {tuple(reconstruction.shape)} "
                f"for inputs {tuple(inputs.shape)}",
                cure='signals=Signals(inputs="batch.<key>", logits="module.<decoder>")',
            )
        error = (inputs - reconstruction).detach().square().flatten(1)
        per_sample = error.mean(1) if self.reduction == "mean" else error.sum(1)
        expected = float(per_sample.mean())
        given = float(step.loss.detach())
        half = step.loss.dtype in (torch.float16, torch.bfloat16)
        # Half-precision losses are rounded to three digits; a NaN says nothing.
        tolerance = (2e-2 if half else 2e-3) * max(abs(expected), 1e-6)
        if abs(given - expected) > tolerance:
            raise RegularizationError(
                self,
                f"completes the reconstruction error, which is {expected:.6g} with "
                f'reduction="{self.reduction}", but training_step returned {given:.6g}. Its scale '
                "decides what sigma^2 means; a loss with further terms need not be checked",
                cure=f"ReconstructionContraction(..., reduction="
                f'"{"sum" if self.reduction == "mean" else "mean"}") or (..., check_loss=False)',
            )
