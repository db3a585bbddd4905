"""Follows the gradient at the worst weights nearby, so that training ends in a flat minimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.normalized_ascent import NormalizedAscent, normalized_ascent
from lightning_reg.mechanisms.weight_perturbation import Sharpness


def sam_perturbation(
    gradients: Sequence[Tensor],
    rho: float = 0.05,
    *,
    weights: Sequence[Tensor | None] | None = None,
    eta: float = 0.01,
) -> list[Tensor]:
    r"""The step of size ``rho`` that raises the loss most, to first order.

    .. math:: e = \rho \frac{T^2 g}{\lVert T g \rVert_2}, \qquad T = 1 \text{ or } |w| + \eta

    The norm is one over all tensors. With :math:`T = |w| + \eta` (ASAM) the neighbourhood is
    scaled by the weights: :math:`\lVert T^{-1} e \rVert_2 = \rho`.

    Args:
        gradients: one gradient a weight, of any shapes.
        rho: the size of the step.
        weights: ``None`` for SAM. For ASAM one tensor a gradient, of its shape; ``None`` in the
            place of a parameter that is not scaled (:math:`T = 1`).
        eta: keeps the scale of weights near 0 away from 0.

    Returns:
        One displacement a gradient, in its shape and dtype, detached; zeros for zero gradients.
    """
    return normalized_ascent(gradients, rho, weights=weights, eta=eta)


class SAM(NormalizedAscent):
    r"""SAM (Foret et al. 2021, arXiv:2010.01412) and its adaptive form ASAM (Kwon et al. 2021).

    The gradient that the optimizer gets is taken at :math:`w + e` instead of :math:`w`, where

    .. math:: e = \rho \frac{T^2 g}{\lVert T g \rVert_2}, \quad g = \nabla L(w)

    with one norm over all parameters; :math:`T = 1`, or with ``adaptive=True``
    :math:`T = |w| + \eta` for parameters whose name contains ``weight``, 1 for the others
    (biases). The gradient is not passed through :math:`e`. ``reg/sam`` is
    :math:`L(w + e) - L(w)`, in the unit of the loss.

    Formulas, and the rule by names, are those of SamsungLabs/ASAM (``asam.py``), whose defaults
    for ASAM are ``rho=0.5, eta=0.01``; SAM agrees with google-research/sam and with
    davda54/sam, whose default ``rho=0.05`` is ours. With ``steps`` above 1, each step has the
    size :math:`\rho /` ``steps`` and starts where the last one ended, so that the sum stays
    within :math:`\rho`; the sources have one step only.

    Args:
        rho: the radius; a number or a :class:`Schedule`. 0 turns SAM off.
        adaptive: scale the neighbourhood by the weights (ASAM); take ``rho`` about 10 times
            larger then.
        eta: ASAM's floor for the scale of a weight.
        sharpness: whose gradient gives :math:`e`. ``"micro"``: each micro-batch's on its rank
            (m-sharpness, which the paper finds to work best); ``"rank"``: that of a rank's whole
            accumulation window; ``"global"``: that of all ranks' windows.
        steps: ascent steps.
        interval: perturb in every n-th optimizer step only; the others are plain steps.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``rho`` or ``eta`` is negative, or ``sharpness``, ``steps`` or
            ``interval`` has no meaning.
        UnsupportedError: if a second run of ``training_step`` gives another loss than the first,
            under manual optimization; where FSDP2 shards weights (``ModelParallelStrategy``) for
            ``sharpness`` other than ``"global"``, and under other strategies that shard them.

    Note:
        Ranks: every rank perturbs its own replica and puts the saved bits back, so replicas stay
        equal. With ``"global"`` N ranks train what one process does on the joined batch, at one
        more reduction of the size of the weights per optimizer step. Where FSDP2 shards weights,
        ``"global"`` is the only choice: gradients are averaged over ranks as they are made. The
        first pass is a whole backward there, and the norm is still that of all weights.
        Accumulation: ``"micro"`` perturbs each micro-batch by itself; with ``"rank"`` and
        ``"global"`` N micro-batches equal one N times larger batch. These two keep the batches
        of the window in memory until its end, and take its second pass in the last micro-batch.
        Cost: ``steps`` more forward and backward passes a micro-batch, ``"rank"`` and
        ``"global"`` not more; one copy of the weights, and one of the gradients while both
        passes run, plus one for a window. The first step of a run takes one more pass, to see
        whether ``training_step`` can be repeated.
        Random numbers (dropout) are the same in both passes; logs, metrics and BatchNorm
        statistics count the first one, at the clean weights.
        It hurts where time matters more than accuracy, with a ``rho`` too large for the
        learning rate (underfitting), and in bfloat16 weights, where a displacement below a
        weight's rounding is lost.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SAM
        >>> trainer = L.Trainer(callbacks=[SAM(rho=0.05)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Sharpness-Aware Minimization for Efficiently Improving Generalization",
            "Foret et al.",
            2021,
            "2010.01412",
        ),
        Paper(
            "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep "
            "Neural Networks",
            "Kwon et al.",
            2021,
            "2102.11600",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    function = staticmethod(sam_perturbation)
    exemptions: ClassVar[Mapping[str, str]] = {
        "gradient": "the method takes the perturbation as a constant: no gradient passes through it"
    }
    explanation: ClassVar[str] = "the gradient is taken at w + rho * g / ||g||"

    def __init__(
        self,
        rho: float | Schedule = 0.05,
        *,
        adaptive: bool = False,
        eta: float = 0.01,
        sharpness: Sharpness = "micro",
        steps: int = 1,
        interval: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(
            rho,
            adaptive=adaptive,
            eta=eta,
            sharpness=sharpness,
            steps=steps,
            interval=interval,
            name=name,
        )


__all__ = ["SAM", "sam_perturbation"]
