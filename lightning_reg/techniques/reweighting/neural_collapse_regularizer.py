"""Draws the features of each class together, and the class means as far apart as they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.feature_penalty import Pooling
from lightning_reg.mechanisms.labeled_feature_penalty import LabeledFeaturePenalty

__all__ = ["NeuralCollapseRegularizer", "class_compactness", "class_separation"]

# Beyond this cosine the arc cosine has no gradient that helps.
_CLAMP = 0.99999


def class_compactness(
    features: Tensor, means: Tensor, distribution: Tensor, counts: Tensor | None = None
) -> Tensor:
    """``(1/K) sum_k (1/n_k) sum_{i in k} |h_i - mu_k|^2`` (NC1), each class counting alike.

    Args:
        features: (N, d) ``h``.
        means: (K, d) ``mu``.
        distribution: (N, K) the labels; a soft one belongs to each class by its share.
        counts: (K,) ``n_k`` of a batch that these rows are a part of; ``None`` if they are all.

    Returns:
        A scalar; a class without samples adds 0.
    """
    counts = distribution.sum(0) if counts is None else counts
    share = distribution / counts.clamp_min(torch.finfo(counts.dtype).tiny)
    squares = features.square().sum(1, keepdim=True) + means.square().sum(1)
    distances = squares - 2 * features @ means.t()
    return (share * distances).sum() / len(means)


def class_separation(means: Tensor) -> Tensor:
    """``-(1/K) sum_k min_{j != k} angle(mu_k - mu, mu_j - mu)`` (NC2), with ``mu`` their mean.

    Args:
        means: (K, d).

    Returns:
        A scalar in radians, at least ``-arccos(-1 / (K - 1))``: that of a simplex with equal
        angles. An angle below 0.26 degrees, or above 179.74, has no gradient.
    """
    directions = F.normalize(means - means.mean(0), dim=1)
    own = torch.eye(len(means), dtype=torch.bool, device=means.device)
    closest = (directions @ directions.t()).masked_fill(own, -1.0).amax(1)
    return -closest.clamp(-_CLAMP, _CLAMP).acos().mean()


class NeuralCollapseRegularizer(LabeledFeaturePenalty):
    """Induces neural collapse under imbalance: compact classes, means at the widest angles.

    Liu, Zhang, Hu, Cao, Pan, Yao (2023), Inducing Neural Collapse in Deep Long-tailed
    Learning, arXiv:2302.12453.

    Trained on balanced classes, the features of a class end at its mean, and the centred means at
    the corners of a simplex with equal angles; trained on a long tail, the means of rare classes
    move together. Two terms bring back both: ``L = CE + lambda_1 NC1 + lambda_2 NC2``, with
    ``NC1 = (1/K) sum_k (1/n_k) sum_{i in k} |h_i - mu_k|^2`` over the batch, in which a rare class
    counts as much as a frequent one, and ``NC2 = -(1/K) sum_k min_{j != k} angle(k, j)`` of the
    centred means.

    As in the official code (Pepper-lll/NCfeature@c681f7e, losses.py), the means ``mu`` are not
    averages of a batch but free vectors with a gradient step of their own,
    ``mu <- mu - alpha grad_mu (NC1 + (lambda_2 / lambda_1) NC2)``, from a standard normal start:
    NC1 draws them to their features, NC2 apart, and features follow them through NC1 alone. A
    class that is not in the batch keeps being pushed apart. Cosines are clamped to 0.99999.
    ``lambda_1`` 0.01, ``lambda_2`` 0.1 and ``alpha`` 0.5 are its defaults; it adds the pair to
    deferred reweighting (``ClassBalancedLoss``, ``LabelDistributionAwareMargin``).

    Args:
        strength: ``lambda_1``, at least 0.
        num_classes: ``K``, at least 2.
        layer: the submodule whose output are the features in front of the classifier.
        separation: ``lambda_2 / lambda_1``, at least 0.
        alpha: the learning rate of the means, in (0, K): above ``K`` they overshoot their class.
        pooling: how outputs with positions become rows; see :class:`FeaturePenalty`.
        feature_dim: where the features lie in outputs of more than two dimensions.
        signals: where ``targets`` are.
        name: the name in logs and checkpoints.

    Attributes:
        means: (K, d) ``mu``; (K, 0) before the first batch.

    Raises:
        ArgumentError: if a number is outside its range, or there is no such layer.
        RegularizationError: in the first step, if there is not one label for each row.

    Note:
        The logged value is ``NC1 + (lambda_2 / lambda_1) NC2``; beside it is
        ``reg/<name>_angle``, the mean smallest angle of the means in degrees. Over ranks: global;
        counts and sums of each class are reduced in each step, so that means and counts are those
        of the joint batch and the same on every rank. Means are saved with the checkpoint;
        features that are not finite do not move them. Cost: a product of B x d x K, one of
        K x K x d, and a reduction of K (d + 1) numbers.

        It hurts with features that need room within a class: several modes, regression.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import NeuralCollapseRegularizer
        >>> collapse = NeuralCollapseRegularizer(num_classes=10, layer="encoder")
        >>> trainer = L.Trainer(callbacks=[collapse], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Inducing Neural Collapse in Deep Long-tailed Learning",
            "Liu et al.",
            2023,
            "2302.12453",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "class counts and means are those of each micro-batch",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(class_compactness)
    explanation: ClassVar[str] = "draws each class together and the class means apart"

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        num_classes: int,
        layer: str | None = None,
        separation: float = 10.0,
        alpha: float = 0.5,
        pooling: Pooling = "mean",
        feature_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            num_classes=num_classes,
            layer=layer,
            pooling=pooling,
            feature_dim=feature_dim,
            signals=signals,
            name=name,
        )
        cure = 'NeuralCollapseRegularizer(num_classes=10, layer="encoder", alpha=0.5)'
        check_range(self, "separation", separation, 0, cure=cure)
        check_range(self, "alpha", alpha, 0, num_classes, low_open=True, high_open=True, cure=cure)
        self.separation = separation
        self.alpha = alpha
        self.means = torch.zeros(num_classes, 0)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run from step 0 starts with means of its own."""
        if int(trainer.global_step) == 0:
            self.means = torch.zeros(self.num_classes, 0)

    def value(self, step: Step, features: Tensor, distribution: Tensor) -> JointMean:
        """Both terms at the means as they are; then the means move."""
        means = self._means_for(step, features)
        sums = torch.cat([distribution.t() @ features, distribution.sum(0).unsqueeze(1)], 1)
        joint = step.comm.reduce(sums.detach())
        counts = joint[:, -1]
        compactness = class_compactness(features, means, distribution, counts)
        with torch.enable_grad():
            at = means.clone().requires_grad_()
            separation = class_separation(at)
            (push,) = torch.autograd.grad(separation, at)
        if not step.is_rerun:
            step.log(self, -separation.detach().rad2deg(), "angle", joint=True)
            self._move(means, joint[:, :-1], counts, push)
        # The parts of the ranks are summed, so each of them brings its share of the second term.
        share = compactness.new_tensor(1 / step.comm.world_size)
        return JointMean(compactness + share * self.separation * separation.detach(), share)

    def state_dict(self) -> dict[str, Any]:
        """The means."""
        return {**super().state_dict(), "means": self.means.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved means."""
        super().load_state_dict(state_dict)
        self.means = state_dict["means"].clone()

    def _means_for(self, step: Step, features: Tensor) -> Tensor:
        if self.means.shape[1] != features.shape[1]:
            generator = step.rng(self, shared=True)
            shape = (self.num_classes, features.shape[1])
            self.means = torch.randn(shape, generator=generator, device=generator.device)
        return self.means.to(features)

    def _move(self, means: Tensor, sums: Tensor, counts: Tensor, push: Tensor) -> None:
        centres = sums / counts.clamp_min(torch.finfo(counts.dtype).tiny).unsqueeze(1)
        present = (counts > 0).unsqueeze(1)
        pull = torch.where(present, 2 / self.num_classes * (means - centres), 0.0)
        moved = means - self.alpha * (pull + self.separation * push)
        # Features that are not finite move nothing.
        self.means = torch.where(torch.isfinite(moved).all(), moved, means)
