"""Makes predicted distributions change little with the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.mechanisms.gradient_penalty import (
    GradientPenalty,
    Projections,
    check_projections,
    input_gradient,
)

__all__ = ["FisherInformationPenalty", "fisher_information_penalty"]


def fisher_information_penalty(
    logits: Tensor,
    inputs: Tensor,
    samples: Projections = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``tr I_x = E_{y ~ p(y|x)} ||d log p(y|x) / dx||^2`` of each sample, ``p = softmax(logits)``.

    Half of it times ``|d|^2``, summed over directions, is ``KL(p(.|x) || p(.|x + d))`` to second
    order: how much the distribution changes around ``x``.

    Args:
        logits: (B, C), a differentiable function of ``inputs``.
        inputs: (B, ...), which requires a gradient.
        samples: ``"exact"`` sums over all classes, ``sum_y p_y ||d log p_y / dx||^2``; a number
            draws as many classes from ``p`` per sample, without a gradient through the draw, an
            unbiased estimate of the trace's value.
        generator: where they are drawn from.

    Returns:
        (B,), with a graph, in nats per squared unit of an input.
    """
    log_p = logits.log_softmax(-1)
    total = torch.zeros((), device=logits.device)
    if samples == "exact":
        p = log_p.exp()
        for label in range(logits.shape[-1]):
            score = input_gradient(log_p[:, label], inputs).flatten(1)
            total = total + p[:, label] * score.square().sum(1)
        return total
    labels = torch.multinomial(log_p.detach().exp(), samples, True, generator=generator)  # type: ignore[arg-type]
    for drawn in labels.unbind(1):
        score = input_gradient(log_p.gather(1, drawn[:, None])[:, 0], inputs).flatten(1)
        total = total + score.square().sum(1)
    return total / labels.shape[1]


class FisherInformationPenalty(GradientPenalty):
    """Makes predicted distributions change little with the inputs, in the metric of KL divergence.

    Glockler, Deistler, Macke (2023), Adversarial robustness of amortized Bayesian inference,
    arXiv:2305.14984.

    The loss becomes ``L + beta E_x tr I_x`` with the Fisher information of the conditional
    distribution by its *inputs*, ``I_x = E_{y ~ p(y|x)} [d log p(y|x)/dx (d log p(y|x)/dx)^T]``:
    since ``KL(p(.|x) || p(.|x + d)) = 1/2 d^T I_x d + o(|d|^2)``, it bounds what a small
    perturbation can do to the answer. The expectation is over the network's own distribution, not
    over the labels (that would be the empirical Fisher). For other distributions ``values`` is
    the place: here it is the softmax of a classifier.

    That the penalty is this trace is in the abstract; its form and sampling are from memory of the
    paper and not checked against code. The paper estimates the expectation from samples; for
    classes it can be exact, which is the default. A sampled estimate has the right value, and as
    its gradient that of the penalty with ``p`` held fixed. The default strength is ours.

    Args:
        strength: ``beta``, in squared units of the inputs.
        samples: classes drawn per sample and step, or ``"exact"`` for all of them.
        layer: differentiate by this submodule's output instead of the inputs, for example an
            embedding where inputs are tokens.
        signals: where ``inputs`` and ``logits`` are, if not in the usual places.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``samples`` is neither, or the module has no such layer, or the logits
            are not (B, C).
        UnsupportedError: in the first step, if inputs are integers or the network is compiled.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks, for one all-reduce of two
        numbers a step. Draws are each rank's and micro-batch's own; with ``"exact"`` N ranks, or
        N micro-batches, equal the joint batch. BatchNorm in training mode mixes samples.

        Cost: per class (or drawn class) one backward pass to the inputs, and a second one through
        that, with the activations of both. It hurts calibration of confident answers that are
        right: predictions become smoother everywhere.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import FisherInformationPenalty
        >>> trainer = L.Trainer(callbacks=[FisherInformationPenalty(0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Adversarial robustness of amortized Bayesian inference",
            "Glockler et al.",
            2023,
            "2305.14984",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(fisher_information_penalty)
    explanation: ClassVar[str] = "adds the Fisher information of the prediction by the inputs"

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        samples: Projections = "exact",
        layer: str | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layer=layer, signals=signals, name=name)
        try:
            check_projections(self, samples)
        except ArgumentError as error:
            problem = error.problem.replace("projections", "samples")
            cure = "FisherInformationPenalty(samples=1)"
            raise ArgumentError(self, problem, cure=cure) from None
        self.samples = samples

    def values(self, outputs: Tensor, points: Tensor, generator: torch.Generator | None) -> Tensor:
        """The trace of each sample's Fisher information."""
        if outputs.ndim != 2:
            raise ArgumentError(
                self,
                f"needs logits (B, C), got {tuple(outputs.shape)}",
                cure='signals=Signals(logits="module.<name>")',
            )
        return fisher_information_penalty(outputs, points, self.samples, generator)
