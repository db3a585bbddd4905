"""Streams depend on names and positions alone; the global state can be put back."""

import random
import subprocess
import sys

import numpy as np
import torch

from lightning_reg.engine.random import (
    base_seed,
    restore_rng_state,
    rng_state,
    stream,
    stream_seed,
)


def test_a_stream_is_the_same_in_another_process():
    code = "from lightning_reg.engine.random import stream_seed as s; print(s(1, 'sam', 7))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == stream_seed(1, "sam", 7)


def test_streams_differ_in_every_key_and_in_the_kind_of_key():
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", "1"), (0, 1, "a")]
    keys += [(0, "a,1"), (0, "a", 1, -1), (0, "a\n1"), (0, "a'\n'1")]
    assert len({stream_seed(*key) for key in keys}) == len(keys)


def test_a_seed_fits_into_63_bits():
    assert all(0 <= stream_seed(0, i) < 2**63 for i in range(200))


def test_a_stream_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    torch.rand(4, generator=stream("cpu", 0, "a"))
    assert torch.equal(before, torch.get_rng_state())


def test_base_seed_is_that_of_seed_everything(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert base_seed() == 11
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert base_seed(5) == 5


def test_restored_state_repeats_the_draws_of_all_three_libraries():
    def draw():
        return torch.randn(3).tolist(), random.gauss(0, 1), np.random.randn(3).tolist()

    draw()  # leaves half a pair of normals behind in `random` and numpy
    state = rng_state()
    first = draw()
    restore_rng_state(state)
    assert draw() == first


def test_state_passes_a_weights_only_load(tmp_path):
    torch.save(rng_state(), tmp_path / "state.pt")
    restore_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
