"""AdaWAC: official numbers, the closed form over a run, and who ends up with which weight."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import AdaWAC, IndexedDataset
from lightning_reg.engine import RegularizationError
from lightning_reg.functional import ada_wac, ada_wac_log_odds
from tests.engine.simple import INPUTS, LABELS, trainer

SUPERVISED = torch.tensor([0.3, 1.7, 0.9])
CONSISTENCY = torch.tensor([0.8, 0.2, 0.9])


def test_official_weights_value_and_gradient():
    # gail-yxie/adawac@7d1b79e, models.py: two updates with lr_w 1, then the loss of the batch.
    odds = torch.zeros(3)
    for _ in range(2):
        odds = ada_wac_log_odds(odds, SUPERVISED, CONSISTENCY)
    official = [0.2689414322376251, 0.9525741338729858, 0.5]
    torch.testing.assert_close(odds.sigmoid(), torch.tensor(official))
    losses = [t.clone().requires_grad_() for t in (SUPERVISED, CONSISTENCY)]
    loss = ada_wac(odds, *losses).mean()
    loss.backward()
    assert loss.item() == pytest.approx(1.064796805381775, rel=1e-6)
    torch.testing.assert_close(losses[0].grad, torch.tensor(official) / 3)
    torch.testing.assert_close(losses[1].grad, (1 - torch.tensor(official)) / 3)


def test_weights_survive_losses_that_overflow_an_exponential():
    odds = ada_wac_log_odds(torch.zeros(2), torch.tensor([1e4, 0.0]), torch.tensor([0.0, 1e4]))
    assert odds.sigmoid().tolist() == [1.0, 0.0]


class Views(L.LightningModule):
    """A linear classifier on one view or on both, one behind the other."""

    def __init__(self, both=False):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head, self.both = nn.Linear(8, 6), nn.Linear(6, 4), both

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.encoder(torch.cat([x, x.roll(1, 1)]))
        if not self.both:
            logits = self.head(features[: len(x)])
            return {"loss": F.cross_entropy(logits, y), "logits": logits}
        logits, labels = self.head(features), torch.cat([y, y])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits, "targets": labels}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def _losses(both):
    module = Views()
    views = [module.encoder(x) for x in (INPUTS, INPUTS.roll(1, 1))]
    ce = [F.cross_entropy(module.head(z), LABELS, reduction="none") for z in views]
    consistency = (views[0] - views[1]).square().mean(1)
    return ((sum(ce) / 2 if both else ce[0]).detach(), consistency.detach())


@pytest.mark.parametrize("both", [False, True])
def test_weights_follow_the_sums_of_both_losses(both):
    technique = AdaWAC(1.5, views="encoder", step_size=0.7)
    module = Views(both)
    data = IndexedDataset(TensorDataset(INPUTS, LABELS))
    trainer([technique], max_epochs=3).fit(module, DataLoader(data, 16, shuffle=True))
    supervised, consistency = _losses(both)
    expected = 3 * 0.7 * (supervised - 1.5 * consistency)
    torch.testing.assert_close(technique.memory.memory.table[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_loss_of_a_run_is_that_of_the_moved_weights():
    seen = []

    class Noted(Views):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(float(outputs["loss"]))

    technique = AdaWAC(1.5, views="encoder", step_size=0.7)
    data = IndexedDataset(TensorDataset(INPUTS, LABELS))
    trainer([technique], max_steps=1).fit(Noted(), DataLoader(data, 16))
    supervised, consistency = (t[:16] for t in _losses(False))
    w = (0.7 * (supervised - 1.5 * consistency)).sigmoid()
    expected = (w * supervised + (1 - w) * 1.5 * consistency).mean()
    assert seen[0] == pytest.approx(float(expected), rel=1e-5)


class Segmenter(L.LightningModule):
    """Two classes a pixel, from one convolution; the second view has noise on it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.encoder(x), self.encoder(x + 0.5 * torch.randn_like(x))
        self.last_views = first.detach(), second.detach()
        logits = self.head(first)
        loss = F.cross_entropy(logits, y)
        return {"loss": loss, "logits": logits, "z1": first, "z2": second}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def _slices():
    """40 slices of 8x8: every second one has a faint object in noise; the dark ones have none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 8, 8, generator=generator)
    y = torch.zeros(40, 8, 8, dtype=torch.long)
    y[::2, 1:6, 2:7] = 1
    x[::2, 0, 1:6, 2:7] += 0.5
    x[1::2] -= 3
    return x, y


def test_slices_without_an_object_get_consistency_and_those_with_one_their_label():
    x, y = _slices()
    technique = AdaWAC(4.0)
    data = DataLoader(IndexedDataset(TensorDataset(x, y)), 10, shuffle=True)
    trainer([technique], max_epochs=20).fit(Segmenter(), data)
    log_odds = technique.memory.memory.table[:, 0]
    # Measured over two seeds: 6.6 at least, and -0.4 on average.
    assert float(log_odds[::2].min()) > 3
    assert float(log_odds[1::2].mean()) < -0.2


def test_a_sample_without_a_label_has_consistency_alone():
    x, y = _slices()
    y[3] = -100
    technique = AdaWAC(step_size=2.0)
    module = Segmenter()
    data = DataLoader(IndexedDataset(TensorDataset(x, y)), 8)
    trainer([technique], max_steps=1).fit(module, data)
    first, second = (view[3] for view in module.last_views)
    expected = -2.0 * float((first - second).square().mean())
    assert float(technique.memory.memory.table[3, 0]) == pytest.approx(expected, rel=1e-5)


def test_views_of_other_samples_are_named():
    data = IndexedDataset(TensorDataset(INPUTS, LABELS))

    class Whole(Views):
        def training_step(self, batch, batch_idx):
            logits = self.head(self.encoder(batch[0]))
            return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits}

    with pytest.raises(RegularizationError, match="the batch has 16, a view 8"):
        trainer([AdaWAC(views="encoder")], max_steps=1).fit(Whole(), DataLoader(data, 16))
