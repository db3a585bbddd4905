"""GSAM's two gradients against their definition, the official optimizer, and SAM."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.sharpness.gsam import GSAM, gsam_gradient
from lightning_reg.techniques.sharpness.sam import SAM
from tests.engine.simple import fit, weights
from tests.techniques.sharpness.family import DOUBLE, START, hessian, on_quadratic

CLEAN = [torch.tensor([[1.0, 2.0]], **DOUBLE), torch.tensor([-0.5], **DOUBLE)]
PERTURBED = [torch.tensor([[0.4, -1.0]], **DOUBLE), torch.tensor([3.0], **DOUBLE)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).numpy()


def test_only_what_is_orthogonal_is_taken_away():
    g, p = flat(CLEAN), flat(PERTURBED)
    taken = (p - flat(gsam_gradient(CLEAN, PERTURBED, 0.3))) / 0.3
    assert taken @ p == pytest.approx(0, abs=1e-11)
    np.testing.assert_allclose(taken, g - (g @ p) / (p @ p) * p, rtol=1e-10)


def test_parallel_gradients_are_left_alone():
    same = gsam_gradient([3 * p for p in PERTURBED], PERTURBED, 0.9)
    np.testing.assert_allclose(flat(same), flat(PERTURBED), rtol=1e-10)


# juntang-zhuang/GSAM@a770275, gsam/gsam.py: GSAM(SGD(0.1), gsam_alpha, rho 0.3, adaptive=False) on
# the quadratic in float64, after three steps.
OFFICIAL = {
    0.0: [0.4243529100265559, -0.5076402206831415, -0.21146491507319393, 0.2167327519541355],
    0.4: [0.4262949900213103, -0.5082415478788385, -0.21558517468806218, 0.20457066785859507],
}


@pytest.mark.parametrize("alpha", OFFICIAL)
@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_trains_as_the_official_optimizer(alpha, sharpness):
    # The official code restores by w + e - e, which is off by a few roundings.
    found = on_quadratic(GSAM(0.3, alpha=alpha, sharpness=sharpness), 3)
    np.testing.assert_allclose(found, OFFICIAL[alpha], rtol=1e-9)


def test_one_step_is_the_formula():
    h = hessian()
    g = h @ START
    p = h @ (START + 0.3 * g / np.linalg.norm(g))
    expected = START - 0.1 * (p - 0.7 * (g - (g @ p) / (p @ p) * p))
    np.testing.assert_allclose(on_quadratic(GSAM(0.3, alpha=0.7), 1), expected, rtol=1e-10)


@pytest.mark.parametrize("sharpness", ["micro", "rank", "global"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_without_alpha_it_is_sam_bit_for_bit(sharpness, accumulate):
    settings = {"batch_size": 4, "accumulate_grad_batches": accumulate}
    ours, _ = fit([GSAM(0.2, alpha=0.0, sharpness=sharpness)], **settings)
    sam, _ = fit([SAM(0.2, sharpness=sharpness)], **settings)
    assert torch.equal(weights(ours), weights(sam))
    other, _ = fit([GSAM(0.2, alpha=0.4, sharpness=sharpness)], **settings)
    assert not torch.equal(weights(other), weights(sam))


def test_micro_batches_are_split_by_themselves_and_windows_as_a_whole():
    whole, _ = fit([GSAM(0.3, alpha=0.8)], batch_size=16)
    window, _ = fit(
        [GSAM(0.3, alpha=0.8, sharpness="rank")], batch_size=4, accumulate_grad_batches=4
    )
    micro, _ = fit([GSAM(0.3, alpha=0.8)], batch_size=4, accumulate_grad_batches=4)
    torch.testing.assert_close(weights(window), weights(whole), rtol=0, atol=2e-6)
    assert (weights(micro) - weights(whole)).abs().max() > 1e-3


def test_the_surrogate_gap_shrinks_faster_than_by_sam():
    """To first order a step changes L_p as SAM's does, and the gap by -alpha |g_perp|^2 more."""
    h, gaps = hessian(), []

    def gap(w):
        g = h @ w
        up = w + 0.3 * g / np.linalg.norm(g)
        return 0.5 * up @ h @ up - 0.5 * w @ h @ w

    for alpha in (0.0, 0.5):
        gaps.append(gap(on_quadratic(GSAM(0.3, alpha=alpha), 1, lr=1e-3)))
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize(
    "arguments", [{"alpha": -0.1}, {"alpha": float("nan")}, {"rho": -1.0}, {"sharpness": "all"}]
)
def test_bad_arguments_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match=r"GSAM: .*Try: GSAM\("):
        GSAM(**arguments)
