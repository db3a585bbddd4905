"""What cannot be right where weights are split over ranks is refused before training."""

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy

from lightning_reg.engine import UnsupportedError
from lightning_reg.techniques.sharpness.sam import SAM
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import Host, fit, loader


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Stands in for Lightning's, which needs a package and a GPU; known by its name."""


def refusal() -> str:
    """What SAM with its defaults says under FSDP2 on this rank."""
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    run = rank_trainer(callbacks=[SAM()], strategy=strategy, max_epochs=1)
    try:
        run.fit(Host(), loader())
    except UnsupportedError as error:
        return str(error)
    return ""


def test_a_rank_of_its_own_is_refused_under_model_parallel(ranks):
    one, other = ranks.run(refusal)
    assert one == other
    assert one.startswith('SAM: follows the gradient of one rank (sharpness="micro")')
    assert 'Try: SAM(sharpness="global")' in one


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
