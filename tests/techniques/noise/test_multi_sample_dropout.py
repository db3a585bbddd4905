"""Several masks, one backbone pass, the mean of the losses."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.noise.multi_sample_dropout import (
    MultiSampleDropoutMixin,
    multi_sample_dropout,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, loader, trainer, weights


class Net(MultiSampleDropoutMixin, L.LightningModule):
    """A backbone, several masks, a head."""

    def __init__(self, samples=8, p=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU()), nn.Linear(32, 4)
        self.set_multi_sample_dropout(samples, p)
        self.passes = 0

    def training_step(self, batch, batch_idx):
        self.passes += 1
        loss, logits = self.multi_sample_loss(self.head, self.backbone(batch[0]), batch[1])
        assert logits.shape == (len(batch[0]), 4)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class PlainDropout(Net):
    def training_step(self, batch, batch_idx):
        hidden = F.dropout(self.backbone(batch[0]), self.dropout_p)
        return F.cross_entropy(self.head(hidden), batch[1])


def train(module, **settings):
    torch.manual_seed(3)
    trainer(max_epochs=2, **settings).fit(module, loader())
    return weights(module)


def test_one_sample_is_dropout_bit_for_bit():
    assert torch.equal(train(Net(samples=1, p=0.3)), train(PlainDropout(samples=1, p=0.3)))


def test_loss_is_the_mean_of_the_losses_of_separate_passes():
    net, hidden = Net(samples=5, p=0.4), torch.randn(6, 32)
    torch.manual_seed(7)
    loss, logits = net.multi_sample_loss(net.head, hidden, LABELS[:6])
    torch.manual_seed(7)
    masked = F.dropout(hidden.repeat(5, 1), 0.4).view(5, 6, 32)
    losses = [F.cross_entropy(net.head(h), LABELS[:6]) for h in masked]
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(logits, torch.stack([net.head(h) for h in masked]).mean(0))
    # Losses are averaged, not logits: the cross-entropy is convex, so theirs is the larger mean.
    assert loss > F.cross_entropy(logits, LABELS[:6])


def test_masks_differ_and_keep_the_mean():
    features = torch.ones(4, 10_000)
    copies = multi_sample_dropout(features, 3, 0.25).view(3, 4, -1)
    assert not torch.equal(copies[0], copies[1])
    torch.testing.assert_close(copies.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert copies.mean().item() == pytest.approx(1.0, abs=0.02)


def test_maps_keep_their_shape():
    assert multi_sample_dropout(torch.ones(2, 3, 4, 5), 3).shape == (6, 3, 4, 5)


def test_evaluation_is_one_plain_pass():
    net = Net().eval()
    loss, logits = net.multi_sample_loss(net.head, net.backbone(INPUTS), LABELS)
    plain = net.head(net.backbone(INPUTS))
    assert torch.equal(logits, plain)
    assert torch.equal(loss, F.cross_entropy(plain, LABELS))


def test_variance_of_the_heads_gradient_falls_with_the_number_of_samples():
    def variance(samples):
        net, hidden = Net(samples, 0.5), torch.randn(16, 32, generator=torch.Generator())
        torch.manual_seed(0)
        drawn = []
        for _ in range(300):
            loss, _ = net.multi_sample_loss(net.head, hidden, LABELS[:16])
            drawn.append(torch.autograd.grad(loss, net.head.weight)[0])
        return torch.stack(drawn).var(0).sum().item()

    assert variance(1) / variance(8) == pytest.approx(8, rel=0.25)


def test_trains_with_accumulation_and_half_precision():
    start = weights(Net())
    for settings in ({"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}):
        assert not torch.equal(train(Net(), **settings), start)


@pytest.mark.parametrize("arguments", [(0, 0.5), (1.5, 0.5), (True, 0.5), (8, 1.0), (8, -0.1)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=r"MultiSampleDropoutMixin.*set_multi_sample_dropout"):
        Net(*arguments)


def train_on_ranks():
    module = Net()
    torch.manual_seed(torch.distributed.get_rank())
    data = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8)
    rank_trainer(max_epochs=2).fit(module, data)
    return weights(module)


def test_replicas_agree_although_their_masks_differ(ranks):
    first, second = ranks.run(train_on_ranks)
    assert torch.equal(first, second)
    assert not torch.equal(first, weights(Net()))
