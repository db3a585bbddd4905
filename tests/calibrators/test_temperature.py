"""Temperature: the optimum at any scale, where there is none, and any order of any rows."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from lightning_reg.calibrators import temperature
from lightning_reg.calibrators.temperature import TemperatureScaling, fit_temperature
from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.engine.communicator import Communicator

_draws = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(800, 6, dtype=torch.float64, generator=_draws)
LABELS = torch.multinomial(LOGITS.softmax(1), 1, generator=_draws).squeeze(1)


def optimum(logits, targets):
    """Brent's root of the slope by log(1 / T), in NumPy."""
    z, t = logits.double().numpy(), targets.numpy()
    soft = t if t.ndim == 2 else np.eye(z.shape[1])[t]

    def slope(log_inverse):
        p = scipy.special.softmax(math.exp(log_inverse) * z, 1)
        return ((p - soft) * z).sum()

    centre = -math.log(np.abs(z).max())
    root = scipy.optimize.brentq(slope, centre - 12, centre + 12, xtol=1e-14, rtol=1e-14)
    return math.exp(-root)


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1.0, 40.0, 1e4, 1e9])
def test_is_the_optimum_at_any_scale_of_logits(scale):
    expected = optimum(scale * LOGITS, LABELS)
    assert fit_temperature(scale * LOGITS, LABELS) == pytest.approx(expected, rel=1e-10)


def test_is_the_optimum_where_almost_all_rows_are_saturated():
    # One wrong row in a hundred, logits in the thousands: the curvature at T = 1 underflows.
    wrong = torch.arange(800) % 100 == 0
    labels = torch.where(wrong, (LOGITS.argmax(1) + 1) % 6, LOGITS.argmax(1))
    found = fit_temperature((3000 * LOGITS).float(), labels)
    assert found == pytest.approx(optimum((3000 * LOGITS).float(), labels), rel=1e-9)


def test_two_points_have_a_closed_form():
    # sigmoid(g / T) = k / n: T = g / log(k / (n - k)).
    logits = torch.full((10,), 1234.5)
    labels = (torch.arange(10) < 7).long()
    expected = 1234.5 / math.log(7 / 3)
    assert fit_temperature(logits, labels, task="binary") == pytest.approx(expected, rel=1e-11)
    two = torch.stack([torch.zeros(10), logits], 1)
    assert fit_temperature(two, labels) == pytest.approx(expected, rel=1e-11)


def test_soft_labels_are_weights_of_classes():
    soft = (3 * torch.randn(800, 6, dtype=torch.float64, generator=_draws) + LOGITS).softmax(1)
    assert fit_temperature(LOGITS, soft) == pytest.approx(optimum(LOGITS, soft), rel=1e-10)
    hard = torch.nn.functional.one_hot(LABELS, 6).double()
    assert fit_temperature(LOGITS, hard) == fit_temperature(LOGITS, LABELS)


def test_ignored_and_invalid_rows_do_not_count():
    logits = torch.cat([LOGITS, 9 * LOGITS[:50], torch.full((3, 6), math.nan)])
    labels = torch.cat([LABELS, torch.full((50,), -100), torch.zeros(3, dtype=torch.int64)])
    found = fit_temperature(logits, labels, ignore_index=-100)
    assert found == fit_temperature(LOGITS, LABELS)


def test_masked_classes_have_no_part():
    masked = torch.cat([LOGITS, torch.full((800, 2), -math.inf)], 1)
    assert fit_temperature(masked, LABELS) == fit_temperature(LOGITS, LABELS)
    with pytest.raises(ArgumentError, match="masked"):
        fit_temperature(masked, torch.full((800,), 6))


def test_positions_are_rows_whatever_the_layout():
    images = LOGITS.view(8, 10, 10, 6)
    labels = LABELS.view(8, 10, 10)
    expected = fit_temperature(LOGITS, LABELS)
    assert fit_temperature(images.movedim(-1, 1), labels) == expected
    assert fit_temperature(images, labels, class_dim=-1) == expected
    scaling = TemperatureScaling(class_dim=-1).fit(images, labels)
    torch.testing.assert_close(
        scaling.probabilities(images).sum(-1), torch.ones(8, 10, 10).double()
    )


def test_order_does_not_change_a_bit():
    order = torch.randperm(800, generator=_draws)
    assert fit_temperature(LOGITS[order], LABELS[order]) == fit_temperature(LOGITS, LABELS)


def test_separable_rows_end_at_the_bound_of_float64():
    scaling = TemperatureScaling()
    with pytest.warns(UserWarning, match="separable"):
        scaling.fit(LOGITS, LOGITS.argmax(1))
    assert scaling.outcome == "separable"
    nll = torch.nn.functional.cross_entropy(scaling.calibrate(LOGITS), LOGITS.argmax(1))
    assert 0 <= float(nll) < 1e-15
    assert 0 < scaling.temperature < math.inf


def test_labels_against_the_logits_end_at_uniform_predictions_in_their_order():
    scaling = TemperatureScaling()
    with pytest.warns(UserWarning, match="inverted"):
        scaling.fit(LOGITS, LOGITS.argmin(1))
    p = scaling.probabilities(LOGITS)
    assert (p - 1 / 6).abs().max() < 1e-4
    assert torch.equal(p.argmax(1), LOGITS.argmax(1))
    nll = torch.nn.functional.cross_entropy
    labels = LOGITS.argmin(1)
    assert nll(scaling.calibrate(LOGITS), labels) < nll(LOGITS, labels)


def test_equal_logits_leave_the_temperature_alone():
    with pytest.warns(UserWarning, match="flat"):
        assert fit_temperature(torch.ones(5, 3), torch.tensor([0, 1, 2, 0, 1])) == 1.0


def test_inputs_of_inference_mode_are_taken_and_left_alone():
    with torch.inference_mode():
        logits, labels = LOGITS.clone(), LABELS.clone()
        scaling = TemperatureScaling().fit(logits, labels)
        assert torch.equal(logits, LOGITS)
    assert scaling.temperature == fit_temperature(LOGITS, LABELS)
    assert not scaling.inverse_temperature.is_inference()


def test_gradients_reach_the_logits():
    scaling = TemperatureScaling().fit(LOGITS, LABELS)
    z = LOGITS[:2].clone().requires_grad_()
    scaling.calibrate(z).sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 1 / scaling.temperature))


def test_is_refused_before_a_fit_and_without_data():
    with pytest.raises(RegularizationError, match="not been fitted"):
        TemperatureScaling().calibrate(LOGITS)
    with pytest.raises(ArgumentError, match="nothing to fit on"):
        fit_temperature(LOGITS, torch.full((800,), -100), ignore_index=-100)
    with pytest.raises(ArgumentError, match="task"):
        TemperatureScaling(task="multilabel")


def _on_rank(logits, labels, parts):
    rank = torch.distributed.get_rank()
    own = parts[rank]
    return fit_temperature(logits[own], labels[own], comm=Communicator(rank, 2))


@pytest.mark.parametrize("first", [400, 37, 0])
def test_two_ranks_have_the_temperature_of_one_bit_for_bit(ranks, first):
    order = torch.randperm(800, generator=_draws)
    found = ranks.run(_on_rank, LOGITS, LABELS, [order[:first], order[first:]])
    assert found == [fit_temperature(LOGITS, LABELS)] * 2


def test_a_distorted_model_gets_its_calibration_back():
    from lightning_reg.metrics import calibration_error

    draws = torch.Generator().manual_seed(3)
    true = 1.5 * torch.randn(20_000, 5, generator=draws)
    labels = torch.multinomial(true.softmax(1), 1, generator=draws).squeeze(1)
    half, other = slice(0, 10_000), slice(10_000, None)
    scaling = TemperatureScaling().fit(2.5 * true[half], labels[half])
    assert scaling.temperature == pytest.approx(2.5, rel=0.05)

    def ece(logits):
        return float(calibration_error(logits, labels[other], from_logits=True))

    # The perfect model's own error is sampling noise: about 0.01 at 10,000 samples and 15 bins.
    assert ece(2.5 * true[other]) > 0.15
    assert ece(scaling.calibrate(2.5 * true[other])) < ece(true[other]) + 0.005


def test_one_row_of_huge_logits_hides_nothing_of_the_others():
    # Its distances set the unit: without the second word sums would be off by 2^-50 units a row.
    logits = torch.cat([LOGITS, 1e12 * torch.eye(6, dtype=torch.float64)[:1]])
    labels = torch.cat([LABELS, torch.tensor([0])])
    expected = fit_temperature(LOGITS, LABELS)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-9)


def test_a_few_newton_steps_are_enough(monkeypatch):
    steps = []
    original = temperature._HeldOut.slope_and_curvature

    def counted(self, inverse):
        steps.append(inverse)
        return original(self, inverse)

    monkeypatch.setattr(temperature._HeldOut, "slope_and_curvature", counted)
    fit_temperature(3 * LOGITS, LABELS)
    assert len(steps) < 12


def test_blocks_of_rows_do_not_change_a_bit(monkeypatch):
    masked = torch.where(torch.arange(800).unsqueeze(1) % 7 == torch.arange(6), -math.inf, LOGITS)
    masked[range(800), LABELS] = LOGITS[range(800), LABELS]
    expected = [fit_temperature(z, LABELS) for z in (LOGITS, masked)]
    monkeypatch.setattr(temperature, "_BLOCK", 6 * 100 + 5)
    assert [fit_temperature(z, LABELS) for z in (LOGITS, masked)] == expected
