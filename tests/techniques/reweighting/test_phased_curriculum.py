"""Domains that come into the loss later."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import RegularizationError, Signals
from lightning_reg.techniques.reweighting.phased_curriculum import (
    PhasedCurriculum,
    curriculum_starts,
    curriculum_weights,
)
from tests.engine.simple import INPUTS, LABELS, trainer, weights


def test_a_domain_starts_so_late_that_it_ends_where_it_would_overfit():
    assert curriculum_starts([100.0, 40.0, 250.0], total=100.0) == [0.0, 60.0, 0.0]
    # In phases of 25 updates: not longer than it can bear by more than a phase.
    assert curriculum_starts([100.0, 40.0, 10.0, 0.0], 100.0, phases=4) == [0.0, 50.0, 75.0, 75.0]


def test_the_loss_is_the_mean_over_samples_of_domains_that_have_started():
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    domain = torch.tensor([0, 1, 0, 2, 1])
    counts = torch.bincount(domain).double()
    means = torch.tensor([2.5, 9.0, 8.0]).double()
    starts = torch.tensor([0.0, 0.5, 1.0]).double()
    share = curriculum_weights(counts, starts, 0.5)
    assert (share @ means).item() == pytest.approx(losses[[0, 1, 2, 4]].mean().item())
    assert curriculum_weights(counts, starts + 1, 0.5).tolist() == [0, 0, 0]


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


SIGNALS = Signals(logits="module.net", domain="batch.2")


def _fit(callbacks, chosen, **settings):
    domain = (torch.arange(64) % 4 == 0).long()
    data = TensorDataset(INPUTS[chosen], LABELS[chosen], domain[chosen])
    module = Linear()
    run = trainer(callbacks, max_epochs=1, **settings)
    run.fit(module, DataLoader(data, batch_size=len(chosen)))
    return weights(module)


def test_training_is_that_on_the_introduced_domains_alone():
    everything, first = torch.arange(64), torch.arange(64)[torch.arange(64) % 4 != 0]
    late = PhasedCurriculum(starts=[0.0, 5.0], by="step", signals=SIGNALS)
    torch.testing.assert_close(_fit([late], everything), _fit([], first))
    now = PhasedCurriculum(starts=[0.0, 0.0], by="step", signals=SIGNALS)
    torch.testing.assert_close(_fit([now], everything), _fit([], everything))


def test_a_batch_of_domains_that_have_not_started_trains_nothing():
    only_late = torch.arange(0, 64, 4)
    late = PhasedCurriculum(starts=[0.0, 5.0], by="epoch", signals=SIGNALS)
    assert torch.equal(_fit([late], only_late), weights(Linear()))


def test_a_domain_without_a_start_is_named():
    with pytest.raises(RegularizationError, match="groups 0 to 0, got 1"):
        _fit([PhasedCurriculum(starts=[0.0], signals=SIGNALS)], torch.arange(64))
