"""Closed-form readouts: which rows count, when the layer is set, and to what."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import IndexedDataset
from lightning_reg.engine import ArgumentError
from lightning_reg.mechanisms.closed_form_readout import ClosedFormReadout
from lightning_reg.testing.ranks import rank_trainer

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + X[:, :2]


class LeastSquares(ClosedFormReadout):
    """Ordinary least squares on the batch's inputs."""

    def rows(self, step):
        return step.inputs, step.targets

    def solve(self, moments):
        return torch.linalg.solve(moments.gram, moments.cross).T


class Model(L.LightningModule):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 2, bias=bias).double()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.head(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen = self.head.weight.detach().clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(technique, *, model=None, x=X, y=Y, callbacks=(), **settings):
    model = model or Model()
    loader = DataLoader(TensorDataset(x, y), 4)
    trainer = L.Trainer(
        **{"max_epochs": 1, **settings},
        accelerator="cpu",
        callbacks=[technique, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, DataLoader(TensorDataset(x, y), 20))
    return model


def solution(x=X, y=Y, intercept=True):
    """By NumPy's least squares, with a column of ones: (weight, bias)."""
    columns = np.hstack([x.numpy(), np.ones((len(x), 1))]) if intercept else x.numpy()
    found = torch.from_numpy(np.linalg.lstsq(columns, y.numpy(), rcond=None)[0])
    return found[:3].T, found[3:].flatten()


def test_layer_is_the_solution_over_the_epoch_with_an_intercept():
    model = fit(LeastSquares(layer="head"))
    weight, bias = solution()
    torch.testing.assert_close(model.head.weight.detach(), weight)
    torch.testing.assert_close(model.head.bias.detach(), bias)


def test_layer_without_a_bias_has_no_intercept():
    model = fit(LeastSquares(layer="head"), model=Model(bias=False))
    torch.testing.assert_close(model.head.weight.detach(), solution(intercept=False)[0])


def test_validation_at_the_end_of_the_epoch_sees_the_solution():
    model = fit(LeastSquares(layer="head"), max_epochs=2, check_val_every_n_epoch=1)
    torch.testing.assert_close(model.seen, solution()[0])


def test_strength_is_the_share_of_the_way():
    torch.testing.assert_close(
        fit(LeastSquares(0.25, layer="head")).head.weight.detach(),
        0.75 * fit(LeastSquares(0.0, layer="head")).head.weight.detach() + 0.25 * solution()[0],
    )


def test_rows_that_are_not_finite_do_not_count():
    x = X.clone()
    x[3, 1], x[7, 0] = torch.nan, torch.inf
    counts = torch.tensor([i not in (3, 7) for i in range(len(X))])

    class Careful(Model):
        def training_step(self, batch, batch_idx):
            return self.head(batch[0].nan_to_num(0.0, 0.0)).square().mean()

    model = fit(LeastSquares(layer="head"), model=Careful(), x=x)
    torch.testing.assert_close(model.head.weight.detach(), solution(X[counts], Y[counts])[0])


def test_epoch_without_rows_leaves_the_layer_alone():
    nothing = torch.full_like(X, torch.nan)

    class Blind(Model):
        def training_step(self, batch, batch_idx):
            return self.head(torch.zeros_like(batch[0])).sum() * 0

    model = fit(LeastSquares(layer="head"), model=Blind(), x=nothing)
    assert torch.equal(model.head.weight.detach(), Model().head.weight.detach())


class Heads(Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(pl_module.head.weight.detach().clone())


def test_every_second_epoch():
    heads = Heads()
    fit(LeastSquares(layer="head", every=2), callbacks=[heads], max_epochs=4)
    solved = [torch.allclose(h, solution()[0]) for h in heads.seen]
    assert solved == [False, True, False, True]


def test_layer_that_does_not_read_the_rows_is_named():
    class Narrow(LeastSquares):
        def rows(self, step):
            return step.inputs[:, :2], step.targets

    with pytest.raises(ArgumentError, match=r"`head`, which maps 3 numbers to 2.*\(4, 2\)"):
        fit(Narrow(layer="head"))


def test_repeats_of_a_sampler_do_not_count(ranks):
    for weight in ranks.run(_on_rank):
        torch.testing.assert_close(weight, solution(X[:19], Y[:19])[0])


def _on_rank():
    # 19 samples on two ranks: the sampler repeats one.
    data = IndexedDataset(TensorDataset(X[:19], Y[:19]))
    model = Model()
    trainer = rank_trainer(max_epochs=1, callbacks=[LeastSquares(layer="head")])
    trainer.fit(model, DataLoader(data, 3))
    return model.head.weight.detach()
