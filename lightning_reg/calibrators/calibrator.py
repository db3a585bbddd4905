"""What all calibrators share: reading held-out data, the layout of logits, state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, RegularizationError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.inputs import Task, high_precision, read_rows

# The smallest distance to 0 and 1 that a calibrated probability keeps, so that logits are finite.
FLOOR = torch.finfo(torch.float64).eps


class Calibrator(nn.Module):
    """A map from a classifier's logits to logits whose softmax (sigmoid) is calibrated.

    ``fit`` takes held-out logits and labels; ``calibrate`` maps logits and keeps their shape. Every
    calibrator gives logits, also those that work on probabilities (``log p``), so that it can
    stand between a model and whatever takes its logits. The network is never changed.

    A subclass supplies :meth:`fit_rows` and :meth:`map_rows`, and keeps what it found in buffers.
    The base takes care of the layout (classes on any dimension, several positions per sample), of
    labels that do not count, of rows that hold NaN or infinity (left out), of high precision
    (float64; float32 on MPS), of ``torch.inference_mode``, and of buffers whose size is only known
    after a fit when a state is loaded.

    Args:
        task: ``"multiclass"``: logits (N, C, ...); ``"binary"``: logits (N, ...), of the positive
            class.
        ignore_index: positions with this label are left out of the fit.
        class_dim: the dimension of the classes: -1 for token logits (B, T, C).

    Raises:
        ArgumentError: if an argument is none of these.
    """

    papers: ClassVar[tuple[Paper, ...]] = ()
    tasks: ClassVar[tuple[Task, ...]] = ("binary", "multiclass")

    def __init__(
        self, *, task: Task = "multiclass", ignore_index: int | None = None, class_dim: int = 1
    ) -> None:
        super().__init__()
        if task not in self.tasks:
            raise ArgumentError(
                self,
                f"`task` must be one of {', '.join(self.tasks)}, got {task!r}",
                cure=f'{type(self).__name__}(task="{self.tasks[-1]}")',
            )
        self.task: Task = task
        self.ignore_index = ignore_index
        self.class_dim = class_dim
        self.fitted = False

    # ------------------------------------------------------------------ what a subclass supplies

    @abstractmethod
    def fit_rows(self, scores: Tensor, targets: Tensor, comm: Communicator) -> None:
        """Set the buffers.

        Args:
            scores: (N, C) or, for a binary task, (N,) logits of this rank, in high precision.
            targets: (N,) class indices, or floats of the shape of ``scores``.
            comm: all ranks. Every rank calls it and must end with the same buffers.
        """

    @abstractmethod
    def map_rows(self, scores: Tensor) -> Tensor:
        """Calibrated logits of the shape of ``scores``: (N, C) or (N,), in high precision."""

    # ------------------------------------------------------------------ use

    def fit(
        self, logits: Tensor, targets: Tensor, *, comm: Communicator | None = None
    ) -> Calibrator:
        """Fit on held-out data; returns the calibrator.

        Args:
            logits: (N, C, ...) or, for a binary task, (N, ...).
            targets: class indices (N, ...), or soft labels of the shape of ``logits``.
            comm: the ranks of a run, each with its own share of the data; by default this process
                is alone. All ranks get what one process with all data would.

        Raises:
            ArgumentError: if shapes or values are not those of the task, or nothing counts.
        """
        comm = comm or Communicator()
        with torch.inference_mode(False), torch.no_grad():
            scores, labels = self._held_out(logits, targets)
            if int(comm.reduce(torch.tensor(len(scores), device=scores.device))) == 0:
                raise ArgumentError(
                    self,
                    "was given nothing to fit on: no row of finite logits has a label that counts",
                    cure=f"{type(self).__name__}().fit(validation_logits, validation_labels)",
                )
            self.fit_rows(scores, labels, comm)
        self.fitted = True
        return self

    def calibrate(self, logits: Tensor) -> Tensor:
        """Calibrated logits of the shape of ``logits``, in float32 or float64.

        Raises:
            RegularizationError: before a fit.
        """
        self._check_fitted()
        rows, shape = self._as_rows(logits)
        return self._as_given(self.map_rows(self._precise(rows)), shape, logits)

    forward = calibrate

    def probabilities(self, logits: Tensor) -> Tensor:
        """The calibrated probabilities: the softmax over classes, or the sigmoid."""
        scores = self.calibrate(logits)
        return scores.sigmoid() if self.task == "binary" else scores.softmax(self.class_dim)

    # ------------------------------------------------------------------ state

    def get_extra_state(self) -> dict[str, Any]:
        """Primitives of the state."""
        return {"fitted": self.fitted}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load them."""
        self.fitted = bool(state["fitted"])

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The size of a buffer may follow from the data of the fit.
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and buffer is not None and saved.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ rows

    def _held_out(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, targets = logits.detach().clone(), targets.detach().clone()
        if self.task == "multiclass" and logits.ndim > 2:
            soft = targets.is_floating_point()
            targets = targets.movedim(self.class_dim, 1) if soft else targets
            logits = logits.movedim(self.class_dim, 1)
        rows = read_rows(
            self,
            logits,
            targets,
            task=self.task,
            from_logits=True,
            ignore_index=self.ignore_index,
            validate=True,
        )
        assert rows.targets is not None
        labels = rows.targets
        return self._precise(rows.scores), (
            self._precise(labels) if labels.is_floating_point() else self._off_mps(labels).long()
        )

    def _as_rows(self, logits: Tensor) -> tuple[Tensor, torch.Size]:
        if self.task == "binary":
            return logits.reshape(-1), logits.shape
        if not logits.is_floating_point() or logits.ndim < 2:
            raise ArgumentError(
                self,
                f"needs float logits (N, C, ...), got {logits.dtype} of {tuple(logits.shape)}",
                cure="calibrator.calibrate(logits)",
            )
        last = logits.movedim(self._dim(logits), -1)
        return last.reshape(-1, last.shape[-1]), last.shape

    def _as_given(self, rows: Tensor, shape: torch.Size, logits: Tensor) -> Tensor:
        dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
        result = rows.to(dtype).to(logits.device).reshape(shape)
        return result if self.task == "binary" else result.movedim(-1, self._dim(logits))

    def _dim(self, logits: Tensor) -> int:
        return 1 if logits.ndim == 2 else self.class_dim

    def _precise(self, values: Tensor) -> Tensor:
        return high_precision(self._off_mps(values))

    @staticmethod
    def _off_mps(values: Tensor) -> Tensor:
        # MPS has no float64.
        return values.cpu() if values.device.type == "mps" else values

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise RegularizationError(
                self,
                "has not been fitted",
                cure=f"{type(self).__name__}().fit(validation_logits, validation_labels)",
            )

    def _check_finite(self, scores: Tensor) -> None:
        """Refuse classes that are masked with minus infinity, where the map has no sense."""
        if not bool(torch.isfinite(scores).all()):
            raise ArgumentError(
                self,
                "needs finite logits, and some classes are masked with -inf; TemperatureScaling "
                "takes them",
                cure="TemperatureScaling().fit(logits, labels)",
            )


class GatheredCalibrator(Calibrator):
    """Base of calibrators that are fitted on the data of all ranks at once.

    A subclass supplies :meth:`solve` in place of ``fit_rows``. Held-out rows are gathered once, to
    every rank, and put into an order that follows from their contents alone: the fit is the same
    however the samples were spread or shuffled.
    """

    @abstractmethod
    def solve(self, scores: Tensor, targets: Tensor) -> None:
        """Set the buffers from all rows; arguments as those of ``fit_rows``."""

    def fit_rows(self, scores: Tensor, targets: Tensor, comm: Communicator) -> None:
        """Gather, sort, solve."""
        scores, targets = comm.gather(scores), comm.gather(targets)
        order = content_order(scores, targets)
        self.solve(scores[order], targets[order])
        for name, buffer in self._buffers.items():
            if buffer is not None and comm.world_size > 1:
                # Ranks may run on different processors, whose last bits differ.
                self._buffers[name] = comm.broadcast(buffer.to(scores.device)).to(buffer.device)


def content_order(*columns: Tensor) -> Tensor:
    """The permutation that sorts rows by their bytes: the same whatever order they came in."""
    parts = [column.reshape(len(column), -1).cpu().contiguous() for column in columns]
    joint = torch.cat([part.view(torch.uint8) for part in parts], 1).numpy()
    keys = joint.view(f"V{joint.shape[1]}").reshape(-1)
    return torch.from_numpy(keys.argsort(kind="stable")).to(columns[0].device)


def logit(probability: Tensor) -> Tensor:
    """``log p - log(1 - p)``, of probabilities that keep their distance to 0 and 1."""
    clipped = probability.clamp(FLOOR, 1 - FLOOR)
    return clipped.log() - torch.log1p(-clipped)


def one_hot(targets: Tensor, scores: Tensor) -> Tensor:
    """Labels (N, C) as distributions, in the type of ``scores``."""
    if targets.is_floating_point():
        return targets.to(scores)
    return nn.functional.one_hot(targets, scores.shape[1]).to(scores)
