"""Wasserstein to the start: sorted values, permutations, and where training under it ends."""

import pytest
import scipy.stats
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.wasserstein_init import WassersteinInit, wasserstein_init
from tests.engine.simple import Host, fit, loader, trainer
from tests.techniques.weights.penalty import Still, matrix


def test_value_is_the_squared_distance_of_optimal_matching():
    # Of all permutations the sorted one is the cheapest: tried one by one.
    import itertools

    w, start = matrix(2, 3), matrix(2, 3, seed=1)
    costs = [
        float((w.flatten() - start.flatten()[list(order)]).square().mean())
        for order in itertools.permutations(range(6))
    ]
    assert wasserstein_init(w, start).item() == pytest.approx(min(costs))
    # The 1-Wasserstein distance of the same samples is no more, by Jensen.
    first = scipy.stats.wasserstein_distance(w.flatten().numpy(), start.flatten().numpy())
    assert first**2 <= min(costs)


def test_permutations_cost_nothing():
    start = matrix(4, 5)
    shuffled = start.flatten()[torch.randperm(20)].view(4, 5)
    assert wasserstein_init(shuffled, start) == 0
    assert torch.autograd.gradcheck(
        lambda w: wasserstein_init(w, start), (matrix(5, 4).requires_grad_(),)
    )


def test_gradient_in_a_run_is_that_of_the_value():
    found = {}

    class Moved(WassersteinInit):
        def on_reference(self, trainer, pl_module):
            super().on_reference(trainer, pl_module)
            with torch.no_grad():
                pl_module.net[4].weight.mul_(-2.0).add_(0.3)

        def edit_gradients(self, update):
            found.update({n: p.grad.clone() for n, p in update.module.named_parameters()})

    module, start = Still(), Still().net[4].weight.detach()
    w = (start * -2 + 0.3).requires_grad_()
    (expected,) = torch.autograd.grad(0.7 * wasserstein_init(w, start), w)
    _, run = fit([Moved(0.7)], module=module, batch_size=64, max_epochs=1)
    torch.testing.assert_close(found["net.4.weight"], expected)
    assert not found["net.0.weight"].any()
    assert run.callback_metrics["reg/moved"] == pytest.approx(
        float(wasserstein_init(w, start)), rel=1e-5
    )


def test_training_restores_the_distribution_and_not_the_weights():
    class Shuffled(WassersteinInit):
        def on_reference(self, trainer, pl_module):
            super().on_reference(trainer, pl_module)
            w = pl_module.net[4].weight
            order = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                w.copy_(3 * w.flatten()[order].view_as(w))

    module, start = Still(), Still().net[4].weight.detach()
    # d / (2 lr s) steps shrink a distance by e: 64 / (2 * 0.1 * 100) = 3.2.
    fit([Shuffled(100.0)], module=module, max_epochs=20)
    values = module.net[4].weight.detach().flatten().sort().values
    torch.testing.assert_close(values, start.flatten().sort().values, atol=1e-4, rtol=0)
    assert (module.net[4].weight - start).abs().max() > 0.1


def test_start_is_not_taken_again_on_a_resume(tmp_path):
    _, run = fit([WassersteinInit(0.1)], max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed = WassersteinInit(0.1)
    trainer([resumed], max_epochs=2).fit(
        Host(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    start = Host().net[0].weight.detach().flatten().sort().values
    assert torch.equal(resumed.reference["net.0.weight"].flatten(), start)


def test_negative_strength_is_refused():
    with pytest.raises(ArgumentError, match="WassersteinInit"):
        WassersteinInit(-0.1)
