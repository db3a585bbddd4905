"""One cycle of the learning rate over the run, with momentum going the other way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Regularizer, Step, UnsupportedError
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics

__all__ = ["OneCycle", "one_cycle"]

Anneal = Literal["linear", "cos"]
_ANNEAL = ("linear", "cos")


def one_cycle(
    step: int,
    total: int,
    initial: float,
    peak: float,
    final: float,
    pct_start: float = 0.45,
    three_phase: bool = True,
    anneal: Anneal = "linear",
) -> float:
    """The value at a step of the cycle: initial, up or down to the peak, and on to the end.

    With three phases: to the peak at step ``pct_start T - 1``, back to the initial value at
    ``2 pct_start T - 2``, to the final one at ``T - 1``. With two: from the peak to the final value
    directly.

    Args:
        step: from 0; behind ``T - 1`` the value stays.
        total: ``T``, the steps of the run.
        initial: the value at step 0.
        peak: that at the turn.
        final: that at the last step.
        pct_start: the share of the run up to the turn, in (0, 1); at most 0.5 with three phases.
        three_phase: whether to go back to the initial value before the final one.
        anneal: in straight lines, or along half cosines.
    """
    ends = [(pct_start * total - 1, peak)]
    ends += [(2 * pct_start * total - 2, initial)] if three_phase else []
    ends += [(float(total - 1), final)]
    start, value = 0.0, initial
    for end, target in ends:
        if step <= end:
            share = (step - start) / (end - start) if end > start else 1.0
            return _between(value, target, share, anneal)
        # A phase of no length, in a short run, is passed over.
        start, value = max(start, end), target
    return final


def _between(start: float, end: float, share: float, anneal: Anneal) -> float:
    if share >= 1 or start == end:
        return end
    if anneal == "cos":
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
    return start + (end - start) * share


class OneCycle(Regularizer):
    """The 1cycle policy: one cycle of learning rate and momentum, as a regularizer.

    Smith (2018), A disciplined approach to neural network hyper-parameters: Part 1 -- learning
    rate, batch size, momentum, and weight decay, arXiv:1803.09820.

    The learning rate rises from ``max_lr / div_factor`` to ``max_lr``, falls back, and is then
    annealed to a thousandth of where it began; momentum goes from ``max_momentum`` down to
    ``base_momentum`` and back, against it. A large learning rate in the middle regularizes, so
    that other regularization, weight decay above all, has to be reduced to keep the balance:
    see ``lightning_reg.functional.weight_decay_range_test``, which finds both. The phases are
    those of ``torch.optim.lr_scheduler.OneCycleLR``, of which tests take every value; the defaults
    are the paper's (straight lines, equal times up and down, the rest of the run to anneal, a
    factor of 10, momentum 0.95 to 0.85), where torch's are fastai's: ``OneCycle(pct_start=0.3,
    div_factor=25.0, final_div_factor=1e4, three_phase=False, anneal="cos")``.

    Args:
        max_lr: the peak, above 0; ``None``: each parameter group's own learning rate, so that
            groups keep their ratios.
        div_factor: the peak over the initial rate, at least 1.
        final_div_factor: the initial rate over the final one, at least 1.
        momentum: ``(base_momentum, max_momentum)`` for ``momentum``, or the first of ``betas``,
            of every group that has one above 0; ``None`` leaves momentum alone.
        pct_start: the share of the run that the rate rises, in (0, 1); at most 0.5 with three
            phases.
        three_phase: whether it falls back to the initial rate before it is annealed.
        anneal: ``"linear"`` or ``"cos"``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: before the first step, if the module has learning rate schedulers of its
            own, or the run has no end.

    Note:
        Set in front of every training step, for all optimizers of the module, from the number of
        optimizer steps (divided by the number of optimizers, where several step): the same on all
        ranks and in all micro-batches. Over ranks: replica. Own values are saved with the
        checkpoint, so that a resumed run goes on exactly, and come back when the fit is over.
        ``reg/one_cycle`` logs the rate of the first group, ``reg/one_cycle_momentum`` its momentum.
        Cost: two numbers a group, once per optimizer step.

        A run that is stopped early never anneals. It hurts where ``max_lr`` is one at which the
        training diverges: find it with the range test, with all other regularizers on.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import OneCycle
        >>> trainer = L.Trainer(callbacks=[OneCycle(max_lr=0.4)], max_epochs=30, logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "A disciplined approach to neural network hyper-parameters: Part 1 -- learning rate, "
            "batch size, momentum, and weight decay",
            "Smith",
            2018,
            "1803.09820",
        ),
    )
    semantics: ClassVar[Semantics] = "replica"
    exclusive: ClassVar[frozenset[str]] = frozenset({"learning_rate"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "gradient": "a schedule of a rate has nothing to differentiate",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(one_cycle)
    explanation: ClassVar[str] = "sets learning rate and momentum; own values come back"

    def __init__(
        self,
        max_lr: float | None = None,
        *,
        div_factor: float = 10.0,
        final_div_factor: float = 1000.0,
        momentum: Sequence[float] | None = (0.85, 0.95),
        pct_start: float = 0.45,
        three_phase: bool = True,
        anneal: Anneal = "linear",
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, name=name)
        cure = "OneCycle(max_lr=0.4, div_factor=10.0, momentum=(0.85, 0.95))"
        if max_lr is not None:
            check_range(self, "max_lr", max_lr, 0, low_open=True, cure=cure)
        check_range(self, "div_factor", div_factor, 1, cure=cure)
        check_range(self, "final_div_factor", final_div_factor, 1, cure=cure)
        limit = 0.5 if three_phase else 1.0
        high_open = not three_phase
        check_range(
            self, "pct_start", pct_start, 0, limit, low_open=True, high_open=high_open, cure=cure
        )
        if anneal not in _ANNEAL:
            problem = f"`anneal` must be one of {', '.join(_ANNEAL)}, got {anneal!r}"
            raise ArgumentError(self, problem, cure=cure)
        if momentum is not None:
            if len(momentum) != 2:
                problem = f"`momentum` must be a base and a maximum, got {momentum!r}"
                raise ArgumentError(self, problem, cure=cure)
            check_range(self, "momentum", momentum[1], 0, 1, high_open=True, cure=cure)
            check_range(self, "momentum", momentum[0], 0, momentum[1], cure=cure)
        self.max_lr, self.div_factor, self.final_div_factor = max_lr, div_factor, final_div_factor
        self.momentum = None if momentum is None else list(momentum)
        self.pct_start, self.three_phase, self.anneal = pct_start, three_phase, anneal
        self._groups: list[dict[str, Any]] = []
        self._own: list[list[float]] = []
        self._optimizers = 1
        self._total = 1
        self._written: int | None = None

    # ------------------------------------------------------------------ phases

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the groups and their own values, which a resumed run takes from its checkpoint."""
        if trainer.lr_scheduler_configs:
            raise UnsupportedError(
                self,
                "sets the learning rate, and the module has a scheduler of its own",
                cure="return optimizer  # without lr_scheduler, from configure_optimizers",
            )
        total = float(trainer.estimated_stepping_batches)
        if not 0 < total < math.inf:
            raise UnsupportedError(
                self,
                "spreads one cycle over the run, and this run has no end",
                cure="Trainer(max_steps=10_000) or Trainer(max_epochs=30)",
            )
        self._optimizers, self._total = max(1, len(trainer.optimizers)), int(total)
        self._groups = [group for opt in trainer.optimizers for group in opt.param_groups]
        if len(self._own) != len(self._groups):
            self._own = [[float(g["lr"]), _momentum(g)] for g in self._groups]
        self._written = None

    def prepare(self, step: Step) -> None:
        """Phase 0."""
        position = step.global_step // self._optimizers
        if position != self._written:
            self._written = position
            for group, own in zip(self._groups, self._own, strict=True):
                self._set(group, own, position)
        if step.logging and self._groups:
            step.log(self, float(self._groups[0]["lr"]), joint=True)
            step.log(self, _momentum(self._groups[0]), "momentum", joint=True)

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the own values back."""
        for group, (rate, momentum) in zip(self._groups, self._own, strict=False):
            _write(group, rate, momentum)
        self._groups, self._own, self._written = [], [], None

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The groups' own values, which the optimizer's state no longer holds."""
        return {**super().state_dict(), "own": [list(own) for own in self._own]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the own values of the run that goes on."""
        super().load_state_dict(state_dict)
        self._own = [list(own) for own in state_dict["own"]]

    # ------------------------------------------------------------------ internals

    def _set(self, group: dict[str, Any], own: Sequence[float], position: int) -> None:
        peak = own[0] if self.max_lr is None else self.max_lr
        initial = peak / self.div_factor
        rate = self._at(position, initial, peak, initial / self.final_div_factor)
        momentum = own[1]
        if self.momentum is not None and own[1] > 0:
            base, high = self.momentum
            momentum = self._at(position, high, base, high)
        _write(group, rate, momentum)

    def _at(self, position: int, initial: float, peak: float, final: float) -> float:
        return one_cycle(
            position,
            self._total,
            initial,
            peak,
            final,
            self.pct_start,
            self.three_phase,
            self.anneal,
        )

    def __getstate__(self) -> dict[str, Any]:
        # The groups belong to the optimizers of the run.
        return {**super().__getstate__(), "_groups": [], "_written": None}


def _momentum(group: Mapping[str, Any]) -> float:
    """The momentum of a group, or its first beta; 0 without either."""
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def _write(group: dict[str, Any], rate: float, momentum: float) -> None:
    if isinstance(group["lr"], Tensor):
        # Of an optimizer that was captured into a graph, which reads this tensor.
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
    if momentum <= 0:
        return
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    elif "momentum" in group:
        group["momentum"] = momentum
