"""Mixtures lie on the sphere, are hard, and enter their own query's denominator."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.mechanisms.info_nce import info_nce
from lightning_reg.techniques.contrastive.online_hard_negative_mixing import (
    OnlineHardNegativeMixing,
    mix_hard_negatives,
)
from tests.engine.simple import trainer

PAIRS = torch.tensor([[0, 1], [0, 3], [2, 1]])
SHARES = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_mixtures_are_those_of_numpy():
    q, h = normal(1, 3), normal(1, 4, 3, seed=1)
    unit = h[0].numpy() / np.linalg.norm(h[0].numpy(), axis=1, keepdims=True)
    scores = unit @ q[0].numpy() / np.linalg.norm(q[0].numpy())
    ranked, scores = unit[np.argsort(-scores)], np.sort(scores)[::-1]
    rows = [
        s * ranked[a] + (1 - s) * ranked[b]
        for (a, b), s in zip(PAIRS.tolist(), SHARES.tolist(), strict=True)
    ]
    weights = np.exp(scores / 0.3) / np.exp(scores / 0.3).sum()
    rows = np.stack([*rows, weights @ ranked])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(mix_hard_negatives(q, h, PAIRS, SHARES, 0.3)[0].numpy(), rows)


def test_order_of_the_candidates_does_not_matter():
    q, h = normal(5, 3), normal(5, 4, 3, seed=1)
    mixed = mix_hard_negatives(q, h, PAIRS, SHARES)
    torch.testing.assert_close(mix_hard_negatives(q, h[:, [2, 0, 3, 1]], PAIRS, SHARES), mixed)


def test_mixtures_are_unit_vectors_at_least_as_similar_as_the_less_similar_parent():
    q, h = normal(50, 6), normal(50, 4, 6, seed=1).abs()
    q = q.abs()  # all similarities are positive
    mixed = mix_hard_negatives(q, h, PAIRS, SHARES, list_wise=False)
    torch.testing.assert_close(mixed.norm(dim=2), torch.ones(50, 3, dtype=torch.float64))
    parents = F.cosine_similarity(q[:, None], h, dim=2).sort(1, descending=True).values
    least = parents[:, PAIRS].min(2).values
    assert (F.cosine_similarity(q[:, None], mixed, dim=2) >= least).all()


def test_list_wise_mixture_is_the_hardest_negative_when_cold():
    q, h = normal(5, 3), normal(5, 4, 3, seed=1)
    none = PAIRS[:0], SHARES[:0]
    hardest = F.cosine_similarity(q[:, None], h, dim=2).argmax(1)
    expected = F.normalize(h[torch.arange(5), hardest], dim=1)
    torch.testing.assert_close(mix_hard_negatives(q, h, *none, 1e-4)[:, 0], expected)


def test_private_negatives_count_for_their_own_query_alone():
    q, p, own = normal(3, 4), normal(3, 4, seed=1), normal(3, 2, 4, seed=2)
    base = info_nce(q, p, 0.5)
    again = info_nce(q, p, 0.5, private=own)
    scores = F.cosine_similarity(q[:, None], own, dim=2) / 0.5
    # e^L is 1 + the sum of negatives over the positive.
    positive = (F.cosine_similarity(q, p) / 0.5).exp()
    torch.testing.assert_close(again.exp() - base.exp(), scores.exp().sum(1) / positive)


class Retrieval(L.LightningModule):
    """Queries and documents through one map; hard negatives come with the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4, bias=False).double()

    def training_step(self, batch, batch_idx):
        q, p, n = batch
        z1, z2 = self.net(q), self.net(p)
        return {"loss": 0.0 * z1.sum(), "z1": z1, "z2": z2, "negatives": self.net(n)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(technique, samples=6):
    data = TensorDataset(
        normal(samples, 4), normal(samples, 4, seed=1), normal(samples, 3, 4, seed=2)
    )
    module = Retrieval()
    run = trainer([technique], max_epochs=1)
    run.fit(module, DataLoader(data, batch_size=samples))
    return run.callback_metrics, module


@pytest.mark.parametrize("place", [None, "outputs.negatives"])
def test_mixing_makes_finding_the_positive_harder(place):
    name = "reg/online_hard_negative_mixing"
    mixed, _ = fit(OnlineHardNegativeMixing(negatives=place))
    fewer, _ = fit(OnlineHardNegativeMixing(negatives=place, pairs=0))
    q, p, n = (
        Retrieval().net(t) for t in (normal(6, 4), normal(6, 4, seed=1), normal(6, 3, 4, seed=2))
    )
    plain = info_nce(q, p, 0.05, negatives=None if place is None else n).mean()
    assert mixed[name] > fewer[name] > plain


def test_mixtures_leave_out_the_querys_own_positive():
    # Orthogonal pairs: every negative and every mixture of negatives has similarity 0.
    technique = OnlineHardNegativeMixing(hardest=3, pairs=2, temperature=0.5)
    z, seeded = torch.eye(4, dtype=torch.float64), torch.Generator()
    step = SimpleNamespace(rng=lambda *_, **__: seeded)
    mixed = technique.private_negatives(step, z, z, None, torch.arange(4))
    losses = info_nce(z, z, 0.5, private=mixed)
    expected = np.log(1 + (3 + 2 + 1) * np.exp(-2.0))
    np.testing.assert_allclose(losses.numpy(), expected)


def test_pairs_are_of_two_different_places():
    technique, seeded = OnlineHardNegativeMixing(pairs=300), torch.Generator()
    pairs, shares = technique._draw(SimpleNamespace(rng=lambda *_, **__: seeded), 3)
    assert set(map(tuple, pairs.tolist())) == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert 0.4 < shares.mean() < 0.6  # Beta(2, 2) has variance 1/20: 8 standard errors


def test_a_batch_with_one_candidate_has_no_mixtures():
    metrics, _ = fit(OnlineHardNegativeMixing(), samples=2)
    q, p = (Retrieval().net(t) for t in (normal(2, 4), normal(2, 4, seed=1)))
    expected = info_nce(q, p, 0.05).mean().item()
    assert metrics["reg/online_hard_negative_mixing"].item() == pytest.approx(expected)
