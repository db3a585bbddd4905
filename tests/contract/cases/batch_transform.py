"""Mixup, CutMix, Cutout and the switch between them."""

import torch

from lightning_reg.techniques.inputs.cutmix import CutMix, cutmix
from lightning_reg.techniques.inputs.cutout import cutout
from lightning_reg.techniques.inputs.mixup import Mixup, mixup
from lightning_reg.testing import ContractCase, ImageHost

_PARTNERS = torch.tensor([2, 0, 1])


def _images(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*size, dtype=torch.float64, generator=generator, requires_grad=True)


def _mixup():
    lam = torch.tensor([0.3, 1.0, 0.5], dtype=torch.float64)
    return lambda x: mixup(x, _PARTNERS, lam), (_images(3, 4),)


def _cutmix():
    boxes = torch.tensor([[0, 1, 2, 3], [1, 1, 1, 3], [0, 0, 4, 4]])
    return lambda x: cutmix(x, _PARTNERS, boxes)[0], (_images(3, 2, 4, 4),)


def _cutout():
    centres = torch.tensor([[[0, 0]], [[2, 3]], [[-9, -9]]])
    return lambda x: cutout(x, centres, 3, 0.5), (_images(3, 2, 4, 4),)


CASES = {
    "Mixup": ContractCase(
        args={"alpha": 1.0},
        neutral={"probability": 0.0},
        bad=[{"alpha": 0.0}, {"alpha": -1.0}, {"probability": 1.5}, {"per": "pixel"}],
        gradcheck=_mixup,
        logs=("reg/mixup",),
    ),
    "CutMix": ContractCase(
        args={"alpha": 1.0},
        neutral={"probability": 0.0},
        bad=[{"alpha": 0.0}, {"probability": -0.1}, {"replaces": "everything"}],
        host=ImageHost,
        gradcheck=_cutmix,
        logs=("reg/cut_mix",),
    ),
    "Cutout": ContractCase(
        args={"length": 5},
        neutral={"probability": 0.0},
        bad=[{"length": 0}, {"length": 2.5}, {"holes": 0}, {"probability": 2.0}],
        host=ImageHost,
        gradcheck=_cutout,
        logs=("reg/cutout",),
    ),
    "MixSwitch": ContractCase(
        args={"mixers": [Mixup(1.0), CutMix(1.0)]},
        yaml={
            "mixers": [
                {
                    "class_path": "lightning_reg.techniques.inputs.mixup.Mixup",
                    "init_args": {"alpha": 1.0},
                },
                {
                    "class_path": "lightning_reg.techniques.inputs.cutmix.CutMix",
                    "init_args": {"alpha": 1.0},
                },
            ]
        },
        neutral={"probability": 0.0},
        bad=[
            {"mixers": [Mixup(1.0)]},
            {"mixers": [Mixup(1.0), 3]},
            {"mixers": [Mixup(1.0), CutMix(1.0, replaces="term")]},
            {"probabilities": [0.5, 0.6]},
            {"probabilities": [1.0]},
        ],
        host=ImageHost,
        logs=("reg/mix_switch",),
    ),
}
