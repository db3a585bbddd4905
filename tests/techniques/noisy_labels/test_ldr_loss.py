"""Its limits are known losses; values and gradients are those of the official code."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import IndexedDataset, RegularizationError
from lightning_reg.techniques.noisy_labels.ldr_loss import (
    ALDRLoss,
    LDRLoss,
    adaptive_lambda,
    aldr_loss,
    ldr_loss,
)
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, fit, trainer, weights

SCORES = torch.tensor(
    [[1.0, -2.0, 0.5, 3.0], [0.2, 0.1, -0.3, 0.4], [-1.0, 2.5, 0.0, 1.5]], dtype=torch.float64
)
TARGETS = torch.tensor([3, 0, 2])
ONE_HOT = F.one_hot(TARGETS, 4).double()


def gradient(loss, scores=SCORES):
    scores = scores.clone().requires_grad_()
    value = loss(scores)
    value.backward()
    return value.item(), scores.grad


# ---------------------------------------------------------------------- the function


def test_lambda_one_is_the_cross_entropy_less_log_k():
    expected = F.cross_entropy(SCORES, TARGETS, reduction="none") - math.log(4)
    torch.testing.assert_close(ldr_loss(SCORES, ONE_HOT, 1.0), expected)


@pytest.mark.parametrize("lam", [0.0, 1e-4])
def test_lambda_zero_is_the_crammer_singer_hinge(lam):
    margins = SCORES - SCORES.gather(1, TARGETS[:, None]) + 2.0 * (1 - ONE_HOT)
    # The right class has margin 0, so the largest one is a hinge; lambda adds at most l log K.
    torch.testing.assert_close(
        ldr_loss(SCORES, ONE_HOT, lam, 2.0), margins.amax(1), rtol=0, atol=2 * lam + 1e-12
    )


@pytest.mark.parametrize(("lam", "tolerance"), [(math.inf, 1e-12), (1e6, 1e-4)])
def test_lambda_infinity_is_symmetric(lam, tolerance):
    total = sum(ldr_loss(SCORES, torch.eye(4).double()[[k] * 3], lam, 2.0) for k in range(4))
    # Over all labels: sum_y mean_k (f_k - f_y) = 0, and c counts K - 1 of K times for each.
    torch.testing.assert_close(total, torch.full_like(total, 2.0 * 3), rtol=0, atol=tolerance)


def test_is_the_largest_value_over_distributions():
    lam, own = 1.5, SCORES - SCORES.gather(1, TARGETS[:, None]) + (1 - ONE_HOT)
    best = (own / lam).softmax(1)
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(200, 3, 4, dtype=torch.float64, generator=generator).mul(3).softmax(-1)

    def objective(p):
        divergence = (p * (4 * p).log()).sum(-1)
        return (p * own).sum(-1) - lam * divergence

    value = ldr_loss(SCORES, ONE_HOT, lam, 1.0)
    torch.testing.assert_close(value, objective(best))
    assert (objective(others) <= value + 1e-12).all()


@pytest.mark.parametrize("lam", [1e-6, 1e-3, 1.0, 1e4, 1e8])
def test_float32_is_exact_for_every_lambda(lam):
    exact = ldr_loss(SCORES, ONE_HOT, lam, 1.0).float()
    torch.testing.assert_close(ldr_loss(SCORES.float(), ONE_HOT.float(), lam, 1.0), exact)


def test_one_lambda_a_row():
    lam = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    rows = [ldr_loss(SCORES[i : i + 1], ONE_HOT[i : i + 1], lam[i].item())[0] for i in range(3)]
    torch.testing.assert_close(ldr_loss(SCORES, ONE_HOT, lam), torch.stack(rows))


def test_adaptive_lambda_lies_between_its_ends():
    lam = torch.ones(3, dtype=torch.float64)
    uniform, sure = torch.zeros(3, 4).double(), 1e3 * ONE_HOT
    torch.testing.assert_close(adaptive_lambda(uniform, lam, 2.0, 4.0), 2.0 * lam)
    torch.testing.assert_close(adaptive_lambda(sure, lam, 2.0, 4.0), 2.0 * (1 - 1 / 4) * lam)


def test_adaptive_lambda_settles_where_the_loss_is_largest_over_lambda():
    # Without a margin, the fixed point of the update maximizes ALDR-KL over lambda.
    lam = torch.ones(3, dtype=torch.float64)
    for _ in range(200):
        lam = adaptive_lambda(SCORES, lam, 1.0, 2.0)
    here = aldr_loss(SCORES, ONE_HOT, lam, 1.0, 2.0, 0.0)
    for shift in (-0.02, 0.02):
        assert (aldr_loss(SCORES, ONE_HOT, lam + shift, 1.0, 2.0, 0.0) < here).all()


def test_iterates_fall_from_lambda_0_to_the_largest_stationary_point():
    lam = torch.full((3,), 1.5, dtype=torch.float64)
    one = adaptive_lambda(SCORES, lam, 1.5, 1.2)
    many = [adaptive_lambda(SCORES, lam, 1.5, 1.2, n) for n in (1, 2, 5, 200)]
    torch.testing.assert_close(many[1], adaptive_lambda(SCORES, one, 1.5, 1.2))
    assert all((later < sooner).all() for sooner, later in itertools.pairwise([lam, *many]))
    # No other point above it is stationary: between it and lambda_0 the loss only falls.
    grid = many[-1] + (lam - many[-1]) * torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
    losses = torch.stack([aldr_loss(SCORES, ONE_HOT, at, 1.5, 1.2, 0.0) for at in grid])
    assert (losses.diff(dim=0) < 0).all()


# ---------------------------------------------------------------------- the official code
# Optimization-AI/ICML2023_LDR@732fc85 loss.py, run in float32 on SCORES and TARGETS.

OFFICIAL_LDR = (
    1.45830858,
    [
        [0.11446890, 0.01443357, 0.08979514, -0.11296143],
        [-0.21993898, 0.07381895, 0.05093999, 0.09720091],
        [-0.00451607, 0.06142426, -0.14776807, 0.01859692],
    ],
)
OFFICIAL_ALDR = (
    (0.83584780, [0.85190803, 0.89172238, 0.85508025], [0.10930125, -0.03608476, 0.08938640]),
    (0.83552527, [0.81404430, 0.87337446, 0.82188261], [0.10866066, -0.03602672, 0.08794358]),
)

# ALDRLoss_V1(threshold=0.1, Lambda=10.0, alpha=2.0, softplus=True), as for CIFAR-100.
OFFICIAL_SOFTPLUS = (
    (-0.17978930, [9.98875523, 9.99946785, 9.99181843], [0.09677295, 0.01517601, 0.08146837]),
    (-0.17978942, [9.98872948, 9.99946785, 9.99180508], [0.09677293, 0.01517601, 0.08146837]),
)


class Step:
    """As much of a step as the losses need."""

    is_rerun = False

    def log(self, *args, **kwargs):
        pass


def test_equals_the_official_ldr():
    technique = LDRLoss(lam=1.5, margin=2.0)
    value, grad = gradient(lambda s: technique.losses(Step(), s, ONE_HOT).mean())
    assert value == pytest.approx(OFFICIAL_LDR[0], abs=1e-6)
    np.testing.assert_allclose(grad.numpy(), OFFICIAL_LDR[1], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "official"),
    [
        ({"lam": 1.0, "alpha": 2.0, "margin": 1.0}, OFFICIAL_ALDR),
        ({"lam": 10.0, "margin": 0.1, "normalization": "softplus"}, OFFICIAL_SOFTPLUS),
    ],
)
def test_equals_the_official_aldr_over_two_visits(monkeypatch, settings, official):
    technique = ALDRLoss(**settings)
    table = torch.full((3, 1), technique.lam)

    def remember(step, rows):
        table.copy_(rows)
        return rows

    monkeypatch.setattr(technique, "recall", lambda step, width: table.clone())
    monkeypatch.setattr(technique, "remembered", remember)
    for expected, lam, row in official:
        value, grad = gradient(lambda s: technique.losses(Step(), s, ONE_HOT).mean())
        # The official code adds 1e-5 to probabilities, which moves lambda by about 1e-4.
        assert value == pytest.approx(expected, abs=2e-4)
        np.testing.assert_allclose(table[:, 0].numpy(), lam, atol=2e-4)
        np.testing.assert_allclose(grad[0, :3].numpy(), row, atol=2e-4)


# ---------------------------------------------------------------------- training


def indexed(batch_size=16):
    return DataLoader(IndexedDataset(TensorDataset(INPUTS, LABELS)), batch_size=batch_size)


def train(technique, lr=0.1, epochs=2, others=()):
    module, run = Host(lr=lr), trainer([technique, *others], max_epochs=epochs)
    run.fit(module, indexed())
    return module, technique.memory.memory.table[:, 0]


def test_raw_logits_with_lambda_one_train_as_the_cross_entropy():
    technique = LDRLoss(lam=1.0, margin=0.0, normalization="none")
    ours, plain = fit([technique])[0], fit([])[0]
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-6)


def test_every_visit_moves_the_lambda_of_a_sample_once():
    _, table = train(ALDRLoss(alpha=2.0), lr=0.0, epochs=3)
    scores = Host()(INPUTS).detach()
    scores = scores / scores.abs().mean(1, keepdim=True)
    lam = torch.ones(64)
    for _ in range(3):
        lam = adaptive_lambda(scores, lam)
    torch.testing.assert_close(table, lam)


def test_without_a_table_every_step_starts_from_lambda_0():
    technique, module = ALDRLoss(alpha=2.0, iterations=4, stored=False), Host(lr=0.1)
    run = trainer([technique], max_epochs=1)
    plain = DataLoader(TensorDataset(INPUTS[:16], LABELS[:16]), batch_size=16)
    run.fit(module, plain)
    scores = Host()(INPUTS[:16]).detach()
    scores = scores / scores.abs().mean(1, keepdim=True)
    lam = adaptive_lambda(scores, torch.ones(16), 1.0, 2.0, 4)
    logged = run.callback_metrics
    assert logged["reg/aldr_loss_lambda"].item() == pytest.approx(lam.mean().item(), abs=1e-6)
    expected = aldr_loss(scores, F.one_hot(LABELS[:16], 4).float(), lam).mean()
    assert logged["reg/aldr_loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert technique.state_dict() == {}


def test_a_second_pass_does_not_move_lambda_again():
    _, alone = train(ALDRLoss(), lr=0.0)
    _, beside = train(ALDRLoss(), lr=0.0, others=[Ascent(0.05)])
    torch.testing.assert_close(beside, alone)


def test_aldr_needs_one_label_a_sample():
    class Tagger(Host):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0]).unsqueeze(1).repeat(1, 2, 1)
            labels = batch[1].unsqueeze(1).repeat(1, 2)
            loss = F.cross_entropy(logits.transpose(1, 2), labels)
            return {"loss": loss, "logits": logits, "targets": labels}

    with pytest.raises(
        RegularizationError, match=r"ALDRLoss.*32 terms for 16 samples.*stored=False"
    ):
        trainer([ALDRLoss()], max_epochs=1).fit(Tagger(), indexed())


def test_large_lambda_withstands_wrong_labels():
    # Two clusters, 40 % of the labels of one flipped: the symmetric loss keeps the majority.
    def agreement(lam, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(100) % 2
        x = 3.0 * F.one_hot(labels, 2) + torch.randn(100, 2, generator=generator)
        noisy = labels.clone()
        noisy[:80:2] = (torch.rand(40, generator=generator) < 0.4).long()
        features = torch.cat([x, torch.randn(100, 60, generator=generator)], 1)
        weight = torch.zeros(62, 2, requires_grad=True)
        optimizer = torch.optim.SGD([weight], 0.5)
        target = F.one_hot(noisy, 2).float()
        for _ in range(300):
            scores = (features @ weight).softmax(1)
            optimizer.zero_grad()
            ldr_loss(scores, target, lam, 0.0).mean().backward()
            optimizer.step()
        return (scores.argmax(1) == labels).float().mean().item()

    robust = [agreement(math.inf, seed) for seed in range(5)]
    sharp = [agreement(0.05, seed) for seed in range(5)]
    assert np.mean(robust) > np.mean(sharp)
