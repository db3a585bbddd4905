"""Keeps the loss linear around training inputs while training on single-step attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.criterion import (
    as_distribution,
    flatten,
    labelled,
    soft_cross_entropy,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.random import stream
from lightning_reg.mechanisms.adversarial_inputs import AdversarialInputs, Norm

__all__ = ["ELLE", "elle"]


def elle(first: Tensor, second: Tensor, between: Tensor, alpha: Tensor) -> Tensor:
    """``(l(x_c) - (1 - alpha) l(x_a) - alpha l(x_b))^2`` of each sample.

    The squared error of linear interpolation at ``x_c = (1 - alpha) x_a + alpha x_b``: 0 for a
    loss that is linear on the line from ``x_a`` to ``x_b``.

    Args:
        first: ``l(x_a)`` (B,).
        second: ``l(x_b)`` (B,).
        between: ``l(x_c)`` (B,).
        alpha: (B,), in [0, 1].

    Returns:
        (B,), in squared units of the loss.
    """
    return (between - (1 - alpha) * first - alpha * second).square()


class ELLE(AdversarialInputs):
    """Single-step adversarial training without catastrophic overfitting, by local linearity.

    Abad Rocamora, Liu, Chrysos, Olmos, Cevher (2024), Efficient local linearity regularization to
    overcome catastrophic overfitting, arXiv:2401.11618.

    Brings the attack with it: the loss is that of :class:`AdversarialTraining` at ``x + d``, plus
    ``lambda E (l(x_c) - (1 - alpha) l(x_a) - alpha l(x_b))^2`` with ``x_a, x_b`` uniform in the
    ball of radius ``epsilon`` around ``x``, ``alpha`` uniform in [0, 1], ``x_c = (1 - alpha) x_a +
    alpha x_b``, and the cross-entropy ``l`` of each sample. A single step of an attack is only
    the worst point if the loss is linear in the ball, and it needs no second derivative to say
    that it is not.

    ``adaptive=True`` is ELLE-A: ``lambda`` becomes ``strength`` when the error exceeds the mean of
    its past values by ``sensitivity`` of their standard deviations (from the fourth value on), and
    otherwise shrinks by ``decay`` a step. It starts at ``strength`` here; in the released code the
    start is an argument of its own.

    Confirmed against LIONS-EPFL/ELLE (``core/utils/train.py``), whose value and gradient are in
    the tests; ``decay`` 0.99 and ``sensitivity`` 2 are its defaults. There the three points
    go through the network as one batch of 3B, so that BatchNorm sees them together; here they are
    three passes, after the attack's, in float32 also under mixed precision, where squared
    differences of rounded losses would be noise. ``x_c`` is not clamped to valid inputs, as
    there. The default strength 4000 is from memory of the paper's CIFAR-10 settings, not checked:
    it depends on ``epsilon``, since the error of a curved loss grows with its fourth power.

    Args:
        strength: ``lambda``, at least 0; at 0 plain single-step training is left.
        epsilon: the radius of attack and triplets, in the inputs' own unit; 0 turns all off.
        adaptive: change ``lambda`` as above.
        decay: of ``lambda`` per micro-batch without alarm, in (0, 1].
        sensitivity: standard deviations that raise the alarm, at least 0.
        step_size: of the attack; see AdversarialTraining.
        norm: ``"linf"`` or ``"l2"``.
        random_start: the radius of the attack's random start, in units of ``epsilon``; the
            paper's N-FGSM is ``random_start=2.0, project=False``.
        project: bring steps back into the ball.
        bounds: the least and the largest valid input, for the attack.
        signals: where ``inputs``, ``targets`` and ``logits`` are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if logits are not (B, C).
        UnsupportedError: if inputs are integers, under manual optimization, and where weights are
            sharded over ranks.

    Note:
        The log shows the error ``E``, and for ELLE-A ``lambda`` as ``reg/elle_lambda``. Over
        ranks: global; the error is the mean over all ranks' samples, which moves ``lambda`` alike
        everywhere, for one all-reduce of two numbers; each rank draws its own triplets. ELLE-A
        moves ``lambda`` in each micro-batch, and a loss that is not finite leaves it alone.
        Cost: single-step training (one more forward and backward pass), and three forward passes
        with their backward; no second derivative.

        It costs clean accuracy where the loss has to bend inside the ball.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ELLE
        >>> trainer = L.Trainer(callbacks=[ELLE(4000.0, adaptive=True)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Efficient local linearity regularization to overcome catastrophic overfitting",
            "Abad Rocamora et al.",
            2024,
            "2401.11618",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits", "targets"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "semantics": "each rank draws its own triplets",
        "accumulation": "each micro-batch draws its own triplets",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(elle)
    explanation: ClassVar[str] = "trains at inputs + d, with the loss kept linear around the inputs"

    def __init__(
        self,
        strength: float | Schedule = 4000.0,
        *,
        epsilon: float = 8 / 255,
        adaptive: bool = False,
        decay: float = 0.99,
        sensitivity: float = 2.0,
        step_size: float | None = None,
        norm: Norm = "linf",
        random_start: float = 0.0,
        project: bool = True,
        bounds: Sequence[float] | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            epsilon=epsilon,
            step_size=step_size,
            norm=norm,
            random_start=random_start,
            project=project,
            bounds=bounds,
            signals=signals,
            name=name,
        )
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="ELLE(4000.0)")
        check_range(self, "decay", decay, 0, 1, low_open=True, cure="ELLE(decay=0.99)")
        check_range(self, "sensitivity", sensitivity, 0, cure="ELLE(sensitivity=2.0)")
        self.adaptive = adaptive
        self.decay = decay
        self.sensitivity = sensitivity
        # lambda / strength, and the number, mean and squared deviations of past errors.
        self._state = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)

    def penalty(self, step: Step) -> Tensor | None:
        """Phase 4: the error of interpolation, in the pass that is trained."""
        if self.attacking(step) or step.strength(self) == 0:
            return None
        error = step.comm.mean(self._errors(step))
        step.asked_by(self).log(self, error.detach())
        if not self.adaptive:
            return error
        share = self._adapt(step, error.detach())
        step.log(self, share * step.strength(self), "lambda")
        return error * share.to(error)

    def state_dict(self) -> dict[str, Any]:
        """Where ELLE-A is."""
        return {"state": self._state.clone()} if self.adaptive else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        if "state" in state_dict:
            self._state = state_dict["state"].clone()

    def _errors(self, step: Step) -> Tensor:
        clean, moved = self.clean_inputs(step), step.inputs
        generator = stream(step.device, step.rng(self).initial_seed(), "triplets")
        noise = [self.attack.noise(clean, self.epsilon, generator) for _ in range(2)]
        alpha = torch.rand(len(clean), generator=generator, device=clean.device)
        share = alpha.to(clean).view(-1, *[1] * (clean.ndim - 1))
        first, second = clean + noise[0], clean + noise[1]
        points = (first, second, (1 - share) * first + share * second)
        ends, others, between = (self._losses_at(step, point) for point in points)
        step.asked_by(self).inputs = moved
        classes = step.asked_by(self).logits.shape[-1]
        alpha = labelled(alpha.to(between), torch.as_tensor(step.targets), classes)
        return elle(ends, others, between, alpha)

    def _losses_at(self, step: Step, points: Tensor) -> Tensor:
        targets, soft = torch.as_tensor(step.targets), step.target_distribution
        step.asked_by(self).inputs = points
        return step.rerun(lambda: self._losses(step.asked_by(self).logits, targets, soft))

    def _losses(self, logits: Tensor, targets: Tensor, soft: Tensor | None) -> Tensor:
        if logits.ndim != 2:
            raise RegularizationError(
                self,
                f"compares one loss per sample and needs logits (B, C), got {tuple(logits.shape)}",
                cure='signals=Signals(logits="module.<name>")',
            )
        # A sample without a label has no loss.
        rows, labels = flatten(logits, targets)
        return soft_cross_entropy(rows, as_distribution(labels if soft is None else soft, rows))

    def _adapt(self, step: Step, error: Tensor) -> Tensor:
        """The new ``lambda / strength``; compared with past errors, which the present one joins."""
        share, count, mean, squares = self._state.to(error.device).unbind()
        value = error.double()
        deviation = (squares / count.clamp_min(1)).sqrt()
        alarm = (count > 2) & (value > mean + self.sensitivity * deviation)
        new_share = torch.where(alarm, 1.0, share * self.decay)
        gap = value - mean
        new_mean = mean + gap / (count + 1)
        moved = torch.stack([new_share, count + 1, new_mean, squares + gap * (value - new_mean)])
        before = self._state.to(error.device)
        after = torch.where(torch.isfinite(value), moved, before)
        # A pass at other weights (SAM) reads the same lambda: errors count once a micro-batch.
        if self.name not in step.kept.get("adapted", ()):
            step.kept["adapted"] = (*step.kept.get("adapted", ()), self.name)
            self._state = after
        return self._state[0]
