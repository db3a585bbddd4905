"""Flooding: the official expression, and where training comes to rest."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.outputs.flooding import Flooding, flooding
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, fit

LOSSES = torch.tensor([0.02, 0.5, 0.11], dtype=torch.float64)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 0.9])
def test_the_mean_is_the_official_expression(level):
    # (loss - b).abs() + b of takashiishida/flooding@b65dc56, synthetic/demo_synth.py.
    losses = LOSSES.clone().requires_grad_()
    official = (losses.mean() - level).abs() + level
    ours = flooding(losses, level, losses.mean()).mean()
    torch.testing.assert_close(ours, official)
    expected = torch.autograd.grad(official, losses)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, losses)[0], expected)


def test_by_sample_each_loss_has_its_own_level():
    losses = LOSSES.clone().requires_grad_()
    ours = flooding(losses, 0.1)
    torch.testing.assert_close(ours, (losses - 0.1).abs() + 0.1)
    (gradient,) = torch.autograd.grad(ours.sum(), losses)
    assert gradient.tolist() == [-1, 1, 1]


def losses_of(module):
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(module.net(INPUTS), LABELS, reduction="none")


@pytest.mark.parametrize("level", [0.2, 0.5])
def test_training_comes_to_rest_at_the_level(level):
    plain, _ = fit(max_epochs=150)
    ours, _ = fit([Flooding(level=level)], max_epochs=150, module=Host(lr=0.02))
    assert losses_of(plain).mean() < 0.05
    # The step size lets it swing; measured: within 0.03.
    assert losses_of(ours).mean().item() == pytest.approx(level, abs=0.08)


def test_by_sample_fewer_losses_lie_far_below_the_level():
    batch, _ = fit([Flooding(level=0.3)], max_epochs=200, module=Host(lr=0.05))
    sample, _ = fit([Flooding(level=0.3, per="sample")], max_epochs=200, module=Host(lr=0.05))
    # Measured: 29 of 64 with the level of the batch, 6 with that of each sample.
    low = [int((losses_of(m) < 0.1).sum()) for m in (batch, sample)]
    assert low[1] < 0.5 * low[0]


def one_side_below():
    """Rank 0's loss lies below the level, rank 1's above, and their mean above."""
    rank = torch.distributed.get_rank()
    run = rank_trainer(
        callbacks=[Flooding(level=1.2)],
        max_epochs=1,
        limit_train_batches=1,
        use_distributed_sampler=False,
    )
    module = Host(lr=0.1)
    with torch.no_grad():
        module.net[4].weight.zero_()
        module.net[4].bias.copy_(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    run.fit(module, DataLoader(TensorDataset(INPUTS, torch.full((64,), rank)), 8))
    return module.net[4].bias.detach().clone()


def test_the_level_is_that_of_all_ranks(ranks):
    # Losses near 0.14 and 3.14: the mean 1.64 is above the level, so both descend; each rank on
    # its own would turn rank 0's gradient around.
    one, other = ranks.run(one_side_below)
    assert torch.equal(one, other)
    p = torch.tensor([3.0, 0.0, 0.0, 0.0]).softmax(0)
    mean_label = torch.tensor([0.5, 0.5, 0.0, 0.0])
    expected = torch.tensor([3.0, 0.0, 0.0, 0.0]) - 0.1 * (p - mean_label)
    torch.testing.assert_close(one, expected)


def test_a_level_is_asked_for():
    with pytest.raises(ArgumentError, match="Flooding"):
        Flooding(level=-1.0)
    with pytest.raises(TypeError, match="level"):
        Flooding()
