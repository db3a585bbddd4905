"""Distills a clean teacher on clean inputs and a robust one on adversarial inputs, in balance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import RunContext
from lightning_reg.mechanisms.adversarial_inputs import AdversarialInputs, Norm
from lightning_reg.mechanisms.divergence import tempered_divergence
from lightning_reg.mechanisms.given_teacher import GivenTeachers
from lightning_reg.mechanisms.output_penalty import softmax_entropy

__all__ = ["MTARD", "balanced_weights", "matched_temperatures", "mtard"]

_ROLES = ("clean_teacher", "robust_teacher")


def mtard(student: Tensor, teacher: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """``KL(softmax(t / tau) || softmax(s))`` of each row, in nats: the teacher alone is softened.

    Args:
        student: (N, C) logits ``s``.
        teacher: (N, C) logits ``t``; no gradient flows.
        temperature: ``tau``, above 0. No factor ``tau^2``.
    """
    return tempered_divergence(student, teacher / temperature, 1.0)


def matched_temperatures(
    temperatures: Tensor, entropies: Tensor, rate: float, low: float = 1.0, high: float = 10.0
) -> Tensor:
    """``tau_i <- clip(tau_i - r sign(H_i / H_j - 1), low, high)``: entropies move together.

    Args:
        temperatures: (K,) ``tau`` of the teachers.
        entropies: (K,) the mean entropy ``H`` of each at its temperature; with more than two,
            each is compared with the mean of the others.
        rate: ``r``.
        low: the least temperature.
        high: the largest.

    Returns:
        (K,).
    """
    others = (entropies.sum() - entropies) / (len(entropies) - 1)
    return (temperatures - rate * (entropies - others).sign()).clamp(low, high)


def balanced_weights(weights: Tensor, losses: Tensor, initial: Tensor, rate: float) -> Tensor:
    """``w_i <- w_i - r (w_i - l_i / sum_j l_j)`` with ``l = L / L(0)``, then to a sum of 1.

    What has come down the least gets the most weight. With constant losses the distance to the
    shares shrinks by ``1 - r`` each time.

    Args:
        weights: (K,) ``w``, a sum of 1.
        losses: (K,) ``L``, positive.
        initial: (K,) ``L(0)``, the losses in the first step.
        rate: ``r`` in [0, 1].

    Returns:
        (K,), at least 0.
    """
    relative = losses / initial
    moved = (weights - rate * (weights - relative / relative.sum())).clamp_min(0)
    return moved / moved.sum()


class MTARD(GivenTeachers, AdversarialInputs):
    """Learns accuracy from a clean teacher and robustness from a robust one (MTARD, B-MTARD).

    Zhao, Wang, Wei (2023), Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher
    Adversarial Distillation, arXiv:2306.16170.

    Adversarial training costs clean accuracy. Here two trained networks teach, each what it is
    good at: ``w_c KL(p_c(x) || q(x)) + w_r KL(p_r(x') || q(x'))`` with the student's ``q``,
    ``p = softmax(t / tau)``, and ``x'`` found by ascent of the training loss within ``epsilon``.
    Two balances keep either from taking over, once a step:

    - entropy (EBB): each ``tau`` moves by ``temperature_rate``, down where its teacher is the less
      certain one, so that both teach equally soft predictions; within ``temperature_bounds``;
    - loss (NLB): ``w`` moves by ``weight_rate`` to the shares of the losses, each divided by its
      value in the first step, so that both are learnt at one pace.

    Confirmed with the official code (zhaoshiji123/MTARD-extension,
    resnet18_mtard_cifar10.py): the student has no temperature, nothing is multiplied by ``tau^2``,
    temperatures move behind the loss of the step and weights in front of it; 10 steps of 2/255
    within 8/255; all rates and bounds. There losses are means over classes too, so ``1 / C`` of
    these, with 1e-5 inside the teacher's logarithm; the student attacks itself in eval mode, from
    a start of 0.001 times normal noise, here in train mode and from the input itself, which saves
    a pass; both rates fall by 10 with the learning rate: schedule the attributes.

    Args:
        strength: ``s`` in [0, 1]: the loss becomes ``(1 - s) L(x')`` plus ``s`` times the above.
            1, as in the paper, leaves no label but in the attack.
        clean_teacher: a network that is accurate on clean inputs.
        robust_teacher: one that is robust.
        epsilon: the radius of the ball, in the inputs' own unit; 0 turns the technique off.
        step_size: of the ascent.
        steps: ascent steps.
        norm: ``"linf"`` or ``"l2"``.
        random_start: the radius of a uniform random start in units of ``epsilon``, at the price
            of a pass.
        bounds: the least and the largest valid input; the official code has (0, 1).
        weight_rate: of the loss balance, in [0, 1]; 0 keeps equal weights.
        temperature_rate: of the entropy balance; 0 keeps both at the lower bound.
        temperature_bounds: the least and the largest temperature.
        signals: where ``inputs`` and ``logits`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: if logits are not (B, C), a teacher's are not of the student's shape,
            or a run resumes with another teacher.

    Note:
        Over ranks: global; both balances follow losses and entropies of all ranks' samples, and
        are equal on all of them, by one all-reduce of eight numbers a step. They are part of the
        checkpoint. A batch that is not finite moves neither. Under accumulation they move with
        each micro-batch. Cost: ``steps + 1`` forward and backward passes, and two forward passes
        of teachers. A second pass of another technique (SAM) sees the robust half only.

        It hurts where a teacher is worse than the labels; and robustness costs accuracy still.

    Example:
        >>> import lightning as L, torch
        >>> from lightning_reg import MTARD
        >>> clean, robust = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)  # trained networks
        >>> technique = MTARD(clean_teacher=clean, robust_teacher=robust, bounds=(0.0, 1.0))
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher Adversarial "
            "Distillation",
            "Zhao et al.",
            2023,
            "2306.16170",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "both balances move with each micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mtard)
    explanation: ClassVar[str] = "distills a clean and a robust teacher in balance"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        clean_teacher: nn.Module,
        robust_teacher: nn.Module,
        epsilon: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 10,
        norm: Norm = "linf",
        random_start: float = 0.0,
        bounds: Sequence[float] | None = None,
        weight_rate: float = 0.025,
        temperature_rate: float = 1e-3,
        temperature_bounds: Sequence[float] = (1.0, 10.0),
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            teachers={"clean_teacher": clean_teacher, "robust_teacher": robust_teacher},
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            norm=norm,
            random_start=random_start,
            bounds=bounds,
            signals=signals,
            name=name,
        )
        cure = "MTARD(1.0, clean_teacher=one, robust_teacher=other, weight_rate=0.025)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, 1, cure=cure)
        check_range(self, "weight_rate", weight_rate, 0, 1, cure=cure)
        check_range(self, "temperature_rate", temperature_rate, 0, cure=cure)
        low, high = temperature_bounds
        cure = "MTARD(clean_teacher=one, robust_teacher=other, temperature_bounds=(1.0, 10.0))"
        check_range(self, "temperature_bounds", low, 0, low_open=True, cure=cure)
        check_range(self, "temperature_bounds", high, low, cure=cure)
        self.weight_rate = weight_rate
        self.temperature_rate = temperature_rate
        self.temperature_bounds = (float(low), float(high))
        self.weights = torch.full((2,), 0.5)
        self.temperatures = torch.full((2,), float(low))
        # 0 before the first step.
        self.initial = torch.zeros(2)

    def active(self, context: RunContext) -> bool:
        """Without a ball or a strength there is nothing to do."""
        return self.epsilon > 0 and context.strength(self) != 0

    def keeps_clean(self, step: Step) -> bool:
        """The clean teacher's part is learnt there."""
        return True

    def scale_loss(self, step: Step) -> float:
        """The attack raises the user's loss, of which ``1 - s`` is trained."""
        return 1.0 if self.attacking(step) else 1 - step.strength(self)

    def penalty(self, step: Step) -> Tensor | None:
        """Phase 4: keep what is said of the clean inputs; compare both at the end."""
        if step.logits.ndim != 2:
            raise RegularizationError(
                self,
                f"compares distributions of classes, (B, C), and got {tuple(step.logits.shape)}",
                cure='signals=Signals(logits="module.<name>")',
            )
        if self.attacking(step):
            if not step.is_rerun:
                step.kept[self._clean_key] = self._parts(step, 0)
            return None
        clean = step.kept.pop(self._clean_key, None)
        robust = self._parts(step, 1)
        if clean is None:
            # Run again by another technique, at weights that the clean half did not see.
            return self.weights[1] * step.comm.means(robust[:1])[0]
        *losses, first, second = step.comm.means([clean[0], robust[0], clean[1], robust[1]])
        weights = self._balance(torch.stack(losses).detach(), torch.stack([first, second]))
        value: Tensor = (weights * torch.stack(losses)).sum()
        self._log(step, value)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The balances."""
        state = {k: getattr(self, k).cpu() for k in ("weights", "temperatures", "initial")}
        return {**super().state_dict(), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the balances of a checkpoint."""
        super().load_state_dict(state_dict)
        for key in ("weights", "temperatures", "initial"):
            setattr(self, key, state_dict[key].clone())

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the balances to the module's device."""
        super().on_reference(trainer, pl_module)
        for key in ("weights", "temperatures", "initial"):
            setattr(self, key, getattr(self, key).to(pl_module.device))

    # ------------------------------------------------------------------ internals

    @property
    def _clean_key(self) -> str:
        return f"{self.name} clean"

    def _parts(self, step: Step, which: int) -> tuple[JointMean, JointMean]:
        """The divergence from one teacher at the inputs of this pass, and its entropy."""
        student = step.logits
        taught = self.answer(_ROLES[which], step, step.inputs)
        softened = taught / self.temperatures[which].to(taught)
        rows = mtard(student, softened)
        return JointMean.of(rows), JointMean.of(softmax_entropy(softened))

    def _balance(self, losses: Tensor, entropies: Tensor) -> Tensor:
        """The weights of this step; the temperatures of the next."""
        losses, entropies = losses.to(self.weights), entropies.detach().to(self.weights)
        finite = torch.isfinite(losses).all() & torch.isfinite(entropies).all()
        initial = torch.where(finite & (self.initial == 0), losses, self.initial)
        tiny = torch.finfo(losses.dtype).tiny
        weights = balanced_weights(
            self.weights, losses.clamp_min(tiny), initial.clamp_min(tiny), self.weight_rate
        )
        temperatures = matched_temperatures(
            self.temperatures, entropies, self.temperature_rate, *self.temperature_bounds
        )
        self.initial = initial
        self.weights = torch.where(finite, weights, self.weights)
        self.temperatures = torch.where(finite, temperatures, self.temperatures)
        return self.weights

    def _log(self, step: Step, value: Tensor) -> None:
        # In a pass whose penalties the engine does not log.
        step.log(self, value.detach(), joint=True)
        step.log(self, self.weights[0], "clean_weight", joint=True)
        for role, temperature in zip(_ROLES, self.temperatures, strict=True):
            step.log(self, temperature, f"{role}_temperature", joint=True)
