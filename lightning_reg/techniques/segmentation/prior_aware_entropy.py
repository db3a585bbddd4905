"""Makes unlabeled predictions sure, and their proportions those of a prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.signals import read_path
from lightning_reg.engine.technique import Semantics

__all__ = ["PriorAwareEntropy", "class_proportions", "prior_aware_entropy"]

Proportion = Literal["mean", "relative"]
_PROPORTIONS = ("mean", "relative")


def class_proportions(logits: Tensor, proportion: Proportion = "mean") -> Tensor:
    """The share of each class in each image.

    ``"mean"``: ``1/|Omega| sum_i p_ic``. ``"relative"``: of ``p_ic / max_k p_ik``, scaled to sum
    to 1, which gives a pixel's top class full weight however unsure it is.

    Args:
        logits: (B, C, ...).
        proportion: ``"mean"`` or ``"relative"``.

    Returns:
        (B, C), rows summing to 1.
    """
    p = _pixels(logits).softmax(1)
    if proportion == "mean":
        return p.mean(2)
    sizes = (p / p.amax(1, keepdim=True)).sum(2)
    return sizes / sizes.sum(1, keepdim=True)


def prior_aware_entropy(
    logits: Tensor,
    prior: Tensor,
    class_weights: Tensor | None = None,
    prior_weight: float = 1.0,
    proportion: Proportion = "relative",
) -> Tensor:
    r"""``1/|Omega| sum_i sum_c -nu_c p_ic log p_ic + rho KL(phat || tau)`` of each image.

    Args:
        logits: (B, C, ...) over the pixels ``Omega`` of each image.
        prior: ``tau``, (C,) or (B, C), rows summing to 1; a class of 0 counts as 1e-10.
        class_weights: ``nu`` (C,); ones by default.
        prior_weight: ``rho``.
        proportion: how ``phat`` is taken; see :func:`class_proportions`.

    Returns:
        (B,), in nats.
    """
    logs = F.log_softmax(_pixels(logits), dim=1)
    surprise = -logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)
    if class_weights is not None:
        surprise = surprise * class_weights.to(logits).unsqueeze(-1)
    estimate = class_proportions(logits, proportion)
    # A class that an image has nowhere adds nothing, and passes no infinite gradient.
    ratio = estimate.clamp_min(torch.finfo(estimate.dtype).tiny) / prior.to(estimate).clamp_min(
        1e-10
    )
    divergence = (estimate * ratio.log()).sum(-1)
    return surprise.sum(1).mean(1) + prior_weight * divergence


def _pixels(logits: Tensor) -> Tensor:
    """(B, C, P), whatever the layout of an image's P pixels."""
    return logits.flatten(2) if logits.ndim > 2 else logits.unsqueeze(-1)


class PriorAwareEntropy(Regularizer):
    """Adapts a segmenter without labels: low entropy, with class proportions of a prior (AdaEnt).

    Bateson et al. (2020), Source-Free Domain Adaptation for Image Segmentation, arXiv:2005.03697.

    The loss becomes ``L + lambda [H(p) + rho KL(phat || tau)]``: the mean entropy of the pixels,
    weighted by class, and the divergence of each image's class proportions ``phat`` from what is
    known of them (anatomy, a size predictor). Entropy alone is least where all pixels have one
    class; the second term forbids that. With a uniform ``tau`` it is, up to a constant, the
    negative mutual information of pixels and labels. The estimate comes first in the divergence:
    a class that the prior has not is punished, one that it has and the image has not is less.

    Values and gradients are those of mathilde-b/SFDA@fdcd141 (``losses.py``, ``EntKLProp``),
    which trains with ``lambda = rho = 1`` and weights such as (0.1, 0.9), inverse to frequency.
    Its proportion is not the mean of the paper's formula but ``"relative"``, the default here.

    Args:
        strength: ``lambda``; at least 0.
        prior: ``tau``: C numbers that sum to 1, or ``"batch.<key>"``, where the batch has (C,) or
            (B, C).
        class_weights: ``nu``: C numbers from 0; ones by default.
        prior_weight: ``rho``; at least 0.
        proportion: ``"relative"`` as in the official code, ``"mean"`` as in the paper.
        signals: where ``logits`` (B, C, ...) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``prior`` is no distribution, or an argument is outside its range.
        RegularizationError: in the first step, if prior and logits have other numbers of classes.

    Note:
        Over ranks: global; each image has its own proportions, and the mean runs over the images
        of all ranks, for a share of the one all-reduce of all means. Accumulation changes nothing
        if micro-batches have equally many images. Cost: a log-softmax, a softmax and a few
        products over the logits.

        It hurts where the prior is wrong: pixels of the surest wrong class are taken to fill it.
        The user's own loss is kept: for adaptation without labels return
        ``0.0 * logits.sum()`` as the loss.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PriorAwareEntropy
        >>> adapt = PriorAwareEntropy(1.0, prior=[0.9, 0.1], class_weights=[0.1, 0.9])
        >>> trainer = L.Trainer(callbacks=[adapt], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Source-Free Domain Adaptation for Image Segmentation",
            "Bateson et al.",
            2020,
            "2005.03697",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    reads: ClassVar[frozenset[str]] = frozenset({"logits"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(prior_aware_entropy)
    explanation: ClassVar[str] = "lowers entropy and holds class proportions at a prior"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        prior: Sequence[float] | str,
        class_weights: Sequence[float] | None = None,
        prior_weight: float = 1.0,
        proportion: Proportion = "relative",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        cure = "PriorAwareEntropy(1.0, prior=[0.9, 0.1])"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "prior_weight", prior_weight, 0, cure=cure)
        self.prior = prior if isinstance(prior, str) else tuple(float(t) for t in prior)
        self._check_prior(cure)
        if class_weights is not None and not all(w >= 0 for w in class_weights):
            raise ArgumentError(
                self, f"`class_weights` must be at least 0, got {class_weights}", cure=cure
            )
        if proportion not in _PROPORTIONS:
            raise ArgumentError(
                self,
                f"`proportion` must be one of {', '.join(_PROPORTIONS)}, got {proportion!r}",
                cure=cure,
            )
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.prior_weight = prior_weight
        self.proportion: Proportion = proportion

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        logits = step.logits
        tau = self._tau(step, logits)
        weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        if weights is not None and len(weights) != logits.shape[1]:
            raise RegularizationError(
                self,
                f"has {len(weights)} class weights, and the logits are {tuple(logits.shape)}",
                cure=f"class_weights=[1.0] * {logits.shape[1]}",
            )
        values = prior_aware_entropy(logits, tau, weights, self.prior_weight, self.proportion)
        return JointMean.of(values)

    def _tau(self, step: Step, logits: Tensor) -> Tensor:
        if isinstance(self.prior, str):
            tau = torch.as_tensor(read_path({"batch": step.batch}, self.prior)).to(logits)
        else:
            tau = logits.new_tensor(self.prior)
        if logits.ndim < 2 or tau.shape not in (logits.shape[1:2], logits.shape[:2]):
            raise RegularizationError(
                self,
                f"needs a prior (C,) or (B, C) for logits (B, C, ...), got {tuple(tau.shape)} for "
                f"{tuple(logits.shape)}",
                cure=f"PriorAwareEntropy(prior=[...])  # {logits.shape[-1]} numbers",
            )
        return tau

    def _check_prior(self, cure: str) -> None:
        if isinstance(self.prior, str):
            if not self.prior.startswith("batch."):
                raise ArgumentError(
                    self,
                    f"`prior` must be numbers or a place in the batch, got {self.prior!r}",
                    cure='PriorAwareEntropy(1.0, prior="batch.prior")',
                )
            return
        total = math.fsum(self.prior)
        if len(self.prior) < 2 or not min(self.prior) >= 0 or not abs(total - 1) < 1e-3:
            raise ArgumentError(
                self,
                f"`prior` must be two numbers or more from 0 that sum to 1, got {self.prior}",
                cure=cure,
            )
