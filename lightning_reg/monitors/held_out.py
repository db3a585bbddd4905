"""Logits and labels that are kept for a fit after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.calibrators.calibrator import Calibrator
from lightning_reg.calibrators.correctness_aware import CorrectnessAwareCalibration
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, MissingSignalError
from lightning_reg.engine.signals import logits_of
from lightning_reg.engine.step import Step


@dataclass(frozen=True)
class Rows:
    """Held-out rows.

    Attributes:
        logits: (N, C), or (N,) for a binary task.
        targets: (N,) class indices, or floats of the shape of ``logits``.
        views: (N, V, C) the logits of transformed inputs, where a calibrator asks for them.
    """

    logits: Tensor
    targets: Tensor
    views: Tensor | None = None

    def copy(self) -> Rows:
        """Tensors of its own: a caller may write over those that it was given."""
        views = None if self.views is None else self.views.detach().clone()
        return Rows(self.logits.detach().clone(), self.targets.detach().clone(), views)

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What a calibrator takes beside logits and labels."""
        return {} if self.views is None else {"views": self.views}


def join(batches: Sequence[Rows], comm: Communicator, device: torch.device) -> Rows:
    """All rows of a rank; a rank without any gets none, of the widths that other ranks have."""
    own = batches[0] if batches else Rows(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    described = torch.tensor(_describe(own) if batches else [0, 0, 0, 0], device=device)
    classes, soft, label_classes, n_views = comm.reduce(described, "max").tolist()
    if batches:
        views = [rows.views for rows in batches if rows.views is not None]
        return Rows(
            torch.cat([rows.logits for rows in batches]),
            torch.cat([rows.targets for rows in batches]),
            torch.cat(views) if views else None,
        )
    logits = torch.zeros((0, classes) if classes else (0,), device=device)
    kind = torch.float32 if soft else torch.int64
    labels = torch.zeros((0, label_classes) if label_classes else (0,), dtype=kind, device=device)
    return Rows(logits, labels, logits.new_zeros(0, n_views, classes) if n_views else None)


def rows_of(owner: object, calibrator: Calibrator, step: Step, counted: Tensor | None) -> Rows:
    """The rows of one batch, whatever its layout.

    Args:
        owner: who is named in errors.
        calibrator: says the task, and the dimension of the classes.
        step: the user's step.
        counted: (B,) False for samples that are left out; ``None`` if all count.
    """
    logits, targets = step.logits.detach(), torch.as_tensor(step.targets)
    views = _views(calibrator, step)
    if counted is not None:
        logits, targets = logits[counted], targets[counted]
        views = None if views is None else views[counted]
    if calibrator.task == "binary":
        if logits.ndim == targets.ndim + 1 and logits.shape[-1] == 1:
            logits = logits.squeeze(-1)
        if logits.shape != targets.shape:
            raise _misfit(owner, calibrator, logits, targets, "binary")
        return Rows(logits.reshape(-1), targets.reshape(-1))
    class_dim = calibrator.class_dim if logits.ndim > 2 else 1
    classes_last = logits.movedim(class_dim, -1)
    soft = targets.is_floating_point()
    if targets.shape != (logits.shape if soft else classes_last.shape[:-1]):
        layout = f"with classes on dimension {class_dim}"
        raise _misfit(owner, calibrator, logits, targets, layout)
    classes = classes_last.shape[-1]
    if soft:
        targets = targets.movedim(class_dim, -1)
    labels = targets.reshape((-1, classes) if soft else (-1,))
    return Rows(classes_last.reshape(-1, classes), labels, views)


def transformed(
    calibrator: CorrectnessAwareCalibration, module: nn.Module, inputs: Any
) -> Tensor | None:
    """(N, V, C) the module's logits of transformed inputs; ``None`` without transforms.

    Calls ``module.forward``, so that hooks which record the user's own calls do not see these.
    """
    views = []
    with torch.no_grad():
        for transform in calibrator.transforms:
            logits = logits_of(module.forward(transform(inputs)))
            if logits is None:
                raise MissingSignalError(
                    calibrator,
                    "runs `forward` on transformed inputs, which returned no logits",
                    cure="def forward(self, x): return logits",
                )
            views.append(logits.detach())
    return torch.stack(views, 1) if views else None


def _views(calibrator: Calibrator, step: Step) -> Tensor | None:
    if not isinstance(calibrator, CorrectnessAwareCalibration) or not calibrator.transforms:
        return None
    return transformed(calibrator, step.module, step.inputs)


def _misfit(
    owner: object, calibrator: Calibrator, logits: Tensor, targets: Tensor, layout: str
) -> ArgumentError:
    kind = type(calibrator).__name__
    other = 'task="multiclass"' if calibrator.task == "binary" else "class_dim=-1"
    return ArgumentError(
        owner,
        f"logits {tuple(logits.shape)}, {layout}, and targets {tuple(targets.shape)} do not belong "
        "together",
        cure=f"{type(owner).__name__}({kind}({other}))",
    )


def _describe(rows: Rows) -> list[int]:
    classes = rows.logits.shape[1] if rows.logits.ndim == 2 else 0
    label_classes = rows.targets.shape[1] if rows.targets.ndim == 2 else 0
    n_views = 0 if rows.views is None else rows.views.shape[1]
    return [classes, int(rows.targets.is_floating_point()), label_classes, n_views]
