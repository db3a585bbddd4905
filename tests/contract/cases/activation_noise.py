"""Noise on activations, on weights and on inputs."""

import torch

from lightning_reg.techniques.inputs.instance_noise import instance_noise
from lightning_reg.techniques.inputs.zero_impute_mask import zero_impute_mask
from lightning_reg.techniques.noise.drop_block import drop_block
from lightning_reg.techniques.noise.feature_noise import feature_noise
from lightning_reg.techniques.noise.modality_dropout import modality_dropout
from lightning_reg.techniques.noise.nested_dropout import nested_dropout
from lightning_reg.techniques.noise.very_large_dropout import inverted_dropout
from lightning_reg.techniques.noise.weight_noise import weight_noise
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ImageHost

_GENERATOR = torch.Generator().manual_seed(0)
_ROWS, _NOISE = (torch.randn(5, 4, dtype=torch.float64, generator=_GENERATOR) for _ in "ab")
_MAPS = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=_GENERATOR)
_SEEDS = torch.rand(2, 3, 4, 4, generator=_GENERATOR) < 0.1
_LENGTHS = torch.tensor([1, 4, 2, 3, 2])


def _function(change, values, *settings):
    return lambda x: change(x, *settings), (values.clone().requires_grad_(),)


_NO_LAYER = [{"layers": "no_such_layer"}]

CASES = {
    "FeatureNoise": ContractCase(
        args={"sigma": 0.5, "layers": "encoder"},
        neutral={"sigma": 0.0},
        bad=[{"sigma": -1.0}, {"kind": "other"}, {"layers": []}],
        bad_late=_NO_LAYER,
        gradcheck=lambda: _function(feature_noise, _ROWS, _NOISE, 0.5, "multiplicative"),
    ),
    "VeryLargeDropout": ContractCase(
        args={"p": 0.9, "layers": "encoder"},
        neutral={"p": 0.0},
        bad=[{"p": 1.0}, {"p": -0.1}, {"layers": []}],
        bad_late=_NO_LAYER,
        gradcheck=lambda: _function(inverted_dropout, _ROWS, (_NOISE > 0).double(), 0.5),
    ),
    "DropBlock": ContractCase(
        args={"p": 0.3, "layers": "stem", "block_size": 3},
        neutral={"p": 0.0},
        bad=[{"p": 1.0}, {"block_size": 0}, {"layers": []}],
        bad_late=_NO_LAYER,
        host=ImageHost,
        gradcheck=lambda: _function(drop_block, _MAPS, _SEEDS, 2),
    ),
    "NestedDropout": ContractCase(
        args={"layer": "encoder", "sigma": 8.0},
        neutral={"probability": 0.0},
        bad=[{"probability": 1.5}, {"sigma": 0.0}, {"per": "epoch"}],
        bad_late=[{"layer": "no_such_layer"}],
        gradcheck=lambda: _function(nested_dropout, _ROWS, _LENGTHS),
    ),
    "ModalityDropout": ContractCase(
        args={"p": 0.5, "layers": "encoder"},
        neutral={"p": 0.0},
        bad=[{"p": 1.5}, {"null": float("nan")}, {"layers": []}],
        bad_late=_NO_LAYER,
        gradcheck=lambda: _function(modality_dropout, _ROWS, _NOISE[:, 0] > 0, 1.0),
    ),
    "WeightNoise": ContractCase(
        args={"sigma": 0.1},
        neutral={"sigma": 0.0},
        bad=[{"sigma": -1.0}, {"scale": "other"}],
        bad_late=[{"parameters": "no_such_name"}],
        gradcheck=lambda: _function(weight_noise, _ROWS, _NOISE, 0.1),
    ),
    "InstanceNoise": ContractCase(
        args={"sigma": 0.5},
        neutral={"sigma": 0.0},
        bad=[{"sigma": -1.0}],
        expected=lambda probe: 0.5,
        gradcheck=lambda: _function(instance_noise, _ROWS, _NOISE, 0.5),
        logs=("reg/instance_noise",),
    ),
    "ZeroImputeMask": ContractCase(
        args={"missing": 0.4},
        neutral={"missing": 0.0},
        bad=[{"missing": 1.0}, {"missing": -0.1}],
        gradcheck=lambda: _function(zero_impute_mask, _ROWS, _NOISE > 0),
        logs=("reg/zero_impute_mask",),
    ),
}
