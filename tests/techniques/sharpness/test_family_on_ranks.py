"""GSAM, WSAM, LookSAM and ESAM on two ranks."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.techniques.sharpness.gsam import gsam_gradient
from lightning_reg.techniques.sharpness.look_sam import look_sam_direction, look_sam_gradient
from tests.engine.simple import INPUTS, LABELS, Host, weights
from tests.techniques.sharpness.runs import Setting, train

ARGUMENTS = {
    "GSAM": {"rho": 0.2, "alpha": 0.7},
    "WSAM": {"rho": 0.2, "gamma": 0.7},
    "LookSAM": {"rho": 0.2, "k": 2},
    "ESAM": {"rho": 0.2},
}


def setting(technique, sharpness="micro", **settings):
    arguments = {**ARGUMENTS[technique], "sharpness": sharpness}
    return Setting(technique, arguments, **{"batch": 4, "accumulate": 2, "epochs": 2, **settings})


@pytest.mark.parametrize("technique", ARGUMENTS)
@pytest.mark.parametrize("strategy", ["find_unused", "bucket_view", "ddp_reg"])
def test_every_variant_of_ddp_trains_the_same_bits(ranks, technique, strategy):
    one, other = ranks.run(train, setting(technique, strategy=strategy))
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.weights, ranks.run(train, setting(technique))[0].weights)


@pytest.mark.parametrize("technique", ARGUMENTS)
@pytest.mark.parametrize("sharpness", ["micro", "rank", "global"])
def test_layers_that_not_every_micro_batch_uses(ranks, technique, sharpness):
    run = setting(technique, sharpness, strategy="find_unused", hard="sometimes")
    one, other = ranks.run(train, run)
    assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("technique", ARGUMENTS)
def test_overflow_on_one_rank_skips_the_step_on_both(ranks, technique):
    run = setting(technique, precision="fp16", hard="overflows", batch=8, accumulate=1)
    one, other = ranks.run(train, run)
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.isfinite(mine).all()
    if technique == "WSAM":
        # Its second part moves the weights after the history has noted them.
        return
    skipped = [torch.equal(a, b) for a, b in zip(one.history, one.history[1:], strict=False)]
    assert skipped == [True, False, False, False, True, False, False]


def micro_batches(rank, epoch, size=4):
    """The inputs and labels of a rank, as an unshuffled DistributedSampler deals them."""
    return list(zip(INPUTS[rank::2].split(size), LABELS[rank::2].split(size), strict=True))


def gradients(module, batch, at=None, rho=0.2):
    """Plain gradients, or those at SAM's weights with ``at`` as the way up."""
    parameters = list(module.parameters())
    kept = [p.detach().clone() for p in parameters]
    if at is not None:
        norm = torch.sqrt(sum(g.square().sum() for g in at))
        with torch.no_grad():
            for p, g in zip(parameters, at, strict=True):
                p += rho * g / norm
    found = torch.autograd.grad(F.cross_entropy(module(batch[0]), batch[1]), parameters)
    with torch.no_grad():
        for p, k in zip(parameters, kept, strict=True):
            p.copy_(k)
    return list(found)


def mean(lists):
    return [torch.stack(parts).mean(0) for parts in zip(*lists, strict=True)]


def loop(step):
    """A plain loop over joint optimizer steps, in the order of the ranks' micro-batches."""
    module = Host()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    count = 0
    for epoch in range(2):
        dealt = [micro_batches(rank, epoch) for rank in (0, 1)]
        for first in range(0, len(dealt[0]), 2):
            batches = [mine[i] for i in (first, first + 1) for mine in dealt]
            for p, g in zip(module.parameters(), step(module, batches, count), strict=True):
                p.grad = g
            optimizer.step()
            count += 1
    return weights(module)


def test_gsam_splits_the_gradients_of_each_micro_batch_on_its_rank(ranks):
    def step(module, batches, count):
        new = []
        for batch in batches:
            clean = gradients(module, batch)
            new.append(gsam_gradient(clean, gradients(module, batch, at=clean), 0.7))
        return mean(new)

    one, _ = ranks.run(train, setting("GSAM"))
    torch.testing.assert_close(one.weights, loop(step), rtol=0, atol=2e-6)


def test_look_sam_keeps_the_direction_of_joint_gradients(ranks):
    direction = []

    def step(module, batches, count):
        clean = [gradients(module, batch) for batch in batches]
        if count % 2:
            return look_sam_gradient(mean(clean), direction[-1], 0.7)
        pairs = zip(batches, clean, strict=True)
        new = mean([gradients(module, batch, at=g) for batch, g in pairs])
        direction.append(look_sam_direction(mean(clean), new))
        return new

    one, _ = ranks.run(train, setting("LookSAM"))
    torch.testing.assert_close(one.weights, loop(step), rtol=0, atol=5e-6)
