"""Trains a network again, on its labels and on what its last generation said of the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    Communicator,
    Paper,
    RegularizationError,
    Schedule,
    Signals,
    Step,
)
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.criterion import as_distribution, labelled
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.observe import held_out_steps, validation_loaders
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.loss_replacement import Replaces, check_replaces
from lightning_reg.mechanisms.teacher import FrozenNetwork, Teacher

__all__ = [
    "WeightedSelfDistillation",
    "optimal_alpha",
    "weighted_self_distillation",
]

Form = Literal["cross_entropy", "mse", "regression"]
_PHASES = {
    "cross_entropy": "transform_targets",
    "mse": "per_sample_loss",
    "regression": "penalty",
}


def weighted_self_distillation(
    predictions: Tensor, targets: Tensor, teacher: Tensor, alpha: float
) -> Tensor:
    """``alpha |f - y|^2 + (1 - alpha) |f - g|^2``, as a mean over the outputs of each row.

    The gradient by ``f`` is that of the squared error from ``alpha y + (1 - alpha) g``.

    Args:
        predictions: (N, k) ``f``: values, or probabilities of classes.
        targets: (N, k) ``y``.
        teacher: (N, k) ``g``, predictions of the generation before; no gradient flows.
        alpha: the weight of the labels, in [0, 1].

    Returns:
        (N,).
    """
    labels = (predictions - targets).square()
    past = (predictions - teacher.detach()).square()
    return _rows(torch.lerp(past, labels, alpha)).mean(1)


def optimal_alpha(targets: Tensor, labels_fit: Tensor, past_fit: Tensor) -> Tensor:
    """``<y - v, u - v> / |u - v|^2``: the weight of the labels that held-out data ask for.

    A fit that is linear in its targets predicts ``alpha u + (1 - alpha) v`` after training on
    ``alpha y + (1 - alpha) f``; this ``alpha`` minimizes the squared error of that.

    Args:
        targets: ``y`` of held-out samples.
        labels_fit: ``u``, what the fit to the labels alone predicts there.
        past_fit: ``v``, what the fit to the last generation's predictions alone predicts there.

    Returns:
        A scalar, in [0, 1] or not; NaN where both fits predict the same.
    """
    above, below = _products(targets, labels_fit, past_fit)
    weight: Tensor = above / below
    return weight


def _rows(values: Tensor) -> Tensor:
    return values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)


def _products(targets: Tensor, labels_fit: Tensor, past_fit: Tensor) -> Tensor:
    """``<y - v, u - v>`` and ``|u - v|^2``, which add up over samples."""
    apart = labels_fit - past_fit
    return torch.stack([((targets - past_fit) * apart).sum(), apart.square().sum()])


class WeightedSelfDistillation(Teacher):
    """Trains generations of a network, each on the labels and on the generation before.

    Borup, Andersen (2021), Even your Teacher Needs Guidance: Ground-Truth Targets Dampen
    Regularization Imposed by Self-Distillation, arXiv:2102.13088.

    Each fit is a generation: the technique takes a copy of the module when a fit ends, and in the
    next fits the loss is ``alpha l(f, y) + (1 - alpha) l(f, g)`` with ``g`` what that copy says of
    the same inputs. In kernel ridge regression each generation is in closed form
    (:func:`kernel_self_distillation`): self-distillation regularizes more with every generation,
    without labels (``alpha = 0``) until nothing is left, with them towards the ridge ``lambda /
    alpha`` at most.

    ``optimal=True`` chooses ``alpha`` by the paper's closed form, for two fits a generation and
    no search: after the first fit ``u`` on the labels, a trial fit ``v`` on ``g`` alone; then
    ``alpha* = <y - v, u - v> / |u - v|^2`` over the validation data, limited to [0, 1], and a fit
    with it, which is the next generation.

    Confirmed with the official code (Kennethborup/self_distillation, toy_example.ipynb for the
    kernel, self_distiller.py for networks): for classes the squared error of probabilities
    (``form="mse"``), a teacher in eval mode, ``alpha`` 0.6 in its example, a new network each time.
    ``alpha*`` is not in it: ours from the paper's statement, exact for fits that are linear in
    their targets. ``form="cross_entropy"``, with labels ``alpha y + (1 - alpha) p_g``, is ours.

    Args:
        strength: ``1 - alpha``, the share of the last generation, in [0, 1]. With ``optimal=True``
            it is chosen, and only 0, which turns the technique off, has a meaning.
        form: ``"cross_entropy"``; ``"mse"``: of probabilities; ``"regression"``: the squared error
            of outputs, beside the user's own loss, which keeps the share ``alpha``.
        optimal: alternate trial fits and fits with ``alpha*``.
        replaces: for classes, what of the user's loss goes: ``"cross_entropy"`` (checked to be
            it), ``"term"`` or ``"loss"``.
        signals: where ``inputs``, ``logits`` (the outputs) and ``targets`` are.
        name: the name in logs and checkpoints.

    Attributes:
        generation: how many are trained; ``trial``: whether the next fit is a trial.

    Raises:
        ArgumentError: if an argument is outside its range, or ``optimal`` meets a Schedule.
        RegularizationError: if ``alpha*`` is asked for without validation data.
        UnsupportedError: if the module has no ``forward`` or cannot be copied.

    Note:
        Fit a new network each time; one that is trained on starts from the generation before. The
        teacher sees what the student sees, mixed and augmented inputs too. Over ranks: global;
        ``alpha*`` comes from the predictions of all ranks. Under accumulation nothing changes. The
        copies (two with ``optimal=True``) are in the checkpoint, and not taken again on a resume.
        Cost: a forward pass without gradients a step, and one of both fits over the validation
        data after a trial.

        It hurts where the network underfits: each generation regularizes more.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import WeightedSelfDistillation
        >>> technique = WeightedSelfDistillation(0.4)  # in the Trainer of one fit after the other
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed "
            "by Self-Distillation",
            "Borup & Andersen",
            2021,
            "2102.13088",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits", "targets"})
    writes: ClassVar[frozenset[str]] = frozenset({"targets"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(weighted_self_distillation)
    explanation: ClassVar[str] = "learns from labels and from the last generation's predictions"

    def __init__(
        self,
        strength: float | Schedule = 0.4,
        *,
        form: Form = "cross_entropy",
        optimal: bool = False,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        if form not in _PHASES:
            raise ArgumentError(
                self,
                f"`form` must be one of {', '.join(_PHASES)}, got {form!r}",
                cure='WeightedSelfDistillation(form="cross_entropy")',
            )
        self.form = form
        super().__init__(strength, source="reference", signals=signals, name=name)
        cure = "WeightedSelfDistillation(0.4)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, 1, cure=cure)
        elif optimal:
            raise ArgumentError(
                self,
                "`optimal` chooses the strength, which then cannot be a Schedule",
                cure="WeightedSelfDistillation(optimal=True)",
            )
        check_replaces(self, replaces)
        self.needs = ("inputs", *type(self).needs)  # type: ignore[misc]
        self.optimal = optimal
        self.replaces = replaces
        self.generation = 0
        self.trial = False
        self.first: FrozenNetwork | None = None
        self._loaded_first: dict[str, Tensor] | None = None
        self._off = strength == 0
        if form == "mse":
            self.writes = frozenset({"losses"})  # type: ignore[misc]
            self.exclusive = frozenset({"criterion"})  # type: ignore[misc]
        elif form == "regression":
            self.writes = frozenset()  # type: ignore[misc]

    @property
    def alpha(self) -> float:
        """The weight of the labels, where it is a constant."""
        if self.generation == 0 or isinstance(self.strength, Schedule):
            return 1.0
        return 1 - self.strength

    def acts_in(self, phase: str) -> bool:
        """Each form acts in a phase of its own."""
        if phase == "scale_loss":
            return self.form == "regression"
        return phase not in _PHASES.values() or phase == _PHASES[self.form]

    def active(self, context: Any) -> bool:
        """There is nobody to learn from in the first fit."""
        return self.generation > 0 and super().active(context)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The best weight is that of held-out data."""
        super().validate(trainer, pl_module)
        if self.optimal and not self._off and not trainer.enable_validation:
            raise self._without_data("this run has none")

    # ------------------------------------------------------------------ the loss

    def transform_targets(self, step: Step, distribution: Tensor) -> Tensor:
        """Phase 3 of ``"cross_entropy"``."""
        past = self._past(step, distribution)
        if not step.is_rerun:
            step.log(self, (past * distribution).sum(-1).mean())
        return torch.lerp(distribution, past, step.strength(self))

    def per_sample_loss(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """Phase 3 of ``"mse"``."""
        past = self._past(step, distribution)
        losses = weighted_self_distillation(
            logits.softmax(-1), distribution, past, 1 - step.strength(self)
        )
        if not step.is_rerun:
            step.log(self, losses.detach().mean())
        return losses

    def penalty(self, step: Step) -> JointMean:
        """Phase 4 of ``"regression"``."""
        own, past = step.logits, self.predict(step)
        return JointMean.of(_rows((own - past).square()).mean(1))

    def scale_loss(self, step: Step) -> float:
        """The user's own loss keeps the weight of the labels."""
        return 1 - step.strength(self)

    def _past(self, step: Step, distribution: Tensor) -> Tensor:
        """(N, C) probabilities, of the samples that have a label."""
        found = self.predict(step).softmax(-1)
        targets = torch.as_tensor(step.targets)
        if found.ndim == 2 and len(targets) == len(found):
            found = labelled(found, targets, found.shape[-1])
        if found.shape != distribution.shape:
            raise RegularizationError(
                self,
                f"learns one distribution per sample: the copy answers {tuple(found.shape)}, and "
                f"the loss has {len(distribution)} terms of {distribution.shape[-1]} classes",
                cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
            )
        return found.to(distribution)

    # ------------------------------------------------------------------ generations

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the copies of a checkpoint; those of an earlier fit are there."""
        first, self._loaded_first = self._loaded_first, None
        if self._loaded_teacher is not None:
            super().on_reference(trainer, pl_module)
        elif self.teacher is None:
            # What cannot be copied is better known now than at the end of the fit.
            self._copy(pl_module)
        if first is not None:
            self.first = self._copy(pl_module)
            self.first.load_state_dict(first)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of a generation, or of a trial."""
        if self._off:
            return
        if self.trial:
            self._choose(trainer, pl_module)
            return
        taken = self.copy_now(pl_module)
        if taken is None:
            return
        self.teacher = taken
        self.generation += 1
        if self.optimal:
            self.first = self.first or taken
            self.trial, self.strength = True, 1.0

    def _choose(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """``alpha*`` from what both fits predict of the validation data."""
        loaders = validation_loaders(trainer)
        if not loaders:
            raise self._without_data("no validation has run")
        totals = torch.zeros(2, device=module.device)
        for loader in loaders:
            for step, counted in held_out_steps(self, trainer, module, loader):
                totals += self._held_out(step, counted)
        above, below = Communicator.of(trainer).reduce(totals).tolist()
        # Both fits are the same, or there is nothing to compare: labels are what is known.
        alpha = above / below if below > 0 else 1.0
        if alpha == alpha:
            self.trial, self.strength = False, 1 - min(1.0, max(0.0, alpha))

    def _without_data(self, what: str) -> RegularizationError:
        return RegularizationError(
            self,
            f"chooses the weight of the labels by validation data, and {what}",
            cure="trainer.fit(model, train_loader, val_loader), with a `validation_step`",
        )

    def _held_out(self, step: Step, counted: Tensor | None) -> Tensor:
        assert self.first is not None
        own, targets = step.logits, torch.as_tensor(step.targets)
        first = self._answer(self.first, step.inputs, step.module)
        if self.form != "regression":
            classes = own.shape[-1]
            own, first = (labelled(p.softmax(-1), targets, classes) for p in (own, first))
            counted = None if counted is None else labelled(counted, targets, classes)
            targets = as_distribution(labelled(targets, targets, classes), own)
        rows = targets.to(own), first, own
        return _products(*rows if counted is None else [r[counted] for r in rows]).float()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Copies, and where in the row of generations the run is."""
        held = {} if self.first is None else self.first.state_dict()
        state = {"first": self._loaded_first or held, "generation": self.generation}
        chosen = {"chosen": self.strength} if self.optimal else {}
        return {**super().state_dict(), **state, "trial": self.trial, **chosen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the generation of a checkpoint."""
        super().load_state_dict(dict(state_dict))
        self._loaded_first = dict(state_dict["first"]) or None
        self.generation = int(state_dict["generation"])
        self.trial = bool(state_dict["trial"])
        if not self._off:
            self.strength = state_dict.get("chosen", self.strength)
