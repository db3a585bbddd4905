"""Mixes each sample of a batch, and its label, with another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.batch_transform import (
    BatchTransform,
    Per,
    Replaces,
    Transformed,
    draw_mix,
    mix_rows,
)

__all__ = ["Mixup", "mixup"]


def mixup(inputs: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """``lam_i x_i + (1 - lam_i) x_j`` with ``j = permutation[i]``.

    Args:
        inputs: (B, ...), floating-point.
        permutation: (B,), the partner of each sample.
        lam: (B,) or (1,), in [0, 1], the share that a sample keeps.

    Returns:
        (B, ...); where ``lam`` is 1 the sample itself, bit for bit.
    """
    return mix_rows(inputs, permutation, lam)


class Mixup(BatchTransform):
    """Trains on convex combinations of pairs of samples and of their labels.

    Zhang, Cisse, Dauphin, Lopez-Paz (2017), mixup: Beyond Empirical Risk Minimization,
    arXiv:1710.09412.

    ``x~ = lam x_i + (1 - lam) x_j`` and ``y~ = lam y_i + (1 - lam) y_j`` with
    ``lam ~ Beta(alpha, alpha)``, where ``j`` is a random permutation of the batch. The formula
    was checked against the official code (facebookresearch/mixup-cifar10), as was the default
    ``alpha=1`` (CIFAR-10). The paper uses 0.1 to 0.4 on ImageNet. There one ``lam`` serves the
    whole batch, as here; ``per="sample"`` draws one for each sample.

    What happens to labels: class indices stay in the batch, so that a metric which your step
    updates with them goes on counting whole labels (the accuracy on mixed samples against the
    label of the first partner, which is low on purpose). The loss that is differentiated is the
    cross-entropy of the logits of your step with the mixed labels; the loss that you log is your
    own. Float targets (soft labels, 0 and 1 for a binary loss, regression) are mixed in the
    batch, and your own loss is used.

    Args:
        alpha: of the Beta distribution, above 0. A small one leaves most samples nearly alone,
            1 draws ``lam`` evenly, a large one halves every pair.
        probability: of mixing a batch, or a sample with ``per="sample"``: a number in [0, 1] or
            a :class:`Schedule`; 0 turns the technique off. Default 1, as in the paper.
        per: ``"batch"`` for one ``lam`` a batch, ``"sample"`` for one a sample.
        replaces: for class indices: ``"cross_entropy"`` if your loss is the cross-entropy of
            logits and labels (checked in the first step), ``"term"`` if it has other terms,
            which are kept, ``"loss"`` to drop it.
        signals: where ``inputs``, ``targets`` and (for class indices) ``logits`` are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if ``alpha`` or ``probability`` is outside its range.
        RegularizationError: in the first step, if the inputs are not one floating-point tensor,
            if your loss is not the cross-entropy of the logits and labels that were found, or if
            there is a label per pixel or token.

    Note:
        Over ranks: local; partners are of the same rank, and each rank draws its own ``lam``. No
        collective. Under accumulation each micro-batch is mixed by itself. A second pass (SAM)
        sees the same mix. Cost: a gather and one interpolation over the inputs, and the
        cross-entropy once more.

        ``reg/mixup`` logs the mean of ``1 - lam``, the share of labels that was given away.

        It hurts small models and short trainings, which underfit; training losses and
        accuracies are not comparable with a run without it; and probabilities come out
        underconfident where it meets label smoothing.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import Mixup
        >>> trainer = L.Trainer(callbacks=[Mixup(alpha=0.2)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("mixup: Beyond Empirical Risk Minimization", "Zhang et al.", 2017, "1710.09412"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mixup)
    explanation: ClassVar[str] = (
        "mixes pairs of samples; class indices stay in the batch for your metrics, and the loss "
        "is the cross-entropy of the captured logits with the mixed labels; float targets are "
        "mixed in the batch"
    )

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        probability: float | Schedule = 1.0,
        per: Per = "batch",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, per=per, replaces=replaces, signals=signals, name=name)
        check_range(self, "alpha", alpha, 0, low_open=True, cure="Mixup(alpha=0.2)")
        self.alpha = alpha

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """Mix the chosen samples."""
        permutation, lam = draw_mix(self.alpha, chosen, self.per, generator)
        share = 1 - float(lam.mean())
        permutation, lam = permutation.to(inputs.device), lam.to(inputs.device)
        return Transformed(mixup(inputs, permutation, lam), share, permutation, lam)
