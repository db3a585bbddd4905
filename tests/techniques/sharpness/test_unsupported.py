"""Strategies that split weights over ranks are refused before anything is trained."""

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy

from lightning_reg.engine import UnsupportedError
from lightning_reg.techniques.sharpness.sam import SAM
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import Host, fit, loader


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Stands in for Lightning's, which needs a package and a GPU; known by its name."""


def refusal() -> str:
    """What SAM says under FSDP2 on this rank."""
    run = rank_trainer(callbacks=[SAM()], strategy=ModelParallelStrategy(), max_epochs=1)
    try:
        run.fit(Host(), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


def test_model_parallel_is_refused_on_every_rank(ranks):
    one, other = ranks.run(refusal)
    assert one == other
    assert one.startswith("SAM: acts on whole weights, which ModelParallelStrategy splits")
    assert 'Try: Trainer(strategy="ddp_reg")' in one


def test_deepspeed_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="DeepSpeedStrategy splits over ranks"):
        fit([SAM()], strategy=DeepSpeedStrategy("cpu"))


def test_manual_optimization_is_refused():
    class Manual(Host):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(UnsupportedError, match="SAM: needs the Trainer's own backward"):
        fit([SAM()], module=Manual())
