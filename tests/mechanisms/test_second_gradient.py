"""The second gradient is that of the joint batch, and leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.mechanisms.second_gradient import SecondGradient
from tests.engine.simple import INPUTS, LABELS, Host, trainer


class Watching(SecondGradient):
    """Keeps both gradients, and uses twice the first."""

    def second_loss(self, step):
        return step.logits.square().mean()

    def combine(self, own, second, share, generator):
        self.seen = own.clone(), second.clone()
        return 2 * own, own.norm()


def flat(loss, module):
    return torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, list(module.net.parameters()))]
    )


def fit(technique, module, batches=1):
    run = trainer([technique], max_epochs=1, accumulate_grad_batches=batches)
    data = TensorDataset(INPUTS[:32], LABELS[:32])
    run.fit(module, DataLoader(data, batch_size=32 // batches))
    return run


@pytest.mark.parametrize("batches", [1, 4])
def test_both_gradients_are_those_of_the_whole_batch(batches):
    technique, module = Watching(), Host()
    fit(technique, module, batches)
    fresh = Host()
    logits = fresh(INPUTS[:32])
    own = flat(F.cross_entropy(logits, LABELS[:32]), fresh)
    second = flat(fresh(INPUTS[:32]).square().mean(), fresh)
    torch.testing.assert_close(technique.seen[0], own)
    torch.testing.assert_close(technique.seen[1], second)
    # The optimizer has used twice the first.
    moved = parameters_to_vector(fresh.net.parameters()) - parameters_to_vector(
        module.net.parameters()
    )
    torch.testing.assert_close(moved, 0.1 * 2 * own, rtol=1e-3, atol=1e-6)


def test_chosen_weights_only_are_combined_and_nothing_is_left_for_the_next_step():
    technique = Watching(parameters=r"net\.4")
    fit(technique, Host(), 2)
    assert len(technique.seen[0]) == 16 * 4 + 4
    assert technique._second == {}
