"""Holds back the confidence of a batch, so that ranks with other data do not drift apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.output_penalty import LogitRows

__all__ = ["MarginControl", "margin_control"]


def margin_control(logits: Tensor) -> Tensor:
    """``log(1 + sum_b ||p_b||_2^2)`` with ``p_b = softmax(z_b)``.

    Args:
        logits: ``z`` (N, C).

    Returns:
        A scalar, from ``log(1 + N / C)`` where all predictions are uniform to ``log(1 + N)`` where
        all are sure.
    """
    return torch.log1p(_confidence(logits))


class MarginControl(LogitRows):
    """Holds back the confidence of a batch, so that ranks with other data do not drift apart.

    Zeng et al. (2023), Tackling Data Heterogeneity in Federated Learning via Loss Decomposition:
    the regularization of local training.

    The loss becomes ``L + lambda log(1 + ||P||_F^2)`` with the matrix ``P`` (N, C) of the batch's
    predicted probabilities. The squared norm of a prediction is ``1 / C`` where it is uniform and
    1 where it is sure, so large margins are held back; the logarithm makes the pull on each sample
    fall as ``1 / N`` with the batch, up to a constant.

    Formula and default confirmed against Zeng-Shuang/FedLD@9440494, methods/fedld.py and options.py
    (0.03). The other half of the paper, its aggregation of the gradients of clients on a server, is
    no part of this class.

    Args:
        strength: ``lambda``, at least 0.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are; targets are optional.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0.
        RegularizationError: in the first step, if there are fewer than two classes.

    Note:
        Over ranks: global; the sum runs over the samples of all ranks before the logarithm, for
        one all-reduce of a number a step and one in backward. (In the paper each client has its
        own batch.) Under accumulation each micro-batch has its own logarithm. Cost: a softmax and
        a sum of squares over the logits. It hurts where labels are clean and confidence is earned;
        :class:`ConfidencePenalty` does the same for the entropy, so use one of them.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MarginControl
        >>> trainer = L.Trainer(callbacks=[MarginControl(0.03)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
            "Zeng et al.",
            2023,
            None,
        ),
    )
    exemptions = {
        "accumulation": "the logarithm is taken of the whole batch, which each micro-batch is "
        "for itself",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(margin_control)
    explanation: ClassVar[str] = "holds back the confidence of a batch"

    def __init__(
        self,
        strength: float | Schedule = 0.03,
        *,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="MarginControl(0.03)")

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        confidence = _confidence(self._rows(step.logits, step.find("targets")))
        return torch.log1p(step.comm.reduce(confidence))


def _confidence(logits: Tensor) -> Tensor:
    return logits.softmax(-1).square().sum()
