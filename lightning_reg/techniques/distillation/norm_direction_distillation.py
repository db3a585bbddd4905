"""Teaches features the direction of their class in the teacher, and to be as long as its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from lightning_reg.engine.criterion import mixed
from lightning_reg.engine.observe import Observer
from lightning_reg.engine.random import rng_state
from lightning_reg.engine.rerun import replayed_rng
from lightning_reg.mechanisms.feature_distillation import FeatureDistillation
from lightning_reg.mechanisms.feature_penalty import positions
from lightning_reg.mechanisms.teacher import Source
from lightning_reg.mechanisms.training_share import TrainingShare

__all__ = ["NormDirectionDistillation", "class_directions", "norm_direction_distillation"]

_FIXED = ("reference", "random")


def norm_direction_distillation(student: Tensor, teacher: Tensor, directions: Tensor) -> Tensor:
    """``1 - <f_s, e_y> / max(|f_s|, |f_t|)`` of each row.

    Args:
        student: (N, d) features ``f_s``; gradients flow through their length too.
        teacher: (N, d) features ``f_t``, of which only the length counts; no gradient flows.
        directions: (N, d) the unit vector ``e_y`` of each row's class.

    Returns:
        (N,), in [0, 2]. While ``|f_s| < |f_t|`` the gradient by ``f_s`` is ``-e_y / |f_t|``: longer
        and in the class's direction; beyond, only the angle counts.
    """
    lengths = torch.linalg.vector_norm(student, dim=-1)
    longest = torch.maximum(lengths, torch.linalg.vector_norm(teacher.detach(), dim=-1))
    along = (student * directions).sum(-1)
    return 1 - along / longest.clamp_min(torch.finfo(longest.dtype).tiny)


def class_directions(sums: Tensor) -> Tensor:
    """``e_c = mu_c / |mu_c|``: the unit vectors of the classes' mean features.

    Args:
        sums: (C, d) the sum, or the mean, of each class's features.

    Returns:
        (C, d); zeros for a class without samples.
    """
    return F.normalize(sums, dim=-1)


class NormDirectionDistillation(FeatureDistillation):
    """Pulls features to the direction of their class in the teacher, at least at its length (ND).

    Wang, Cheng, Duan, Wang, Feng, Kong (2023), Improving Knowledge Distillation via
    Regularizing Feature Norm and Direction, arXiv:2305.17007.

    The mean of a teacher's features of one class is itself a strong classifier, and long features
    are the more certain ones. So the penultimate features ``f_s`` of the student are aligned with
    ``e_y = mu_y / |mu_y|``, the direction of the teacher's mean feature of the class, and not with
    the teacher's feature of the sample, whose length alone counts:
    ``lambda mean_i (1 - <f_s,i, e_y> / max(|f_s,i|, |f_t,i|))``.

    Confirmed with the official code (WangYZ1608/Knowledge-Distillation-via-ND, CIFAR/utils.py):
    the length ``|f_s|`` in the maximum has a gradient, the class means are those of the training
    set as its augmentations give it, taken once in eval mode. Weights of this term there are 0.5
    to 4 beside ``CE + KD``, 2 for ResNet-56 to ResNet-20; KD++ and DKD++ are this technique with
    :class:`HintonDistillation` (``T`` 4) or :class:`DecoupledDistillation`. Class means are rounded
    to four digits there, not here.

    Args:
        strength: ``lambda``, at least 0.
        layer: the student's submodule that returns the features (B, d); maps and sequences are
            averaged over their positions.
        teacher: a trained network.
        teacher_layer: its submodule with the features; by default ``layer``.
        source: a copy of the module in its place, one that does not move: ``"reference"`` or
            ``"random"``.
        class_means: (C, d) the teacher's mean feature of each class; ``None`` takes them from the
            training data when the fit starts.
        signals: where ``inputs`` and ``targets`` (classes (B,) or soft labels (B, C)) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: without a teacher, with two, or if a layer is not there.
        RegularizationError: if widths differ: let the student map its features to the teacher's
            width in a layer of its own (in the official code BatchNorm, dropout of 0.5 and a
            linear layer), and name that layer.
        UnsupportedError: if the training data cannot be gone through a second time.

    Note:
        A mixed or soft label takes the directions of its classes by their shares, so that the loss
        of a mixture is the mixture of losses. Samples without a class (a negative label) do not
        count. Over ranks: global; the class means are those of the whole training set, each sample
        counted once, by one all-reduce at the start; the loss is a mean over all ranks' samples.
        They are saved with the checkpoint and not taken again on a resume.
        Cost: a forward pass of the teacher over the training set at the start, and one a step, both
        without gradients.

        It hurts where the teacher's features of a class have no common direction (classes of
        several modes), or are long for other reasons than certainty.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import NormDirectionDistillation
        >>> technique = NormDirectionDistillation(2.0, layer="encoder", source="reference")
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
            "Wang et al.",
            2023,
            "2305.17007",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "targets", "features")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "targets", "features"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(norm_direction_distillation)
    explanation: ClassVar[str] = "pulls features to the teacher's class direction and length"

    def __init__(
        self,
        strength: float | Schedule = 2.0,
        *,
        layer: str,
        teacher: nn.Module | None = None,
        teacher_layer: str | None = None,
        source: Source | None = None,
        class_means: Tensor | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            layer=layer,
            teacher=teacher,
            teacher_layer=teacher_layer,
            source=source,
            signals=signals,
            name=name,
        )
        if source is not None and source not in _FIXED:
            raise ArgumentError(
                self,
                f"takes class means once, so `source` must be one of {', '.join(_FIXED)}, got "
                f"{source!r}",
                cure='NormDirectionDistillation(layer="encoder", source="reference")',
            )
        if class_means is not None and (
            not isinstance(class_means, Tensor)
            or class_means.ndim != 2
            or not class_means.is_floating_point()
        ):
            raise ArgumentError(
                self,
                "`class_means` must be a tensor (classes, features) of floats",
                cure='NormDirectionDistillation(layer="encoder", class_means=torch.ones(10, 64))',
            )
        self.class_means = class_means
        self._directions: Tensor | None = None

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the teacher, then its class means, unless a checkpoint brought them."""
        resumes = int(trainer.global_step) > 0 and self._directions is not None
        super().on_reference(trainer, pl_module)
        if resumes or self.strength == 0:
            return
        sums = self.class_means
        if sums is None:
            devices = [pl_module.device] if pl_module.device.type == "cuda" else []
            with replayed_rng(rng_state(devices), devices):
                sums = self._class_sums(trainer, pl_module)
        self._directions = class_directions(sums.detach()).float()

    def value(self, step: Step, student: Tensor, teacher: Tensor) -> JointMean:
        """The mean over samples."""
        self.one_width(student, teacher)
        student, teacher = student.mean(1), teacher.mean(1)
        directions = self._held(student)
        labels = mixed(step, self._shares(step.targets, len(student), len(directions)))
        rows = norm_direction_distillation(student, teacher, labels.to(student) @ directions)
        # A sample without a class has no direction.
        return JointMean.of(rows, labels.sum(-1) > 0, fixed=True)

    def state_dict(self) -> dict[str, Any]:
        """The directions of the classes."""
        held = {} if self._directions is None else {"directions": self._directions.cpu()}
        return {**super().state_dict(), **held}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the directions that were taken."""
        super().load_state_dict(dict(state_dict))
        self._directions = state_dict.get("directions")

    # ------------------------------------------------------------------ class means

    def _class_sums(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """(C, d) sums of the teacher's features over the training set, all ranks together."""
        comm = Communicator.of(trainer)
        # MPS has no float64.
        kind = torch.float32 if module.device.type == "mps" else torch.float64
        own = torch.zeros(0, 0, dtype=kind, device=module.device)
        for step in self._steps(trainer, module, comm):
            rows = positions(self, self.teacher_features(step)).mean(1)
            own = _added(own, self._shares(step.targets, len(rows)).to(rows), rows)
        size = torch.tensor(own.shape, device=own.device)
        shape = comm.reduce(size, "max").tolist()
        return comm.reduce(_grown(own, *shape))

    def _steps(self, trainer: pl.Trainer, module: pl.LightningModule, comm: Communicator) -> Any:
        share = TrainingShare(
            self,
            trainer,
            comm,
            why="takes the teacher's mean feature of each class",
            cure='NormDirectionDistillation(layer="encoder", class_means=means)',
        )
        observer = Observer(self, trainer, module, "training_step")
        try:
            for index, raw in enumerate(share):
                batch = trainer.precision_plugin.convert_input(raw)
                batch = trainer.strategy.batch_to_device(batch)
                yield observer.observe(lambda _: None, batch, index)
        finally:
            observer.close()

    # ------------------------------------------------------------------ labels

    def _shares(self, targets: Any, rows: int, classes: int | None = None) -> Tensor:
        """Labels (B, C) as shares of classes; a row of zeros where there is no class."""
        if isinstance(targets, Tensor) and targets.ndim == 2 and targets.is_floating_point():
            shares = targets
        elif isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
            known = targets >= 0
            number = classes if classes is not None else int(targets.clamp_min(0).max()) + 1
            held = torch.where(known, targets, 0).clamp_max(number - 1)
            counted = (known & (targets < number)).unsqueeze(-1)
            shares = (F.one_hot(held, number) * counted).float()
        else:
            shares = None
        if shares is None or len(shares) != rows or classes not in (None, shares.shape[1]):
            kind = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise RegularizationError(
                self,
                f"needs a class (B,) or soft label (B, C) for each of {rows} samples, got {kind}",
                cure='signals=Signals(targets="batch.<key>")',
            )
        return shares

    def _held(self, like: Tensor) -> Tensor:
        assert self._directions is not None
        if self._directions.device != like.device:
            self._directions = self._directions.to(like.device)
        if self._directions.shape[1] != like.shape[1]:
            raise RegularizationError(
                self,
                f"has class means of {self._directions.shape[1]} features, and {self.layer!r} "
                f"returns {like.shape[1]}",
                cure='NormDirectionDistillation(layer="<a layer of that width>")',
            )
        return self._directions.to(like.dtype)


def _added(sums: Tensor, shares: Tensor, rows: Tensor) -> Tensor:
    """``sums`` (C, d) and the rows' features by class, as large as either needs."""
    new = shares.to(sums).T @ rows.to(sums)
    classes, width = max(len(sums), len(new)), max(sums.shape[1], new.shape[1])
    return _grown(sums, classes, width) + _grown(new, classes, width)


def _grown(sums: Tensor, classes: int, width: int) -> Tensor:
    return F.pad(sums, (0, width - sums.shape[1], 0, classes - len(sums)))
