"""Makes a model sure of its predictions on the data that it is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Step
from lightning_reg.mechanisms.adaptation import TestTimeAdaptation
from lightning_reg.mechanisms.output_penalty import softmax_entropy

__all__ = ["Tent", "tent"]


def tent(logits: Tensor) -> Tensor:
    """``H(p) = -sum_c p_c log p_c`` of each sample, the loss that Tent minimizes.

    Args:
        logits: (B, C).

    Returns:
        (B,), in nats, in [0, log C].
    """
    return softmax_entropy(logits)


class Tent(TestTimeAdaptation):
    """Adapts normalization layers to the test data by minimizing the entropy of predictions.

    Wang, Shelhamer, Liu, Olshausen, Darrell (2021), Tent: Fully Test-Time Adaptation by Entropy
    Minimization, arXiv:2006.10726.

    During ``trainer.test`` every batch is predicted with BatchNorm normalizing by the batch's own
    statistics, then scale and shift of all normalization layers take one optimizer step on the
    mean entropy ``H(p) = -sum_c p_c log p_c`` (nats) of the batch. No label is used. The
    predictions are those from before the update, as in the official code, so the first batch
    is predicted with the trained weights.

    Confirmed against DequanWang/tent@e9e926a, tent.py. That code adapts BatchNorm2d only; here
    every layer whose class is called a norm takes part (BatchNorm, LayerNorm, GroupNorm,
    InstanceNorm, RMSNorm). It also puts the whole network in training mode; here everything
    but BatchNorm stays in evaluation mode, so dropout is off. The default optimizer, SGD with
    learning rate 0.00025 and momentum 0.9, is the one of mr-eggplant/EATA@f739b36 for Tent on
    ImageNet at batches of 64; the official configuration for CIFAR-10-C is
    ``optimizer=lambda p: torch.optim.Adam(p, 1e-3)``.

    Args:
        strength: the multiplier of the entropy; 0 turns the technique off.
        lr: the learning rate of SGD with momentum 0.9, unless ``optimizer`` is given.
        optimizer: makes an optimizer of the parameters that are adapted.
        steps: updates a batch, each with a forward of its own.
        episodic: start every batch from the trained weights.
        keep: leave the adapted weights in the module after the run; running statistics are those
            of training again.
        stages: of ``"test"``, ``"validate"`` and ``"predict"``, those in which to adapt.
        signals: where ``logits`` (B, C) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` or ``lr`` is negative, ``steps`` below 1, a stage unknown.
        UnsupportedError: before the first batch, if the module has no normalization layer.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks in one all-reduce of the
        adapted parameters' gradients. BatchNorm takes the statistics of each rank's own batch,
        as in training, unless it is a SyncBatchNorm. Cost: one backward a batch, through all
        layers down to the first norm, and the memory of a training step.

        Logged are the entropy before the update (``reg/tent``) and the share of samples that
        count. It hurts on small batches, whose statistics are noise; where the classes of a batch
        are few, since statistics then tell classes apart; and in long runs, which can end with
        one class for everything: see :class:`EATA`, or ``episodic=True``. A BatchNorm1d on
        vectors cannot normalize a batch of one sample: use ``drop_last=True``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import Tent
        >>> trainer = L.Trainer(callbacks=[Tent(lr=0.001)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Tent: Fully Test-Time Adaptation by Entropy Minimization",
            "Wang et al.",
            2021,
            "2006.10726",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(tent)
    explanation: ClassVar[str] = "adapts normalization layers while the model is tested"

    def sample_losses(self, step: Step) -> tuple[Tensor, Tensor]:
        """The entropy of each sample; all count."""
        losses = tent(step.logits)
        return losses, torch.ones_like(losses, dtype=torch.bool)
