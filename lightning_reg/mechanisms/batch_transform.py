"""Techniques that change the inputs of a batch, and mix its labels to match.

A technique supplies :meth:`BatchTransform.transform`: new inputs and, if samples were mixed, the
partner of each sample and the share of its own label that it keeps. The mechanism takes care of

- finding the inputs in the batch, checking that they can be changed, and writing them back into
  a copy, so that the loader's own batch stays as it was;
- the probability with which batches, or samples of a batch, are transformed;
- random numbers: one stream per technique, micro-batch and rank, drawn on the CPU, so that the
  draws are those of every device and cost no synchronization; partners are of the same rank;
- labels: class indices stay in the batch, where the user's metrics count them, and the loss is
  computed from the captured logits and the mixed labels; float targets are mixed in the batch;
- the log: ``reg/<name>`` is the share of labels (or of the area) that was replaced.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, RegularizationError, check_range
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.step import Step
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.loss_replacement import Replaces, check_replaces

Per = Literal["batch", "sample"]
_PER = ("batch", "sample")
MIXING_EXEMPTIONS = {
    "accumulation": "each micro-batch draws its own partners and shares, so that two "
    "micro-batches are not one batch of twice the size",
}


@dataclass(frozen=True)
class Transformed:
    """What a transform made of the inputs of one batch.

    Attributes:
        inputs: the new inputs (B, ...).
        share: the share of labels or of the area that was replaced, for the log.
        permutation: the partner of each sample (B,); ``None`` if labels stay as they are.
        lam: the share of its own label that each sample keeps (B,).
    """

    inputs: Tensor
    share: Tensor | float
    permutation: Tensor | None = None
    lam: Tensor | None = None


class BatchTransform(Regularizer):
    """Base of techniques that change a batch before the user's step sees it.

    What is declared here is right for transforms that mix samples and labels; one that leaves
    labels alone declares less. ``image`` says whether inputs have to be images (B, C, H, W).

    Args:
        probability: of transforming a batch (``per="batch"``) or a sample (``per="sample"``), a
            number in [0, 1] or a :class:`Schedule`; 0 turns the technique off.
        per: whether a batch is transformed with one draw, or each sample with its own.
        replaces: what becomes of the user's loss when class labels are mixed.
            ``"cross_entropy"``: it is the cross-entropy, which is checked in the first step, and
            is replaced; ``"term"``: it contains the cross-entropy, which is replaced, and the
            other terms stay; ``"loss"``: it is dropped for the cross-entropy.
        signals: where inputs, targets and logits are, if not in the usual places.
        name: the name in logs, checkpoints and random streams.
    """

    semantics: ClassVar[Semantics] = "local"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "targets", "logits")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "targets"})
    writes: ClassVar[frozenset[str]] = frozenset({"inputs", "targets"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"batch_mixing"})
    exemptions: ClassVar[Mapping[str, str]] = MIXING_EXEMPTIONS
    image: ClassVar[bool] = False

    def __init__(
        self,
        probability: float | Schedule = 1.0,
        *,
        per: Per = "batch",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, signals=signals, name=name)
        kind = type(self).__name__
        if not isinstance(probability, Schedule):
            cure = f"{kind}(probability=0.5)"
            check_range(self, "probability", probability, 0, 1, cure=cure)
        if per not in _PER:
            raise ArgumentError(
                self,
                f"`per` must be one of {', '.join(_PER)}, got {per!r}",
                cure=f'{kind}(per="batch")',
            )
        check_replaces(self, replaces)
        self.per = per
        self.replaces = replaces

    @abstractmethod
    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """Change a batch of inputs; no draw from elsewhere than ``generator``.

        Args:
            inputs: (B, ...), not to be changed in place.
            chosen: (B,) bool on the CPU: the samples that are to be transformed; with
                ``per="batch"`` all of them.
            generator: on the CPU.
            step: the step, for what else a transform may need.
        """

    def transform_batch(self, step: Step) -> None:
        """Phase 1."""
        inputs = self._inputs(step)
        # The stream of this rank and micro-batch, on the CPU whatever the module's device is.
        generator = torch.Generator().manual_seed(step.rng(self).initial_seed())
        result = self.draw(inputs, generator, step)
        if result is None:
            step.log(self, 0.0)
            return
        step.inputs = result.inputs
        if result.permutation is not None and result.lam is not None:
            step.mix_targets(result.permutation, result.lam)
        step.log(self, result.share)

    def draw(self, inputs: Tensor, generator: torch.Generator, step: Step) -> Transformed | None:
        """The transformed batch, or ``None`` where the draw says to leave it alone."""
        size = len(inputs) if self.per == "sample" else 1
        chosen = torch.rand(size, generator=generator) < step.strength(self)
        if not bool(chosen.any()):
            return None
        self._check_inputs(inputs)
        return self.transform(inputs, chosen.expand(len(inputs)), generator, step)

    def _inputs(self, step: Step) -> Tensor:
        inputs = step.inputs
        if isinstance(inputs, Tensor) and inputs.ndim > 0:
            return inputs
        raise RegularizationError(
            self,
            f"changes `inputs`, which must be one tensor (B, ...), got {type(inputs).__name__}",
            cure='signals=Signals(inputs="batch.<key>")',
        )

    def _check_inputs(self, inputs: Tensor) -> None:
        if not inputs.is_floating_point():
            raise RegularizationError(
                self,
                f"changes `inputs`, which must be floating-point numbers, got {inputs.dtype}; "
                "images come after the conversion to floats, token indices have no in-between",
                cure='signals=Signals(inputs="batch.<key of a float tensor>")',
            )
        if self.image and inputs.ndim < 4:
            raise RegularizationError(
                self,
                f"cuts boxes out of images (B, C, H, W), got inputs {tuple(inputs.shape)}",
                cure='signals=Signals(inputs="batch.<key of the images>")',
            )


def draw_beta(alpha: float, size: int, generator: torch.Generator) -> Tensor:
    """Draws (size,) from Beta(alpha, alpha), in float64 on the generator's device."""
    concentration = torch.full((size, 2), alpha, dtype=torch.float64, device=generator.device)
    return torch._sample_dirichlet(concentration, generator=generator)[:, 0]


def draw_mix(
    alpha: float, chosen: Tensor, per: Per, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A partner (B,) for each sample, and the share (B,) of itself that it keeps.

    Args:
        alpha: shares are from Beta(alpha, alpha).
        chosen: (B,) bool; the others keep all of themselves.
        per: one share a batch, or one a sample.
        generator: on the CPU.
    """
    drawn = draw_beta(alpha, len(chosen) if per == "sample" else 1, generator)
    lam = torch.where(chosen, drawn, 1.0).float()
    return draw_permutation(len(chosen), generator), lam


def mix_rows(rows: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """``lam_i x_i + (1 - lam_i) x_j`` with ``j = permutation[i]``, of rows (B, ...)."""
    weight = lam.to(rows).view(-1, *[1] * (rows.ndim - 1))
    return torch.lerp(rows[permutation], rows, weight)


def draw_permutation(size: int, generator: torch.Generator) -> Tensor:
    """A partner (size,) for each sample; a sample may be its own."""
    return torch.randperm(size, generator=generator, device=generator.device)


def draw_centres(size: tuple[int, ...], height: int, width: int, rng: torch.Generator) -> Tensor:
    """Pixels (*size, 2) as (row, column), uniform over the whole image."""
    rows = torch.randint(height, size, generator=rng, device=rng.device)
    columns = torch.randint(width, size, generator=rng, device=rng.device)
    return torch.stack([rows, columns], dim=-1)


def clipped_boxes(
    centres: Tensor, before: Tensor | int, after: Tensor | int, height: int, width: int
) -> Tensor:
    """Boxes (..., 4) as (top, left, bottom, right), the ends excluded, cut off at the borders.

    Args:
        centres: (..., 2) as (row, column).
        before: how far boxes reach up and left of their centre: a number, or (..., 2).
        after: how far they reach down and right.
        height: of the image.
        width: of the image.
    """
    limit = torch.tensor([height, width], device=centres.device)
    low = (centres - before).clamp_min(0)
    high = torch.minimum(centres + after, limit)
    return torch.cat([low, high], dim=-1)


def box_areas(boxes: Tensor) -> Tensor:
    """The pixels (...) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks (..., H, W), true inside boxes (..., 4)."""
    top, left, bottom, right = (edge[..., None] for edge in boxes.unbind(-1))
    row = torch.arange(height, device=boxes.device)
    column = torch.arange(width, device=boxes.device)
    rows = (row >= top) & (row < bottom)
    columns = (column >= left) & (column < right)
    return rows[..., :, None] & columns[..., None, :]


__all__ = [
    "MIXING_EXEMPTIONS",
    "BatchTransform",
    "Per",
    "Replaces",
    "Transformed",
    "box_areas",
    "box_masks",
    "clipped_boxes",
    "draw_beta",
    "draw_centres",
    "draw_mix",
    "draw_permutation",
    "mix_rows",
]
