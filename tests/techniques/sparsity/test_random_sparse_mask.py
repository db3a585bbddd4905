"""Random sparse masks: exact counts, layer densities, and no dead units."""

import math

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.sparsity.random_sparse_mask import (
    RandomSparseMask,
    random_sparse_mask,
)
from tests.engine.simple import Host, fit

SHAPES = [(30, 20), (10, 30), (4, 10)]
DISTRIBUTIONS = ("balanced", "pyramidal", "erk", "uniform")


def draw(shapes, density, seed=0, **settings):
    return random_sparse_mask(shapes, density, torch.Generator().manual_seed(seed), **settings)


def densities(masks):
    return [float(mask.float().mean()) for mask in masks]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_count_is_exact(distribution, density):
    masks = draw(SHAPES, density, distribution=distribution)
    assert sum(int(mask.sum()) for mask in masks) == round(density * 940)
    assert [tuple(mask.shape) for mask in masks] == SHAPES


def test_pyramidal_densities_are_those_of_the_released_code():
    # RelationalML/sparse_to_sparse@6abdf0e, ER_DST/sparselearning/core.py, density 0.2.
    released = [0.27432884, 0.07525631, 0.02064498]
    for mask, share in zip(draw(SHAPES, 0.2, distribution="pyramidal"), released, strict=True):
        assert abs(int(mask.sum()) - share * mask.numel()) < 1


def test_balanced_layers_keep_equally_many_and_full_ones_pass_on_the_rest():
    assert sorted(int(m.sum()) for m in draw(SHAPES, 0.1)) == [31, 31, 32]
    # 188 to keep: 40 fill the last layer, and the others share the remaining 148.
    assert [int(m.sum()) for m in draw(SHAPES, 0.2)] == [74, 74, 40]


def test_erdos_renyi_densities_follow_the_sum_over_the_product_of_sizes():
    shapes = [(64, 32, 3, 3), (128, 64)]
    first, second = densities(draw(shapes, 0.1, distribution="erk"))
    ratio = (102 / (64 * 32 * 9)) / (192 / (128 * 64))
    assert first / second == pytest.approx(ratio, rel=0.01)


def test_every_unit_keeps_an_input_and_an_output():
    # Uniformly random, 40 of 400 entries leave a row or column empty almost surely.
    for seed in range(20):
        (mask,) = draw([(20, 20)], 0.1, seed)
        assert mask.any(0).all()
        assert mask.any(1).all()
        assert int(mask.sum()) == 40


@pytest.mark.parametrize("groups", [2, 4])
def test_every_channel_of_a_grouped_convolution_is_connected(groups):
    out, inputs, kernel = 8, 16 // groups, 3
    for seed in range(10):
        (mask,) = draw(
            [(out, inputs, kernel, kernel)], 24 / (out * inputs * 9), seed, groups=[groups]
        )
        edges = mask.flatten(2).any(2).view(groups, out // groups, inputs)
        assert edges.any(2).all()
        assert edges.any(1).all()


def test_masks_are_uniform_where_nothing_has_to_be_repaired():
    total = torch.zeros(6, 6)
    for seed in range(600):
        total += draw([(6, 6)], 0.5, seed)[0]
    # Each entry is kept 300 times of 600, with a deviation of 12.
    assert (total - 300).abs().max() < 4.5 * 12.3


def test_same_stream_same_masks():
    assert all(map(torch.equal, draw(SHAPES, 0.2, 1), draw(SHAPES, 0.2, 1)))
    assert not torch.equal(draw(SHAPES, 0.2, 1)[0], draw(SHAPES, 0.2, 2)[0])


def test_kept_weights_start_larger_by_the_root_of_the_density():
    technique = RandomSparseMask(0.3, distribution="uniform")
    module = Host(lr=0.0)
    before = module.net[0].weight.detach().clone()
    fit([technique], module=module, max_epochs=1)
    weight = module.net[0].weight.detach()
    kept = weight != 0
    share = float(kept.float().mean())
    torch.testing.assert_close(weight[kept], before[kept] / math.sqrt(share))
    plain = Host(lr=0.0)
    fit([RandomSparseMask(0.3, rescale=False)], module=plain, max_epochs=1)
    kept = plain.net[0].weight != 0
    assert torch.equal(plain.net[0].weight[kept], before[kept])


def test_second_fit_does_not_rescale_again():
    technique = RandomSparseMask(0.3)
    module = Host(lr=0.0)
    fit([technique], module=module, max_epochs=1)
    once = module.net[0].weight.detach().clone()
    fit([technique], module=module, max_epochs=1)
    assert torch.equal(module.net[0].weight, once)


def test_network_keeps_its_count_through_training():
    class Adam(Host):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.05, weight_decay=0.1)

    module, run = fit([RandomSparseMask(0.25)], module=Adam(), max_epochs=10)
    kept = sum(int((p != 0).sum()) for p in module.parameters() if p.ndim > 1)
    assert kept == round(0.25 * (8 * 16 + 16 * 4))
    assert run.callback_metrics["reg/random_sparse_mask"] == pytest.approx(0.25)
    assert isinstance(module.net[0], nn.Linear)


@pytest.mark.parametrize(
    "arguments", [{"density": 0.0}, {"density": 1.5}, {"distribution": "even"}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="RandomSparseMask"):
        RandomSparseMask(**arguments)
