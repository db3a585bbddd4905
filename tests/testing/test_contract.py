"""A technique that keeps the contract passes; each one that breaks it is caught by its check."""

import pickle
from dataclasses import replace

import pytest

from lightning_reg.testing import CHECKS, ContractError, check_regularizer
from tests.testing import broken as b
from tests.testing.broken import GOOD, GOOD_IN_TEST, GOOD_MIXIN

# (check, technique, changes of the good case, what the message says)
BROKEN = [
    ("neutral", b.DrawsFromTheGlobalGenerator, {}, "global random generator"),
    ("neutral", b.Good, {"neutral": None}, "no `neutral` setting"),
    ("acts", b.DoesNothing, {}, "does not act"),
    ("formula", b.FlipsTheSign, {}, "the function gives"),
    ("formula", b.ForgetsManualOptimization, {}, "under manual optimization"),
    ("formula", b.Good, {"expected": None, "gradcheck": None}, "nothing says what it computes"),
    ("gradient", b.Good, {"gradcheck": b.detached_gradcheck}, "finite differences"),
    ("gradient", b.Good, {"gradcheck": None}, "no `gradcheck`"),
    ("replicas", b.NoiseOfItsOwnOnEachRank, {}, "disagree in a parameter"),
    ("replicas", b.StateOfItsOwnOnEachRank, {}, "disagree in the technique's state"),
    ("semantics", b.LocalStatisticDeclaredGlobal, {}, "declared 'global'"),
    ("semantics", b.LogsALocalValue, {}, "log `reg/"),
    ("accumulation", b.CountsEveryMicroBatch, {}, "two accumulated micro-batches"),
    ("resume", b.LosesItsStateOnResume, {}, "other weights"),
    ("resume", b.TakesItsReferenceAgain, {}, "references are not taken again"),
    ("resume", b.SavesTheStateOfOneRank, {}, "of two and resumed"),
    ("resume", b.HidesThatItHasAState, {}, "was not refused"),
    ("precision", b.AddsToScaledGradients, {}, "under 16-mixed"),
    ("precision", b.ForgetsThatFusedOptimizersUnscaleLater, {}, "with a fused optimizer"),
    ("precision", b.Good, {"args": {"strength": 1e-4}}, "rounding alone can do"),
    ("order", b.DependsOnThePlaceInTheList, {}, "its place in `callbacks`"),
    ("restores", b.LeavesAHookBehind, {}, "_forward_hooks"),
    ("restores", b.FreezesForGood, {}, "requires_grad"),
    ("restores", b.LeavesWeightsMoved, {}, "an exception in a second pass"),
    ("restores", b.RemembersInTheClass, {}, "two equal runs train different weights"),
    ("restores", b.SwallowsExceptions, {}, "swallows"),
    ("copies", b.CannotBePickled, {}, "pickle of it fails"),
    ("copies", b.CopiesKeepTheRun, {}, "its state differs"),
    ("yaml", b.CannotBeWrittenToYaml, {"args": {"power": "two"}}, "LightningCLI config"),
    ("yaml", b.OtherArgumentsFromYaml, {"args": {"layers": ("encoder",)}}, "made from the same"),
    ("arguments", b.AcceptsAnyStrength, {}, "is accepted by the constructor"),
    ("arguments", b.SwallowsArguments, {}, "is swallowed"),
    ("arguments", b.NamesNoCure, {}, "end with a cure"),
    ("arguments", b.RefusesLate, {"bad_late": [{"layer": "x"}]}, "after the first batch only"),
    ("arguments", b.Good, {"bad_late": [{"strength": 1.0}]}, "the run goes through"),
    ("signals", b.GoesOnWithoutItsSignal, {}, "without a word"),
    ("non_finite", b.LearnsFromNan, {}, "state mean is not finite"),
    ("non_finite", b.LearnsInSkippedSteps, {}, "changed its state mean"),
    ("non_finite", b.LearnsOnTheRanksThatCan, {}, "on one of two ranks their states differ"),
    ("non_finite", b.CrashesOnNan, {}, "stops the run with ValueError"),
    ("non_finite", b.WritesNanWeights, {}, "where the step was skipped"),
    ("logs", b.LogsNothing, {}, "was not logged"),
    ("logs", b.LogsOverTheUsersLoss, {}, "the clean loss"),
    ("logs", b.CountsTwice, {}, "counted 64 samples of 32"),
]


def test_a_good_technique_keeps_every_promise(ranks):
    assert check_regularizer(b.Good, GOOD, ranks) == dict.fromkeys(CHECKS, "kept")


@pytest.mark.parametrize(
    ("check", "technique", "changes", "text"),
    BROKEN,
    ids=[f"{check}-{technique.__name__}" for check, technique, _, _ in BROKEN],
)
def test_catches(check, technique, changes, text, ranks):
    with pytest.raises(ContractError) as caught:
        check_regularizer(technique, replace(GOOD, **changes), ranks, checks=[check])
    assert caught.value.check == check
    message = str(caught.value)
    assert message.startswith(f"{technique.__name__} breaks the check {check!r}: ")
    assert text in message


def kept(names):
    return [name for name, result in names.items() if result == "kept"]


def test_a_good_technique_in_a_test_keeps_what_has_a_meaning(ranks):
    result = check_regularizer(b.GoodInTest, GOOD_IN_TEST, ranks)
    left = sorted(result.keys() - set(kept(result)))
    assert left == ["accumulation", "order", "resume", "signals"]


@pytest.mark.parametrize(
    ("check", "technique", "text"),
    [
        ("replicas", b.AdaptsEachRankByItself, "disagree in a parameter"),
        ("semantics", b.AdaptsEachRankByItself, "declared 'global'"),
        ("non_finite", b.AdaptsEachRankByItself, "is not finite"),
        ("restores", b.LeavesAMarkAfterATest, "`adapted` of the module is new"),
        ("restores", b.StopsAfterATest, "two equal runs"),
    ],
)
def test_catches_in_a_test(check, technique, text, ranks):
    with pytest.raises(
        ContractError, match=f"{technique.__name__} breaks the check '{check}'"
    ) as e:
        check_regularizer(technique, GOOD_IN_TEST, ranks, checks=[check])
    assert text in str(e.value)


def test_a_good_mixin_keeps_what_has_a_meaning(ranks):
    result = check_regularizer(b.GoodMixin, GOOD_MIXIN, ranks)
    assert sorted(result.keys() - set(kept(result))) == ["order", "signals", "yaml"]


@pytest.mark.parametrize(
    ("check", "technique", "mixin", "text"),
    [
        ("neutral", b.OtherWeights, b.other_weights, "not those of a run without"),
        ("semantics", b.LocalMixin, b.local_mixin, "declared 'global'"),
    ],
)
def test_catches_mixins(check, technique, mixin, text, ranks):
    with pytest.raises(
        ContractError, match=f"{technique.__name__} breaks the check '{check}'"
    ) as e:
        check_regularizer(technique, replace(GOOD_MIXIN, mixin=mixin), ranks, checks=[check])
    assert text in str(e.value)


def test_every_check_is_seen_failing():
    assert {check for check, _, _, _ in BROKEN} == set(CHECKS)


def test_every_check_has_a_description():
    assert all(len(check.description) > 20 for check in CHECKS.values())


@pytest.mark.parametrize(
    ("technique", "text"),
    [(b.ExemptsFromNothing, "which is no check"), (b.ExemptsWithoutReason, "needs a reason")],
)
def test_bad_exemptions_are_refused(technique, text):
    with pytest.raises(ContractError, match=text):
        check_regularizer(technique, GOOD, checks=[])


def test_exempt_checks_are_reported_with_their_reason(ranks):
    class Exempt(b.FlipsTheSign):
        exemptions = {"formula": "the sign is flipped on purpose"}

    kept = check_regularizer(Exempt, GOOD, ranks, checks=["formula", "acts"])
    assert kept == {"formula": "exempt: the sign is flipped on purpose", "acts": "kept"}


def test_unknown_checks_are_refused():
    with pytest.raises(ValueError, match="there is no check 'speed'"):
        check_regularizer(b.Good, GOOD, checks=["speed"])


def test_cases_that_ranks_cannot_get_are_named(ranks):
    case = replace(GOOD, host=lambda options: GOOD.host(options))
    with pytest.raises(ContractError, match="module-level functions"):
        check_regularizer(b.Good, case, ranks, checks=["replicas"])


def test_errors_survive_a_process_boundary():
    error = ContractError("SAM", "it drifts", "replicas")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
