"""Keeps predictions from depending on parts of the input that are known to be irrelevant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.mechanisms.gradient_penalty import GradientPenalty, input_gradient
from lightning_reg.mechanisms.input_mask import check_mask, read_mask

__all__ = ["RightForRightReasons", "right_for_right_reasons"]


def right_for_right_reasons(logits: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
    """``sum_d (A_d d/dx_d sum_k log p_k)^2`` of each sample, with ``p = softmax(logits)``.

    Args:
        logits: (B, C), a differentiable function of ``inputs``.
        inputs: ``x`` (B, ...), which requires a gradient.
        mask: ``A``, broadcasts against the inputs: 1 where the input must not matter, 0 where it
            may; numbers in between weigh.

    Returns:
        (B,), with a graph.
    """
    gradient = input_gradient(logits.log_softmax(-1).sum(-1), inputs)
    return (mask * gradient).flatten(1).square().sum(1)


class RightForRightReasons(GradientPenalty):
    """Keeps predictions from depending on parts of the input that are known to be irrelevant.

    Ross, Hughes, Doshi-Velez (2017), Right for the Right Reasons: Training Differentiable Models
    by Constraining their Explanations, arXiv:1703.03717. As the baseline of Rieger, Singh,
    Murdoch, Yu (2019), Interpretations are useful, arXiv:1909.13584.

    The loss becomes ``L + lambda E sum_d (A_d d/dx_d sum_k log p_k(x))^2``: the gradient of the
    log-probabilities, summed over classes, has to vanish where the mask ``A`` is 1. A network
    then cannot use a watermark, a border or a token that leaks the label, even where it predicts
    it perfectly.

    Formula and default strength (1000, chosen so that both terms have one order of magnitude) are
    from memory of the paper; not checked against its code. The comparison in
    laura-rieger/deep-explanation-penalization (``src/score_funcs.py``, ``gradient_sum``) takes the
    gradient of the loss, summed over channels, and sums over the batch: ours is the paper's, with
    the mean over samples, so its ``lambda`` of a sum is ours divided by the batch size.

    Args:
        strength: ``lambda``.
        mask: where the masks are: a key (``"mask"``), a position (``"2"``) or a dotted path in the
            batch, or ``"outputs.<key>"`` of what ``training_step`` returns. 1 marks what must not
            matter. A sample without an annotation has a mask of zeros.
        layer: differentiate by this submodule's output, whose shape the mask then has.
        signals: where ``inputs`` and ``logits`` are, if not in the usual places.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``mask`` names nothing, or the module has no such layer.
        MissingSignalError: in the first step, if there is no mask.
        RegularizationError: in the first step, if it does not fit the inputs, or logits are not
            (B, C).
        UnsupportedError: in the first step, if inputs are integers or the network is compiled.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks, for one all-reduce of two
        numbers a step. Cost: one backward pass to the inputs and a second one through that,
        whatever the number of classes. BatchNorm in training mode mixes samples.

        A gradient says how the answer changes, not what it rests on: a saturated unit can depend
        on a masked input and have no gradient. CDEP penalizes the contribution itself.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import RightForRightReasons
        >>> trainer = L.Trainer(callbacks=[RightForRightReasons(10.0, mask="mask")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Right for the Right Reasons: Training Differentiable Models by Constraining their "
            "Explanations",
            "Ross et al.",
            2017,
            "1703.03717",
        ),
        Paper(
            "Interpretations are useful: penalizing explanations to align neural networks with "
            "prior knowledge",
            "Rieger et al.",
            2019,
            "1909.13584",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(right_for_right_reasons)
    explanation: ClassVar[str] = "penalizes the gradient of log-probabilities where a mask is 1"

    def __init__(
        self,
        strength: float | Schedule = 1000.0,
        *,
        mask: str = "mask",
        layer: str | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layer=layer, signals=signals, name=name)
        check_mask(self, mask)
        self.mask = mask
        self._mask: Tensor | None = None

    def penalty(self, step: Step) -> JointMean:
        """Phase 4, with the masks of this micro-batch."""
        points = step.inputs
        if self.layer is not None:
            points = step.feature(self.layer, as_captured=True)
        self._mask = read_mask(self, step, self.mask, points)
        try:
            return super().penalty(step)
        finally:
            self._mask = None

    def values(self, outputs: Tensor, points: Tensor, generator: torch.Generator | None) -> Tensor:
        """The squared gradient under each sample's mask."""
        assert self._mask is not None
        if outputs.ndim != 2:
            raise RegularizationError(
                self,
                f"needs logits (B, C), got {tuple(outputs.shape)}",
                cure='signals=Signals(logits="module.<name>")',
            )
        return right_for_right_reasons(outputs, points, self._mask)
