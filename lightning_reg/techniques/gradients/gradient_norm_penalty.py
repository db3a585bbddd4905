"""Penalizes the norm of the loss's gradient by the weights, as noise in SGD does implicitly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import Paper, RegularizationError, Regularizer, Schedule, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.gradient_penalty import check_not_compiled, twice_differentiable

__all__ = ["GradientNormPenalty", "gradient_norm_penalty"]


def gradient_norm_penalty(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``||dL/dw||^2`` over all weights together, with a graph: its gradient is ``2 H g``.

    Args:
        loss: ``L``, a scalar.
        weights: ``w``; those that the loss does not reach count 0.

    Returns:
        A scalar, in the squared unit of the loss per squared unit of a weight.
    """
    found = torch.autograd.grad(loss, list(weights), create_graph=True, allow_unused=True)
    norms = torch._foreach_norm(
        [g.float() if g.dtype.itemsize == 2 else g for g in _present(found)]
    )
    return torch.stack(norms).square().sum()


class GradientNormPenalty(Regularizer):
    """Penalizes the gradient norm explicitly, in place of the noise of small batches.

    Geiping, Goldblum, Pope, Moeller, Goldstein (2021), Stochastic Training is Not Necessary for
    Generalization, arXiv:2109.14119. The term is that of Smith, Dherin, Barrett, De (2021), On the
    Origin of Implicit Regularization in Stochastic Gradient Descent, arXiv:2101.12176.

    The loss of a micro-batch ``b`` becomes ``L_b + s (eta / 4) ||dL_b/dw||^2`` with the learning
    rate ``eta`` of the moment: to first order this is what SGD with these batches minimizes on
    average, so that training with large batches gets the same implicit regularizer back when
    the penalty is taken on *small* blocks. Hence it is the gradient of each rank's micro-batch
    that counts; the norm of the averaged gradient is smaller and another regularizer. Split a
    large batch into micro-batches with ``accumulate_grad_batches`` to set the block size.

    The term is the paper's. JonasGeiping/fullbatchtraining (``fullbatch/models/modules.py``,
    ``GradRegularizer``) adds ``(eta / 4) s H g`` in its finite differences and double backward,
    half the gradient ``s (eta / 2) H g`` of that term, and all of it in its mode "autograd-pen"
    without earlier gradients: its ``block_strength`` 0.5 is our 0.25 in the first, 0.5 in the
    last. The default is the paper's formula. Here the second derivative is exact; see
    FiniteDifferenceGradientRegularizer for one that costs less.

    Args:
        strength: ``s``, at least 0.
        with_learning_rate: multiply by ``eta / 4``, the first optimizer's first learning rate;
            ``False`` leaves ``s ||dL/dw||^2``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0.
        RegularizationError: in the first step, if the loss does not depend on the weights.
        UnsupportedError: in the first step, if the network is compiled; where weights are sharded
            over ranks; under manual optimization without ``self.regularize``.

    Note:
        The log shows the penalty with its factor ``eta / 4``. It is the gradient of your own loss,
        before other techniques replace or add to it. Ranks: local, by definition of the method;
        each rank's penalty is of its own micro-batch, and DDP averages their gradients.
        Cost: a backward pass that keeps its graph, and one through both passes: about twice the
        time of a step, and the memory of both. Attention runs without fused kernels.

        It slows training down where gradients are large: begin after the warm-up.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import GradientNormPenalty
        >>> trainer = L.Trainer(callbacks=[GradientNormPenalty(0.5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Stochastic Training is Not Necessary for Generalization",
            "Geiping et al.",
            2021,
            "2109.14119",
        ),
        Paper(
            "On the Origin of Implicit Regularization in Stochastic Gradient Descent",
            "Smith et al.",
            2021,
            "2101.12176",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    sharded: ClassVar[bool | None] = False
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "the gradient whose norm is penalized is that of a micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(gradient_norm_penalty)
    explanation: ClassVar[str] = "adds the squared norm of each micro-batch's gradient to its loss"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        with_learning_rate: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="GradientNormPenalty(1.0)")
        self.with_learning_rate = with_learning_rate
        self._recurrent = False
        self._checked = False

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for layers whose fast kernels have no second derivative."""
        self._checked = False
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in pl_module.modules())

    def forward_context(self, step: Step) -> AbstractContextManager[Any]:
        """Phase 2."""
        return twice_differentiable(self._recurrent)

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        assert step.loss is not None
        weights = step.trainable_parameters()
        self._check(step.loss)
        value = _scaled_penalty(step, step.loss, weights)
        if not self.with_learning_rate:
            return value
        rate: float = step.trainer.optimizers[0].param_groups[0]["lr"]
        return value * (rate / 4)

    def _check(self, loss: Tensor) -> None:
        if self._checked:
            return
        self._checked = True
        if not loss.requires_grad:
            raise RegularizationError(
                self,
                "differentiates the loss by the weights, and it carries no gradient",
                cure="return the loss itself from training_step, not loss.detach()",
            )
        check_not_compiled(self, loss)


def _scaled_penalty(step: Step, loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Under fp16 the gradient goes through the scale, so that none underflows."""
    scaler = getattr(step.trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return gradient_norm_penalty(loss, weights)
    scale = scaler.scale(torch.ones((), device=loss.device))
    found = torch.autograd.grad(loss * scale, list(weights), create_graph=True, allow_unused=True)
    return _squared_norm([g / scale for g in _present(found)])


def _squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    norms = torch._foreach_norm([full_precision(g) for g in gradients])
    return torch.stack(norms).square().sum()


def _present(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in gradients if g is not None]
