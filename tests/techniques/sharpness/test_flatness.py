"""The claim of the family: flatter minima, by the Hessian's trace, at equal training loss."""

from itertools import pairwise

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import IndexedDataset
from lightning_reg.metrics import hessian_trace
from lightning_reg.techniques.sharpness.adversarial_model_perturbation import (
    AdversarialModelPerturbation,
)
from lightning_reg.techniques.sharpness.saf import SAF
from lightning_reg.techniques.sharpness.sam import SAM
from tests.engine.simple import trainer

LOSS = 0.03
SEEDS = range(5)


def digits():
    data = load_digits()
    return torch.tensor(data.data[:512] / 16, dtype=torch.float32), torch.tensor(data.target[:512])


class Deep(L.LightningModule):
    """Three hidden layers; trains until the loss on all digits is reached."""

    def __init__(self, seed, data):
        super().__init__()
        torch.manual_seed(seed)
        self.data, sizes = data, (64, 16, 16, 16)
        hidden = [nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in pairwise(sizes)]
        self.net = nn.Sequential(*hidden, nn.Linear(16, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def loss(self):
        return F.cross_entropy(self(self.data[0]), self.data[1])

    def on_train_epoch_end(self):
        self.trainer.should_stop = float(self.loss().detach()) < LOSS


def trace(technique, seed):
    """The trace where the loss has fallen to LOSS."""
    module, data = Deep(seed, digits()), TensorDataset(*digits())
    indexed = IndexedDataset(data) if isinstance(technique, SAF) else data
    run = trainer([] if technique is None else [technique], max_epochs=150)
    torch.manual_seed(seed)
    run.fit(module, DataLoader(indexed, batch_size=64, shuffle=True))
    loss = module.loss()
    assert 0.6 * LOSS < float(loss.detach()) < LOSS
    return float(hessian_trace(loss, list(module.parameters()), probes=30).value)


@pytest.fixture(scope="module")
def plain():
    return [trace(None, seed) for seed in SEEDS]


# Measured: 0.40, 0.39 and 0.62 at most, over the five seeds.
@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: SAM(0.3), 0.6),
        (lambda: AdversarialModelPerturbation(0.5), 0.6),
        (lambda: SAF(1.0, temperature=2.0, lag=3, start=5), 0.8),
    ],
    ids=["SAM", "AMP", "SAF"],
)
def test_trace_is_lower_at_equal_training_loss(plain, make, least):
    ratios = [trace(make(), seed) / before for seed, before in zip(SEEDS, plain, strict=True)]
    assert max(ratios) < least
