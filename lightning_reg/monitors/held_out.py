"""Logits and labels that are kept for a fit after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.calibrators.correctness_aware import CorrectnessAwareCalibration
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import MissingSignalError
from lightning_reg.engine.signals import logits_of


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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each submodule has its mode again."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes.items():
            child.training = training


def _describe(rows: Rows) -> list[int]:
    classes = rows.logits.shape[1] if rows.logits.ndim == 2 else 0
    label_classes = rows.targets.shape[1] if rows.targets.ndim == 2 else 0
    n_views = 0 if rows.views is None else rows.views.shape[1]
    return [classes, int(rows.targets.is_floating_point()), label_classes, n_views]
