"""A lasso whose strength follows from the numbers of samples and of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.proximal_penalty import (
    ProximalMode,
    ProximalPenalty,
    soft_threshold,
)

__all__ = ["TheoryScaledL1", "theory_scaled_l1"]

Rule = Literal["lasso", "mixture"]
_RULES = ("lasso", "mixture")


def theory_scaled_l1(weight: Tensor, samples: int) -> Tensor:
    """``lambda(n, p) ||w||_1`` with ``lambda = sqrt(2 ln p / n)`` of a layer with ``p`` inputs.

    Args:
        weight: ``w`` (out, ...); everything behind the first dimension is an input.
        samples: ``n``, the size of the training set.

    Returns:
        A scalar, at least 0.
    """
    return _lasso_rate(samples, weight.flatten(1).shape[1]) * weight.abs().sum()


class TheoryScaledL1(ProximalPenalty):
    """A lasso whose strength follows from the numbers of samples and of inputs.

    Nguyen, Nguyen, Chamroukhi, McLachlan (2020), Non-asymptotic oracle inequalities for the Lasso
    in high-dimensional mixture of experts.

    ``R = sum_l lambda_l ||w_l||_1`` where ``lambda_l`` is of the size at which the lasso's error is
    that of an oracle which knows the right inputs, for ``n`` samples and ``p`` inputs of layer
    ``l``:

    - ``rule="lasso"``: ``sqrt(2 ln p / n)``, of a linear model with noise of deviation one;
    - ``rule="mixture"``: ``K B / sqrt(n) (q ln(n) sqrt(ln(2 p + 1)) + 1)``, the paper's lower
      bound for ``K`` experts with ``q`` outputs under a softmax gate.

    What is left to choose, ``strength``, does not change with the size of the data. The bound is
    made to hold with certainty, so the second rule is larger than what predicts best by far.

    The lasso's rate is the textbook's. The paper's bound is from memory of it and uncertain (its
    abstract says only that there is one): ``B`` collects bounds of its parameter space. Nothing is
    checked against code, of which none was found.

    Args:
        strength: ``kappa``, at least 0; for the lasso's rule the deviation of the noise, in
            units of the loss's targets for half the mean squared error.
        rule: ``"lasso"`` or ``"mixture"``.
        samples: ``n``, at least 2; ``None`` takes the size of the training dataset.
        experts: ``K``, from 1, for ``"mixture"``.
        outputs: ``q``, from 1, for ``"mixture"``.
        bound: ``B``, above 0, for ``"mixture"``.
        parameters: a regular expression on parameter names, or a ParameterSelection: those of the
            gate and of the experts. ``None`` takes the weights of all linear and convolutional
            layers.
        mode: ``"proximal"`` soft-thresholds after the step, which gives exact zeros;
            ``"gradient"`` and ``"loss"`` follow the subgradient.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, no parameter is chosen, or the size of
            the training set is not known.

    Note:
        Over ranks: replica; nothing is communicated. The size of the training set is that of the
        dataset, whatever the number of ranks. Cost per optimizer step: two passes over the
        weights. The proximal step uses the learning rate of its parameter group; under Adam it
        leaves out the preconditioner, and thresholds in another metric than the loss is descended
        in. Inputs of different scale should be standardized first. The theory is of gates and
        experts that are linear in the inputs; in deep layers the rate is a rule of thumb.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import TheoryScaledL1
        >>> trainer = L.Trainer(callbacks=[TheoryScaledL1(0.5, parameters="gate")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Non-asymptotic oracle inequalities for the Lasso in high-dimensional mixture of "
            "experts",
            "Nguyen et al.",
            2020,
            None,
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(theory_scaled_l1)
    explanation: ClassVar[str] = "a lasso of the strength that theory asks for"
    by_rows = True

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        rule: Rule = "lasso",
        samples: int | None = None,
        experts: int = 1,
        outputs: int = 1,
        bound: float = 1.0,
        parameters: str | ParameterSelection | None = None,
        mode: ProximalMode = "proximal",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="TheoryScaledL1(1.0)")
        if rule not in _RULES:
            raise ArgumentError(
                self,
                f"`rule` must be one of {', '.join(_RULES)}, got {rule!r}",
                cure='TheoryScaledL1(rule="lasso")',
            )
        if samples is not None:
            check_range(self, "samples", samples, 2, cure="TheoryScaledL1(samples=1000)")
        check_range(self, "experts", experts, 1, cure="TheoryScaledL1(experts=4)")
        check_range(self, "outputs", outputs, 1, cure="TheoryScaledL1(outputs=1)")
        check_range(self, "bound", bound, 0, low_open=True, cure="TheoryScaledL1(bound=1.0)")
        self.rule = rule
        self.samples = samples
        self.experts = experts
        self.outputs = outputs
        self.bound = bound
        self._samples = samples or 0

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask the training dataset for its size."""
        super().on_reference(trainer, pl_module)
        if self.samples is not None:
            return
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        size = len(dataset) if isinstance(dataset, Sized) else 0
        if size < 2:
            raise ArgumentError(
                self,
                "needs the size of the training set, which its dataset does not tell",
                cure="TheoryScaledL1(samples=1000)",
            )
        self._samples = size

    def rate(self, inputs: int) -> float:
        """``lambda`` of a layer with that many inputs."""
        if self.rule == "lasso":
            return _lasso_rate(self._samples, inputs)
        n, width = self._samples, math.sqrt(math.log(2 * inputs + 1))
        scale = self.experts * self.bound / math.sqrt(n)
        return scale * (self.outputs * math.log(n) * width + 1)

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack([self.rate(m.shape[1]) * m.abs().sum() for m in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Norms and signs, times the rates."""
        rates = [self.rate(m.shape[1]) for m in matrices]
        norms = torch._foreach_mul(torch._foreach_norm(list(matrices), 1), rates)
        return torch.stack(norms), self.gradients(matrices)

    def gradients(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Signs, times the rates."""
        signs = list(torch._foreach_sign(list(matrices)))
        torch._foreach_mul_(signs, [self.rate(m.shape[1]) for m in matrices])
        return signs

    def proximal_form(self, matrices: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """Soft-thresholded weights."""
        rates = [self.rate(m.shape[1]) for m in matrices]
        return soft_threshold(matrices, [t * r for t, r in zip(steps, rates, strict=True)])


def _lasso_rate(samples: int, inputs: int) -> float:
    # A single input is chosen among nothing, and still has noise.
    return math.sqrt(2 * math.log(max(inputs, 2)) / samples)
