"""Trains on growing images, with regularization that grows along with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.schedule import StepSchedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.attribute_schedule import AttributeSchedule, Target, dropout_rates

__all__ = ["AdaptiveRegularizationSchedule", "progressive_value", "resize_images"]

Ends = Sequence[int | float]


def progressive_value(initial: float, final: float, share: float) -> float:
    """``phi_0 + (phi_e - phi_0) i / (M - 1)``; a whole number if both ends are whole numbers.

    Args:
        initial: ``phi_0``, at the first stage.
        final: ``phi_e``, at the last.
        share: ``i / (M - 1)``, of stage ``i`` from 0 to ``M - 1``.

    Returns:
        The ends are returned as they were given.
    """
    if share in (0, 1):
        return final if share else initial
    between = initial + (final - initial) * share
    whole = isinstance(initial, int) and isinstance(final, int)
    return round(between) if whole else between


def resize_images(images: Tensor, size: int) -> Tensor:
    """Images whose shorter side is ``size``, of the same proportions.

    Bilinear, with antialiasing, so that what is too fine for the size is averaged away.

    Args:
        images: (B, C, H, W).
        size: in pixels.

    Returns:
        (B, C, h, w) with ``min(h, w) = size``; the images themselves if that is their size.
    """
    sides = images.shape[-2:]
    shorter = min(sides)
    if size == shorter:
        return images
    height, width = (max(size, round(side * size / shorter)) for side in sides)
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


class AdaptiveRegularizationSchedule(AttributeSchedule):
    """Progressive learning: small images with weak regularization first, both grow in stages.

    Tan, Le (2021), EfficientNetV2: Smaller Models and Faster Training, arXiv:2104.00298.

    Training is cut into ``M`` stages of equal length. At stage ``i`` images have the size
    ``S_i = S_0 + (S_e - S_0) i / (M - 1)`` and every other quantity the value
    ``phi_i = phi_0 + (phi_e - phi_0) i / (M - 1)``: drop rates, the magnitude of RandAugment, the
    ratio of Mixup. Small images are fast and need less regularization; large ones need more. The
    formula is that of the paper's algorithm 1. Confirmed for the other quantities with the
    official code (google/automl, ``efficientnetv2/main_tf2.py``), which takes the same linear
    steps; its image sizes are ``S_0 + (S_e - S_0) (i + 1) / M`` there, which never are ``S_0``: we
    follow the paper. Its settings, all with 4 stages: V2-S sizes 128 to 300, RandAugment 5 to 15,
    dropout 0.1 to 0.3, no Mixup; V2-M 128 to 380, 5 to 20, 0.1 to 0.4, Mixup 0 to 0.2; V2-L 128
    to 380, 5 to 25, 0.1 to 0.5, Mixup 0 to 0.5 (from memory of the paper's table 6).

    Args:
        sizes: ``(S_0, S_e)``, the shorter side of the images in pixels; ``None`` leaves images
            alone. The loader gives images of ``S_e`` or more: they are resized on the device.
        dropout: ``(phi_0, phi_e)`` of all drop rates that layers keep (dropout, attention, drop
            path); ``None`` leaves them alone.
        knobs: ``(phi_0, phi_e)`` by dotted path, from the module (``"net.3.p"``) or from a callback
            (``"callbacks.Mixup.alpha"``). Two whole numbers stay whole in between. Mixup has no
            ``alpha`` of 0: raise its probability, ``"callbacks.Mixup.strength"``, to begin with
            none.
        stages: ``M``, at least 2.
        multiple: sizes are rounded to a multiple of it, 16 for patches of 16 for example.
        pattern: a regular expression that has to occur in the names of layers for ``dropout``.
        signals: where ``inputs`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or nothing is scheduled; before
            training, if an attribute is not there.
        RegularizationError: in the first step, if inputs are no images of floats.

    Note:
        The stage follows from the share of optimizer steps that is done, so that it is the same on
        all ranks, in all micro-batches and after a resume, and changes inside an epoch where epochs
        and stages do not fit. Over ranks: global. No state. The logged value is the mean of those
        that are set, with the suffix ``_size`` the size of images. The own values come back
        when the fit is over; validation sees whole images throughout. Transforms in the worker
        processes of a loader are copies that no knob reaches: RandAugment has to run in the main
        process, on batches. Cost: the resize, and far less than it saves in early stages; every
        new size may be a recompilation under ``torch.compile``.

        Targets are left alone: not for segmentation or detection. BatchNorm's statistics belong
        to the size that they were taken at, which is why the last stage has the full size. Networks
        whose head counts on one size of image need pooling, or position embeddings that stretch.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AdaptiveRegularizationSchedule
        >>> technique = AdaptiveRegularizationSchedule(sizes=[128, 300], dropout=[0.1, 0.3])
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "EfficientNetV2: Smaller Models and Faster Training", "Tan and Le", 2021, "2104.00298"
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    reads: ClassVar[frozenset[str]] = frozenset({"inputs"})
    writes: ClassVar[frozenset[str]] = frozenset({"features", "inputs"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "gradient": "a schedule of sizes and rates has nothing to differentiate",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(progressive_value)
    explanation: ClassVar[str] = "resizes images and sets rates in stages; own values come back"

    def __init__(
        self,
        *,
        sizes: Sequence[int] | None = None,
        dropout: Ends | None = None,
        knobs: Mapping[str, Ends] | None = None,
        stages: int = 4,
        multiple: int = 1,
        pattern: str | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        cure = "AdaptiveRegularizationSchedule(sizes=[128, 300], dropout=[0.1, 0.3], stages=4)"
        for argument, value, low in (("stages", stages, 2), ("multiple", multiple, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                problem = f"`{argument}` must be a whole number from {low}, got {value!r}"
                raise ArgumentError(self, problem, cure=cure)
        steps = range(stages)
        shares = StepSchedule(
            [i / (stages - 1) for i in steps], [i / stages for i in steps[1:]], by="progress"
        )
        super().__init__(shares, name=name)
        self.signals = signals
        self.sizes = None if sizes is None else self._ends("sizes", sizes, 1)
        self.dropout = None if dropout is None else self._ends("dropout", dropout, 0, 1)
        self.knobs = {path: self._ends(path, ends) for path, ends in (knobs or {}).items()}
        self.stages, self.multiple, self.pattern = stages, multiple, pattern
        if self.sizes is None and self.dropout is None and not self.knobs:
            raise ArgumentError(self, "has nothing to schedule", cure=cure)
        if self.sizes is not None and not all(isinstance(s, int) for s in self.sizes):
            raise ArgumentError(self, f"`sizes` must be whole numbers, got {sizes!r}", cure=cure)
        self._ends_of: dict[str, list[int | float]] = {}

    def targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Target]:
        """The drop rates and the knobs."""
        found: dict[str, Target] = {}
        self._ends_of = {}
        if self.dropout is not None:
            found = dropout_rates(pl_module, self.pattern)
            if not found:
                raise ArgumentError(
                    self,
                    f"finds no dropout layer in {type(pl_module).__name__}"
                    + ("" if self.pattern is None else f" whose name has {self.pattern!r}"),
                    cure='AdaptiveRegularizationSchedule(knobs={"net.3.p": [0.1, 0.3]})',
                )
            self._ends_of = dict.fromkeys(found, self.dropout)
        for path, ends in self.knobs.items():
            found[path] = self._target(path, trainer, pl_module)
            self._ends_of[path] = ends
        return found

    def value_of(self, name: str, own: Any, scheduled: float) -> Any:
        """The value of this stage."""
        initial, final = self._ends_of[name]
        return progressive_value(initial, final, scheduled)

    def transform_batch(self, step: Step) -> None:
        """Phase 1: the size of this stage."""
        if self.sizes is None:
            return
        inputs = step.inputs
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
            shown = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise RegularizationError(
                self,
                f"resizes images (B, C, H, W) of floats, got {shown}",
                cure='signals=Signals(inputs="batch.<key of the images>")',
            )
        size = self.size(step.strength(self))
        step.inputs = resize_images(inputs, size)
        step.log(self, float(size), "size", joint=True)

    def size(self, share: float) -> int:
        """The size of images at a share ``i / (M - 1)`` of the stages."""
        assert self.sizes is not None
        initial, final = self.sizes
        exact = progressive_value(initial, final, share)
        return max(1, round(exact / self.multiple)) * self.multiple

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the own values back."""
        super().on_fit_close(trainer, pl_module)
        self._ends_of = {}

    def _ends(
        self, argument: str, ends: Ends, low: float | None = None, high: float | None = None
    ) -> list[int | float]:
        cure = "AdaptiveRegularizationSchedule(sizes=[128, 300], dropout=[0.1, 0.3])"
        if isinstance(ends, str) or len(ends) != 2:
            problem = f"`{argument}` must have two ends, got {ends!r}"
            raise ArgumentError(self, problem, cure=cure)
        for end in ends:
            check_range(self, argument, end, low, high, cure=cure)
        return list(ends)

    def __getstate__(self) -> dict[str, Any]:
        # The names belong to the module of the run.
        return {**super().__getstate__(), "_ends_of": {}}
