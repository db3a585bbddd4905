"""Keeps predictions near those of some epochs ago, so that the loss does not drop suddenly."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.divergence import tempered_divergence
from lightning_reg.mechanisms.past_epochs import PastEpochs


def trajectory_loss(logits: Tensor, past: Tensor, temperature: float = 5.0) -> Tensor:
    r"""How far each sample's prediction has moved since then.

    .. math:: T^2\, \mathrm{KL}\bigl(\mathrm{softmax}(y^{past} / T) \,\Vert\,
        \mathrm{softmax}(y / T)\bigr)

    Args:
        logits: (B, C) :math:`y`; gradients flow through them alone.
        past: (B, C) :math:`y^{past}`, the logits of the same samples.
        temperature: :math:`T`, above 0.

    Returns:
        (B,) in nats, at least 0; 0 with no gradient where both are equal.
    """
    return tempered_divergence(logits, past, temperature)


class SAF(PastEpochs):
    r"""Sharpness-aware training for free, SAF (Du, Zhou, Feng, Tan, Zhou 2022).

    A sharp minimum is where the loss falls suddenly along the way of the weights. SAF adds

    .. math:: \frac{\lambda}{|B|} \sum_i T^2\, \mathrm{KL}\bigl(\mathrm{softmax}(y_i^{(t - E)} / T)
        \,\Vert\, \mathrm{softmax}(y_i^{(t)} / T)\bigr)

    to the loss: the divergence of each sample's prediction from the one of :math:`E` epochs ago,
    which was kept when it was made. There is no second pass.

    Confirmed with the official code (AngusDujw/SAF, ``SAF_train.py``), from which the factor
    :math:`T^2` is, which the paper's formula lacks (from memory). There ``start`` is 5, from
    which on *later* epochs have the term: 6 here, counted from 0. ``strength`` 0.3, ``T`` 5 and
    ``lag`` 3 (2 in its ImageNet run) are those of its README. A sample without a past (left out of
    that epoch) has no term; there it would be compared with an older one, or with the uniform
    prediction. The logged value is the mean divergence, in nats.

    Args:
        strength: :math:`\lambda`, at least 0. While a Schedule is at 0 logits are still kept.
        temperature: :math:`T`, above 0.
        lag: :math:`E`, in epochs.
        start: the first epoch (from 0) that has the term.
        num_classes: the number of classes; ``None`` takes it from the first logits.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        signals: where ``logits`` (and ``sample_index``) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        MissingSignalError: in the first step, if the dataset is no ``IndexedDataset``.
        RegularizationError: in the first step, if logits are not (B, C).

    Note:
        Needs ``IndexedDataset(train_dataset)``; the training step does not notice. Over ranks:
        global; logits are gathered in each step, so that every rank holds the tables that one
        process would have, although the sampler moves samples. A sample that a DistributedSampler
        repeats is not written twice. Under accumulation nothing changes. Cost: two softmaxes over
        the logits, a gather of B x C numbers, and ``lag + 1`` tables of samples x classes float32
        numbers on every device, in checkpoints too: 20 GB for ImageNet, where :class:`MESA` holds
        a copy of the weights instead. The past is a prediction in train mode, of that epoch's
        augmented view, and of mixed samples where samples are mixed.

        It hurts in short runs, in which a large ``strength`` holds training back, and where
        labels are noisy, since what was believed once is kept.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SAF
        >>> trainer = L.Trainer(callbacks=[SAF(0.3, lag=3, start=6)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Sharpness-Aware Training for Free", "Du et al.", 2022, "2205.14083"),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "sample_index")
    reads: ClassVar[frozenset[str]] = frozenset({"logits"})
    function = staticmethod(trajectory_loss)
    explanation: ClassVar[str] = "keeps predictions near those of some epochs ago, per sample"

    def __init__(
        self,
        strength: float | Schedule = 0.3,
        *,
        temperature: float = 5.0,
        lag: int = 3,
        start: int = 6,
        num_classes: int | None = None,
        num_samples: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            lag=lag,
            num_samples=num_samples,
            width=num_classes,
            signals=signals,
            name=name,
        )
        cure = "SAF(0.3, temperature=5.0)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(
            self, "temperature", temperature, 0, math.inf, low_open=True, high_open=True, cure=cure
        )
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise ArgumentError(
                self,
                f"`start` must be a whole number from 0, got {start!r}",
                cure="SAF(0.3, start=6)",
            )
        self.temperature = temperature
        self.start = start

    def penalty(self, step: Step) -> JointMean | None:
        """Phase 4: compare with the past, and keep the present."""
        logits = step.logits
        if logits.ndim != 2:
            raise RegularizationError(
                self,
                f"keeps one prediction per sample and needs logits (B, C), got "
                f"{tuple(logits.shape)}",
                cure='signals=Signals(logits="module.<name>")',
            )
        past, known = self.recall_past(step, logits.shape[1])
        self.remember(step, logits.detach())
        if step.epoch < self.start:
            return None
        # Where nothing is known the prediction stands for its own past: a divergence of 0.
        past = past.to(logits).where(known[:, None], logits.detach())
        return JointMean.of(trajectory_loss(logits, past, self.temperature))


__all__ = ["SAF", "trajectory_loss"]
