"""The released loss, both tails turned down, and bad pairs found among sinusoids."""

import lightning as L
import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import IndexedDataset
from lightning_reg.mechanisms.info_nce import nt_xent
from lightning_reg.techniques.contrastive.dynamic_bad_pair_mining import (
    DynamicBadPairMining,
    bad_pair_weights,
)
from tests.engine.simple import trainer


def table(k):
    return torch.sin(torch.arange(12, dtype=torch.float64).view(4, 3) * k + k)


def test_loss_of_a_pair_is_that_of_the_official_code():
    # lanxiang1017/DynamicBadPairMining_ICLR24@e9355a0, models/loss.py:loss_ntxent.
    z1 = table(1.0).requires_grad_()
    losses = nt_xent(z1, table(1.1), 0.2)
    expected = [0.9259972166697306, 1.1288993167672652, 2.0482285221456524, 2.9051469269365566]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    row = [-0.04787406317929175, 0.025190079269491045, 0.12315306006486407]
    assert torch.autograd.grad(losses.mean(), z1)[0][0].tolist() == pytest.approx(row, abs=1e-12)


def test_weight_of_a_bad_pair_is_the_density_relative_to_its_peak():
    mean, deviation = torch.tensor(2.0), torch.tensor(0.5)
    history = torch.tensor([0.9, 1.1, 2.0, 2.9, 3.1, torch.nan])
    losses = torch.tensor([1.3, 1.3, 1.3, 4.0, 4.0, 0.0])
    density = norm(2.0, 0.5)
    turned_down = density.pdf(losses.numpy()) / density.pdf(2.0)
    expected = np.where([True, False, False, False, True, False], turned_down, 1.0)
    found = bad_pair_weights(losses, history, mean, deviation, 2.0, 2.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_thresholds_of_the_two_tails_are_separate():
    one = torch.ones(())
    history, losses = torch.tensor([-1.5, 1.5]), torch.tensor([-1.5, 1.5])
    assert bad_pair_weights(losses, history, 0 * one, one, 1.0, 2.0)[0] < 1
    assert bad_pair_weights(losses, history, 0 * one, one, 1.0, 2.0)[1] == 1


def test_without_spread_no_pair_is_bad():
    zero = torch.zeros(())
    assert bad_pair_weights(torch.ones(3), torch.zeros(3), zero, zero).tolist() == [1, 1, 1]


class Waves(L.LightningModule):
    """Embeds two views of each series."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))

    def training_step(self, batch, batch_idx):
        z1, z2 = self.net(batch[0]), self.net(batch[1])
        return {"loss": 0.0 * z1.sum(), "z1": z1, "z2": z2}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def waves(samples=200):
    """Jittered views of sinusoids; the first tenth share pure noise, the second are mismatched."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1 + 4 * torch.rand(samples, 1, generator=generator)
    phase = 6.28 * torch.rand(samples, 1, generator=generator)
    time, few = torch.linspace(0, 6.28, 32), samples // 10
    clean = torch.sin(frequency * time + phase)
    clean[:few] = 3 * torch.randn(few, 32, generator=generator)
    first, second = (clean + 0.3 * torch.randn(samples, 32, generator=generator) for _ in range(2))
    # Another frequency, 2 away, and the other sign.
    wrong = 1 + (frequency[few : 2 * few] + 1) % 4
    second[few : 2 * few] = -torch.sin(wrong * time + phase[few : 2 * few])
    return first, second


def test_finds_noisy_and_faulty_pairs_among_sinusoids():
    technique = DynamicBadPairMining(start=12, noisy=0.7, faulty=0.7)
    data = IndexedDataset(TensorDataset(*waves()))
    run = trainer([technique], max_epochs=13)
    run.fit(Waves(), DataLoader(data, batch_size=50, shuffle=True))
    history = technique.state_dict()["history"]
    score = (history - history.mean()) / history.std(correction=0)
    flagged = (score < -0.7).nonzero()[:, 0], (score > 0.7).nonzero()[:, 0]
    # A tenth of the pairs is of each kind. Seen over four seeds: all of them are found, with
    # precisions of 0.67 to 0.8 and 0.91 to 1.
    noisy, faulty = (flagged[0] < 20).sum(), ((flagged[1] >= 20) & (flagged[1] < 40)).sum()
    assert (noisy, faulty) == (20, 20)
    assert noisy > 0.5 * len(flagged[0])
    assert faulty > 0.8 * len(flagged[1])


class Given(L.LightningModule):
    """Its losses are those of the batch, which fall by half from epoch to epoch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        losses = self.scale * batch[0] / 2**self.current_epoch
        return {"loss": 0.0 * losses.sum(), "losses": losses}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_memory_holds_mean_losses_of_past_epochs_and_own_losses_are_weighted_by_them():
    own = torch.tensor([0.0, 4.0, 4.0, 4.0, 4.0, 9.0])
    technique = DynamicBadPairMining(start=2, noisy=1.0, faulty=1.0, losses="outputs.losses")
    run = trainer([technique], max_epochs=3)
    run.fit(Given(), DataLoader(IndexedDataset(TensorDataset(own)), batch_size=6))
    history = own * (1 + 0.5) / 2
    torch.testing.assert_close(technique.state_dict()["history"], history)
    now, density = own.numpy() / 4, norm(history.mean().item(), history.numpy().std())
    weights = np.where(
        [True, *[False] * 4, True], density.pdf(now) / density.pdf(density.mean()), 1
    )
    expected = (weights * now).mean()
    assert run.callback_metrics["reg/dynamic_bad_pair_mining"].item() == pytest.approx(expected)
    assert run.callback_metrics["reg/dynamic_bad_pair_mining_noisy"].item() == pytest.approx(1 / 6)
    assert run.callback_metrics["reg/dynamic_bad_pair_mining_faulty"].item() == pytest.approx(1 / 6)
