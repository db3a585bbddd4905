"""Distorts the images of a batch by a random policy of torchvision, such as RandAugment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.optional import require
from lightning_reg.mechanisms.batch_transform import BatchTransform, Per, Transformed

__all__ = ["AugmentationPolicy", "augmentation_policy"]

ImageTransform = Callable[[Tensor], Tensor]
_POLICIES = {
    "rand_augment": "RandAugment",
    "trivial_augment": "TrivialAugmentWide",
    "auto_augment": "AutoAugment",
    "aug_mix": "AugMix",
}


def augmentation_policy(
    images: Tensor, transform: ImageTransform, seed: int, chosen: Tensor | None = None
) -> Tensor:
    """Each chosen image through ``transform``, with draws that follow from ``seed`` alone.

    Such transforms draw from torch's global generator, which is set for them and then put back as
    if nothing had been drawn.

    Args:
        images: (B, ...).
        transform: from an image to one of the same shape.
        seed: of the draws, for the images one after the other.
        chosen: (B,) bool on the CPU; ``None`` distorts the whole batch as one image, by one draw.

    Returns:
        (B, ...); an image that is not chosen is there bit for bit.
    """
    # torchvision draws on the CPU, whatever the device of the images is; others may draw there.
    devices = [images.device.index or 0] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *map(_of_device, devices)):
            generator.manual_seed(seed)
        if chosen is None:
            return transform(images)
        rows = [transform(x) if c else x for x, c in zip(images, chosen.tolist(), strict=True)]
    return torch.stack(rows)


def _of_device(index: int) -> torch.Generator:
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


class AugmentationPolicy(BatchTransform):
    """Distorts the images of a batch by a random policy of torchvision, such as RandAugment.

    Cubuk, Zoph, Shlens, Le (2019), RandAugment: Practical automated data augmentation with a
    reduced search space, arXiv:1909.13719: ``num_ops`` distortions of one magnitude. Müller,
    Hutter (2021), TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation,
    arXiv:2103.10158: one distortion of a random magnitude, with nothing to tune.
    ``"auto_augment"`` and ``"aug_mix"`` are those of arXiv:1805.09501 and arXiv:1912.02781. The
    policies are torchvision's (the ``v2`` transforms), with its defaults.

    Labels and loss stay as they are. The distortions belong to the worker processes of a loader,
    where images are single and time is free; here they act on the batch as the step gets it, with
    the random numbers of this package: the same after a resume, and none taken from the user's
    own. That is for images that are in memory as tensors, and for turning a policy up and down
    by a :class:`Schedule`.

    Args:
        policy: ``"rand_augment"``, ``"trivial_augment"``, ``"auto_augment"``, ``"aug_mix"``, or
            any transform from a tensor to a tensor of its shape that draws from torch's
            generator.
        settings: keyword arguments of the policy: ``{"num_ops": 2, "magnitude": 9}``.
        probability: of distorting an image (or a batch): a number in [0, 1] or a
            :class:`Schedule`; 0 turns the technique off.
        per: ``"sample"``: each image has its own draws; ``"batch"``: all of a batch have the same,
            in one call, which is faster by far and less random.
        mean: the numbers per channel by which images were normalized before they come to the
            batch; policies need images in [0, 1]. ``None`` if they are.
        std: the same.
        signals: where ``inputs`` are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if ``policy``, ``settings`` or an argument has no meaning.
        ModuleNotFoundError: if a policy is named and torchvision is not installed.
        RegularizationError: in the first step, if inputs are not images (B, C, H, W) of floats; if
            the policy returns other shapes.

    Note:
        Over ranks: local; each rank draws for its own images. No collective. Under accumulation
        each micro-batch draws its own. A second pass (SAM) sees the same images. Cost: the
        policy's kernels, image by image with ``per="sample"``: a loop over the batch.
        ``reg/augmentation_policy`` logs the share of images that was distorted.

        It hurts where a distortion changes the label (digits that are turned over), with strong
        magnitudes on small models, and on images with other than 1 or 3 channels, for which some
        of the distortions have no meaning.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AugmentationPolicy
        >>> from torch.nn import Dropout
        >>> trainer = L.Trainer(callbacks=[AugmentationPolicy(Dropout(0.1))], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "RandAugment: Practical automated data augmentation with a reduced search space",
            "Cubuk et al.",
            2019,
            "1909.13719",
        ),
        Paper(
            "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation",
            "Müller and Hutter",
            2021,
            "2103.10158",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    reads: ClassVar[frozenset[str]] = frozenset({"inputs"})
    writes: ClassVar[frozenset[str]] = frozenset({"inputs"})
    exclusive: ClassVar[frozenset[str]] = frozenset()
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch draws its own distortions",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(augmentation_policy)
    image: ClassVar[bool] = True
    explanation: ClassVar[str] = "distorts images by a random policy; labels and loss are yours"

    def __init__(
        self,
        policy: str | nn.Module | ImageTransform = "rand_augment",
        *,
        settings: Mapping[str, Any] | None = None,
        probability: float | Schedule = 1.0,
        per: Per = "sample",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, per=per, signals=signals, name=name)
        self.policy = policy
        self.settings = dict(settings or {})
        self._policy = self._made(policy)
        if (mean is None) != (std is None) or (std is not None and not all(s > 0 for s in std)):
            raise ArgumentError(
                self,
                f"`mean` and `std` come together, deviations above 0; got {mean!r} and {std!r}",
                cure="AugmentationPolicy(mean=[0.5], std=[0.5])",
            )
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """Distort the chosen images."""
        seed = int(torch.randint(2**62, (), generator=generator))
        images = self._denormalized(inputs)
        which = chosen if self.per == "sample" else None
        changed = augmentation_policy(images, self._policy, seed, which)
        if changed.shape != inputs.shape:
            raise RegularizationError(
                self,
                f"needs a policy that keeps the shape {tuple(inputs.shape)}, got "
                f"{tuple(changed.shape)}",
                cure='AugmentationPolicy("trivial_augment")',
            )
        kept = chosen.to(inputs.device).view(-1, *[1] * (inputs.ndim - 1))
        result = torch.where(kept, self._normalized(changed), inputs)
        return Transformed(result.to(inputs.dtype), float(chosen.float().mean()))

    def _made(self, policy: str | nn.Module | ImageTransform) -> ImageTransform:
        cure = f'AugmentationPolicy("{next(iter(_POLICIES))}")'
        if callable(policy):
            if self.settings:
                problem = f"`settings` are for policies by name, got {self.settings!r}"
                raise ArgumentError(self, problem, cure=cure)
            return policy
        if policy not in _POLICIES:
            problem = f"`policy` must be one of {', '.join(_POLICIES)}, got {policy!r}"
            raise ArgumentError(self, problem, cure=cure)
        transforms = require("torchvision.transforms.v2", "vision", type(self).__name__)
        try:
            made: ImageTransform = getattr(transforms, _POLICIES[policy])(**self.settings)
        except TypeError as error:
            raise ArgumentError(self, f"`settings`: {error}", cure=cure) from error
        return made

    def _denormalized(self, images: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return images
        return images * _channels(self.std, images) + _channels(self.mean, images)

    def _normalized(self, images: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return images
        return (images - _channels(self.mean, images)) / _channels(self.std, images)


def _channels(numbers: Sequence[float], images: Tensor) -> Tensor:
    """One number per channel, to go with (B, C, H, W)."""
    return images.new_tensor(numbers).view(-1, *[1] * (images.ndim - 2))
