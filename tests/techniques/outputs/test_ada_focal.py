"""AdaFocal: its loss in every bin, its rule, what it sees of validation, and what that does."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.outputs.ada_focal import (
    AdaFocal,
    ada_focal,
    equal_mass_gaps,
    next_gammas,
)
from lightning_reg.testing import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, loader, trainer
from tests.techniques.outputs.noisy import Noisy, noisy_data

LOGITS = torch.tensor(
    [[2.0, -1.0, 0.5], [0.0, -3.0, 1.0], [-1.0, 0.3, 0.2], [4.0, 1.0, -2.0]], dtype=torch.float64
)
TARGETS = torch.tensor([0, 1, 2, 1])
EDGES = torch.tensor([0.1, 0.6]).double()
GAMMAS = torch.tensor([-1.5, 2.0, -0.5]).double()
HELD_OUT = torch.randn(45, 8, generator=torch.Generator().manual_seed(9))
HELD_OUT_LABELS = torch.arange(45) % 4


class Validates(Host):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def held_out(batch_size=16):
    return DataLoader(TensorDataset(HELD_OUT, HELD_OUT_LABELS), batch_size=batch_size)


def test_each_row_has_the_loss_of_its_bin():
    p = LOGITS.softmax(1).numpy()[range(4), TARGETS]
    assert set(np.digitize(p, EDGES)) == {0, 1, 2}
    gamma = GAMMAS.numpy()[np.digitize(p, EDGES)]
    expected = -np.where(gamma > 0, (1 - p) ** np.abs(gamma), (1 + p) ** np.abs(gamma)) * np.log(p)
    np.testing.assert_allclose(ada_focal(LOGITS, TARGETS, EDGES, GAMMAS).numpy(), expected)


def test_a_probability_on_an_edge_belongs_to_the_bin_above():
    even = torch.zeros(1, 2, dtype=torch.float64)
    edges, gammas = torch.tensor([0.5]).double(), torch.tensor([1.0, 3.0]).double()
    found = ada_focal(even, torch.tensor([0]), edges, gammas)
    assert float(found) == pytest.approx(0.5**3 * math.log(2))


def test_exponents_of_one_are_the_focal_loss():
    p = LOGITS.softmax(1)[range(4), TARGETS]
    found = ada_focal(LOGITS, TARGETS, EDGES, torch.ones(3).double())
    torch.testing.assert_close(found, -(1 - p) * p.log())


def test_exponents_move_by_the_released_rule():
    # 3mcloud/adafocal@f2c6ca0, losses/adafocal.py, update_bin_stats with its defaults.
    gammas = torch.tensor([1.0, 1.0, 0.21, -0.21, -1.9, 19.0]).double()
    gaps = torch.tensor([0.3, -0.3, -0.2, 0.2, -0.2, 0.2]).double()
    expected = [math.exp(0.3), math.exp(-0.3), -0.2, 0.2, -2.0, 20.0]
    assert next_gammas(gammas, gaps).tolist() == pytest.approx(expected)


def test_bins_hold_equally_many_and_their_gap():
    confidence = torch.rand(90, generator=torch.Generator().manual_seed(0))
    correct = (torch.arange(90) % 3 == 0).double()
    edges, gaps = equal_mass_gaps(confidence, correct, 5)
    order = confidence.argsort()
    # The edge lies on the first sample of the next bin, which belongs to the bin below it.
    index = np.searchsorted(edges.numpy(), confidence.double().numpy(), side="left")
    assert np.bincount(index).tolist() == [19, 18, 18, 18, 17]
    for b in range(5):
        own = torch.from_numpy(index == b)
        gap = confidence[own].double().mean() - correct[own].mean()
        assert float(gaps[b]) == pytest.approx(float(gap), abs=1e-12)
    assert (edges == confidence[order[18:90:18]].double()).all()


def test_ties_leave_empty_bins_alone():
    _, gaps = equal_mass_gaps(torch.full((8,), 0.5), torch.ones(8), 4)
    assert gaps.tolist() == [-0.5, 0, 0, 0]


def expected_state(module, n_bins, gammas):
    module.eval()
    with torch.no_grad():
        confidence, top = module(HELD_OUT).softmax(1).max(1)
    edges, gaps = equal_mass_gaps(confidence, (top == HELD_OUT_LABELS).double(), n_bins)
    return edges, next_gammas(gammas, gaps)


def test_every_validation_of_a_fit_moves_the_exponents_and_the_sanity_check_does_not():
    ours, module = AdaFocal(n_bins=4), Validates(dropout=0.5, lr=0.0)
    ones = ours.gammas.clone()
    trainer([ours], num_sanity_val_steps=1, max_epochs=2).fit(module, loader(), held_out())
    edges, once = expected_state(module, 4, ones)
    torch.testing.assert_close(ours.edges, edges)
    torch.testing.assert_close(ours.gammas, expected_state(module, 4, once)[1])
    trainer([ours]).validate(module, held_out(), verbose=False)
    torch.testing.assert_close(ours.gammas, expected_state(module, 4, once)[1])


def test_a_dataloader_of_its_own_is_looked_at():
    ours, module = AdaFocal(n_bins=4, dataloader=held_out()), Validates()
    ones = ours.gammas.clone()
    trainer([ours], max_epochs=1).fit(module, loader(), loader())
    torch.testing.assert_close(ours.gammas, expected_state(module, 4, ones)[1])


def test_exponents_go_with_the_checkpoint(tmp_path):
    ours, module = AdaFocal(n_bins=4), Validates()
    saved = ModelCheckpoint(tmp_path, save_last=True)
    trainer([ours, saved], max_epochs=1, enable_checkpointing=True).fit(
        module, loader(), held_out()
    )
    again = AdaFocal(n_bins=4)
    run = trainer([again], max_epochs=1)
    run.fit(Validates(), loader(), held_out(), ckpt_path=saved.last_model_path)
    assert torch.equal(again.gammas, ours.gammas)


def _on_ranks():
    ours, module = AdaFocal(n_bins=4), Validates(lr=0.0)
    data = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8)
    rank_trainer(callbacks=[ours], max_epochs=1).fit(module, data, held_out(8))
    return ours.gammas, ours.edges


def test_two_ranks_have_the_exponents_of_one(ranks):
    # 45 held-out samples: the sampler repeats one. The weights stay, so that they are the same.
    ours, module = AdaFocal(n_bins=4), Validates(lr=0.0)
    trainer([ours], max_epochs=1).fit(module, loader(16), held_out())
    for gammas, edges in ranks.run(_on_ranks):
        torch.testing.assert_close(gammas, ours.gammas, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(edges, ours.edges, rtol=1e-6, atol=1e-6)


def test_overconfident_bins_get_larger_exponents_and_end_less_overconfident():
    x, y = noisy_data(0, 300)
    validation, test = noisy_data(50, 1000), noisy_data(100, 2000)
    gaps = {}
    for name in ("plain", "ada"):
        ours = AdaFocal(rate=2.0)
        module = Noisy(0)
        module.validation_step = lambda batch, batch_idx: None
        trainer([ours] if name == "ada" else [], max_epochs=40, log_every_n_steps=50).fit(
            module,
            DataLoader(TensorDataset(x, y), batch_size=100),
            DataLoader(TensorDataset(*validation), batch_size=500),
        )
        with torch.no_grad():
            p = module(test[0]).softmax(1)
        gaps[name] = float(p.amax(1).mean() - (p.argmax(1) == test[1]).float().mean())
    # Measured: 0.22 and 0.10, and exponents of 8 to 20 in the upper bins.
    assert ours.gammas[-5:].mean() > 2
    assert gaps["ada"] < gaps["plain"] - 0.05


@pytest.mark.parametrize(
    "arguments", [{"n_bins": 1}, {"gamma": 0.0}, {"gamma": 30.0}, {"lowest": 1.0}, {"rate": -1.0}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="AdaFocal"):
        AdaFocal(**arguments)


def test_masked_classes_and_sure_rows_give_finite_gradients():
    z = torch.tensor([[90.0, 0.0, -torch.inf], [0.0, 90.0, 0.0]], requires_grad=True)
    edges, gammas = torch.tensor([0.5]), torch.tensor([0.5, 0.5])
    ada_focal(z, torch.tensor([0, 0]), edges, gammas).sum().backward()
    assert torch.isfinite(z.grad[0, :2]).all()
    assert torch.isfinite(z.grad[1]).all()
