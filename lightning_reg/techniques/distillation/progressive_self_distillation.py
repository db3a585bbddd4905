"""Softens labels with what the model itself said an epoch ago, more so as training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    RegularizationError,
    Schedule,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.loss_replacement import Replaces, check_replaces
from lightning_reg.mechanisms.sample_memory import SampleMemoryRegularizer, SampleTable
from lightning_reg.mechanisms.teacher import Teacher

__all__ = ["ProgressiveSelfDistillation", "progressive_self_distillation"]

Memory = Literal["predictions", "model"]
_MEMORIES = ("predictions", "model")
_UNSEEN = -1.0


def progressive_self_distillation(targets: Tensor, past: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) y + alpha P_past``: labels softened by past predictions.

    Args:
        targets: (B, C) ``y``, one-hot or soft.
        past: (B, C) probabilities of the same samples from before; no gradient flows.
        alpha: ``alpha_t`` in [0, 1]; at 1 labels are ignored.

    Returns:
        (B, C) distributions.
    """
    return torch.lerp(targets, past.detach().to(targets), alpha)


class ProgressiveSelfDistillation(Teacher, SampleMemoryRegularizer):
    """Softens labels with the model's own past predictions, progressively (PS-KD).

    Kim, Ji, Yoon, Hwang (2020), Self-Knowledge Distillation with Progressive Refinement of
    Targets, arXiv:2006.12000.

    In epoch ``t`` of ``T`` the cross-entropy takes the targets ``(1 - alpha_t) y + alpha_t
    P_{t-1}(x)`` with ``alpha_t = alpha_T t / T``, and its gradient is ``p`` minus these targets:
    samples that the past self found hard weigh more than easy ones.

    Confirmed with the official code (lgcnsai/PS-KD-Pytorch, main.py and loss/pskd_loss.py):
    ``alpha_t`` moves by epochs, ``t`` counting from 1; ``alpha_T`` 0.8 is its default; in
    the first epoch, which has no past, targets stay the labels. The past is what the official
    code stores, ``memory="predictions"``: the softmax of each sample's logits when it was last
    trained on, in train mode and on that epoch's augmented view. ``memory="model"`` is the
    paper's ``P_{t-1}(x)`` as written: a copy of the model from the end of the last epoch, in
    eval mode, on this epoch's view.

    The logged value is the mean past probability of the labelled class.

    Args:
        strength: ``alpha_T`` in [0, 1]. A Schedule is multiplied by ``t / T`` as well.
        memory: ``"predictions"`` (needs an ``IndexedDataset``) or ``"model"`` (needs ``forward``
            to return the logits).
        epochs: ``T``; ``None`` takes ``max_epochs`` of the Trainer.
        num_classes: the number of classes; ``None`` takes it from the first logits.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        replaces: what of the user's loss goes: ``"cross_entropy"`` (checked to be it),
            ``"term"`` or ``"loss"``.
        signals: where ``logits`` and ``targets`` (``sample_index``, ``inputs``) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or ``epochs`` cannot be known.
        MissingSignalError: in the first step, if the dataset is no ``IndexedDataset``.
        UnsupportedError: if predictions are kept and another technique mixes samples.

    Note:
        Over ranks: global. ``"predictions"`` costs a gather of B x C numbers each step and a
        table of samples x classes float32 numbers on every device, in checkpoints too; every rank
        holds what one process would. ``"model"`` costs a forward pass without gradients each
        step and a second copy of the weights, in checkpoints too. Under accumulation nothing
        changes.

        It hurts where early predictions are wrong in a systematic way, which targets then keep,
        and in runs of few epochs, in which most of the past is that of a bad model. Labels that
        are smoothed as well are softened twice.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ProgressiveSelfDistillation
        >>> trainer = L.Trainer(callbacks=[ProgressiveSelfDistillation(0.8)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Self-Knowledge Distillation with Progressive Refinement of Targets",
            "Kim et al.",
            2020,
            "2006.12000",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = True
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets", "sample_index")
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "targets"})
    writes: ClassVar[frozenset[str]] = frozenset({"targets"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(progressive_self_distillation)
    explanation: ClassVar[str] = "softens labels with the model's predictions of the last epoch"

    def __init__(
        self,
        strength: float | Schedule = 0.8,
        *,
        memory: Memory = "predictions",
        epochs: int | None = None,
        num_classes: int | None = None,
        num_samples: int | None = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        if memory not in _MEMORIES:
            raise ArgumentError(
                self,
                f"`memory` must be one of {', '.join(_MEMORIES)}, got {memory!r}",
                cure='ProgressiveSelfDistillation(memory="predictions")',
            )
        source: Literal["past"] | None = "past" if memory == "model" else None
        super().__init__(strength, source=source, signals=signals, name=name)
        cure = "ProgressiveSelfDistillation(strength=0.8, epochs=300)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, 1, cure=cure)
        if epochs is not None:
            check_range(self, "epochs", epochs, 1, cure=cure)
        check_replaces(self, replaces)
        self.epochs = epochs
        self.replaces = replaces
        self.memory = SampleTable(self, num_samples, num_classes, fill=_UNSEEN)
        if memory == "model":
            self.needs = ("inputs", "logits", "targets")  # type: ignore[misc]

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The number of epochs has to be known."""
        super().validate(trainer, pl_module)
        if self.epochs is None and (trainer.max_epochs is None or trainer.max_epochs < 1):
            raise ArgumentError(
                self,
                "softens labels by the share of epochs that is done, and the Trainer has no "
                f"`max_epochs` (it is {trainer.max_epochs})",
                cure="ProgressiveSelfDistillation(epochs=300)",
            )

    def transform_targets(self, step: Step, distribution: Tensor) -> Tensor:
        """Phase 3."""
        past = self._past(step, distribution)
        if not step.is_rerun:
            step.log(self, (past * distribution).sum(-1).mean())
        return progressive_self_distillation(distribution, past, self.alpha(step))

    def alpha(self, step: Step) -> float:
        """``alpha_t`` of this epoch."""
        epochs = self.epochs or step.trainer.max_epochs
        assert epochs is not None
        return step.strength(self) * min(1.0, (step.epoch + 1) / epochs)

    def _past(self, step: Step, distribution: Tensor) -> Tensor:
        """Past predictions; the labels themselves where there is no past."""
        if self.source is None:
            return self._past_predictions(step, distribution)
        if self.teacher is None:
            return distribution
        past = self.predict(step).softmax(-1)
        self._check_rows(past, distribution)
        return past

    def _past_predictions(self, step: Step, distribution: Tensor) -> Tensor:
        if step.is_mixed:
            raise UnsupportedError(
                self,
                "keeps predictions by sample, and the samples of this batch are mixed",
                cure='ProgressiveSelfDistillation(memory="model")',
            )
        logits = step.logits
        self._check_rows(logits, distribution)
        past = self.recall(step, logits.shape[1]).to(distribution)
        self.remember(step, logits.detach().softmax(-1))
        return torch.where(past == _UNSEEN, distribution, past)

    def _check_rows(self, past: Tensor, distribution: Tensor) -> None:
        if past.shape != distribution.shape:
            raise RegularizationError(
                self,
                f"softens one label per sample: logits are {tuple(past.shape)} and the loss has "
                f"{len(distribution)} terms of {distribution.shape[-1]} classes",
                cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
            )
