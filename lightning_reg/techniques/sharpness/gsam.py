"""Follows the gradient at the worst weights nearby, and narrows its gap to the loss in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine.errors import check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.normalized_ascent import NormalizedAscent, joint_dot, joint_norm
from lightning_reg.mechanisms.weight_perturbation import Sharpness

_EPSILON = 1e-12


def gsam_gradient(
    clean: Sequence[Tensor], perturbed: Sequence[Tensor], alpha: float = 0.4
) -> list[Tensor]:
    r"""The perturbed gradient less the part of the clean one that is orthogonal to it.

    .. math:: g_p - \alpha g_\perp, \qquad
        g_\perp = g - \frac{\langle g, g_p \rangle}{\lVert g_p \rVert^2} g_p

    Norms and the inner product are over all tensors together.

    Args:
        clean: the gradient :math:`g` at the weights, one tensor a weight.
        perturbed: the gradient :math:`g_p` at the perturbed weights, in the same shapes.
        alpha: the share.

    Returns:
        One tensor a weight; for a vanishing ``perturbed`` that is ``-alpha * clean``.
    """
    sizes = joint_norm(clean), joint_norm(perturbed)
    cosine = joint_dot(clean, perturbed) / (sizes[0] * sizes[1] + _EPSILON)
    along = cosine * sizes[0] / (sizes[1] + _EPSILON)
    grown = torch._foreach_mul(list(perturbed), [1 + alpha * along] * len(perturbed))
    return list(torch._foreach_add(grown, list(clean), alpha=-alpha))


class GSAM(NormalizedAscent):
    r"""GSAM, surrogate gap guided sharpness-aware minimization (Zhuang et al. 2022).

    SAM lowers the loss :math:`L_p` at the perturbed weights, which a sharp minimum can have as
    well if its loss is low. GSAM lowers the surrogate gap :math:`h = L_p - L` too, without
    touching :math:`L_p`: it descends :math:`L_p` and ascends :math:`L` in what of its gradient is
    orthogonal to that of :math:`L_p`:

    .. math:: g_p - \alpha g_\perp, \qquad g_p = \nabla L(w + e), \quad
        g_\perp = g - \frac{\langle g, g_p \rangle}{\lVert g_p \rVert^2} g_p, \quad
        e = \rho \frac{g}{\lVert g \rVert_2}

    Confirmed with the official code (juntang-zhuang/GSAM, ``gsam/gsam.py``), whose example has
    ``alpha=0.4``. There ``rho`` follows the learning rate: give a :class:`Schedule` of the same
    shape. Its adaptive form scales all parameters by :math:`|w|`; ours is ASAM's, weights by
    :math:`|w| + \eta` and biases not. ``reg/gsam`` is the surrogate gap
    :math:`L(w + e) - L(w)`, in the unit of the loss.

    Args:
        rho: the radius; a number or a :class:`Schedule`. 0 turns GSAM off.
        alpha: the share of the orthogonal part, at least 0; 0 is SAM, bit for bit.
        adaptive: scale the neighbourhood by the weights (ASAM).
        eta: the floor of that scale.
        sharpness: whose gradients are meant. ``"micro"``: those of each micro-batch on its rank,
            as in the official code; ``"rank"``: of a rank's whole accumulation window;
            ``"global"``: of all ranks' windows.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``rho``, ``alpha`` or ``eta`` is negative, or ``sharpness`` has no
            meaning.
        UnsupportedError: if a second run of ``training_step`` gives another loss than the first,
            under manual optimization, and where weights are sharded over ranks.

    Note:
        Ranks: gradients are split before they are averaged, as in the official code; with
        ``"global"`` after, so that N ranks train what one process does on the joined batch, at
        two more reductions of the size of the weights per optimizer step. Accumulation:
        ``"micro"`` splits each micro-batch's gradients by themselves; the others keep the batches
        of the window in memory until its end.
        Cost: one more forward and backward pass, as SAM; three copies of the gradients, one inner
        product and two norms. DDP's reduction runs after the second backward and not along with
        it. It hurts where SAM does, and with a large ``alpha`` early in training, where it slows
        down the descent.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import GSAM
        >>> trainer = L.Trainer(callbacks=[GSAM(rho=0.05, alpha=0.4)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Surrogate Gap Minimization Improves Sharpness-Aware Training",
            "Zhuang et al.",
            2022,
            "2203.08065",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    sharded: ClassVar[bool | None] = False
    function = staticmethod(gsam_gradient)
    explanation: ClassVar[str] = "g(w + e) less a share of g(w)'s part orthogonal to it"

    def __init__(
        self,
        rho: float | Schedule = 0.05,
        *,
        alpha: float = 0.4,
        adaptive: bool = False,
        eta: float = 0.01,
        sharpness: Sharpness = "micro",
        name: str | None = None,
    ) -> None:
        super().__init__(rho, adaptive=adaptive, eta=eta, sharpness=sharpness, name=name)
        check_range(
            self, "alpha", alpha, 0, float("inf"), high_open=True, cure="GSAM(0.05, alpha=0.4)"
        )
        self.alpha = alpha

    @property
    def combines(self) -> bool:
        """Without ``alpha`` it is SAM."""
        return self.alpha != 0

    def combine(
        self, weights: list[nn.Parameter], clean: list[Tensor], perturbed: list[Tensor]
    ) -> list[Tensor]:
        """Ascend the loss in place, orthogonally."""
        return gsam_gradient(clean, perturbed, self.alpha)


__all__ = ["GSAM", "gsam_gradient"]
