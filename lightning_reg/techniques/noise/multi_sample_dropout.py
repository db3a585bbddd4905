"""Trains the head of a network under several dropout masks at once, and averages their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Technique
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

__all__ = ["MultiSampleDropoutMixin", "multi_sample_dropout"]


def multi_sample_dropout(
    features: Tensor, samples: int = 8, p: float = 0.5, training: bool = True
) -> Tensor:
    """``M`` copies of ``features``, each under a dropout mask of its own.

    Args:
        features: (B, ...).
        samples: ``M``; 1 is dropout, bit for bit.
        p: the probability that a number is dropped; the rest is divided by ``1 - p``.
        training: otherwise ``features`` come back as they are.

    Returns:
        (M B, ...): all samples under the first mask, then under the second, and so on. Draws
        come from torch's global generator, as those of ``nn.Dropout``.
    """
    if not training:
        return features
    return F.dropout(features.repeat(samples, *[1] * (features.ndim - 1)), p)


class MultiSampleDropoutMixin(Technique, _Base):
    """Averages the loss over several dropout masks in front of one head (multi-sample dropout).

    Inoue (2019), Multi-Sample Dropout for Accelerated Training and Better Generalization,
    arXiv:1905.09788.

    ``L = (1/M) sum_m loss(head(dropout_m(h)), y)``: the backbone's features ``h`` are computed
    once, the dropout and what follows it ``M`` times with shared weights, in one pass over a
    batch of ``M B``. Losses are averaged, not logits: the average of losses is the larger one
    where the loss is convex. At inference nothing is dropped and the head runs once.

    The formula is that of the paper's abstract; no official code was found. ``samples`` 8 is a
    typical value of the paper (2 to 64), ``p`` 0.5 the usual one of dropout.

    Subclass it together with a LightningModule whose ``training_step`` has features, a head
    without dropout of its own, and a loss that is a mean over samples.

    Args (of :meth:`set_multi_sample_dropout`, called in ``__init__``; without it the defaults):
        samples: ``M``, from 1.
        p: the probability that a feature is dropped, in [0, 1).

    Raises:
        ArgumentError: if ``samples`` or ``p`` is outside its range.

    Note:
        Over ranks and micro-batches: each draws masks of its own, as dropout does; an average
        of means needs no communication. Cost: the head's forward and backward on ``M`` times the
        batch, and its activations; the backbone's cost does not change. BatchNorm in the head
        sees the joint batch of ``M B``.

        It hurts where the head is most of the network, and gains little with small ``p``.

    Example:
        >>> import torch, lightning as L
        >>> from lightning_reg import MultiSampleDropoutMixin
        >>> class Net(MultiSampleDropoutMixin, L.LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         h = self.backbone(batch[0])
        ...         loss, logits = self.multi_sample_loss(self.head, h, batch[1])
        ...         return loss
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Multi-Sample Dropout for Accelerated Training and Better Generalization",
            "Inoue",
            2019,
            "1905.09788",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch draws its own masks, as dropout does",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(multi_sample_dropout)

    dropout_samples: int = 8
    dropout_p: float = 0.5

    def set_multi_sample_dropout(self, samples: int = 8, p: float = 0.5) -> None:
        """Choose the number of masks and the probability; see the class."""
        cure = "self.set_multi_sample_dropout(samples=8, p=0.5)"
        owner = "MultiSampleDropoutMixin"
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ArgumentError(
                owner, f"`samples` must be a whole number from 1, got {samples!r}", cure=cure
            )
        check_range(owner, "p", p, 0, 1, high_open=True, cure=cure)
        self.dropout_samples, self.dropout_p = samples, p

    def multi_sample_loss(
        self,
        head: Callable[[Tensor], Tensor],
        features: Tensor,
        targets: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> tuple[Tensor, Tensor]:
        """The loss averaged over masks, and the logits averaged over masks.

        Args:
            head: from features (B, ...) to logits (B, ...).
            features: (B, ...), before any dropout.
            targets: (B, ...) as ``loss`` takes them.
            loss: a mean over samples.

        Returns:
            A scalar, and logits (B, ...) for metrics; in eval mode those of one plain pass.
        """
        samples = self.dropout_samples if self.training else 1
        hidden = multi_sample_dropout(features, samples, self.dropout_p, self.training)
        logits = head(hidden)
        repeated = targets.repeat(samples, *[1] * (targets.ndim - 1))
        value = loss(logits, repeated)
        return value, logits.unflatten(0, (samples, len(features))).mean(0)
