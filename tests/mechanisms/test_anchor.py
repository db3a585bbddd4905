"""When references are taken, what becomes of them, and the pull in closed form."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_reg.engine import RegularizationError
from lightning_reg.mechanisms.anchor import WeightAnchor, anchor_pull
from tests.engine.simple import Host, fit, loader, trainer, weights


class Anchored(WeightAnchor):
    """Pulls to wherever a test says."""


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_gradient_is_that_of_autograd():
    shapes = [(3, 2), (4,)]
    make = [
        torch.randn(*s, dtype=torch.float64, generator=generator(i)) for i, s in enumerate(shapes)
    ]
    refs = [torch.randn(*s, dtype=torch.float64, generator=generator(9)) for s in shapes]
    importance = [torch.rand(*s, dtype=torch.float64, generator=generator(7)) for s in shapes]
    leaves = [m.clone().requires_grad_() for m in make]
    loss = sum((o * (w - r) ** 2).sum() for o, w, r in zip(importance, leaves, refs, strict=True))
    expected = torch.autograd.grad(loss, leaves)
    value, gradients = anchor_pull(make, refs, importance)
    torch.testing.assert_close(value, loss.detach())
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_pull_alone_shrinks_the_distance_by_one_minus_two_lr_strength():
    # With SGD without momentum, w - r is multiplied by (1 - 2 lr strength) in each step.
    module = Still(lr=0.1)
    technique = Anchored(0.5)
    far = copy.deepcopy(module)
    with torch.no_grad():
        for w in far.parameters():
            w.add_(1.0)
    technique.take_reference(far)
    before = module.layer.weight.detach().clone()
    fit([technique], module, max_epochs=1, limit_train_batches=3)
    reference = technique.reference["layer.weight"]
    expected = reference + (before - reference) * (1 - 2 * 0.1 * 0.5) ** 3
    torch.testing.assert_close(module.layer.weight.detach(), expected)


class Still(Host):
    """Its own loss has no gradient."""

    def __init__(self, lr):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return 0.0 * self.layer(torch.ones(1, 3)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), self.lr)


def test_weights_outside_the_choice_are_not_touched():
    module, plain = Host(), Host()
    technique = Anchored(10.0, parameters=r"^net\.0\.weight$")
    technique.take_reference(Host())
    with torch.no_grad():
        for m in (module, plain):
            m.net[0].weight.add_(0.1)
    fit([technique], module, max_epochs=1, limit_train_batches=1)
    fit([], plain, max_epochs=1, limit_train_batches=1)
    assert torch.equal(module.net[4].weight, plain.net[4].weight)
    assert torch.equal(module.net[0].bias, plain.net[0].bias)
    assert not torch.equal(module.net[0].weight, plain.net[0].weight)


def test_missing_importances_count_one():
    module = Host()
    technique = Anchored(1.0)
    technique.take_reference(module, {"net.0.weight": torch.full((16, 8), 3.0)})
    assert technique.importance["net.0.weight"].unique().tolist() == [3.0]
    assert technique.importance["net.4.weight"].unique().tolist() == [1.0]


def test_state_comes_back_whole():
    one, other = Anchored(1.0), Anchored(1.0)
    one.take_reference(Host(), {"net.0.weight": torch.rand(16, 8)})
    other.load_state_dict(one.state_dict())
    assert other.references_taken == 1
    for name, reference in one.reference.items():
        assert torch.equal(other.reference[name], reference)
        assert torch.equal(other.importance[name], one.importance[name])


def test_without_a_reference_nothing_is_pulled():
    assert torch.equal(weights(fit([Anchored(5.0)])[0]), weights(fit()[0]))


def test_a_reference_that_is_not_finite_is_not_taken():
    module = Host()
    technique = Anchored(1.0)
    technique.take_reference(module)
    kept = technique.reference["net.0.weight"].clone()
    with torch.no_grad():
        module.net[4].weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="Anchored.*not finite"):
        technique.take_reference(module)
    assert torch.equal(technique.reference["net.0.weight"], kept)
    assert technique.references_taken == 1


def test_a_weight_that_grew_is_named():
    technique = Anchored(1.0)
    technique.take_reference(Host())
    module = Host()
    module.net[4] = nn.Linear(16, 6)
    with pytest.raises(RegularizationError, match=r"net\.4\.weight.*\(4, 16\).*\(6, 16\).*exclude"):
        trainer([technique], max_epochs=1).fit(module, loader())


def test_layers_that_are_new_are_left_free():
    technique = Anchored(1.0)
    old = Host()
    old.net = nn.Sequential(nn.Linear(8, 16))
    technique.take_reference(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, run = fit([technique], max_epochs=1)
    assert "reg/anchored" in run.callback_metrics
