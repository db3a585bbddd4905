"""What techniques log on several ranks is the mean over ranks, at whichever phase it is known."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightning_reg import SAM, EntropyPenalty
from lightning_reg.engine import Regularizer
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.technique import Semantics
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, trainer


class Own(Regularizer):
    """A value of each rank, r + 1, at every phase: a tenth of it before the loss is known."""

    semantics: ClassVar[Semantics] = "local"

    def transform_batch(self, step: Any) -> None:
        step.log(self, 0.1 * (step.comm.rank + 1), "early")

    def penalty(self, step: Any) -> Tensor:
        return 0.0 * step.loss + (step.comm.rank + 1)

    def edit_gradients(self, update: Any) -> Tensor:
        return torch.tensor(10.0 * (update.comm.rank + 1))


class Joint(Regularizer):
    """A mean over samples of which rank r has r + 1, each worth r + 1."""

    semantics: ClassVar[Semantics] = "global"

    def penalty(self, step: Any) -> JointMean:
        number = torch.tensor(step.comm.rank + 1.0)
        return JointMean(number * number, number)


def logged(strategy: str, accumulate: int) -> dict[str, float]:
    run = rank_trainer(
        strategy=strategy,
        callbacks=[Own(1.0), Joint(1.0, name="joint")],
        max_steps=2,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )
    data = torch.utils.data.TensorDataset(INPUTS, LABELS)
    run.fit(Host(), torch.utils.data.DataLoader(data, batch_size=4))
    return {key: float(value) for key, value in run.logged_metrics.items() if "reg/" in key}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "ddp_reg"])
def test_values_of_every_phase_are_means_over_ranks(ranks, strategy, accumulate):
    for found in ranks.run(logged, strategy, accumulate):
        assert found.pop("reg/own_early") == pytest.approx(0.15)
        # The penalty's 1.5 and the edit's 15 are two values of one key.
        expected = (1.5 * accumulate + 15) / (accumulate + 1)
        assert found.pop("reg/own") == pytest.approx(expected)
        assert found.pop("reg/joint") == pytest.approx((1 + 4) / 3)
        assert not found


def rise(run, batch_size: int) -> float:
    """What SAM logs of a step over 16 samples, with a penalty that counts in both passes."""
    data = torch.utils.data.TensorDataset(INPUTS[:16], LABELS[:16])
    run.fit(Host(), torch.utils.data.DataLoader(data, batch_size=batch_size))
    return float(run.logged_metrics["reg/sam"])


SETTINGS: dict[str, Any] = {"max_steps": 1, "log_every_n_steps": 1}


def twice() -> list[Any]:
    return [EntropyPenalty(5.0, direction="maximize"), SAM(0.5, sharpness="global")]


def rise_on_ranks(strategy: str) -> float:
    return rise(rank_trainer(strategy=strategy, callbacks=twice(), **SETTINGS), 8)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_reg"])
def test_rise_behind_a_second_pass_is_that_of_one_process(ranks, strategy):
    alone = rise(trainer(callbacks=twice(), **SETTINGS), 16)
    without = rise(trainer(callbacks=twice()[1:], **SETTINGS), 16)
    assert abs(alone - without) > 0.1
    for found in ranks.run(rise_on_ranks, strategy):
        assert found == pytest.approx(alone, rel=1e-4)
