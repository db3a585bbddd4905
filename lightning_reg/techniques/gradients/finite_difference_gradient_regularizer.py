"""Penalizes the norm of the gradient by the difference of two gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.weight_perturbation import Sharpness, WeightPerturbation

__all__ = ["FiniteDifferenceGradientRegularizer", "finite_difference_gradient"]

Difference = Literal["forward", "backward"]
_DIFFERENCES = ("forward", "backward")


def finite_difference_gradient(
    clean: Sequence[Tensor], moved: Sequence[Tensor], factor: Tensor | float
) -> list[Tensor]:
    """``g + f (g' - g)`` of each tensor, with ``f = gamma / epsilon``.

    With ``g' = dL/dw(w + epsilon g)`` it is the gradient of ``L + (gamma/2) ||dL/dw||^2`` up to
    terms of order ``epsilon``; for ``epsilon = gamma`` it is ``g'``, the gradient of SAM without a
    normalization. A negative ``epsilon`` takes the backward difference.

    Args:
        clean: ``g``, gradients at the weights.
        moved: ``g'``, those a step along (or against) ``g`` away.
        factor: ``f``.

    Returns:
        New gradients.
    """
    difference = torch._foreach_sub(list(moved), list(clean))
    torch._foreach_mul_(difference, factor)
    return list(torch._foreach_add(list(clean), difference))


class FiniteDifferenceGradientRegularizer(WeightPerturbation):
    r"""Gradient regularization by a finite difference, which costs one more pass and no memory.

    Karakida, Takase, Hayase, Osawa (2022), Understanding Gradient Regularization in Deep Learning:
    Efficient Finite-Difference Computation and Implicit Bias, arXiv:2210.02720.

    The optimizer gets the gradient of ``L + (gamma/2) ||g||^2``, ``g = dL/dw``, whose second term
    ``gamma H g`` is taken as ``(gamma/epsilon) (g(w + epsilon g) - g(w))`` (``"forward"``, one
    step of ascent) or ``(gamma/epsilon) (g(w) - g(w - epsilon g))`` (``"backward"``, a descent).
    The paper finds the forward difference with a large ``epsilon`` to generalize better than the
    exact term: it prefers flatter minima. At ``epsilon = gamma`` it is SAM without a
    normalization; Flooding alternates ascent and descent to a similar end.

    With ``relative=True`` the step has the length ``epsilon`` whatever the gradient's,
    ``epsilon g / ||g||``, as in JonasGeiping/fullbatchtraining (``fullbatch/models/modules.py``,
    ``GradRegularizer``, with 0.01), whose term ``(eta/4) s H g`` is ``gamma = eta s / 4`` here; the
    tests hold its value. The paper's formula is from memory; not checked against its own code, of
    which none was found. The defaults are ours.

    Args:
        strength: ``gamma``, at least 0.
        epsilon: the step, above 0.
        relative: whether ``epsilon`` is the step's length.
        difference: ``"forward"`` or ``"backward"``.
        sharpness: whose gradient is meant. ``"micro"``: that of each micro-batch on its rank;
            ``"rank"``: of a rank's whole accumulation window; ``"global"``: of all ranks' windows,
            the norm of the gradient that the optimizer steps with.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: if a second run of ``training_step`` gives another loss than the first,
            under manual optimization, and where weights are sharded over ranks.

    Note:
        ``reg/finite_difference_gradient_regularizer`` is the change of the loss by the step. Ranks:
        every rank takes the difference of its own gradients before they are averaged; with
        ``"global"`` after, so that N ranks train what one process does on the joined batch, at
        two more reductions of the size of the weights per optimizer step. Accumulation:
        ``"micro"`` treats each micro-batch by itself, the others keep the window's batches.
        Cost: one more forward and backward pass, and three copies of the gradients. Random
        numbers are the same in both passes; BatchNorm counts the first. Under fp16 the step is
        that of unscaled gradients.

        A small ``epsilon`` in float32 leaves rounding in the difference; a large product of
        ``epsilon`` and the gradient's norm leaves the range where the difference means a
        curvature.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import FiniteDifferenceGradientRegularizer
        >>> callback = FiniteDifferenceGradientRegularizer(0.01)
        >>> trainer = L.Trainer(callbacks=[callback], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Understanding Gradient Regularization in Deep Learning: Efficient Finite-Difference "
            "Computation and Implicit Bias",
            "Karakida et al.",
            2022,
            "2210.02720",
        ),
        Paper(
            "Stochastic Training is Not Necessary for Generalization",
            "Geiping et al.",
            2021,
            "2109.14119",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    sharded: ClassVar[bool | None] = False
    function: ClassVar[Callable[..., Any] | None] = staticmethod(finite_difference_gradient)
    explanation: ClassVar[str] = "adds the difference of gradients a step apart"

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        epsilon: float = 0.05,
        relative: bool = False,
        difference: Difference = "forward",
        sharpness: Sharpness = "micro",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, sharpness=sharpness, name=name)
        kind = type(self).__name__
        infinite = float("inf")
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, infinite, cure=f"{kind}(0.01)")
        check_range(
            self, "epsilon", epsilon, 0, infinite, low_open=True, high_open=True, cure=f"{kind}()"
        )
        if difference not in _DIFFERENCES:
            problem = f"`difference` must be one of {', '.join(_DIFFERENCES)}, got {difference!r}"
            raise ArgumentError(self, problem, cure=f'{kind}(difference="forward")')
        self.epsilon = epsilon
        self.relative = relative
        self.difference = difference
        self._factor: Tensor | float = 0.0

    def perturbation(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], strength: float
    ) -> list[Tensor]:
        """A step along the gradient, or against it."""
        step: Tensor | float = self.epsilon if self.difference == "forward" else -self.epsilon
        if self.relative:
            norms = torch.stack(torch._foreach_norm(list(gradients)))
            step = step / norms.square().sum().sqrt().clamp_min(torch.finfo(norms.dtype).tiny)
        # Of a gradient of zero nothing is left to amplify.
        self._factor = strength / step
        return list(torch._foreach_mul(list(gradients), step))

    @property
    def combines(self) -> bool:
        """Always: the optimizer gets both gradients."""
        return True

    def combine(
        self, weights: list[nn.Parameter], clean: list[Tensor], perturbed: list[Tensor]
    ) -> list[Tensor]:
        """The gradient of the penalized loss."""
        return finite_difference_gradient(clean, perturbed, self._factor)
