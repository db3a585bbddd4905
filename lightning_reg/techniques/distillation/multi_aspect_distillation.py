"""Distills a language model's answers to yes-or-no questions about each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Communicator, Paper, Technique
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

__all__ = ["MultiAspectDistillationMixin", "aspect_targets", "multi_aspect_distillation"]

_NAME = "MultiAspectDistillationMixin"


def multi_aspect_distillation(logits: Tensor, aspects: Tensor) -> Tensor:
    """``-q log sigmoid(z) - (1 - q) log(1 - sigmoid(z))``, of each sample and aspect.

    Args:
        logits: (B, K) ``z``, the student's answer to each question.
        aspects: (B, K) ``q`` in [0, 1], the teacher's; NaN where there is no answer. No gradient
            flows.

    Returns:
        (B, K) in nats; 0 where there is no answer. The gradient is ``sigmoid(z) - q``.
    """
    known = ~aspects.isnan()
    held = torch.where(known, aspects.detach(), 0.0).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, held, reduction="none")
    return torch.where(known, losses, 0.0)


def aspect_targets(yes: Tensor, no: Tensor) -> Tensor:
    """``exp(yes) / (exp(yes) + exp(no))``: what a language model's two logits say.

    Args:
        yes: (...) the logit of the token for yes.
        no: (...) that for no.
    """
    return torch.sigmoid(yes - no)


class MultiAspectDistillationMixin(Technique, _Base):
    """Teaches the answers of a language model about aspects of each sample, by further outputs.

    Lee, Cho, Kang, Cha, Kim (2025), Multi-aspect Knowledge Distillation with Large Language Model,
    arXiv:2501.13341.

    A multimodal language model is asked ``K`` questions about each training sample (does it have
    stripes, does it live in water), and its logits of yes and no become soft answers ``q``
    (:func:`aspect_targets`). The classifier gets ``K`` more outputs ``z``, and the loss ``alpha``
    times the mean over samples and aspects of the binary cross-entropy of ``q``. Features have to
    carry what the questions are about, and not just the classes.

    Confirmed with the official code (taegyeong-lee/MaKD-Multi-aspect-knowledge-distillation-with-
    Large-Language-Model, mdistiller/distillers/MaKD.py and configs/fine_grained/makd.yaml): the
    mean over all numbers, ``alpha`` 4, 50 aspects. There one linear layer gives ``C + K`` outputs,
    of which the first ``C`` are the classes; here the further rows are a layer of their own, the
    same function and gradient, so that ``forward``, your loss, your metrics and what is deployed
    have the ``C`` classes only.

    Args (of :meth:`add_aspect_head`, called at the end of ``__init__``):
        in_features: the width of the features that the classifier takes.
        num_aspects: ``K``, the number of questions.
        strength: ``alpha``, at least 0; 0 turns it off.

    Raises:
        ArgumentError: if an argument is outside its range, or the aspects do not fit.

    Note:
        Answers travel in the batch, as the dataset's own field. A sample or question without an
        answer is NaN and does not count. Over ranks: global; a mean over all answers of all ranks,
        by one all-reduce of two numbers a step. Under accumulation each micro-batch takes its own
        mean. Cost: a linear layer. Logged is the mean, ``reg/multi_aspect_distillation``.

        Inputs that are mixed have no answers of their own: pass the mixture of both, or leave
        mixing out. It hurts with questions whose answers do not depend on what is to be learnt.

    Example:
        >>> import torch, lightning as L
        >>> from lightning_reg import MultiAspectDistillationMixin
        >>> class Classifier(MultiAspectDistillationMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        ...         self.add_aspect_head(in_features=16, num_aspects=50)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y, aspects = batch
        ...         h = self.backbone(x)
        ...         loss = torch.nn.functional.cross_entropy(self.head(h), y)
        ...         return self.distill_aspects(loss, features=h, aspects=aspects)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Multi-aspect Knowledge Distillation with Large Language Model",
            "Lee et al.",
            2025,
            "2501.13341",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = True
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch takes the mean over the answers that it has"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(multi_aspect_distillation)

    aspect_head: nn.Linear

    def add_aspect_head(self, in_features: int, num_aspects: int, *, strength: float = 4.0) -> None:
        """Make the further outputs; see the class."""
        cure = "self.add_aspect_head(in_features=64, num_aspects=50, strength=4.0)"
        check_range(_NAME, "strength", strength, 0, math.inf, high_open=True, cure=cure)
        for argument, value in (("in_features", in_features), ("num_aspects", num_aspects)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(
                    _NAME, f"`{argument}` must be a whole number from 1, got {value!r}", cure=cure
                )
        self.aspect_head = nn.Linear(in_features, num_aspects)
        # Outputs that take no part would be unused parameters to DDP.
        self.aspect_head.requires_grad_(strength != 0)
        self._aspect_strength = strength

    def distill_aspects(self, loss: Tensor, features: Tensor, aspects: Tensor) -> Tensor:
        """The loss of the classes with that of the aspects of this batch.

        Args:
            loss: the loss of the classes, a scalar.
            features: (B, in_features), what the classifier takes.
            aspects: (B, K) answers in [0, 1]; NaN where there is none.

        Returns:
            The loss to return from ``training_step``, or to ``manual_backward``.
        """
        strength = self.__dict__.get("_aspect_strength")
        if strength is None:
            raise ArgumentError(
                _NAME,
                "`distill_aspects` was called on a module without outputs for aspects",
                cure="self.add_aspect_head(in_features=64, num_aspects=50)",
            )
        if strength == 0:
            return loss
        logits = self.aspect_head(features)
        if not isinstance(aspects, Tensor) or aspects.shape != logits.shape:
            shape = tuple(aspects.shape) if isinstance(aspects, Tensor) else type(aspects).__name__
            raise ArgumentError(
                _NAME,
                f"`aspects` must be answers of shape {tuple(logits.shape)}, got {shape}",
                cure="self.add_aspect_head(in_features=64, num_aspects=<answers per sample>)",
            )
        trainer = self.__dict__.get("_trainer")
        comm = Communicator() if trainer is None else Communicator.of(trainer)
        with torch.autocast(features.device.type, enabled=False):
            losses = multi_aspect_distillation(full_precision(logits), aspects)
            value = comm.mean(losses.flatten(), (~aspects.isnan()).flatten())
        if self.training and trainer is not None and trainer._logger_connector.should_update_logs:
            self.log("reg/multi_aspect_distillation", value.detach())
        total: Tensor = loss + strength * value
        return total
