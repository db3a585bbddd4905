"""Splits each sample between its label and the agreement of two views of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.embedding_loss import DEFAULT_VIEWS, TwoViews
from lightning_reg.mechanisms.loss_replacement import Replaces, check_replaces
from lightning_reg.mechanisms.sample_memory import SampleMemoryRegularizer
from lightning_reg.mechanisms.sample_reweighting import sample_of_rows

__all__ = ["AdaWAC", "ada_wac", "ada_wac_log_odds"]


def ada_wac_log_odds(
    log_odds: Tensor, supervised: Tensor, consistency: Tensor, step_size: float = 1.0
) -> Tensor:
    """One step of mirror ascent, ``w_0 <- w_0 exp(eta l_CE)``, ``w_1 <- w_1 exp(eta l_AC)``.

    On the log odds ``s = log(w_0 / w_1)`` of weights that sum to 1 this is
    ``s + eta (l_CE - l_AC)``, which large losses do not overflow.

    Args:
        log_odds: (B,) ``s``; 0 for weights of 1/2 each.
        supervised: (B,) ``l_CE``.
        consistency: (B,) ``l_AC``, its coefficient ``lambda`` included.
        step_size: ``eta``, at least 0.

    Returns:
        (B,), without a gradient.
    """
    return log_odds.detach() + step_size * (supervised - consistency).detach()


def ada_wac(log_odds: Tensor, supervised: Tensor, consistency: Tensor) -> Tensor:
    """``w_0 l_CE + w_1 l_AC`` of each sample, with ``w_0 = sigmoid(s)`` and ``w_1 = 1 - w_0``.

    Args:
        log_odds: (B,) ``s``; no gradient flows.
        supervised: (B,) ``l_CE``.
        consistency: (B,) ``l_AC``, its coefficient ``lambda`` included.

    Returns:
        (B,).
    """
    odds = log_odds.detach()
    return odds.sigmoid() * supervised + (-odds).sigmoid() * consistency


class AdaWAC(TwoViews, SampleMemoryRegularizer):
    """Weights, in each sample, its label against the consistency of two augmented views of it.

    Dong, Xie, Ward (2022), Adaptively Weighted Data Augmentation Consistency Regularization for
    Robust Optimization under Concept Shift, arXiv:2210.01891.

    ``min_theta max_w mean_i w_i0 l_CE,i + w_i1 lambda l_AC,i``, with weights of each sample that
    sum to 1 and start at 1/2. ``l_AC,i`` is the mean squared difference of the features of two
    augmentations of sample ``i``. Weights go up the loss by mirror ascent, ``w_i0 <- w_i0
    exp(eta l_CE,i)``, ``w_i1 <- w_i1 exp(eta lambda l_AC,i)``, normalized, whenever their sample
    is seen; the network goes down it. Samples whose label says much (an organ in the slice) end
    up with their label, those whose label says little (nothing but background) with consistency.

    Confirmed with the official code (gail-yxie/adawac@7d1b79e, models.py): weights move first and
    are then used; the coefficient is inside the exponent; no gradient flows through weights. It
    averages the cross-entropy over both views, which is what a step that runs both of them
    through the network and the loss gives here too. Its Dice loss stays outside the weights:
    ``replaces="term"``. Weights are kept as log odds, so that they do not overflow.

    ``lambda`` and ``eta`` are 1 by default as in the official argument parser; its scripts for a
    UNet on CT slices set ``strength=2.0, step_size=8.0``.

    Args:
        strength: ``lambda``, at least 0. A constant 0 turns the technique off; while a Schedule
            is at 0 weights still move, towards the labels.
        views: where the two views of the features (B, ...) are: two submodules, two keys of the
            dict that ``training_step`` returns (``["outputs.z1", "outputs.z2"]``, the default),
            or one submodule that is called once for each view, or once with both, one behind
            the other.
        step_size: ``eta``, at least 0; at 0 weights stay at 1/2.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        replaces: what of the user's loss the weighted cross-entropy replaces:
            ``"cross_entropy"`` (checked to be it), ``"term"`` or ``"loss"``.
        signals: where ``logits``, ``targets`` and ``sample_index`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if a number is outside its range, or ``views`` names no layer.
        MissingSignalError: in the first step, if the dataset is no ``IndexedDataset``.
        RegularizationError: in the first step, if views and labels are not of the same samples.

    Note:
        Needs ``IndexedDataset(train_dataset)``, and a step that runs two augmentations of each
        sample. A sample of many labels (pixels) counts with their mean, and without any it has
        consistency alone. ``logits`` and ``targets`` are of one view, or of both, one behind the
        other. The logged value is the mean of ``w_1 l_AC``; beside it is
        ``reg/<name>_supervised``, the mean of ``w_0``. Over ranks: global; new weights are
        gathered in each step, so that every rank holds the table that one process would have.
        Weights are saved with the checkpoint; a loss that is not finite does not move them.
        Cost: what the second view costs the step, and a gather of one number a sample.

        It hurts with wrong labels: their losses are large, and get the weight.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AdaWAC
        >>> trainer = L.Trainer(callbacks=[AdaWAC(views="encoder")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Adaptively Weighted Data Augmentation Consistency Regularization for Robust "
            "Optimization under Concept Shift",
            "Dong et al.",
            2022,
            "2210.01891",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets", "features", "sample_index")
    reads: ClassVar[frozenset[str]] = frozenset({"losses", "features"})
    writes: ClassVar[frozenset[str]] = frozenset({"losses"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"reweighting"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(ada_wac)
    explanation: ClassVar[str] = "weights each sample's label against the consistency of its views"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        views: str | Sequence[str] = DEFAULT_VIEWS,
        step_size: float = 1.0,
        num_samples: int | None = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, views=views, num_samples=num_samples, width=1, signals=signals, name=name
        )
        cure = 'AdaWAC(1.0, views="encoder", step_size=1.0)'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "step_size", step_size, 0, cure=cure)
        check_replaces(self, replaces)
        self.step_size = step_size
        self.replaces = replaces

    def sample_weights(self, step: Step, losses: Tensor) -> Tensor:
        """Phase 3: move the weights of this batch, and give those of the labels."""
        past = self.recall(step, 1)[:, 0].to(losses)
        consistency = self._consistency(step).detach().to(losses)
        samples = self._samples(step, losses, len(past)) if len(past) == len(consistency) else None
        if samples is None:
            raise RegularizationError(
                self,
                f"needs both views and the labels of the same samples; the batch has {len(past)}, "
                f"a view {len(consistency)}, and the labels are {tuple(step.targets.shape)}",
                cure='AdaWAC(views=["outputs.z1", "outputs.z2"])',
            )
        ones = losses.new_zeros(len(past)).index_add(0, samples, losses.new_ones(len(losses)))
        supervised = losses.new_zeros(len(past)).index_add(0, samples, losses) / ones.clamp_min(1)
        inside = step.strength(self) * consistency
        moved = ada_wac_log_odds(past, supervised, inside, self.step_size)
        log_odds = self.remembered(step, moved.unsqueeze(1))[:, 0].to(losses)
        step.kept[self.name] = log_odds
        weights = log_odds.sigmoid()
        if not step.is_rerun:
            step.log(self, weights.mean(), "supervised")
        return weights[samples]

    def penalty(self, step: Step) -> JointMean:
        """Phase 4: the share of the consistency."""
        consistency = self._consistency(step)
        weights = (-step.kept[self.name]).sigmoid().to(consistency)
        return JointMean.of(weights * consistency)

    def _consistency(self, step: Step) -> Tensor:
        first, second = self.two_views(step)
        return (first - second).square().flatten(1).mean(1)

    def _samples(self, step: Step, losses: Tensor, size: int) -> Tensor | None:
        """The sample of each row of the loss; a batch of both views has each of them twice."""
        assert step.target_distribution is not None
        classes = step.target_distribution.shape[-1]
        if len(step.targets) not in (size, 2 * size):
            return None
        rows = sample_of_rows(step.targets, classes, len(losses), losses.device)
        return rows % size
