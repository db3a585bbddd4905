"""Closed-form penalties: what counts, once per optimizer step, and equal to a term of the loss."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ElasticNet, GroupLasso, L1Penalty, L2Penalty, TheoryScaledL1
from lightning_reg.engine import ArgumentError, RegularizeMixin, UnsupportedError
from lightning_reg.mechanisms import weight_penalty
from lightning_reg.mechanisms.weight_penalty import WeightPenalty
from lightning_reg.techniques.weights.norm_loss import NormLoss
from tests.engine.simple import Host, fit, trainer, weights


class Ridge(WeightPenalty):
    """Half the squared norm, whose gradient is what an optimizer calls weight decay."""

    def values(self, matrices):
        return torch.stack([m.square().sum() / 2 for m in matrices])

    def closed_form(self, matrices):
        return self.values(matrices), [m.clone() for m in matrices]


class Decayed(Host):
    decay = 0.1

    def configure_optimizers(self):
        kernels = [p for p in self.parameters() if p.ndim > 1]
        biases = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": kernels, "weight_decay": self.decay}, {"params": biases}]
        return torch.optim.SGD(groups, self.lr, momentum=0.9)


@pytest.mark.parametrize("mode", ["gradient", "loss"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_half_the_squared_norm_is_weight_decay(mode, accumulate):
    decayed, _ = fit(module=Decayed())
    ours, _ = fit(
        [Ridge(0.1, mode=mode)], batch_size=16 // accumulate, accumulate_grad_batches=accumulate
    )
    torch.testing.assert_close(weights(ours), weights(decayed), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["gradient", "loss"])
def test_loss_scale_does_not_change_the_strength(mode):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    ours, _ = fit([Ridge(0.1, mode=mode)], plugins=[plugin])
    decayed, _ = fit(module=Decayed())
    assert (weights(ours) - weights(decayed)).abs().max() < 2e-3


@pytest.mark.parametrize("mode", ["gradient", "loss"])
def test_logged_value_is_the_sum_without_the_strength(mode):
    module = Host(lr=0.0)
    expected = sum(p.detach().square().sum() / 2 for p in module.parameters() if p.ndim > 1)
    _, run = fit([Ridge(0.3, mode=mode)], module=module, max_epochs=1)
    assert run.callback_metrics["reg/ridge"] == pytest.approx(float(expected), rel=1e-6)


class Tied(Host):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        self.net[1].weight = self.net[0].weight
        self.net[2].weight.requires_grad_(False)


def test_tied_weight_counts_once_and_frozen_one_never():
    module = Tied()
    expected = float(module.net[0].weight.detach().square().sum() / 2)
    module.lr = 0.0
    _, run = fit([Ridge(1.0)], module=module, max_epochs=1)
    assert run.callback_metrics["reg/ridge"] == pytest.approx(expected, rel=1e-6)
    assert module.net[2].weight.grad is None


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[4])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[4], optimizer, 0.0)


def test_layer_that_is_unfrozen_in_mid_run_is_taken_in():
    class Filtered(Host):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.0)

    module = Filtered()
    first, last = (float(module.net[i].weight.detach().square().sum() / 2) for i in (0, 4))
    _, run = fit([Unfreeze(), Ridge(1.0)], module=module, max_epochs=1)
    assert run.callback_metrics["reg/ridge"] == pytest.approx(first, rel=1e-6)
    _, run = fit([Unfreeze(), Ridge(1.0)], module=Filtered(), max_epochs=2)
    assert run.callback_metrics["reg/ridge"] == pytest.approx(first + last, rel=1e-6)


class Transposed(L.LightningModule):
    def __init__(self, groups):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)

    def training_step(self, batch, batch_idx):
        return self.up(batch[0]).square().mean() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def images():
    return DataLoader(TensorDataset(torch.randn(2, 4, 5, 5)), batch_size=2)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_convolution_are_its_output_channels(groups):
    module = Transposed(groups)
    kernel = module.up.weight.detach().clone()
    per, inputs = 6 // groups, 4 // groups
    rows = [
        torch.stack([kernel[i, j] for i in range(g * inputs, (g + 1) * inputs)])
        for g in range(groups)
        for j in range(per)
    ]
    norms = torch.stack([row.norm() for row in rows])
    run = trainer([NormLoss(1.0)], max_epochs=1)
    run.fit(module, images())
    value = (1 - norms).square().sum()
    assert run.callback_metrics["reg/norm_loss"] == pytest.approx(float(value), rel=1e-5)
    # One step of 0.1 on 2 (1 - 1 / n) w leaves norms of n - 0.2 (n - 1).
    stepped = [
        module.up.weight[g * inputs : (g + 1) * inputs, j].norm()
        for g in range(groups)
        for j in range(per)
    ]
    torch.testing.assert_close(torch.stack(stepped).detach(), norms - 0.2 * (norms - 1))


class Two(L.LightningModule):
    """Manual optimization of two networks, without a word about regularization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        for optimizer, net in ((first, self.one), (second, self.other)):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(x), y) * 0)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.one, self.other)]


def test_manual_optimization_needs_no_call_in_gradient_mode():
    module = Two()
    start = module.one.weight.detach().clone(), module.other.weight.detach().clone()
    fit([Ridge(0.5, parameters="weight")], module=module, max_epochs=1)
    for net, weight in zip((module.one, module.other), start, strict=True):
        # 4 steps of w <- (1 - 0.1 * 0.5) w: each optimizer's weights once per its step.
        torch.testing.assert_close(net.weight.detach(), weight * 0.95**4)


def test_manual_optimization_needs_a_call_in_loss_mode():
    with pytest.raises(UnsupportedError, match="regularize"):
        fit([Ridge(0.5, mode="loss")], module=Two(), max_epochs=1)
    assert not issubclass(Two, RegularizeMixin)


@pytest.mark.parametrize("arguments", [{"mode": "both"}, {"parameters": "("}, {"parameters": 3}])
def test_bad_arguments_are_refused_in_the_name_of_the_technique(arguments):
    with pytest.raises(ArgumentError, match="Ridge"):
        Ridge(1.0, **arguments)


def test_empty_choice_is_refused_before_training():
    with pytest.raises(ArgumentError, match="chooses no parameter"):
        fit([Ridge(1.0, parameters="no_such_name")])


BY_ROWS = {
    "L1Penalty": lambda: L1Penalty(0.01, mode="gradient"),
    "L2Penalty": lambda: L2Penalty(0.01, mode="gradient"),
    "ElasticNet": lambda: ElasticNet(0.01, mode="gradient"),
    "GroupLasso": lambda: GroupLasso(0.01, mode="gradient"),
    "NormLoss": lambda: NormLoss(0.01),
    "TheoryScaledL1": lambda: TheoryScaledL1(0.01, samples=100, mode="gradient"),
}


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("elements", [1, 20, 10**6])
def test_pieces_add_up_to_the_whole_bit_for_bit(monkeypatch, name, elements):
    technique = BY_ROWS[name]()
    assert technique.by_rows
    # A step that is logged makes whole gradients, together with the value.
    whole, _ = fit([technique], log_every_n_steps=1)
    monkeypatch.setattr(weight_penalty, "_PIECE", elements)
    pieces, _ = fit([BY_ROWS[name]()], log_every_n_steps=10**6)
    plain, _ = fit()
    assert torch.equal(weights(whole), weights(pieces))
    assert not torch.equal(weights(whole), weights(plain))


def test_columns_know_of_each_other():
    assert not GroupLasso(0.01, groups="columns").by_rows


def test_no_value_is_computed_for_a_step_that_is_not_logged():
    seen = []

    class Counted(L1Penalty):
        def closed_form(self, matrices):
            seen.append("values")
            return super().closed_form(matrices)

        def gradients(self, matrices):
            seen.append("gradients")
            return super().gradients(matrices)

    fit([Counted(0.01, mode="gradient")], max_epochs=2, log_every_n_steps=10**6)
    assert set(seen) == {"gradients"}
    seen.clear()
    fit([Counted(0.01, mode="gradient")], max_epochs=1, log_every_n_steps=1)
    assert "values" in seen
