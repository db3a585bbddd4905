"""EASE: ridge regressions of each item on all others, and better rankings than popularity."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ZeroDiagonalRidge
from lightning_reg.engine import UnsupportedError
from lightning_reg.techniques.retrieval.zero_diagonal_ridge import zero_diagonal_ridge


def interactions(users=60, items=8, seed=0):
    """Two tastes: users like items of their own half, and some of all."""
    generator = np.random.default_rng(seed)
    likes = generator.random((users, items)) < 0.12
    half = np.arange(users) % 2
    own = (np.arange(items) % 2)[None] == half[:, None]
    return torch.from_numpy(
        (likes | (own & (generator.random((users, items)) < 0.6))).astype(float)
    )


def test_columns_are_ridge_regressions_on_the_other_items():
    x = interactions()
    found = zero_diagonal_ridge(x.T @ x, 3.0)
    for j in range(8):
        others = np.delete(x.numpy(), j, 1)
        gram = others.T @ others + 3.0 * np.eye(7)
        b = np.linalg.solve(gram, others.T @ x[:, j].numpy())
        np.testing.assert_allclose(np.delete(found[:, j].numpy(), j), b, rtol=1e-10)
    assert found.diagonal().eq(0).all()


def test_projected_gradient_descent_ends_there():
    x = interactions()
    gram = x.T @ x
    b = torch.zeros(8, 8, dtype=torch.float64)
    rate = 1 / (torch.linalg.eigvalsh(gram)[-1] + 3.0)
    for _ in range(600):
        b = (b - rate * (gram @ b - gram + 3.0 * b)).fill_diagonal_(0)
    torch.testing.assert_close(b, zero_diagonal_ridge(gram, 3.0), rtol=1e-9, atol=1e-11)


class Ease(L.LightningModule):
    def __init__(self, layer=None):
        super().__init__()
        self.items = layer or nn.Linear(40, 40, bias=False)

    def forward(self, x):
        return self.items(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(model, x, **args):
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[ZeroDiagonalRidge(**args)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x.float()), 32))
    return model


def test_hidden_items_rank_higher_than_by_popularity():
    x = interactions(users=400, items=40, seed=1)
    model = train(Ease(), x[:300], ridge=20.0)
    expected = zero_diagonal_ridge(x[:300].T @ x[:300], 20.0)
    torch.testing.assert_close(model.items.weight.detach().T, expected.float())
    popularity = x[:300].sum(0)
    ranks = {"model": [], "popularity": []}
    for user in x[300:].float():
        hidden = int(user.nonzero()[0])
        seen = user.clone()
        seen[hidden] = 0
        open_items = seen == 0
        for name, scores in {"model": model(seen).detach(), "popularity": popularity}.items():
            above = (scores[open_items] > scores[hidden]).float().mean()
            ranks[name].append(float(above))
    # The share of open items in front of the hidden one, over 100 users: 0.2 against 0.5.
    assert np.mean(ranks["model"]) < 0.6 * np.mean(ranks["popularity"])


def test_sparse_interactions_give_the_same():
    class Sparse(Ease):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0].to_sparse()]

        def training_step(self, batch, batch_idx):
            return self.items(batch[0].to_dense()).square().mean()

    x = interactions(items=40)
    found = [train(model, x).items.weight for model in (Ease(), Sparse())]
    assert torch.equal(*found)


def test_model_of_nothing_else_needs_neither_a_loss_nor_an_optimizer():
    class Bare(Ease):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    x = interactions(items=40)
    assert torch.equal(train(Bare(), x).items.weight, train(Ease(), x).items.weight)


@pytest.mark.parametrize("layer", [nn.Linear(40, 40), nn.Linear(40, 20, bias=False)])
def test_layer_that_cannot_be_the_model_is_refused(layer):
    with pytest.raises(UnsupportedError, match="square layer without a bias"):
        train(Ease(layer), interactions(items=40))
