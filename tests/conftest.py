"""What all tests share: one pair of gloo processes, one thread, no seed in the environment."""

from collections.abc import Iterator

import pytest
import torch

from lightning_reg.testing.ranks import RankPair


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPair]:
    """Two processes for all two-rank checks: ``ranks.run(function, *args)``."""
    with RankPair() as pair:
        yield pair


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums in a fixed order, and room for the rank processes on two cores."""
    torch.set_num_threads(1)
