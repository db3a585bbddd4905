"""Trains for the worst mixture of samples that is not far from the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import Replaces
from lightning_reg.mechanisms.sample_reweighting import SampleReweighting

__all__ = ["KLRobustReweighting", "kl_robust_loss", "kl_robust_weights"]


def kl_robust_loss(losses: Tensor, lam: float) -> Tensor:
    """``max_w sum_i w_i l_i - lambda KL(w || 1/n) = lambda log mean_i exp(l_i / lambda)``.

    Args:
        losses: (N,) ``l``.
        lam: ``lambda`` above 0: small values go to the largest loss, large ones to the mean.

    Returns:
        A scalar; its gradient by ``l_i`` is ``softmax(l / lambda)_i``.
    """
    return lam * ((losses / lam).logsumexp(0) - math.log(len(losses)))


def kl_robust_weights(losses: Tensor, lam: float, log_normalizer: Tensor | None = None) -> Tensor:
    """``exp(l_i / lambda) / u``, of mean one at the batch's own ``u``.

    Args:
        losses: (N,) ``l``.
        lam: ``lambda`` above 0.
        log_normalizer: ``log u``; ``None`` takes ``u = mean_i exp(l_i / lambda)``.

    Returns:
        (N,), above 0.
    """
    scaled = losses / lam
    if log_normalizer is None:
        log_normalizer = scaled.logsumexp(0) - math.log(len(losses))
    return (scaled - log_normalizer).exp()


class KLRobustReweighting(SampleReweighting):
    """Weights samples by ``exp(loss / lambda)``: distributional robustness within a KL ball.

    Sow, Lin, Wang, Liang (2023), Doubly Robust Instance-Reweighted Adversarial Training: the loss
    becomes ``max_w sum_i w_i l_i - lambda KL(w || 1/n) = lambda log mean_i exp(l_i / lambda)``,
    whose gradient weighs sample ``i`` by ``exp(l_i / lambda) / mean_j exp(l_j / lambda)``. A
    batch's own mean is a biased estimate of the normalizer, so a moving average of it is kept,
    ``u <- (1 - b) u + b mean_batch exp(l / lambda)``, in logarithms.

    The paper takes the losses at adversarial inputs (the second of its two robustnesses): add
    adversarial training, whose samples this then weights. The objective is in the abstract; the
    estimator with ``u`` is from memory, not checked against code. Defaults are ours.

    Args:
        strength: the share of the weighted loss in [0, 1]; the rest is the plain mean.
        lam: ``lambda``, above 0, in the unit of the loss; a Schedule anneals it.
        average: ``b``, the share of the present batch in ``u``, in (0, 1]; 1 normalizes each batch
            by itself.
        replaces: what of the user's loss the weighted cross-entropy replaces:
            ``"cross_entropy"`` (checked to be it), ``"term"`` or ``"loss"``.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Attributes:
        log_normalizer: ``log u``; minus infinity before the first batch.

    Raises:
        ArgumentError: if a number is outside its range.
        RegularizationError: in the first step, if the user's loss is no cross-entropy and
            ``replaces`` does not say what to do.

    Note:
        The logged value is the effective sample size, a share of the batch. Over ranks: global;
        losses of all ranks are gathered in each step. Under accumulation ``u`` moves with each
        micro-batch. ``u`` is saved with the checkpoint; a batch whose loss is not finite does not
        move it. Cost: a gather of two numbers a sample.

        It hurts with wrong labels, whose losses are large: they get the weight.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import KLRobustReweighting
        >>> trainer = L.Trainer(callbacks=[KLRobustReweighting(lam=1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Doubly Robust Instance-Reweighted Adversarial Training", "Sow et al.", 2023, None),
    )
    normalized: ClassVar[bool] = False
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "the normalizer moves with each micro-batch",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(kl_robust_weights)
    explanation: ClassVar[str] = "weights samples by exp(loss / lambda)"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        lam: float | Schedule = 1.0,
        average: float = 0.1,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        cure = "KLRobustReweighting(lam=1.0, average=0.1)"
        if not isinstance(lam, Schedule):
            check_range(self, "lam", lam, 0, low_open=True, cure=cure)
        check_range(self, "average", average, 0, 1, low_open=True, cure=cure)
        self.lam = lam
        self.average = average
        self.log_normalizer = torch.tensor(-torch.inf)

    def weights(self, step: Step, losses: Tensor) -> Tensor:
        """The weights of the joint batch, by the normalizer that it has moved."""
        lam = Schedule.of(self.lam).value(
            step=step.global_step, epoch=step.epoch, progress=step.progress
        )
        if not step.is_rerun:
            self._follow(losses, lam)
        return kl_robust_weights(losses, lam, self.log_normalizer.to(losses))

    def state_dict(self) -> dict[str, Any]:
        """The normalizer."""
        return {**super().state_dict(), "log_normalizer": self.log_normalizer.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved normalizer."""
        super().load_state_dict(state_dict)
        self.log_normalizer = state_dict["log_normalizer"].clone()

    def _follow(self, losses: Tensor, lam: float) -> None:
        now = (losses / lam).logsumexp(0) - math.log(len(losses))
        past = self.log_normalizer.to(now)
        share = math.log(self.average)
        rest = math.log1p(-self.average) if self.average < 1 else -math.inf
        mixed = torch.logaddexp(past + rest, now + share)
        moved = torch.where(torch.isinf(past), now, mixed)
        # A loss that is not finite moves nothing.
        self.log_normalizer = torch.where(torch.isfinite(now), moved, past)
