"""Learns from the mean label of each bag of samples, between a loss on bags and one on samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.technique import Semantics

__all__ = ["BagInstanceInterpolation", "bag_instance_interpolation"]

BagTask = Literal["regression", "multiclass"]
_TASKS = ("regression", "multiclass")


def bag_instance_interpolation(
    predictions: Tensor, responses: Tensor, bags: Tensor, rho: float = 0.5
) -> Tensor:
    """``mean_i (fbar_b - ybar_b)^2 + rho (f_i - fbar_b)^2`` with ``b`` the bag of sample i.

    The first term compares the mean prediction of a bag with its response, the second is the
    variance of predictions in it. ``rho = 0`` is the loss on bags, ``rho = 1`` that on samples,
    ``mean_i (f_i - ybar_b)^2``. A bag counts as often as it has samples.

    Args:
        predictions: ``f`` (N,) or (N, C).
        responses: of the same shape: the response of its bag for each sample. Of responses that
            differ in a bag the mean is taken.
        bags: (N,) integers that name the bags.
        rho: in [0, 1].

    Returns:
        A scalar, the mean over samples and outputs.
    """
    _, place = torch.unique(bags, return_inverse=True)
    mean, response = (_bag_means(t.reshape(len(t), -1), place) for t in (predictions, responses))
    spread = predictions.reshape(len(predictions), -1) - mean
    return ((mean - response).square() + rho * spread.square()).mean()


def _bag_means(values: Tensor, place: Tensor) -> Tensor:
    """The mean (N, C) of each sample's bag."""
    sums = torch.zeros_like(values).index_add(0, place, values)
    counts = torch.zeros_like(values[:, :1]).index_add(0, place, torch.ones_like(values[:, :1]))
    return (sums / counts.clamp_min(1))[place]


class BagInstanceInterpolation(Regularizer):
    """Learns from the mean label of each bag of samples, between a loss on bags and one on samples.

    Javanmard, Chen, Mirrokni, Badanidiyuru, Fu (2024), Learning from Aggregate responses: Instance
    Level versus Bag Level Loss Functions, arXiv:2401.11081.

    ``L_rho = mean_B (fbar_B - ybar_B)^2 + rho mean_B Var_B(f)``, where only ``ybar_B``, the mean
    response of the samples of bag B, is known. Fitting each sample to its bag's response is the
    loss on bags plus the variance of predictions within bags (``rho = 1``): less variance of the
    estimate, and a bias towards predicting one value for a whole bag. Between them one trades
    the two; the best ``rho`` depends on the bags' sizes, their number and the noise.

    The formula is derived from the paper's abstract, by the identity of the two losses; not
    checked against code. For bags of unequal sizes each sample, not each bag, counts once, so that
    ``rho = 1`` is the loss on samples for those too. ``rho = 0.5`` is ours.

    Args:
        strength: the multiplier, at least 0.
        rho: in [0, 1]. :class:`AttributeSchedule` can move it over the run.
        task: ``"regression"``: the output is the prediction; ``"multiclass"``: the softmax of the
            logits is, and responses are the proportions of labels in the bag.
        signals: where the prediction (``logits``), the bag's response for each sample (float
            ``targets`` of the same shape) and the bag of each sample (``domain``, integers) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``rho`` is outside [0, 1], or ``task`` none of the two.
        MissingSignalError: in the first step, without bags.
        RegularizationError: in the first step, if predictions, responses and bags do not fit.

    Note:
        Over ranks: global; predictions, responses and bags of all ranks are gathered with gradients
        first, so that a bag may lie on several ranks. A bag of which a batch holds a part only is
        represented by that part: use a sampler of whole bags. Under accumulation bags are those of
        one micro-batch. Cost: a gather of 2 C numbers a sample and one of the bags, sums over
        bags, and a host sync to number them.

        As the only loss, let ``training_step`` return a zero of the network, ``0.0 *
        prediction.sum()``. It hurts where labels of samples are known: use those.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import BagInstanceInterpolation
        >>> technique = BagInstanceInterpolation(1.0, rho=0.3)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions",
            "Javanmard et al.",
            2024,
            "2401.11081",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets", "domain")
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "targets"})
    exemptions: ClassVar[dict[str, str]] = {"accumulation": "bags are those of one micro-batch"}
    function: ClassVar[Callable[..., Any] | None] = staticmethod(bag_instance_interpolation)
    explanation: ClassVar[str] = "fits bags of samples to their mean label"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        rho: float = 0.5,
        task: BagTask = "regression",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        cure = "BagInstanceInterpolation(1.0, rho=0.5)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "rho", rho, 0, 1, cure=cure)
        if task not in _TASKS:
            raise ArgumentError(
                self,
                f"`task` must be one of {', '.join(_TASKS)}, got {task!r}",
                cure='BagInstanceInterpolation(task="regression")',
            )
        self.rho = rho
        self.task: BagTask = task

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        predictions, responses, bags = self._signals(step)
        width = predictions.shape[1]
        # Bags are named by any integers, which floats may not hold.
        everyone = step.comm.gather(torch.cat([predictions, responses], 1))
        where = step.comm.gather(bags)
        f, y = everyone[:, :width], everyone[:, width:]
        return bag_instance_interpolation(f, y, where, self.rho)

    def _signals(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions and responses (B, C), and bags (B,)."""
        logits, targets = step.logits, step.targets
        bags = torch.as_tensor(step.domain, device=logits.device).reshape(-1).long()
        fits = isinstance(targets, Tensor) and targets.is_floating_point()
        if not fits or targets.shape != logits.shape or len(bags) != len(logits):
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise RegularizationError(
                self,
                "needs a float response of the prediction's shape and one bag for each sample, "
                f"got predictions {tuple(logits.shape)}, responses {shape} and {len(bags)} bags",
                cure='signals=Signals(targets="batch.bag_mean", domain="batch.bag")',
            )
        predictions = logits.softmax(1) if self.task == "multiclass" else logits
        size = len(logits)
        return predictions.reshape(size, -1), targets.to(logits).reshape(size, -1), bags
