"""Contract cases of the averages of weights."""

import os
import tempfile

import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.techniques.averaging.ema import exponential_average
from lightning_reg.techniques.averaging.model_soup import ModelSoup, model_soup
from lightning_reg.techniques.averaging.swa import stochastic_average
from lightning_reg.testing import ContractCase


class Kept(Callback):
    """Gives the soup two files to average: the module's start, and all halves."""

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, ModelSoup) and callback.checkpoints == ["two"]:
                callback.checkpoints = self.files(pl_module)

    def files(self, module):
        folder = tempfile.mkdtemp()
        state = module.state_dict()
        paths = [os.path.join(folder, name) for name in ("start.pt", "half.pt")]
        torch.save(state, paths[0])
        torch.save({n: torch.full_like(v, 0.5) for n, v in state.items()}, paths[1])
        return paths


def _kept():
    return [Kept()]


def _soup():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2)]

    def soup(first, second):
        return model_soup([{"w": first}, {"w": second}], [1.0, 3.0])["w"]

    return soup, tuple(t.requires_grad_() for t in inputs)


def _of(function, number):
    def make():
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(4)]

        def flat(*tensors):
            return tuple(function(tensors[:2], tensors[2:], number))

        return flat, tuple(t.requires_grad_() for t in inputs)

    return make


CASES = {
    "EMA": ContractCase(
        args={"decay": 0.7},
        neutral={"decay": 0.0},
        bad=[{"decay": 1.1}, {"decay": -0.1}, {"every": 0}, {"statistics": "none"}],
        gradcheck=_of(exponential_average, 0.9),
        logs=(),
    ),
    "SWA": ContractCase(
        args={"start": 0, "lr": 0.05, "anneal_epochs": 0},
        neutral={"start": 10},
        bad=[
            {"start": -1},
            {"start": 1.5},
            {"lr": 0.0},
            {"anneal": "step"},
            {"anneal_epochs": -1},
            {"every": 0},
        ],
        gradcheck=_of(stochastic_average, 3),
        logs=(),
    ),
    "ModelSoup": ContractCase(
        args={"checkpoints": ["two"]},
        bad=[{"recipe": "best"}, {"recipe": "greedy"}],
        companions=_kept,
        gradcheck=_soup,
        logs=(),
    ),
}
