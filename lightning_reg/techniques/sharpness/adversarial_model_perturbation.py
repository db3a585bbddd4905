"""Follows the gradient at adversarially perturbed weights, whose distance is clipped, not fixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.engine.errors import check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.weight_perturbation import Sharpness, WeightPerturbation


def adversarial_model_perturbation(
    displacement: Sequence[Tensor], epsilon: float = 0.5, *, per_tensor: bool = True
) -> list[Tensor]:
    r"""Clips displacements of weights to the ball of radius ``epsilon``.

    .. math:: \mathrm{clip}_\epsilon(d) = d \min(1, \epsilon / \lVert d \rVert_2)

    Args:
        displacement: one tensor a weight, of any shapes; after the first ascent step
            :math:`\zeta g`.
        epsilon: the radius.
        per_tensor: one ball for each tensor, or one for all of them together.

    Returns:
        The clipped displacements, in their shapes and dtypes.
    """
    displacement = list(displacement)
    # In half precision the norm of many gradients overflows.
    dtype = torch.promote_types(displacement[0].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm(displacement, 2, dtype=dtype))
    if not per_tensor:
        norms = torch.linalg.vector_norm(norms).expand_as(norms)
    factors = (epsilon / (norms + 1e-12)).clamp(max=1.0)
    return list(torch._foreach_mul(displacement, list(factors.unbind())))  # type: ignore[arg-type]


class AdversarialModelPerturbation(WeightPerturbation):
    r"""Adversarial model perturbation, AMP (Zheng et al. 2020, arXiv:2010.04925).

    The gradient that the optimizer gets is taken at :math:`w + d`, where :math:`d` starts at 0
    and takes ``steps`` steps

    .. math:: d \leftarrow \mathrm{clip}_\epsilon(d + \zeta \nabla L(w + d)), \qquad
        \mathrm{clip}_\epsilon(d) = d \min(1, \epsilon / \lVert d \rVert_2)

    Unlike SAM's, the perturbation vanishes with the gradient. The gradient is not passed through
    :math:`d`. The logged value is :math:`L(w + d) - L(w)`, in the unit of the loss.

    The paper speaks of one ball for all weights. Its code (hiyouga/AMP-Regularizer, ``amp.py``)
    clips each parameter tensor to :math:`\epsilon` by itself, and its settings were found with
    that: we follow the code; ``per_tensor=False`` gives the one ball. Defaults are those of the
    code's ``main.py`` and ``AMP``.

    Args:
        epsilon: the radius; a number or a :class:`Schedule`. 0 turns AMP off.
        inner_lr: :math:`\zeta`, the learning rate of the ascent.
        steps: ascent steps.
        per_tensor: clip each parameter by itself, or all together.
        sharpness: whose gradient gives :math:`d`. ``"micro"``: each micro-batch's on its rank, as
            the code does; ``"rank"``: that of a rank's whole accumulation window; ``"global"``:
            that of all ranks' windows.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``epsilon`` or ``inner_lr`` is negative, or ``steps`` or ``sharpness``
            has no meaning.
        UnsupportedError: if a second run of ``training_step`` gives another loss than the first,
            under manual optimization; where FSDP2 shards weights (``ModelParallelStrategy``) for
            ``sharpness`` other than ``"global"``, and under other strategies that shard them.

    Note:
        Ranks: every rank perturbs its own replica and puts the saved bits back, so replicas stay
        equal. With ``"global"`` N ranks train what one process does on the joined batch, at
        ``steps`` more reductions of the size of the weights per optimizer step.
        Accumulation: ``"micro"`` perturbs each micro-batch by itself; with ``"rank"`` and
        ``"global"`` N micro-batches equal one N times larger batch. These two keep the batches
        of the window in memory until its end, and take its second pass in the last micro-batch.
        Cost: ``steps`` more forward and backward passes a micro-batch; one copy of the weights,
        and one of the gradients while both passes run, plus one for a window. The first step of
        a run takes one more pass, to see whether ``training_step`` can be repeated.
        It hurts where the loss is scaled: :math:`\zeta g`, unlike SAM's step, grows with it.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AdversarialModelPerturbation
        >>> trainer = L.Trainer(callbacks=[AdversarialModelPerturbation(0.5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Regularizing Neural Networks via Adversarial Model Perturbation",
            "Zheng et al.",
            2020,
            "2010.04925",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    function = staticmethod(adversarial_model_perturbation)
    explanation: ClassVar[str] = "the gradient is taken at w + clip(inner_lr * g)"

    def __init__(
        self,
        epsilon: float | Schedule = 0.5,
        *,
        inner_lr: float = 1.0,
        steps: int = 1,
        per_tensor: bool = True,
        sharpness: Sharpness = "micro",
        name: str | None = None,
    ) -> None:
        cure = "AdversarialModelPerturbation(epsilon=0.5, inner_lr=1.0)"
        infinite = float("inf")
        if not isinstance(epsilon, Schedule):
            check_range(self, "epsilon", epsilon, 0, infinite, high_open=True, cure=cure)
        check_range(self, "inner_lr", inner_lr, 0, infinite, high_open=True, cure=cure)
        super().__init__(epsilon, sharpness=sharpness, steps=steps, name=name)
        self.inner_lr = inner_lr
        self.per_tensor = per_tensor

    def perturbation(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], strength: float
    ) -> list[Tensor]:
        """One ascent step, before it is clipped."""
        return list(torch._foreach_mul(list(gradients), self.inner_lr))

    def constrain(self, displacement: list[Tensor], strength: float) -> list[Tensor]:
        """Clip the way so far."""
        return adversarial_model_perturbation(displacement, strength, per_tensor=self.per_tensor)


__all__ = ["AdversarialModelPerturbation", "adversarial_model_perturbation"]
