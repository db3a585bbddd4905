"""The conservation error: by hand, after a projection, and what cannot be a law."""

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import ConservationError
from lightning_reg.metrics.conservation import conservation_error
from lightning_reg.techniques.fields.conservation_projection import (
    conservation_projection,
    trapezoid_weights,
)

POINTS = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)


def test_is_the_mean_gap_of_the_trapezoidal_rule():
    u = torch.randn(7, 2, 4, dtype=torch.float64)
    total = torch.randn(7, 2, dtype=torch.float64)
    found = conservation_error(u, total, weights=trapezoid_weights(POINTS).tolist())
    gaps = trapezoid(u.numpy(), POINTS.numpy()) - total.numpy()
    assert float(found) == pytest.approx(np.abs(gaps).mean())


def test_is_nothing_after_a_projection():
    u, total = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    weights = trapezoid_weights(POINTS)
    projected, _ = conservation_projection(u, None, weights, total)
    assert float(conservation_error(projected, total, weights=weights.tolist())) < 1e-14


@pytest.mark.parametrize("weights", [[], [1.0, float("nan")], [float("inf")]])
def test_weights_that_are_no_law_are_refused(weights):
    with pytest.raises(ArgumentError, match="`weights` must be finite"):
        ConservationError(weights=weights)
