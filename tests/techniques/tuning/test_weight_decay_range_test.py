"""The range test: rising rates, what it chooses, and that it leaves nothing behind."""

import functools

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.functional import weight_decay_range_test
from lightning_reg.techniques.tuning.one_cycle import OneCycle
from lightning_reg.techniques.tuning.weight_decay_range_test import RangeTest, RangeTestCurve
from lightning_reg.testing.ranks import rank_trainer
from lightning_reg.testing.snapshot import changed, snapshot
from tests.engine.simple import INPUTS, LABELS, Host, loader


def _curve(weight_decay, *losses):
    lrs = tuple(0.1 * 2**i for i in range(len(losses)))
    return RangeTestCurve(weight_decay, lrs, losses, losses)


def test_the_largest_decay_that_falls_as_far_is_chosen_with_its_largest_rate():
    curves = (_curve(0.0, 2.0, 1.5, 1.0, 1.6), _curve(1e-4, 2.0, 1.4, 1.02, 0.99, 3.0))
    curves += (_curve(1e-3, 2.0, 1.9, 1.4, 2.0),)
    found = RangeTest(curves, tolerance=0.05)
    assert (found.weight_decay, found.max_lr) == (1e-4, pytest.approx(0.8))
    # A fall of one: the third misses 0.41 of it.
    assert RangeTest(curves, tolerance=0.5).weight_decay == 1e-3
    assert RangeTest(curves[:1], tolerance=0.0).max_lr == pytest.approx(0.4)


class Quadratic(L.LightningModule):
    """``h w^2 / 2`` under plain SGD: diverges where the rate exceeds 2 / (h + weight decay)."""

    def __init__(self, curvature=4.0, momentum=0.0):
        super().__init__()
        self.w, self.curvature = nn.Parameter(torch.tensor(1.0)), curvature
        self.rates = []

    def training_step(self, batch, batch_idx):
        return self.curvature * self.w.square() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = functools.partial(L.Trainer, accelerator="cpu")


@pytest.mark.parametrize("weight_decay", [0.0, 4.0])
def test_loss_falls_up_to_the_rate_at_which_theory_lets_it_diverge(weight_decay):
    settings = {"min_lr": 1e-3, "max_lr": 100.0, "steps": 200, "smoothing": 0.0}
    found = weight_decay_range_test(
        Quadratic(), loader(), trainer=QUIET, weight_decays=[weight_decay], **settings
    )
    curve = found.curves[0]
    assert curve.lrs[:2] == pytest.approx([1e-3, 1e-3 * 1e5 ** (1 / 199)])
    # Each step multiplies w by 1 - lr (h + wd): the loss is lowest at the last that shrinks it.
    threshold = 2 / (4.0 + weight_decay)
    assert found.max_lr == pytest.approx(threshold, rel=0.07)
    assert len(curve.lrs) == len(curve.losses) < 200


def test_a_decay_that_holds_the_loss_up_is_not_chosen():
    found = weight_decay_range_test(
        Host(), loader(), trainer=QUIET, weight_decays=[3.0, 1e-3, 0.0], steps=60, max_lr=1.0
    )
    assert found.weight_decay == 1e-3
    assert [c.weight_decay for c in found.curves] == [3.0, 1e-3, 0.0]
    # All began at the same weights, with the same batches.
    assert len({c.losses[0] for c in found.curves}) == 1


def test_module_and_random_numbers_are_left_as_they_were():
    module = Host(batch_norm=True, dropout=0.2)
    before, torch_state = snapshot(module), torch.get_rng_state()
    shuffled = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=16, shuffle=True)
    weight_decay_range_test(module, shuffled, trainer=QUIET, weight_decays=[0.0, 0.1], steps=6)
    assert not changed(before, snapshot(module))
    assert torch.equal(torch_state, torch.get_rng_state())


class Selective(Host):
    """Weights decay, biases do not, and learn twice as fast."""

    groups = []

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.ndim > 1]
        biases = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.2}]
        return torch.optim.SGD(groups, 0.1, weight_decay=0.01)

    def on_before_optimizer_step(self, optimizer):
        self.groups.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])


def test_groups_without_decay_keep_none_and_rates_keep_their_ratio():
    Selective.groups.clear()
    weight_decay_range_test(
        Selective(), loader(), trainer=QUIET, weight_decays=[0.5], steps=3, max_lr=1.0
    )
    assert [decay for _, decay in Selective.groups[0]] == [0.5, 0.0]
    assert all(two == pytest.approx(2 * one) for (one, _), (two, _) in Selective.groups)


def test_another_schedule_and_wrong_arguments_are_refused():
    with pytest.raises(RegularizationError, match="sets another one"):
        weight_decay_range_test(
            Host(), loader(), trainer=functools.partial(QUIET, callbacks=[OneCycle()]), steps=4
        )
    for arguments in ({"weight_decays": []}, {"weight_decays": [-1.0]}, {"min_lr": 0.0}):
        with pytest.raises(ArgumentError, match="Try"):
            weight_decay_range_test(Host(), loader(), **arguments)
    for arguments in ({"max_lr": 1e-6}, {"steps": 1}, {"stop": 1.0}, {"smoothing": 1.0}):
        with pytest.raises(ArgumentError, match="Try"):
            weight_decay_range_test(Host(), loader(), **arguments)


def _trainer_on_rank(**settings):
    return rank_trainer(**{**settings, "max_epochs": 2})


def _on_rank():
    found = weight_decay_range_test(
        Host(), loader(), trainer=_trainer_on_rank, weight_decays=[0.1, 0.0], steps=4, max_lr=0.1
    )
    return [curve.losses for curve in found.curves], found.weight_decay


def test_ranks_come_to_one_answer(ranks):
    one, other = ranks.run(_on_rank)
    assert one == other
