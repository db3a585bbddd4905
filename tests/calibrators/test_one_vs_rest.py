"""Beta, histogram, isotonic: constrained optima, scikit-learn, closed forms, several classes."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from sklearn.isotonic import IsotonicRegression

from lightning_reg.calibrators.beta import BetaCalibration
from lightning_reg.calibrators.histogram import HistogramBinning
from lightning_reg.calibrators.isotonic import IsotonicCalibration
from lightning_reg.calibrators.one_vs_rest import log_odds
from lightning_reg.engine import ArgumentError
from lightning_reg.engine.communicator import Communicator

_draws = torch.Generator().manual_seed(0)
BINARY = 2 * torch.randn(1200, dtype=torch.float64, generator=_draws)
POSITIVE = (torch.rand(1200, generator=_draws) < (0.4 * BINARY - 0.5).sigmoid()).long()
LOGITS = 2 * torch.randn(1200, 4, dtype=torch.float64, generator=_draws)
LABELS = torch.multinomial((0.5 * LOGITS).softmax(1), 1, generator=_draws).squeeze(1)
ALL = [BetaCalibration, HistogramBinning, IsotonicCalibration]


def test_log_odds_are_exact_where_a_class_is_sure():
    z = torch.tensor([[800.0, 0.0, 1.0], [0.0, 50.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor(
        [
            [800 - np.logaddexp(0, 1), -800, -799],
            [-50 - math.log1p(math.exp(-50)), 50 - math.log(2), -50 - math.log1p(math.exp(-50))],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(log_odds(z), expected, rtol=1e-13, atol=0)


def beta_nll(parameters, p, y):
    a, b, c = parameters
    scores = a * np.log(p) - b * np.log1p(-p) + c
    return np.logaddexp(0, -np.where(y == 1, scores, -scores)).mean()


def test_beta_is_the_minimum():
    p, y = scipy.special.expit(BINARY.numpy()), POSITIVE.numpy()
    found = BetaCalibration(task="binary").fit(BINARY, POSITIVE).coefficients[0].numpy()
    expected = scipy.optimize.minimize(
        beta_nll, [1.0, 1.0, 0.0], (p, y), method="Nelder-Mead", options={"xatol": 1e-9}
    )
    assert beta_nll(found, p, y) == pytest.approx(expected.fun, abs=1e-10)


def test_beta_keeps_nothing_but_the_constant_where_the_bounds_hold_both_back():
    found = BetaCalibration(task="binary").fit(-BINARY, POSITIVE).coefficients[0]
    assert found[:2].tolist() == [0, 0]
    assert float(found[2]) == pytest.approx(scipy.special.logit(POSITIVE.numpy().mean()), abs=1e-6)


def test_beta_has_the_coefficients_of_the_released_code_where_no_bound_is_reached():
    # betacal/python@3a9dbb4 fits an almost unpenalized logistic regression on log p, -log(1 - p).
    from sklearn.linear_model import LogisticRegression

    p = scipy.special.expit(BINARY.numpy())
    x = np.stack([np.log(p), -np.log(1 - p)], 1)
    released = LogisticRegression(C=99999999999, tol=1e-10, max_iter=1000).fit(x, POSITIVE.numpy())
    assert (released.coef_ > 0).all()
    expected = [*released.coef_[0], released.intercept_[0]]
    found = BetaCalibration(task="binary").fit(BINARY, POSITIVE).coefficients[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_isotonic_equals_scikit_learn():
    scaling = IsotonicCalibration(task="binary").fit(BINARY, POSITIVE)
    p = scipy.special.expit(BINARY.numpy())
    reference = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(p, POSITIVE.numpy())
    asked = torch.cat([BINARY, torch.linspace(-9, 9, 500, dtype=torch.float64)])
    expected = reference.predict(scipy.special.expit(asked.numpy()))
    np.testing.assert_allclose(scaling.probabilities(asked).numpy(), expected, atol=1e-12)


def test_histogram_holds_the_share_of_positives_of_each_bin():
    scaling = HistogramBinning(7, binning="equal_width", task="binary").fit(BINARY, POSITIVE)
    p, y = scipy.special.expit(BINARY.numpy()), POSITIVE.numpy()
    edges = np.linspace(0, 1, 8)
    total, _ = np.histogram(p, edges)
    right, _ = np.histogram(p, edges, weights=y)
    index = np.minimum((p * 7).astype(int), 6)
    expected = (right / total)[index]
    np.testing.assert_allclose(scaling.probabilities(BINARY).numpy(), expected, atol=1e-12)


def test_equal_mass_bins_hold_equally_many():
    scaling = HistogramBinning(8, task="binary").fit(BINARY, POSITIVE)
    counts, _ = np.histogram(scipy.special.expit(BINARY.numpy()), scaling.edges[0].numpy())
    assert (counts == 150).all()


def test_an_empty_bin_takes_its_middle():
    logits, labels = torch.tensor([-4.0, 4.0, 4.0]), torch.tensor([0, 1, 0])
    scaling = HistogramBinning(4, binning="equal_width", task="binary").fit(logits, labels)
    asked = torch.tensor([0.3, 0.6]).double().logit()
    torch.testing.assert_close(scaling.probabilities(asked), torch.tensor([0.375, 0.625]).double())
    torch.testing.assert_close(scaling.probabilities(logits[1:]), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("cls", ALL)
def test_several_classes_are_mapped_alone_and_divided_by_their_sum(cls):
    scaling = cls().fit(LOGITS, LABELS)
    odds, columns = log_odds(LOGITS), []
    for c in range(4):
        labels = torch.eq(LABELS, c)
        alone = cls(task="binary").fit(odds[:, c], labels.long())
        columns.append(alone.probabilities(odds[:, c]))
    expected = torch.stack(columns, 1)
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(scaling.probabilities(LOGITS), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cls", ALL)
def test_held_out_likelihood_comes_near_the_true_models(cls):
    true = torch.nn.functional.cross_entropy(0.5 * LOGITS, LABELS)
    raw = torch.nn.functional.cross_entropy(LOGITS, LABELS)
    fitted = torch.nn.functional.cross_entropy(cls().fit(LOGITS, LABELS).calibrate(LOGITS), LABELS)
    assert raw - true > 0.1
    assert abs(fitted - true) < 0.05


@pytest.mark.parametrize("cls", ALL)
def test_logits_stay_finite_where_probabilities_become_0_or_1(cls):
    logits = torch.cat([LOGITS, 900 * LOGITS])
    scaling = cls().fit(logits, torch.cat([LABELS, LOGITS.argmax(1)]))
    assert torch.isfinite(scaling.calibrate(logits)).all()


def test_a_row_whose_classes_all_have_probability_0_becomes_uniform():
    logits = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0) * 4
    scaling = IsotonicCalibration().fit(logits, torch.tensor([0, 0, 1, 1, 2, 2]))
    flat = torch.zeros(1, 3, dtype=torch.float64)
    scaling.values.zero_()
    torch.testing.assert_close(scaling.probabilities(flat), torch.full_like(flat, 1 / 3))


@pytest.mark.parametrize("cls", ALL)
def test_states_go_through_a_checkpoint(cls, tmp_path):
    scaling = cls().fit(LOGITS, LABELS)
    torch.save(scaling.state_dict(), tmp_path / "state.pt")
    again = cls()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.fitted
    assert torch.equal(again.calibrate(LOGITS), scaling.calibrate(LOGITS))


def _on_rank(cls, parts):
    rank = torch.distributed.get_rank()
    own = parts[rank]
    scaling = cls().fit(LOGITS[own], LABELS[own], comm=Communicator(rank, 2))
    return {name: value.clone() for name, value in scaling.named_buffers()}


def test_two_ranks_have_the_result_of_one_bit_for_bit(ranks):
    order = torch.randperm(1200, generator=_draws)
    for cls in ALL:
        expected = cls().fit(LOGITS, LABELS).state_dict()
        for found in ranks.run(_on_rank, cls, [order[:500], order[500:]]):
            for name, value in found.items():
                assert torch.equal(value, expected[name]), (cls, name)


@pytest.mark.parametrize("arguments", [{"n_bins": 0}, {"binning": "equal"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="HistogramBinning"):
        HistogramBinning(**arguments)
