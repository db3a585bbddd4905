"""Which samples count, what they count, and what is kept of the trained weights."""

import copy
import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.adaptation.eata import EATA, eata
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import trainer
from tests.techniques.adaptation.digits import accuracy, shifted, trained


def with_entropy(value, classes=10):
    """Logits (1, C) of a softmax whose entropy is ``value`` nats, found by bisection."""
    low, high = 0.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        z = torch.zeros(1, classes, dtype=torch.float64)
        z[0, 0] = middle
        p = z.softmax(1)
        low, high = (middle, high) if -(p * p.log()).sum() > value else (low, middle)
    return z


def test_a_sample_weighs_one_at_the_threshold_and_e_one_nat_below():
    threshold = 1.5
    at, below = with_entropy(1.5), with_entropy(0.5)
    losses, _, _ = eata(torch.cat([at, below]), entropy_threshold=threshold)
    assert losses.tolist() == pytest.approx([1.5, math.e * 0.5], abs=1e-9)


def test_default_threshold_is_04_log_c():
    edge = 0.4 * math.log(10)
    assert edge == pytest.approx(0.921, abs=1e-3)
    logits = torch.cat([with_entropy(edge - 1e-6), with_entropy(edge + 1e-6)])
    assert eata(logits)[1].tolist() == [True, False]


def test_the_weight_is_detached():
    z = with_entropy(0.5).requires_grad_()
    losses, _, _ = eata(z, entropy_threshold=1.5)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    p = z.detach().softmax(1).numpy()
    entropy = -(p * np.log(p)).sum()
    expected = math.exp(1.5 - entropy) * -p * (np.log(p) + entropy)
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12)


def test_only_predictions_unlike_the_average_are_new():
    mean = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    logits = 40 * torch.eye(3, dtype=torch.float64)
    assert eata(logits, mean, cosine_threshold=0.7)[2].tolist() == [True, False, True]
    assert eata(logits, mean, cosine_threshold=0.5)[2].tolist() == [False, False, True]
    assert eata(logits, None)[2].all()


# ---------------------------------------------------------------------- the run


class Table(L.LightningModule):
    """Logits of a norm's scale times fixed scores."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3, bias=False).double()

    def test_step(self, batch, batch_idx):
        return {"logits": batch[0] * self.norm.weight}


SCORES = 2 * torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def by_hand(batches, lr, e0, d, beta=0.0, fisher=None, with_mean=False):
    """The official loop in NumPy: entropies, both filters, the average, SGD with momentum."""
    w, momentum, mean = np.ones(3), np.zeros(3), None
    for x in batches:
        x = x.numpy()
        z = x * w
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        entropy = -(p * np.log(p)).sum(1)
        kept = entropy < e0
        if mean is not None:
            norms = np.linalg.norm(p, axis=1) * np.linalg.norm(mean)
            kept &= np.abs(p @ mean) / norms < d
        if not kept.any():
            continue
        average = p[kept].mean(0)
        mean = average if mean is None else 0.9 * mean + 0.1 * average
        dz = -p * (np.log(p) + entropy[:, None]) * np.exp(e0 - entropy)[:, None]
        gradient = (dz * x)[kept].mean(0)
        if fisher is not None:
            gradient = gradient + 2 * beta * fisher * (w - 1)
        momentum = 0.9 * momentum + gradient
        w = w - lr * momentum
    return (w, mean) if with_mean else w


def adapt(technique, x=SCORES, run=trainer, size=6, **settings):
    module = Table()
    run = run(callbacks=[technique], **settings)
    run.test(module, DataLoader(TensorDataset(x), batch_size=size), verbose=False)
    return module.norm.weight.detach().numpy(), run


SETTINGS = {"entropy_threshold": 0.8, "cosine_threshold": 0.8, "lr": 0.3, "keep": True}


def test_weights_are_those_of_the_official_loop():
    technique = EATA(fisher_strength=0, **SETTINGS)
    got, run = adapt(technique)
    expected, mean = by_hand(SCORES.split(6), 0.3, 0.8, 0.8, with_mean=True)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    np.testing.assert_allclose(technique._mean.numpy(), mean, rtol=1e-10)
    assert 0.1 < run.callback_metrics["reg/eata_kept"].item() < 0.9
    # Each filter matters in this case.
    assert np.abs(expected - by_hand(SCORES.split(6), 0.3, 0.8, 2.0)).max() > 1e-3
    assert np.abs(expected - by_hand(SCORES.split(6), 0.3, 2.0, 0.8)).max() > 1e-3


def pseudo_fisher(x):
    """mean_n ((p_n - one_hot(argmax)) x_n)^2, the gradient of each sample by hand."""
    x = x.numpy()
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    label = np.eye(3)[p.argmax(1)]
    return (((p - label) * x) ** 2).mean(0)


@pytest.mark.parametrize("size", [1, 5])
def test_pull_uses_the_fisher_information_of_single_samples(size):
    clean = SCORES.flip(1)[:10]
    loader = DataLoader(TensorDataset(clean), batch_size=size)
    got, _ = adapt(EATA(fisher_strength=5.0, fisher_loader=loader, **SETTINGS))
    expected = by_hand(SCORES.split(6), 0.3, 0.8, 0.8, 5.0, pseudo_fisher(clean))
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    free = by_hand(SCORES.split(6), 0.3, 0.8, 0.8)
    assert np.abs(expected - free).max() > 1e-2


def test_fisher_samples_are_a_limit():
    loader = DataLoader(TensorDataset(SCORES), batch_size=5)
    technique = EATA(fisher_strength=5.0, fisher_loader=loader, fisher_samples=7, **SETTINGS)
    expected = by_hand(SCORES.split(6), 0.3, 0.8, 0.8, 5.0, pseudo_fisher(SCORES[:7]))
    np.testing.assert_allclose(adapt(technique)[0], expected, rtol=1e-10)


def adapt_on_rank():
    rank = torch.distributed.get_rank()
    parts = [batch[:2] if rank == 0 else batch[2:] for batch in SCORES.split(6)]
    clean = SCORES[:3] if rank == 0 else SCORES[3:10]
    loader = DataLoader(TensorDataset(clean), batch_size=4)
    technique = EATA(fisher_strength=5.0, fisher_loader=loader, **SETTINGS)
    size = len(parts[0])
    settings = {"use_distributed_sampler": False}
    weights, _ = adapt(technique, torch.cat(parts), rank_trainer, size, **settings)
    return weights, technique._mean.numpy()


def test_two_unequal_ranks_equal_the_joint_batch(ranks):
    (first, first_mean), (second, second_mean) = ranks.run(adapt_on_rank)
    fisher = pseudo_fisher(SCORES[:10])
    expected, mean = by_hand(SCORES.split(6), 0.3, 0.8, 0.8, 5.0, fisher, with_mean=True)
    np.testing.assert_allclose(first, expected, rtol=1e-10)
    np.testing.assert_allclose(first_mean, mean, rtol=1e-10)
    assert (first == second).all()
    assert (first_mean == second_mean).all()


def test_nothing_reliable_changes_nothing():
    got, run = adapt(EATA(fisher_strength=0, entropy_threshold=1e-9, lr=1.0, keep=True))
    assert (got == 1).all()
    assert run.callback_metrics["reg/eata_kept"].item() == 0


# ---------------------------------------------------------------------- the claim


def test_pull_keeps_the_accuracy_on_clean_data_after_a_long_adaptation():
    for seed in range(2):
        module, (train, test) = trained(seed)
        loader = DataLoader(TensorDataset(*train), batch_size=100)
        clean, kept = accuracy(module, test), {}
        for beta in (0.0, 100.0):
            net = copy.deepcopy(module)
            technique = EATA(
                fisher_strength=beta,
                fisher_loader=loader,
                fisher_samples=300,
                entropy_threshold=2.0,
                cosine_threshold=0.99,
                optimizer=lambda p: torch.optim.SGD(p, 1.0),
                keep=True,
            )
            accuracy(net, shifted(test, 1.0), technique, passes=8)
            kept[beta] = accuracy(net, test)
        assert kept[100.0] > clean - 0.03, (kept, clean)
        assert kept[0.0] < kept[100.0] - 0.03, (kept, clean)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"fisher_strength": -1.0},
        {"fisher_strength": 0, "entropy_threshold": 0.0},
        {"fisher_strength": 0, "cosine_threshold": 1.5},
        {"fisher_strength": 0, "fisher_samples": 0},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=r"EATA.*Try: EATA"):
        EATA(**arguments)
