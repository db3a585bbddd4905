"""The nearest reference of each query, by SciPy."""

import sys

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import Utilization, utilization

QUERIES = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REFERENCES = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_is_the_mean_squared_distance_to_the_nearest_neighbour():
    distances, _ = KDTree(REFERENCES.numpy()).query(QUERIES.numpy())
    assert float(utilization(QUERIES, REFERENCES)) == pytest.approx(np.square(distances).mean())


def test_does_not_depend_on_how_queries_are_cut_up(monkeypatch):
    expected = utilization(QUERIES, REFERENCES)
    monkeypatch.setattr(sys.modules[Utilization.__module__], "_BLOCK", 60)
    metric = Utilization(REFERENCES)
    for part in QUERIES.split(7):
        metric.update(part)
    torch.testing.assert_close(metric.compute(), expected)


def test_of_the_references_themselves_is_zero():
    assert float(utilization(REFERENCES, REFERENCES)) == 0


@pytest.mark.parametrize("references", [torch.zeros(0, 4), torch.zeros(4), [[1.0]]])
def test_refuses_what_are_no_references(references):
    with pytest.raises(ArgumentError, match="references"):
        Utilization(references)


def test_refuses_a_reference_that_is_not_finite():
    with pytest.raises(ArgumentError, match="NaN"):
        Utilization(torch.full((2, 3), torch.inf))
