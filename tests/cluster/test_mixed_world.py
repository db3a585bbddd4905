"""`ddp_reg` by both import names, in one process, in processes that a notebook starts, in tests."""

import json
import os
import sys

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

import lightning_reg as reg
from lightning_reg.testing import rank_trainer
from tests.cluster import mixed_world
from tests.cluster.launch import environment, run
from tests.engine.simple import trainer


def program(package, *modes):
    # A process can be forked only before it has trained itself, so "one" comes last.
    command = [sys.executable, "-m", "tests.cluster.mixed_world", *modes]
    return json.loads(run([(command, environment(PACKAGE=package))]).splitlines()[-1])


@pytest.fixture(scope="module")
def expected():
    """What one process trains that needs no strategy at all."""
    module = mixed_world.Net()
    plain = trainer(mixed_world.callbacks(), **mixed_world.SETTINGS)
    # Under DDP Lightning shuffles training data by a sampler of its own.
    data = reg.IndexedDataset(mixed_world.DATA)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    loader = DataLoader(data, batch_size=mixed_world.JOINT_BATCH, sampler=sampler)
    plain.fit(module, loader, mixed_world.loaders(1)[1])
    metrics = {k: float(v) for k, v in plain.callback_metrics.items() if k.startswith("val/")}
    assert set(metrics) == {"val/ece", "val/nll", "val/entropy", "val/accuracy"}
    return {"weights": module.layer.weight.detach().flatten(), "metrics": metrics}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="notebooks fork")
@pytest.mark.parametrize(
    ("package", "modes"),
    [
        ("lightning.pytorch", ("notebook", "spawn", "one")),
        ("pytorch_lightning", ("notebook", "one")),
    ],
)
def test_every_way_to_start_trains_the_same(expected, package, modes):
    for mode, found in program(package, *modes).items():
        weights = torch.tensor(found["weights"])
        torch.testing.assert_close(weights, expected["weights"], rtol=1e-5, atol=1e-6)
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-5), mode


def evaluate(strategy=None):
    """Values of validate and test, and predictions, of an untrained module."""
    ranks = 1 if strategy is None else torch.distributed.get_world_size()
    make = trainer if strategy is None else rank_trainer
    settings = {} if strategy is None else {"strategy": strategy}
    run = make(callbacks=mixed_world.callbacks(), **settings)
    module, (_, loader) = mixed_world.Net(), mixed_world.loaders(ranks)
    before = set(vars(module))
    (val,) = run.validate(module, loader, verbose=False)
    (test,) = run.test(module, loader, verbose=False)
    predictions = torch.cat(run.predict(module, loader))
    return val, test, predictions, set(vars(module)) - before


def test_evaluation_on_two_ranks_gives_the_values_of_one_process(ranks):
    val, test, predictions, _ = evaluate()
    both = ranks.run(evaluate, "ddp_reg")
    for rank, (their_val, their_test, part, left) in enumerate(both):
        assert their_val == pytest.approx(val, abs=1e-6)
        assert their_test == pytest.approx(test, abs=1e-6)
        assert torch.equal(part, predictions[rank::2])
        assert not any("training_step" in name for name in left)
    assert val["val/nll"] == pytest.approx(test["test/nll"])
