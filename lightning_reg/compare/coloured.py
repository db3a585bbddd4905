"""Digits in a colour that goes along with their label in training and not when it counts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_reg.compare.data import load_digits
from lightning_reg.engine.errors import check_range

GROUPS = 4


def coloured_digits(
    seed: int = 0, *, agreement: float = 0.9, samples: int = 900
) -> tuple[TensorDataset, TensorDataset]:
    """Is a digit 5 or more? In training its colour says so, most of the time.

    A digit of 8x8 pixels lies in one of two colour channels. In the training set it is the
    channel of its label for the share ``agreement`` of the samples, in the other set for half of
    them: who learns the colour, which is easy, is wrong in the groups that are rare in training.

    Args:
        seed: of the split and of the colours.
        agreement: in [0, 1].
        samples: how many of the 1,797 digits are for training.

    Returns:
        A training set and a held-out one, of inputs (N, 128), labels (N,) 0 or 1, and groups (N,)
        ``2 * label + colour``.

    Raises:
        ArgumentError: if ``agreement`` lies outside [0, 1], or ``samples`` leaves a set empty.
    """
    cure = "coloured_digits(agreement=0.9, samples=900)"
    check_range("coloured_digits", "agreement", agreement, 0, 1, cure=cure)
    images, digits = load_digits()
    check_range("coloured_digits", "samples", samples, 1, len(digits) - 1, cure=cure)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    training, held_out = order[:samples], order[samples:]
    labels = (digits >= 5).long()
    return (
        _coloured(images[training], labels[training], agreement, generator),
        _coloured(images[held_out], labels[held_out], 0.5, generator),
    )


def _coloured(
    images: Tensor, labels: Tensor, agreement: float, generator: torch.Generator
) -> TensorDataset:
    agrees = torch.rand(len(labels), generator=generator) < agreement
    colours = torch.where(agrees, labels, 1 - labels)
    inputs = images.new_zeros(len(labels), 2, images.shape[1])
    inputs[torch.arange(len(labels)), colours] = images
    return TensorDataset(inputs.flatten(1), labels, 2 * labels + colours)


__all__ = ["GROUPS", "coloured_digits"]
