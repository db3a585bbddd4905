"""AdaEnt: values of the official code, the direction of the divergence, and collapse."""

import math

import pytest
import torch

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.techniques.segmentation.prior_aware_entropy import (
    PriorAwareEntropy,
    class_proportions,
    prior_aware_entropy,
)
from tests.engine.simple import fit


def fixed(*shape):
    """Numbers that need no generator."""
    return (torch.arange(math.prod(shape), dtype=torch.float64).view(shape) * 1.7).sin() * 3


def of_proportions(*shares):
    """Sure predictions of 10 pixels with these proportions: (1, C, 10)."""
    labels = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    return (torch.nn.functional.one_hot(labels, len(shares)).T.double() * 60).unsqueeze(0)


def test_value_and_gradient_are_those_of_the_official_code():
    # mathilde-b/SFDA@fdcd141, losses.py, EntKLProp with power=1, fn=norm_soft_size, curi=True,
    # weights (0.1, 0.4, 0.9), of two images of 2 x 2 pixels, in float32.
    z = fixed(2, 3, 2, 2).requires_grad_()
    prior = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.4, 0.9])
    entropy = prior_aware_entropy(z, prior, weights, prior_weight=0.0).mean()
    total = prior_aware_entropy(z, prior, weights).mean()
    (gradient,) = torch.autograd.grad(total, z)
    assert entropy.item() == pytest.approx(0.3715008199, abs=1e-6)
    assert (total - entropy).item() == pytest.approx(0.1056686640, abs=1e-6)
    expected = [-0.0038116984, -0.0176403038, 0.0214519985]
    assert gradient[0, :, 0, 1].tolist() == pytest.approx(expected, abs=1e-6)
    expected = [0.0097855981, 0.0194767788, -0.0292623807]
    assert gradient[1, :, 1, 1].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("proportion", ["mean", "relative"])
def test_sure_pixels_with_the_proportions_of_the_prior_cost_nothing(proportion):
    z = of_proportions(7, 2, 1)
    assert class_proportions(z, proportion)[0].tolist() == pytest.approx([0.7, 0.2, 0.1])
    value = prior_aware_entropy(z, torch.tensor([0.7, 0.2, 0.1]).double(), proportion=proportion)
    assert value.item() == pytest.approx(0, abs=1e-7)


def test_the_estimate_comes_first_in_the_divergence():
    z = of_proportions(9, 1)
    value = prior_aware_entropy(z, torch.tensor([0.5, 0.5]).double())
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_relative_proportions_give_unsure_pixels_their_whole_top_class():
    z = torch.tensor([[[math.log(0.6), math.log(0.6)], [math.log(0.4), math.log(0.4)]]]).double()
    assert class_proportions(z, "mean")[0].tolist() == pytest.approx([0.6, 0.4])
    assert class_proportions(z, "relative")[0].tolist() == pytest.approx([0.6, 0.4])
    mixed = torch.tensor([[[math.log(0.9), math.log(0.5)], [math.log(0.1), math.log(0.5)]]])
    relative = (1 + 1) / (1 + 1 / 9 + 2)
    assert class_proportions(mixed, "relative")[0, 0].item() == pytest.approx(relative, abs=1e-6)
    assert class_proportions(mixed, "mean")[0, 0].item() == pytest.approx(0.7, abs=1e-6)


def test_a_class_that_the_prior_has_not_is_finite_and_dear():
    z = fixed(1, 3, 4).requires_grad_()
    value = prior_aware_entropy(z, torch.tensor([0.5, 0.5, 0.0]).double())
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.item() > 1
    assert gradient.isfinite().all()


def test_an_image_that_lacks_a_class_altogether_has_a_finite_gradient():
    z = (of_proportions(10, 0).float() * 100).requires_grad_()
    prior_aware_entropy(z, torch.tensor([0.5, 0.5])).sum().backward()
    assert z.grad.isfinite().all()


def adapt(prior_weight):
    """Descent on the logits of a biased linear segmenter; returns the share of right pixels."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(8, 100, generator=generator) < 0.3).long()
    x = torch.randn(8, 100, generator=generator) * 0.7 + labels * 2.0
    # The source's threshold is off by far: on the new images nearly all is background.
    weight = torch.tensor([1.0, -2.2], requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.5)
    prior = torch.tensor([0.7, 0.3])
    for _ in range(150):
        score = weight[0] * x + weight[1]
        logits = torch.stack([-score, score], 1)
        loss = prior_aware_entropy(logits, prior, None, prior_weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chosen = (weight[0] * x + weight[1] > 0).long()
    union = ((chosen == 1) | (labels == 1)).sum()
    return (((chosen == 1) & (labels == 1)).sum() / union).item()


def test_entropy_alone_loses_the_small_class_and_the_prior_keeps_it():
    assert adapt(0.0) < 0.5
    assert adapt(1.0) > 0.7


def test_a_prior_may_come_with_the_batch():
    technique = PriorAwareEntropy(1.0, prior="batch.1", class_weights=[1.0] * 4)
    # The batch of the host has labels there: not a prior, which the message says.
    with pytest.raises(RegularizationError, match="prior"):
        fit([technique], max_epochs=1)


def test_class_weights_of_another_number_are_refused_in_the_first_step():
    technique = PriorAwareEntropy(1.0, prior=[0.25] * 4, class_weights=[1.0, 2.0])
    with pytest.raises(RegularizationError, match=r"\[1.0\] \* 4"):
        fit([technique], max_epochs=1)


def test_a_prior_that_is_no_distribution_is_refused():
    with pytest.raises(ArgumentError, match="sum to 1"):
        PriorAwareEntropy(prior=[0.5, 0.2])
