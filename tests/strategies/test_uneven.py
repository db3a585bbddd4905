"""Statistics over ranks that hold unequal numbers of samples, or none that counts."""

import pickle

import pytest
import torch

from lightning_reg.mechanisms.output_penalty import LogitRows
from lightning_reg.testing.checks.scale import rank_difference
from lightning_reg.testing.snapshot import largest_gap
from tests.strategies.uneven import changes_the_loss, chosen, on_rank, train, twice, twice_on_rank

SUBJECTS = chosen()
# What they add follows from the user's loss, which is taken away here, or from draws for each
# rank's own samples: ranks have to agree, and to finish.
OF_THE_LOSS = [
    "AAER",
    "AgreementGradientDropout",
    "ELLE",
    "MESA",
    "TruncatedModelStep",
    "VanishingGradientRegularizer",
]
PENALTIES = [
    n for n, s in SUBJECTS.items() if not changes_the_loss(s.technique()) and n not in OF_THE_LOSS
]
LOSSES = sorted(SUBJECTS.keys() - {*PENALTIES, *OF_THE_LOSS})


@pytest.fixture(scope="module")
def outcomes(ranks):
    return [pickle.loads(answer) for answer in ranks.run(on_rank)]


def test_penalties_and_losses_are_among_them():
    assert len(PENALTIES) > 5
    assert len(LOSSES) > 4
    assert sum(issubclass(SUBJECTS[name].cls, LogitRows) for name in PENALTIES) >= 3


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_is_that_of_the_joint_batch(outcomes, name):
    joint = train(SUBJECTS[name], None)
    gap, where = largest_gap(joint.weights, outcomes[0][name].weights)
    assert gap <= 1e-9, where
    assert rank_difference(SUBJECTS[name], *[found[name] for found in outcomes]) is None
    assert largest_gap(joint.start, joint.weights)[0] > 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_loss_over_no_label_on_one_rank_is_zero_there(outcomes, name):
    one, other = (found[name] for found in outcomes)
    assert rank_difference(SUBJECTS[name], one, other) is None
    assert all(torch.isfinite(weight).all() for weight in one.weights.values())
    assert largest_gap(one.start, one.weights)[0] > 1e-4


@pytest.mark.parametrize("name", OF_THE_LOSS)
def test_what_follows_from_the_loss_keeps_ranks_equal(outcomes, name):
    one, other = (found[name] for found in outcomes)
    assert rank_difference(SUBJECTS[name], one, other) is None
    assert all(torch.isfinite(weight).all() for weight in one.weights.values())


@pytest.mark.parametrize("gated", [False, True])
def test_second_pass_is_over_the_samples_of_all_ranks(ranks, gated):
    joint, once = twice(gated, None), train(SUBJECTS["EntropyPenalty"], None)
    for answer in ranks.run(twice_on_rank, gated):
        gap, where = largest_gap(joint.weights, pickle.loads(answer).weights)
        assert gap <= 1e-9, where
    assert largest_gap(joint.weights, once.weights)[0] > 1e-6
