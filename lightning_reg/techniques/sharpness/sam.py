"""Follows the gradient at the worst weights nearby, so that training ends in a flat minimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.errors import check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.weight_perturbation import Sharpness, WeightPerturbation


@torch.no_grad()
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
    scaled = [i for i, w in enumerate(weights or ()) if w is not None]
    scales = _scales([weights[i] for i in scaled], eta) if weights is not None else []
    directions = _times(list(gradients), scaled, scales)
    # In half precision the norm of many gradients overflows.
    dtype = torch.promote_types(directions[0].dtype, torch.float32)
    norms = torch._foreach_norm(directions, 2, dtype=dtype)
    factor = rho / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-12)
    return list(torch._foreach_mul(_times(directions, scaled, scales), factor))


def _scales(weights: Sequence[Tensor | None], eta: float) -> list[Tensor]:
    magnitudes = torch._foreach_abs([w for w in weights if w is not None])
    return list(torch._foreach_add(magnitudes, eta)) if magnitudes else []


def _times(tensors: list[Tensor], indices: list[int], scales: list[Tensor]) -> list[Tensor]:
    """``tensors`` with those at ``indices`` multiplied by their scales."""
    if not indices:
        return tensors
    products = torch._foreach_mul([tensors[i] for i in indices], scales)  # type: ignore[arg-type]
    result = list(tensors)
    for index, product in zip(indices, products, strict=True):
        result[index] = product
    return result


class SAM(WeightPerturbation):
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
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``rho`` or ``eta`` is negative, or ``sharpness`` or ``steps`` has no
            meaning.
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
        name: str | None = None,
    ) -> None:
        if not isinstance(rho, Schedule):
            check_range(
                self, "rho", rho, low=0, high=float("inf"), high_open=True, cure="SAM(0.05)"
            )
        super().__init__(rho, sharpness=sharpness, steps=steps, name=name)
        check_range(
            self, "eta", eta, low=0, high=float("inf"), high_open=True, cure="SAM(eta=0.01)"
        )
        self.adaptive = adaptive
        self.eta = eta
        self._scaled: set[int] = set()

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which parameters are weights by name."""
        named = pl_module.named_parameters()
        self._scaled = {id(p) for n, p in named if "weight" in n} if self.adaptive else set()

    def perturbation(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], strength: float
    ) -> list[Tensor]:
        """One ascent step."""
        rho = strength / self.steps
        if not self.adaptive:
            return sam_perturbation(gradients, rho)
        scaled = [w if id(w) in self._scaled else None for w in weights]
        return sam_perturbation(gradients, rho, weights=scaled, eta=self.eta)


__all__ = ["SAM", "sam_perturbation"]
