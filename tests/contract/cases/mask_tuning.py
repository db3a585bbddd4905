"""Contract settings of masks that learn."""

import torch

from lightning_reg.testing import ContractCase


def _size_of_masks(probe):
    masks = [p for name, p in probe.module.named_parameters() if name.endswith(".mask")]
    return sum(torch.linalg.vector_norm(mask) for mask in masks)


CASES = {
    "MaskTuning": ContractCase(
        args={"strength": 0.01, "train": "bias"},
        bad=[{"strength": -1.0}, {"start": 0.001}, {"train": "("}],
        bad_late=[{"parameters": "no_such_name"}],
        expected=_size_of_masks,
    ),
}
