"""Masks learn straight through, weights do not, and a random network holds a task already."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.gradients.agreement_gradient_dropout import AgreementGradientDropout
from lightning_reg.techniques.sparsity.mask_tuning import MaskTuning, masked_weight
from tests.engine.simple import trainer


def test_value_is_that_of_the_step_and_gradient_that_of_the_product():
    w = torch.tensor([2.0, -3.0, 4.0], dtype=torch.float64, requires_grad=True)
    m = torch.tensor([0.004, 0.005, 0.006], dtype=torch.float64, requires_grad=True)
    value = masked_weight(w, m, 0.005)
    assert value.tolist() == [0, 0, 4]  # at the threshold a weight is off
    g = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    by_weight, by_mask = torch.autograd.grad(value, [w, m], g)
    assert by_weight.tolist() == [0, 0, 100]
    assert by_mask.tolist() == [2, -30, 400]


class Random(L.LightningModule):
    """A network that was never trained."""

    def __init__(self, lr=2e-3):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)
        self.lr = lr

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.lr)


def blobs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    centres = 2 * torch.randn(4, 8, generator=generator)
    return centres[labels] + torch.randn(200, 8, generator=generator), labels


def accuracy(module):
    x, labels = blobs()
    with torch.no_grad():
        return (module(x).argmax(1) == labels).float().mean().item()


def fit(module, *techniques, epochs=15):
    run = trainer(list(techniques), max_epochs=epochs)
    run.fit(module, DataLoader(TensorDataset(*blobs()), batch_size=50))
    return run.callback_metrics


def test_learns_a_task_by_switching_off_weights_of_a_random_network():
    module, before = Random(), Random()
    metrics = fit(module, MaskTuning())
    for now, then in zip(module.parameters(), before.parameters(), strict=True):
        assert bool(((now == then) | (now == 0)).all())
    off = [(w == 0).float().mean() for w in (module.body[0].weight, module.head.weight)]
    assert min(off) > 0.02
    kept = 1 - sum((w == 0).sum() for w in (module.body[0].weight, module.head.weight)) / (64 * 12)
    # The log is from the start of the last step, which switches a few more.
    assert metrics["reg/mask_tuning_kept"].item() == pytest.approx(kept.item(), abs=0.03)
    # Seen: 0.27 before, and after masks alone 0.99.
    assert accuracy(before) < 0.5
    assert accuracy(module) > 0.9


def test_what_is_named_goes_on_learning_and_all_learns_again_after_the_fit():
    module, before = Random(), Random()
    module.body[0].bias.requires_grad_(False)
    fit(module, MaskTuning(train="head", parameters="body.*weight"), epochs=1)
    assert not torch.equal(module.head.weight, before.head.weight)
    assert not torch.equal(module.head.bias, before.head.bias)
    assert torch.equal(module.body[0].bias, before.body[0].bias)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    assert flags == {
        "body.0.weight": True,
        "body.0.bias": False,
        "head.weight": True,
        "head.bias": True,
    }


def test_a_covered_weight_is_frozen_even_if_it_is_named():
    module, before = Random(), Random()
    fit(module, MaskTuning(train="weight|bias"), epochs=1)
    kept = module.head.weight != 0
    assert torch.equal(module.head.weight[kept], before.head.weight[kept])
    assert not torch.equal(module.head.bias, before.head.bias)


def test_penalty_draws_masks_below_the_threshold():
    # Adam moves each mask by its learning rate a step: 20 steps of 1e-3 from 0.01.
    module = Random(1e-3)
    module.training_step = lambda batch, batch_idx: 0 * module(batch[0]).sum()
    fit(module, MaskTuning(1e-4, parameters="body.*weight"), epochs=5)
    assert (module.body[0].weight == 0).all()


def test_gradient_dropout_works_on_the_masks():
    module = Random()
    metrics = fit(module, MaskTuning(), AgreementGradientDropout(), epochs=8)
    assert 0.4 < metrics["reg/agreement_gradient_dropout"] < 1
    assert metrics["reg/agreement_gradient_dropout_second_loss"] > 0
    assert accuracy(module) > 0.8


def test_start_has_to_lie_above_the_threshold():
    with pytest.raises(ArgumentError, match="start"):
        MaskTuning(start=5e-3)
