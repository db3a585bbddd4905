"""The way into the loss for modules that optimize manually."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_reg.engine.regularizer import Regularizer

if TYPE_CHECKING:
    import lightning.pytorch as pl


class RegularizeMixin:
    """Gives a LightningModule ``self.regularize`` for manual optimization.

    Call it on each loss just before ``manual_backward``, with the tensors that the techniques of
    the Trainer need. A technique acts in the calls that hand it what it needs; one that no call
    serves is an error in the first step.

    Example:
        >>> import lightning as L
        >>> from lightning_reg.engine import RegularizeMixin
        >>> class Critic(RegularizeMixin, L.LightningModule):
        ...     def training_step(self, batch):
        ...         loss = self.critic_loss(batch)
        ...         self.manual_backward(self.regularize(loss, critic=self.critic, real=batch))
    """

    trainer: pl.Trainer

    def regularize(
        self,
        loss: Tensor,
        *,
        inputs: Any = None,
        logits: Tensor | None = None,
        targets: Any = None,
        features: Any = None,
        **signals: Any,
    ) -> Tensor:
        """``loss`` with everything that the Trainer's techniques do to it.

        Args:
            loss: a scalar loss of this step.
            inputs: what the network saw; default: the batch's inputs.
            logits: scores (B, C).
            targets: labels; default: the batch's targets.
            features: one tensor, or a dict from layer names to tensors.
            signals: whatever else techniques need by name (``critic``, ``real``, ``fake``).

        Returns:
            The loss to differentiate; ``loss`` itself if the Trainer has no technique.
        """
        given = {
            "inputs": inputs,
            "logits": logits,
            "targets": targets,
            "features": features,
            **signals,
        }
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Regularizer) and callback.pipeline is not None:
                return callback.pipeline.regularize(loss, given)
        return loss
