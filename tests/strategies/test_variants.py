"""Every technique keeps its promises over ranks under every kind of DDP."""

import functools
import pickle

import pytest

from lightning_reg.mechanisms.gradient_aggregation import GradientAggregation
from lightning_reg.testing.checks.scale import rank_difference
from lightning_reg.testing.snapshot import largest_gap
from tests.strategies.drift import subjects
from tests.strategies.variants import EXACT, STRATEGIES, is_joint, joint, trained

SUBJECTS = subjects()


@pytest.fixture(scope="module")
def outcomes(ranks):
    """What both ranks trained under each kind of DDP; all techniques in one call."""

    @functools.cache
    def of(variant):
        return [pickle.loads(answer) for answer in ranks.run(trained, variant)]

    return of


@pytest.mark.parametrize("variant", STRATEGIES)
def test_replicas_stay_bit_equal(outcomes, variant):
    one, other = outcomes(variant)
    refusing = {n for n, s in SUBJECTS.items() if issubclass(s.cls, GradientAggregation)}
    assert one.keys() == SUBJECTS.keys() - (refusing if variant == "fp16_hook" else set())
    differences = {n: rank_difference(SUBJECTS[n], one[n], other[n]) for n in one}
    assert {name: text for name, text in differences.items() if text is not None} == {}


@pytest.mark.parametrize("variant", EXACT)
def test_two_ranks_train_what_one_process_trains(outcomes, variant):
    claimed = {name: subject for name, subject in SUBJECTS.items() if is_joint(subject)}
    assert len(claimed) > 20
    gaps = {
        name: largest_gap(joint(subject).weights, outcomes(variant)[0][name].weights)
        for name, subject in claimed.items()
    }
    wrong = {name: gap for name, gap in gaps.items() if not gap[0] <= claimed[name].case.tolerance}
    assert wrong == {}
