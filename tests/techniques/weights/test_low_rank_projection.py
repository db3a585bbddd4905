"""Low-rank projection: Eckart-Young, the rank after every step, and stacked weights."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.low_rank_projection import (
    LowRankProjection,
    low_rank_projection,
)
from tests.engine.simple import Host, fit, trainer
from tests.techniques.weights.penalty import matrix


def rank(weight):
    return int(torch.linalg.matrix_rank(weight.detach().flatten(1), rtol=1e-4))


@pytest.mark.parametrize("r", [1, 2, 3])
def test_distance_is_that_of_eckart_and_young_and_projecting_again_does_nothing(r):
    w = matrix(5, 4)
    found = low_rank_projection(w, r)
    assert rank(found) == r
    lost = torch.linalg.svdvals(w)[r:].square().sum().sqrt()
    torch.testing.assert_close((w - found).norm(), lost)
    torch.testing.assert_close(low_rank_projection(found, r), found)


def test_matrix_of_low_rank_is_left_as_it_is():
    assert torch.equal(low_rank_projection(matrix(2, 4), 3), matrix(2, 4))
    kernel = torch.randn(4, 2, 3, 3)
    assert rank(low_rank_projection(kernel, 2)) == 2
    assert low_rank_projection(kernel, 2).shape == kernel.shape


class Ranks(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append([rank(pl_module.net[i].weight) for i in (0, 4)])


def test_rank_holds_after_every_step():
    watch = Ranks()
    fit([LowRankProjection(rank=2), watch])
    assert watch.seen == [[2, 2]] * 8


def test_between_projections_the_rank_grows():
    watch = Ranks()
    fit([LowRankProjection(rank=1, every=3), watch])
    assert [ranks[1] for ranks in watch.seen][:6] == [4, 4, 1, 4, 4, 1]


def test_log_shows_what_was_cut_off():
    module = Host(lr=0.0)
    weights = [module.net[i].weight.detach() for i in (0, 4)]
    values = [torch.linalg.svdvals(w).square() for w in weights]
    share = float(sum(v[2:].sum() for v in values) / sum(v.sum() for v in values))
    _, run = fit([LowRankProjection(rank=2)], module=module, batch_size=64, max_epochs=1)
    assert run.callback_metrics["reg/low_rank_projection"] == pytest.approx(share, rel=1e-5)


class Dictionary(L.LightningModule):
    """A classifier and a reconstruction of the same inputs."""

    def __init__(self, rows=(2, 6)):
        super().__init__()
        torch.manual_seed(0)
        self.classifier, self.reconstruction = nn.Linear(6, rows[0]), nn.Linear(6, rows[1])

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.classifier(x), y)
        return loss + (self.reconstruction(x) - x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_stacked_weights_share_their_dictionary():
    data = DataLoader(TensorDataset(matrix(16, 6).float(), torch.arange(16) % 2), batch_size=8)
    module = Dictionary()
    trainer([LowRankProjection(rank=3, together=True)], max_epochs=2).fit(module, data)
    stacked = torch.cat([module.classifier.weight, module.reconstruction.weight])
    assert rank(stacked) == 3
    alone = Dictionary()
    trainer([LowRankProjection(rank=3)], max_epochs=2).fit(alone, data)
    assert rank(torch.cat([alone.classifier.weight, alone.reconstruction.weight])) > 3


def test_projected_descent_finds_a_low_rank_truth_where_the_free_fit_follows_the_noise():
    x = matrix(40, 8).float()
    truth = (matrix(6, 2, seed=1) @ matrix(2, 8, seed=2)).float()
    y = x @ truth.T + matrix(40, 6, seed=3).float()

    class Regression(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 6, bias=False)

        def training_step(self, batch, batch_idx):
            return (self.layer(batch[0]) - batch[1]).square().sum(1).mean() / 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.3)

    errors = []
    for callbacks in ([], [LowRankProjection(rank=2)]):
        torch.manual_seed(0)
        module = Regression()
        trainer(callbacks, max_epochs=100).fit(module, DataLoader(TensorDataset(x, y), 40))
        errors.append(float((module.layer.weight - truth).square().sum()))
    # 48 free numbers against 2 * (6 + 8 - 2) = 24: about half the error.
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("arguments", [{"strength": 2.0}, {"rank": 0}, {"rank": 1.5}, {"every": 0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="LowRankProjection"):
        LowRankProjection(**arguments)


def test_weights_that_do_not_stack_are_refused():
    with pytest.raises(ArgumentError, match="columns"):
        fit([LowRankProjection(rank=2, together=True)])
