"""LookSAM's reused direction against its definition, a port, and SAM."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.sharpness.look_sam import (
    LookSAM,
    look_sam_direction,
    look_sam_gradient,
)
from lightning_reg.techniques.sharpness.sam import SAM
from tests.engine.simple import fit, weights
from tests.techniques.sharpness.family import DOUBLE, START, hessian, on_quadratic

CLEAN = [torch.tensor([[1.0, 2.0]], **DOUBLE), torch.tensor([-0.5], **DOUBLE)]
PERTURBED = [torch.tensor([[0.4, -1.0]], **DOUBLE), torch.tensor([3.0], **DOUBLE)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).numpy()


def test_direction_is_orthogonal_to_the_plain_gradient():
    g, s, v = flat(CLEAN), flat(PERTURBED), flat(look_sam_direction(CLEAN, PERTURBED))
    assert v @ g == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(s - v, (s @ g) / (g @ g) * g, rtol=1e-10)


def test_direction_per_tensor_is_orthogonal_in_each():
    found = look_sam_direction(CLEAN, PERTURBED, per_tensor=True)
    assert float((found[0] * CLEAN[0]).sum()) == pytest.approx(0, abs=1e-10)
    assert float(found[1]) == pytest.approx(0, abs=1e-10)


def test_added_part_has_the_share_alpha_of_the_gradients_length():
    for per_tensor in (False, True):
        found = look_sam_gradient(CLEAN, PERTURBED, 0.7, per_tensor=per_tensor)
        added = [f - g for f, g in zip(found, CLEAN, strict=True)]
        pairs = zip(added, CLEAN, strict=True) if per_tensor else [(flat(added), flat(CLEAN))]
        for a, g in pairs:
            assert np.linalg.norm(a) == pytest.approx(0.7 * np.linalg.norm(g), rel=1e-9)
        cosine = flat(added) @ flat(PERTURBED)
        assert cosine > 0


def test_trains_as_a_port_tensor_by_tensor():
    # pytorch_optimizer 4.1.0, optimizer/sam.py: LookSAM(SGD, rho=0.3, k=3, alpha=0.7, lr=0.1) on
    # the quadratic in float64, after five steps.
    port = [0.38840747883225935, -0.6060616586979465, -0.25422509554351347, 0.2273354248568208]
    found = on_quadratic(LookSAM(0.3, k=3, alpha=0.7, per_tensor=True), 5)
    np.testing.assert_allclose(found, port, rtol=1e-7)


@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_two_steps_are_the_formula(sharpness):
    h = hessian()
    g = h @ START
    s = h @ (START + 0.3 * g / np.linalg.norm(g))
    v = s - (s @ g) / (g @ g) * g
    second = START - 0.1 * s
    g = h @ second
    third = second - 0.1 * (g + 0.6 * np.linalg.norm(g) / np.linalg.norm(v) * v)
    found = on_quadratic(LookSAM(0.3, k=2, alpha=0.6, sharpness=sharpness), 2)
    np.testing.assert_allclose(found, third, rtol=1e-9)


@pytest.mark.parametrize("sharpness", ["micro", "rank", "global"])
def test_every_step_is_sam_bit_for_bit(sharpness):
    settings = {"batch_size": 4, "accumulate_grad_batches": 3}
    ours, _ = fit([LookSAM(0.2, k=1, sharpness=sharpness)], **settings)
    sam, _ = fit([SAM(0.2, sharpness=sharpness)], **settings)
    assert torch.equal(weights(ours), weights(sam))


def test_without_alpha_it_is_sam_at_an_interval():
    settings = {"batch_size": 4, "accumulate_grad_batches": 2}
    ours, _ = fit([LookSAM(0.2, k=3, alpha=0.0)], **settings)
    sam, _ = fit([SAM(0.2, interval=3)], **settings)
    every, _ = fit([SAM(0.2)], **settings)
    plain, _ = fit([], **settings)
    assert torch.equal(weights(ours), weights(sam))
    assert not torch.equal(weights(sam), weights(every))
    assert not torch.equal(weights(sam), weights(plain))


def test_window_of_micro_batches_equals_one_batch():
    arguments = {"k": 3, "alpha": 0.7, "sharpness": "rank"}
    whole, _ = fit([LookSAM(0.2, **arguments)], batch_size=16)
    split, _ = fit([LookSAM(0.2, **arguments)], batch_size=4, accumulate_grad_batches=4)
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=5e-6)


def test_second_passes_are_counted():
    class Counts(LookSAM):
        passes = 0

        def second_loss(self, step):
            self.passes += 1
            return super().second_loss(step)

    technique = Counts(0.1, k=3)
    _, run = fit([technique])
    assert run.global_step == 8
    assert technique.passes == 3


def test_a_new_run_forgets_the_direction():
    technique = LookSAM(0.2, k=2)
    first, _ = fit([technique])
    again, _ = fit([technique])
    assert torch.equal(weights(first), weights(again))


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 2.5}, {"alpha": -1.0}, {"rho": -0.1}])
def test_bad_arguments_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match=r"LookSAM: .*Try: LookSAM\("):
        LookSAM(**arguments)
