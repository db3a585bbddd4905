"""Turns down positive pairs whose loss was always far too low, or far too high."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.embedding_loss import DEFAULT_VIEWS, TwoViews
from lightning_reg.mechanisms.info_nce import nt_xent
from lightning_reg.mechanisms.sample_memory import SampleMemoryRegularizer

__all__ = ["DynamicBadPairMining", "bad_pair_weights"]


def bad_pair_weights(
    losses: Tensor,
    history: Tensor,
    mean: Tensor,
    deviation: Tensor,
    noisy: float = 2.0,
    faulty: float = 3.0,
) -> Tensor:
    """``e^{-(L_i - mu)^2 / (2 sd^2)}`` for bad pairs, 1 for the others.

    A pair is bad whose mean loss ``m_i`` of past epochs lies below ``mu - b_np sd`` (noisy: the
    views agree in nothing but noise, which is easy) or above ``mu + b_fp sd`` (faulty: the views
    have nothing in common, which is hard).

    Args:
        losses: ``L``, (B,), of the pairs now; taken as constants.
        history: ``m``, (B,); NaN for a pair without a past, which is not bad.
        mean: ``mu``, of the means of all pairs.
        deviation: ``sd``, their standard deviation.
        noisy: ``b_np``.
        faulty: ``b_fp``.

    Returns:
        (B,), in [0, 1].
    """
    bad = (history < mean - noisy * deviation) | (history > mean + faulty * deviation)
    # Without any spread no pair is bad, and nothing is divided by 0.
    spread = deviation.where(deviation > 0, torch.ones_like(deviation))
    score = (losses.detach() - mean) / spread
    return torch.where(bad, (-0.5 * score.square()).exp(), torch.ones_like(score))


class DynamicBadPairMining(TwoViews, SampleMemoryRegularizer):
    """Contrastive loss that turns down pairs which are too easy or too hard for a reason.

    Lan, Yan, Hong, Feng (2023), Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad
    Pair Mining Approach (ICLR 2024).

    Pairs of views that share only noise are aligned at once, pairs whose augmentation destroyed
    what they had in common never; both teach nothing. A memory keeps the mean loss ``m_i`` of
    each pair over all past epochs. From epoch ``start`` on, once an epoch, mean and standard
    deviation of the ``m`` of all pairs are taken, and a pair outside ``[mu - b_np sd, mu + b_fp
    sd]`` counts with the weight ``e^{-(L_i - mu)^2 / (2 sd^2)}``; see :func:`bad_pair_weights`.

    The loss of a pair is NT-Xent of both directions, or one of your own (``losses``).

    NT-Xent, with ``t = 0.2``, and the rule are those of lanxiang1017/DynamicBadPairMining_ICLR24@
    e9355a0 (``models/``); the thresholds 2 and 3 and 50 epochs of warm-up (of 80) are those of its
    run. It differs twice. Its weight is the density itself, ``1 / (sd sqrt(2 pi))`` at the peak,
    which turns bad pairs up where ``sd < 0.4``; ours is divided by its peak, so that no pair gains
    by being bad. Its means weight epoch ``e`` with ``(1 + e) / epochs``, and so are losses of
    another scale than the one that is weighted; ours are plain means, as in the paper (from
    memory).

    Args:
        strength: the multiplier. While a Schedule is at 0 losses are still remembered.
        start: the first epoch (from 0) with weights; before it losses are only remembered.
        noisy: ``b_np``, above 0.
        faulty: ``b_fp``, above 0.
        temperature: ``t`` of NT-Xent, above 0.
        views: where the two embeddings are; see :class:`TwoViews`. By default the keys ``z1`` and
            ``z2`` of the dict that ``training_step`` returns.
        losses: where losses (B,) of the pairs are, in place of NT-Xent: a key of the returned
            dict (``"outputs.losses"``).
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        signals: where ``sample_index`` is, if not in an ``IndexedDataset``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or a place is none.
        MissingSignalError: in the first step, if the dataset is no ``IndexedDataset``.
        RegularizationError: in the first step, if shapes do not fit.

    Note:
        Needs ``IndexedDataset(train_dataset)``; the training step does not notice. Over ranks:
        global; embeddings are gathered with gradients, losses without, so that every rank holds
        the memory and the flags that one process would have. Under accumulation negatives come
        from the micro-batch alone. Cost: NT-Xent, a gather of two numbers a sample, and three
        numbers for each training sample on every device and in checkpoints. Logged are the
        weighted loss and the shares of the batch that are noisy (``..._noisy``) and faulty
        (``..._faulty``).

        As the only loss, let ``training_step`` return a zero of the network:
        ``{"loss": 0.0 * z1.sum(), "z1": z1, "z2": z2}``.

        It hurts where rare but good pairs are the hard ones: nothing tells them from faulty ones.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DynamicBadPairMining
        >>> trainer = L.Trainer(callbacks=[DynamicBadPairMining(start=10)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining "
            "Approach",
            "Lan et al.",
            2023,
            None,
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("features", "sample_index")
    function: ClassVar[Callable[..., Any] | None] = staticmethod(bad_pair_weights)
    explanation: ClassVar[str] = "turns down pairs whose past losses are far from all others'"
    exemptions = {"accumulation": "negatives come from the micro-batch alone"}

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        start: int = 50,
        noisy: float = 2.0,
        faulty: float = 3.0,
        temperature: float = 0.2,
        views: str | Sequence[str] = DEFAULT_VIEWS,
        losses: str | None = None,
        num_samples: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, views=views, num_samples=num_samples, width=2, signals=signals, name=name
        )
        cure = "DynamicBadPairMining(start=10, noisy=2.0, faulty=3.0)"
        for key, value in (("noisy", noisy), ("faulty", faulty), ("temperature", temperature)):
            check_range(self, key, value, 0, low_open=True, cure=cure)
        if not isinstance(start, int) or isinstance(start, bool) or start < 1:
            problem = f"`start` must be a whole number from 1, got {start!r}"
            raise ArgumentError(self, problem, cure=cure)
        if losses is not None and (not isinstance(losses, str) or not losses):
            problem = f"`losses` must be a place or None, got {losses!r}"
            raise ArgumentError(self, problem, cure='DynamicBadPairMining(losses="outputs.losses")')
        self.start, self.noisy, self.faulty = start, noisy, faulty
        self.temperature, self.losses = temperature, losses
        self._history: Tensor | None = None
        self._begun = -1

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that starts from step 0 forgets."""
        super().on_reference(trainer, pl_module)
        if int(trainer.global_step) == 0 and int(trainer.current_epoch) == 0:
            self._history, self._begun = None, -1

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look back: the mean loss of each pair in the epochs that are over."""
        super().on_train_epoch_start(trainer, pl_module)
        epoch = int(trainer.current_epoch)
        # Resumed inside an epoch, the memory holds a part of it.
        if epoch >= self.start and epoch != self._begun:
            memory = self.memory.of(2).to(pl_module.device)
            total, count = memory.table.unbind(1)
            self._history = total / count.where(memory.seen, torch.nan)
        self._begun = epoch

    def penalty(self, step: Step) -> JointMean:
        """Phase 4: remember the losses, and weight them by the past."""
        losses = self._losses(step)
        past = self.recall(step, 2)
        now = losses.detach().to(past)
        self.remember(step, past + torch.stack([now, torch.ones_like(now)], 1))
        return JointMean.of(self._weights(step, losses) * losses)

    def _losses(self, step: Step) -> Tensor:
        if self.losses is None:
            rows, (z1, z2) = self.joint_views(step)
            return nt_xent(z1, z2, self.temperature, rows)
        found = step.feature(self.losses)
        if found.ndim != 1 or not found.requires_grad:
            raise RegularizationError(
                self,
                f"needs losses (B,) of the pairs with their graph, got {tuple(found.shape)}",
                cure='return {"loss": 0.0 * losses.sum(), "losses": losses} from training_step',
            )
        return found

    def _weights(self, step: Step, losses: Tensor) -> Tensor:
        if self._history is None:
            return torch.ones_like(losses)
        self._history = self._history.to(losses)
        known = self._history[~self._history.isnan()]
        mean, deviation = known.mean(), known.std(correction=0)
        history = self._history[self._index(step)]
        if not step.is_rerun:
            step.log(self, (history < mean - self.noisy * deviation).float().mean(), "noisy")
            step.log(self, (history > mean + self.faulty * deviation).float().mean(), "faulty")
        return bad_pair_weights(losses, history, mean, deviation, self.noisy, self.faulty)

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the history of this epoch."""
        history = {} if self._history is None else {"history": self._history.cpu().clone()}
        return {**super().state_dict(), **history, "begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved memory."""
        super().load_state_dict(state_dict)
        self._history, self._begun = state_dict.get("history"), int(state_dict["begun"])
