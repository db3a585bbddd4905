"""Where two views are found, and that they are compared over all ranks."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import (
    ArgumentError,
    MissingSignalError,
    RegularizationError,
    RegularizeMixin,
)
from lightning_reg.mechanisms.embedding_loss import EmbeddingLoss
from lightning_reg.techniques.contrastive.decoupled_contrastive import DecoupledContrastive
from lightning_reg.techniques.contrastive.vicreg import VICReg
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import trainer, weights

X = torch.randn(14, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Apart(EmbeddingLoss):
    """The mean product of the first entries: knows which view is which row of which."""

    def value(self, z1, z2):
        return (z1[:, 0] * z2[:, 1]).mean()


class Siamese(RegularizeMixin, L.LightningModule):
    """Embeds two views; ``how`` says in which form the step shows them."""

    def __init__(self, how="keys"):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.automatic_optimization = how != "manual"
        self.net = nn.Linear(6, 3).double()
        self.left, self.right = nn.Identity(), nn.Identity()

    def training_step(self, batch, batch_idx):
        x, y = batch[0], batch[0].flip(1)
        if self.how == "halves":
            z = self.net(torch.cat([x, y]))
            return 0.0 * z.sum()
        z1, z2 = self.net(x), self.net(y)
        if self.how == "three":
            self.net(x)
        if self.how == "layers":
            self.left(z1)
            self.right(z2)
        if self.how == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(
                self.regularize(0.0 * z1.sum(), features={"outputs.z1": z1, "outputs.z2": z2})
            )
            optimizer.step()
            return None
        return {"loss": 0.0 * z1.sum(), "z1": z1, "z2": z2}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def train(technique, how="keys", x=X, run=trainer, size=7, **settings):
    module = Siamese(how)
    run = run(callbacks=[technique], **{"max_epochs": 3, **settings})
    run.fit(module, DataLoader(TensorDataset(x), batch_size=size))
    return weights(module), run.callback_metrics[f"reg/{technique.name}"]


@pytest.mark.parametrize(
    ("how", "views"),
    [
        ("keys", "net"),
        ("halves", "net"),
        ("layers", ["left", "right"]),
        ("manual", ["outputs.z1", "outputs.z2"]),
    ],
)
def test_every_way_of_showing_the_views_trains_the_same(how, views):
    expected, value = train(Apart(1.0))
    got, shown = train(Apart(1.0, views=views), how)
    assert (expected - weights(Siamese())).abs().max() > 1e-2
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(shown, value)


def test_views_are_not_exchanged():
    module = Siamese()
    z1, z2 = module.net(X[:7]), module.net(X[:7].flip(1))
    _, value = train(Apart(1.0), max_epochs=1, limit_train_batches=1)
    assert value.item() == pytest.approx((z1[:, 0] * z2[:, 1]).mean().item(), abs=1e-6)


def test_a_single_sample_counts_nothing():
    start = weights(Siamese())
    for technique in (VICReg(), DecoupledContrastive()):
        assert torch.equal(train(technique, x=X[:1])[0], start)


def train_on_ranks(make):
    rank = torch.distributed.get_rank()
    # Rank 0 holds 2 samples of the first batch and 5 of the second, rank 1 the other way round.
    x = torch.cat([X[:2], X[7:12]]) if rank == 0 else torch.cat([X[2:7], X[12:]])
    sizes = ([0, 1], [2, 3, 4, 5, 6]) if rank == 0 else ([0, 1, 2, 3, 4], [5, 6])
    module = Siamese()
    technique = make()
    run = rank_trainer(callbacks=[technique], max_epochs=3, use_distributed_sampler=False)
    run.fit(module, DataLoader(TensorDataset(x), batch_sampler=list(sizes)))
    return weights(module), run.callback_metrics[f"reg/{technique.name}"]


def mild():
    return VICReg(0.02)


def weighted():
    return DecoupledContrastive(0.1, sigma=0.5)


@pytest.mark.parametrize("make", [mild, DecoupledContrastive, weighted])
def test_two_ranks_with_unequal_numbers_of_samples_train_the_joint_batch(ranks, make):
    (first, value), (second, _) = ranks.run(train_on_ranks, make)
    joint, joint_value = train(make())
    assert (joint - weights(Siamese())).abs().max() > 1e-2
    assert torch.equal(first, second)
    torch.testing.assert_close(first, joint, rtol=0, atol=1e-10)
    torch.testing.assert_close(value, joint_value)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("views", [[], ["a", "a"], ["a", "b", "c"], [1, 2], ""])
def test_bad_views_are_refused(views):
    with pytest.raises(ArgumentError, match="Apart"):
        Apart(1.0, views=views)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ArgumentError, match=r"'nets'.*net, left, right"):
        train(Apart(1.0, views="nets"))


def test_a_layer_called_three_times_is_refused():
    with pytest.raises(MissingSignalError, match="3 times"):
        train(Apart(1.0, views="net"), "three")


def test_missing_keys_are_named():
    with pytest.raises(MissingSignalError, match="z1"):
        train(Apart(1.0), "halves")


def test_an_odd_number_of_rows_has_no_halves():
    class Odd(Siamese):
        def training_step(self, batch, batch_idx):
            return 0.0 * self.net(batch[0]).sum()

    module = Odd()
    with pytest.raises(RegularizationError, match="7 rows"):
        trainer([Apart(1.0, views="net")]).fit(module, DataLoader(TensorDataset(X), batch_size=7))


def test_views_of_different_shape_are_refused():
    class Uneven(Siamese):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {**outputs, "z2": outputs["z2"][:3]}

    with pytest.raises(RegularizationError, match=r"\(7, 3\) and \(3, 3\)"):
        trainer([Apart(1.0)]).fit(Uneven(), DataLoader(TensorDataset(X), batch_size=7))
