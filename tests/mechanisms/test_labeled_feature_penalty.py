"""Features with labels: one label a row, of any kind, or a message."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import Mixup
from lightning_reg.engine import RegularizationError
from lightning_reg.engine.communicator import JointMean
from lightning_reg.mechanisms.labeled_feature_penalty import LabeledFeaturePenalty
from tests.engine.simple import INPUTS, LABELS, Host, trainer


class Seen(LabeledFeaturePenalty):
    """Keeps what it is given."""

    def __init__(self, layer="net.0", **settings):
        super().__init__(0.1, num_classes=4, layer=layer, **settings)

    def value(self, step, features, distribution):
        self.features, self.distribution = features.detach(), distribution
        return JointMean.of(features.square().sum(1))


def _fit(technique, labels, inputs=INPUTS, module=None, others=()):
    module = Host(lr=0.0) if module is None else module
    data = DataLoader(TensorDataset(inputs, labels), 64)
    trainer([technique, *others], max_steps=1).fit(module, data)
    return module


def test_class_indices_become_rows_and_ignored_ones_go():
    class Ignoring(Host):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    labels = LABELS.clone()
    labels[7] = -100
    technique = Seen()
    module = _fit(technique, labels, module=Ignoring(lr=0.0))
    kept = labels >= 0
    assert torch.equal(technique.distribution, F.one_hot(labels[kept], 4).float())
    torch.testing.assert_close(technique.features, module.net[0](INPUTS).detach()[kept])


def test_labels_of_a_mixed_batch_are_mixed():
    technique = Seen()
    _fit(technique, LABELS, others=[Mixup(1.0)])
    assert technique.distribution.shape == (64, 4)
    torch.testing.assert_close(technique.distribution.sum(1), torch.ones(64))
    assert int((technique.distribution > 0).sum()) > 64


class Positions(L.LightningModule):
    """Labels for each position."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 5)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_positions_are_rows_with_labels_of_their_own():
    technique = Seen("net", pooling="positions")
    module = _fit(technique, LABELS.view(16, 4), INPUTS.view(16, 4, 8), Positions())
    torch.testing.assert_close(technique.features, module.net(INPUTS).detach())
    assert torch.equal(technique.distribution.argmax(1), LABELS)


def test_soft_labels_are_taken_as_they_are():
    soft = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    technique = Seen("net")
    _fit(technique, soft, module=Positions())
    assert torch.equal(technique.distribution, soft)


def test_labels_of_other_rows_are_named():
    with pytest.raises(RegularizationError, match=r"features, got \(16, 5\) and targets \(16, 4\)"):
        _fit(Seen("net"), LABELS.view(16, 4), INPUTS.view(16, 4, 8), Positions())
