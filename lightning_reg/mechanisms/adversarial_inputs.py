"""Training on inputs that were moved, within a ball, to where the loss is larger.

A technique says what becomes of the losses (:meth:`AdversarialInputs.combine`) or adds a penalty
of its own in phase 4 of the pass at the adversarial inputs (``attacking`` is then false). One that
raises or trains something else than the loss says so (:meth:`AdversarialInputs.objective`,
:meth:`AdversarialInputs.evaluate`). The mechanism takes care of

- the attack (:class:`Attack`): a start inside the ball, steps along the gradient by the inputs,
  the way back into the ball and into the range of valid inputs;
- the gradient: ``autograd.grad`` by the inputs alone, once a step, so neither ``.grad`` nor the
  hooks of any DDP variant notice, and accumulation goes on as before; taken through the scale of
  fp16, and where it is not finite the sample stays where it is;
- the passes: the user's own step is the first one, at the start of the attack, so that a
  single-step attack costs one extra forward and backward; random numbers (dropout) are the same
  in all passes; logs, metrics and BatchNorm's running statistics count the first one only;
- the rest of the run: other techniques' losses and penalties are part of what is attacked and of
  what is trained, and a second pass of theirs (SAM) finds the adversarial inputs in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError, UnsupportedError, check_range
from lightning_reg.engine.step import RunContext
from lightning_reg.engine.technique import Semantics

Norm = Literal["linf", "l2"]
Labels = Literal["true", "predicted"]
Bounds = tuple[float, float] | None
_NORMS = ("linf", "l2")
_LABELS = ("true", "predicted")


@dataclass(frozen=True)
class Attack:
    """Steps towards a larger loss inside a ball around each input.

    Attributes:
        epsilon: the radius, in the inputs' own unit.
        step_size: the length of a step; ``None`` takes ``epsilon`` without a random start and
            ``1.25 * epsilon`` with one for a single step, ``2.5 * epsilon / steps`` for more.
        steps: how many steps.
        norm: of the ball: ``"linf"`` or ``"l2"``.
        random_start: the radius of the random start, in units of ``epsilon``; 0 starts at the
            input itself.
        project: whether a step that leaves the ball is brought back into it.
        bounds: the least and the largest valid input.
    """

    epsilon: float
    step_size: float | None = None
    steps: int = 1
    norm: Norm = "linf"
    random_start: float = 0.0
    project: bool = True
    bounds: Bounds = None

    @property
    def length(self) -> float:
        """The length of a step."""
        if self.step_size is not None:
            return self.step_size
        if self.steps > 1:
            return 2.5 * self.epsilon / self.steps
        return self.epsilon * (1.25 if self.random_start and self.project else 1.0)

    def start(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point (B, ...) in the ball around each input, or the inputs."""
        radius = self.random_start * self.epsilon
        if radius == 0:
            return inputs
        return self._valid(inputs + self.noise(inputs, radius, generator))

    def noise(self, inputs: Tensor, radius: float, generator: torch.Generator | None) -> Tensor:
        """A uniform draw from the ball of ``radius``, of the inputs' shape."""
        like: Any = {"generator": generator, "device": inputs.device, "dtype": inputs.dtype}
        if self.norm == "linf":
            uniform: Tensor = torch.rand(inputs.shape, **like)
            return radius * (2 * uniform - 1)
        normal: Tensor = torch.randn(inputs.shape, **like)
        share: Tensor = torch.rand(len(inputs), **like)
        return radius * share.pow(1 / inputs[0].numel()).view(_column(inputs)) * _unit(normal)

    def step(self, inputs: Tensor, points: Tensor, gradient: Tensor) -> Tensor:
        """``points`` one step further along ``gradient``, all (B, ...), without a graph."""
        gradient = gradient.to(points.dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        direction = gradient.sign() if self.norm == "linf" else _unit(gradient)
        moved = points.detach() + self.length * direction - inputs
        if self.project:
            moved = self._into_ball(moved)
        return self._valid(inputs + moved).detach()

    def _into_ball(self, moved: Tensor) -> Tensor:
        if self.norm == "linf":
            return moved.clamp(-self.epsilon, self.epsilon)
        return moved * (self.epsilon / _lengths(moved).clamp_min(self.epsilon))

    def _valid(self, points: Tensor) -> Tensor:
        return points if self.bounds is None else points.clamp(*self.bounds)


def check_attack(owner: object, attack: Attack) -> None:
    """Raise :class:`ArgumentError` if a setting of the attack has no meaning."""
    name = owner if isinstance(owner, str) else type(owner).__name__
    infinite = float("inf")
    check_range(
        owner, "epsilon", attack.epsilon, 0, infinite, high_open=True, cure=f"{name}(epsilon=0.1)"
    )
    if attack.step_size is not None:
        cure = f"{name}(step_size=0.01)"
        check_range(owner, "step_size", attack.step_size, 0, low_open=True, cure=cure)
    check_range(owner, "random_start", attack.random_start, 0, cure=f"{name}(random_start=1.0)")
    if not isinstance(attack.steps, int) or isinstance(attack.steps, bool) or attack.steps < 1:
        problem = f"`steps` must be a whole number from 1, got {attack.steps!r}"
        raise ArgumentError(owner, problem, cure=f"{name}(steps=1)")
    if attack.norm not in _NORMS:
        problem = f"`norm` must be one of {', '.join(_NORMS)}, got {attack.norm!r}"
        raise ArgumentError(owner, problem, cure=f'{name}(norm="linf")')
    bounds: Any = attack.bounds
    if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
        problem = f"`bounds` must be the least and the largest valid input, got {bounds!r}"
        raise ArgumentError(owner, problem, cure=f"{name}(bounds=(0.0, 1.0))")


@dataclass
class Attacked:
    """What is kept of one micro-batch: its clean inputs, and whether the pass is an attack's."""

    clean: Tensor
    attacking: bool = True


class AdversarialInputs(Regularizer):
    """Base of techniques that train on adversarial inputs.

    Args:
        strength: what the technique makes of it.
        epsilon: the radius of the ball, in the inputs' own unit; 0 turns the technique off.
        step_size: the length of a step; see :class:`Attack` for the default.
        steps: steps of the attack, each with a forward and a backward pass.
        norm: ``"linf"`` or ``"l2"``, over all numbers of one sample.
        random_start: the radius of the uniform random start in units of ``epsilon``.
        project: whether steps that leave the ball are brought back.
        bounds: the least and the largest valid input, ``(0, 1)`` for example.
        labels: ``"true"``: the attack raises the loss that is trained; ``"predicted"``: the
            cross-entropy of the class that the network predicts at the start.
        signals: where ``inputs`` (and ``logits``) are, if not in the usual places.
        name: the name in logs, checkpoints and random streams.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    reads: ClassVar[frozenset[str]] = frozenset({"inputs"})
    # Not "inputs": what mixes or cuts them comes first. "losses": in front of a second pass.
    writes: ClassVar[frozenset[str]] = frozenset({"adversarial_inputs", "losses"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"adversarial_inputs"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        epsilon: float,
        step_size: float | None = None,
        steps: int = 1,
        norm: Norm = "linf",
        random_start: float = 0.0,
        project: bool = True,
        bounds: Sequence[float] | None = None,
        labels: Labels = "true",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        limits: Any = bounds if bounds is None else tuple(bounds)
        self.attack = Attack(epsilon, step_size, steps, norm, random_start, project, limits)
        check_attack(self, self.attack)
        if labels not in _LABELS:
            problem = f"`labels` must be one of {', '.join(_LABELS)}, got {labels!r}"
            raise ArgumentError(self, problem, cure=f'{type(self).__name__}(labels="true")')
        self.labels = labels

    @property
    def epsilon(self) -> float:
        """The radius of the ball."""
        return self.attack.epsilon

    def active(self, context: RunContext) -> bool:
        """A ball without a radius moves nothing."""
        return self.epsilon > 0

    def keeps_clean(self, step: Step) -> bool:
        """Whether the loss at the clean inputs is needed besides."""
        return False

    def combine(self, step: Step, clean: Tensor | None, adversarial: Tensor) -> Tensor:
        """The loss that is trained, of those at the clean (if kept) and adversarial inputs."""
        return adversarial

    def objective(self, step: Step) -> Tensor:
        """What the attack raises after its first step, at the inputs as they are now."""
        return step.rerun()

    def evaluate(self, step: Step) -> Tensor:
        """What is trained of the adversarial inputs, which are in place."""
        return step.rerun()

    def attacking(self, step: Step) -> bool:
        """Whether the pass under way only serves the attack: its penalties are not trained."""
        kept: Attacked = step.kept[self.name]
        return kept.attacking

    def clean_inputs(self, step: Step) -> Tensor:
        """The inputs of this micro-batch as they were before the attack."""
        kept: Attacked = step.kept[self.name]
        return kept.clean

    def transform_batch(self, step: Step) -> None:
        """Phase 1: the first pass is at the start of the attack, or at the clean inputs."""
        clean = self._checked(step.inputs).detach()
        step.kept[self.name] = Attacked(clean)
        start = clean if self.keeps_clean(step) else self._start(step, clean)
        step.inputs = start.detach().requires_grad_()

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        """Phase 5: the attack, then the pass that is trained."""
        kept: Attacked = step.kept[self.name]
        kept.attacking = True
        clean, classes = total, None
        if self.labels == "predicted":
            classes = step.logits.detach().argmax(1)
        moved = self.keeps_clean(step) and self.attack.random_start > 0
        if moved:
            step.inputs = self._start(step, kept.clean).requires_grad_()
            total = self._objective(step, classes)
        elif classes is not None:
            total = F.cross_entropy(step.logits, classes)
        points, first = step.inputs, (total if classes is None else clean).detach()
        for index in range(self.attack.steps):
            if index > 0:
                step.asked_by(self).inputs = points.requires_grad_()
                total = self._objective(step, classes)
            gradient = self._gradient(step, total, points)
            points = self.attack.step(kept.clean, points, gradient)
        step.asked_by(self).inputs = points
        kept.attacking = False
        adversarial = self.evaluate(step)
        step.asked_by(self)
        self.report(step, first, adversarial.detach())
        return self.combine(step, clean if self.keeps_clean(step) else None, adversarial)

    def report(self, step: Step, first: Tensor, adversarial: Tensor) -> None:
        """Log what is to be seen of the attack: losses at its start and end, without a graph."""

    def restore(self) -> None:
        """Nothing but the batch was moved."""

    def _start(self, step: Step, clean: Tensor) -> Tensor:
        return self.attack.start(clean, step.rng(self)).detach()

    def _objective(self, step: Step, classes: Tensor | None) -> Tensor:
        """What the attack raises, at the inputs as they are now."""
        if classes is None:
            return self.objective(step)
        return step.rerun(lambda: F.cross_entropy(step.asked_by(self).logits, classes))

    def _gradient(self, step: Step, total: Tensor, points: Tensor) -> Tensor:
        """By the inputs alone; the scale of fp16 stays in it, which no direction notices."""
        scaler = getattr(step.trainer.precision_plugin, "scaler", None)
        scaled = total if scaler is None else scaler.scale(total)
        found = None
        if scaled.requires_grad:
            (found,) = torch.autograd.grad(
                scaled, points, retain_graph=self.keeps_clean(step), allow_unused=True
            )
        if found is None:
            raise RegularizationError(
                self,
                "follows the gradient of the loss by the inputs, and found no path between them: "
                "something detached them, or they are not what the network saw",
                cure='signals=Signals(inputs="batch.<key>"), and no detach() or no_grad() between',
            )
        return found

    def _checked(self, inputs: Any) -> Tensor:
        if not isinstance(inputs, Tensor):
            raise RegularizationError(
                self,
                f"needs the inputs as one tensor, got {type(inputs).__name__}",
                cure='signals=Signals(inputs="batch.<key>")',
            )
        if not inputs.is_floating_point():
            raise UnsupportedError(
                self,
                f"moves the inputs along a gradient, and {inputs.dtype} has none; tokens and bytes "
                "have no small changes",
                cure='signals=Signals(inputs="batch.<key of a float tensor>")',
            )
        return inputs


def _column(inputs: Tensor) -> tuple[int, ...]:
    return (len(inputs), *[1] * (inputs.ndim - 1))


def _lengths(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors.flatten(1), dim=1)
    return lengths.view(_column(vectors))


def _unit(vectors: Tensor) -> Tensor:
    """Each sample at length one; zeros stay zeros."""
    # By the largest entry first: gradients of fitted samples are so small that squares vanish.
    tiny = torch.finfo(vectors.dtype).tiny
    largest = vectors.flatten(1).abs().amax(1).view(_column(vectors))
    scaled = vectors / largest.clamp_min(tiny)
    return scaled / _lengths(scaled).clamp_min(tiny)


__all__ = [
    "AdversarialInputs",
    "Attack",
    "Attacked",
    "Bounds",
    "Labels",
    "Norm",
    "check_attack",
]
