"""Softens each label with what the model says of its class when it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterUpdate, RegularizationError, Schedule, Signals
from lightning_reg.engine.criterion import flatten
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import Step
from lightning_reg.mechanisms.target_transform import Replaces, TargetTransform

__all__ = ["OnlineLabelSmoothing", "online_label_smoothing"]


def online_label_smoothing(distribution: Tensor, table: Tensor, share: float) -> Tensor:
    """``(1 - s) q + s sum_c q_c S_c``: each class's label with a share of its soft one.

    Args:
        distribution: (N, C) ``q``, one-hot or soft.
        table: (C, C) ``S``, a distribution per class in each row.
        share: ``s`` in [0, 1].

    Returns:
        (N, C), rows that sum to 1.
    """
    return (1 - share) * distribution + share * (distribution @ table.to(distribution))


def class_sums(logits: Tensor, distribution: Tensor, counts: Tensor | None = None) -> Tensor:
    """The sum of right predictions of each class, and their number, (C, C + 1).

    Args:
        logits: (N, C).
        distribution: (N, C) labels; the most likely class of each is what is right.
        counts: (N,) which rows count; by default all. Rows that are not finite never do.
    """
    p = logits.detach().softmax(-1)
    right = (p.argmax(-1) == distribution.argmax(-1)) & torch.isfinite(p).all(-1)
    if counts is not None:
        right = right & counts
    weight = torch.where(right.unsqueeze(-1), distribution, 0.0)
    p = torch.where(right.unsqueeze(-1), p, 0.0)
    return torch.cat([weight.T @ p, weight.sum(0).unsqueeze(-1)], 1)


class OnlineLabelSmoothing(TargetTransform):
    """Trains against labels that know which classes look alike (OLS).

    Zhang, Jiang, Hou, Wei, Han, Li, Cheng (2021), Delving Deep into Label Smoothing,
    arXiv:2011.12562.

    The targets are ``(1 - s) y + s S_y``: ``S_c`` is the mean of the predictions, in the last
    epoch, for samples of class ``c`` that were predicted right, so the mass that a label gives
    away goes to the classes that resemble it, where label smoothing gives all the same. A class of
    which none was right has the uniform ``S_c``.

    Confirmed against zhangchbin/OnlineLabelSmoothing (cifar/scripts/train_cifar_all_methods.py),
    where ``s = 0.5``. Predictions are those of the training passes, as they were made. In the
    first epoch there is no ``S``: the code leaves the soft part of the loss out and keeps half of
    the cross-entropy; here it is the whole one.

    The log shows the mean mass that ``S`` leaves on the label. Labels in the batch stay what they
    are.

    Args:
        strength: ``s`` in [0, 1]. While a Schedule is at 0 predictions are still summed.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy of logits and labels
            (checked in the first step), ``"term"`` if it has other terms, which are kept,
            ``"loss"`` to drop it.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1].
        RegularizationError: if the number of classes changes.

    Note:
        Over ranks: global; sums are those of all ranks, by one all-reduce of C x (C + 1) numbers
        a step; samples that a DistributedSampler repeats do not count, if an ``IndexedDataset``
        shows which those are. Under accumulation nothing changes. Cost: a softmax and two
        products of (N, C) with (C, C) or (N, C). The tables, of C x C numbers, are in checkpoints.

        It excludes :class:`LabelSmoothing`. It hurts where early predictions are right for few
        samples: ``S`` of a class is then that of its easiest ones. Many thousands of classes need
        too large a table.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import OnlineLabelSmoothing
        >>> trainer = L.Trainer(callbacks=[OnlineLabelSmoothing(0.5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Delving Deep into Label Smoothing", "Zhang et al.", 2021, "2011.12562"),
    )
    reads: ClassVar[frozenset[str]] = frozenset({"targets", "logits"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(online_label_smoothing)
    explanation: ClassVar[str] = "softens labels with the class's mean prediction of last epoch"

    def __init__(
        self,
        strength: float | Schedule = 0.5,
        *,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, 1, cure="OnlineLabelSmoothing(0.5)")
        self._table = self._sums = torch.empty(0)
        self._loaded = False

    def active(self, context: Step | ParameterUpdate) -> bool:
        """A constant strength of 0 turns it off; a Schedule that passes 0 does not."""
        return isinstance(self.strength, Schedule) or context.strength(self) != 0

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that starts from step 0 forgets."""
        if int(trainer.global_step) == 0 and not self._loaded:
            self._table = self._sums = torch.empty(0)
        self._loaded = False

    def new_targets(self, distribution: Tensor, strength: float, step: Step) -> Tensor:
        """Labels softened by the last epoch; what this batch says counts for the next."""
        classes = distribution.shape[-1]
        for kept in (self._table, self._sums):
            if len(kept) not in (0, classes):
                raise RegularizationError(
                    self,
                    f"has a soft label for each of {len(kept)} classes, and this batch has "
                    f"{classes}",
                    cure="trainer.fit(module, ckpt_path=None)",
                )
        if not step.is_rerun:
            self._add(step, distribution)
        if len(self._table) == 0:
            return distribution
        table = self._table = self._table.to(distribution.device)
        if not step.is_rerun:
            step.log(self, (distribution @ table.to(distribution) * distribution).sum(-1).mean())
        return online_label_smoothing(distribution, table, strength)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Soft labels for the next epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if len(self._sums) == 0:
            return
        counts = self._sums[:, -1:]
        mean = self._sums[:, :-1] / counts.clamp_min(1e-12)
        self._table = torch.where(counts > 0, mean, 1 / len(counts))
        self._sums = torch.zeros_like(self._sums)

    def state_dict(self) -> dict[str, Any]:
        """Soft labels, and the sums of this epoch."""
        return {"table": self._table.clone(), "sums": self._sums.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._table, self._sums = state_dict["table"].clone(), state_dict["sums"].clone()
        self._loaded = True

    def _add(self, step: Step, distribution: Tensor) -> None:
        logits, _ = flatten(step.logits, torch.as_tensor(step.targets))
        padding = step.padding
        counts = ~padding if padding is not None and len(padding) == len(logits) else None
        found = step.comm.reduce(class_sums(logits, distribution, counts))
        self._sums = found if len(self._sums) == 0 else self._sums.to(found) + found
