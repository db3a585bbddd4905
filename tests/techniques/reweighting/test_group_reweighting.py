"""Weights of groups and of samples: closed forms, limits, the dual, and ranks without a group."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import GroupDRO, KLRobustReweighting, Signals, WorstGroupLoss
from lightning_reg.engine import RegularizationError
from lightning_reg.functional import (
    fairness_gap,
    group_dro,
    kl_robust_loss,
    kl_robust_weights,
    worst_group_loss,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, trainer

LOSSES = torch.tensor([0.3, 1.7, 0.9, 2.2], dtype=torch.float64)
GROUPS = torch.arange(64) % 8 // 6  # 48 samples of group 0, 16 of group 1


class Grouped(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 4)
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.cross_entropy(self(x), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


SIGNALS = Signals(domain="batch.2")


def _fit(technique, groups=GROUPS, steps=1):
    module = Grouped()
    data = DataLoader(TensorDataset(INPUTS, LABELS, groups), batch_size=16)
    trainer([technique], max_steps=steps).fit(module, data)
    return module


def _group_losses(batch=slice(0, 16), groups=GROUPS):
    losses = F.cross_entropy(Grouped()(INPUTS[batch]), LABELS[batch], reduction="none").detach()
    return torch.stack([losses[groups[batch] == g].mean() for g in range(2)])


def test_group_weights_follow_the_closed_form():
    q = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    for _ in range(5):
        q = group_dro(q, LOSSES, 0.3)
    expected = (5 * 0.3 * LOSSES).exp()
    torch.testing.assert_close(q, expected / expected.sum())


@pytest.mark.parametrize(
    ("adjustment", "weights", "gradient"),
    [
        (
            0.0,
            [0.44468802213668823, 0.40060165524482727, 0.15471027791500092],
            [-0.04056122899055481, -0.18942660093307495, 0.03653997927904129, -0.16376085579395294],
        ),
        (
            3.0,
            [0.2550104260444641, 0.4551701247692108, 0.2898193895816803],
            [-0.0232602097094059, -0.10862842202186584, 0.04151731729507446, -0.18606774508953094],
        ),
    ],
)
def test_official_group_weights_and_gradient(adjustment, weights, gradient):
    # kohpangwei/group_DRO@cbbc1c5, loss.py, LossComputer with step_size 0.5 and group counts 90, 9
    # and 4, after two batches without a sample of the third group. Its value has the margins in
    # it, which are added in place; they have no gradient.
    logits = torch.tensor([[1.0, -0.5], [0.25, 2.0], [0.0, 1.5], [-1.0, 0.5]], requires_grad=True)
    losses = F.cross_entropy(logits, torch.tensor([0, 0, 1, 0]), reduction="none")
    means = torch.cat([losses[:2].mean().view(1), losses[2:].mean().view(1), torch.zeros(1)])
    margins = adjustment / torch.tensor([90.0, 9.0, 4.0]).sqrt()
    q = torch.full((3,), 1 / 3)
    for _ in range(2):
        q = group_dro(q, means.detach() + margins, 0.5)
    assert q.tolist() == pytest.approx(weights, rel=1e-5)
    (found,) = torch.autograd.grad(q @ means, logits)
    assert found[:, 0].tolist() == pytest.approx(gradient, rel=1e-5)


def test_group_weights_survive_losses_that_overflow_an_exponential():
    q = group_dro(torch.tensor([0.5, 0.5]), torch.tensor([1e4, 1.0]), 1.0)
    assert q.tolist() == [1.0, 0.0]


def test_robust_loss_is_that_of_the_moved_weights():
    technique = GroupDRO(num_groups=2, step_size=2.0, signals=SIGNALS)
    losses = _group_losses()
    q = (2.0 * losses).softmax(0)
    assert _fit(technique).losses[0] == pytest.approx(float(q @ losses), rel=1e-5)
    torch.testing.assert_close(technique.weights_of_groups, q, rtol=1e-5, atol=0)


def test_margins_favour_small_groups():
    technique = GroupDRO(
        num_groups=2, step_size=2.0, adjustment=3.0, group_counts=[48, 16], signals=SIGNALS
    )
    _fit(technique)
    losses = _group_losses()
    expected = (2.0 * (losses + 3.0 / torch.tensor([48.0, 16.0]).sqrt())).softmax(0)
    torch.testing.assert_close(technique.weights_of_groups, expected, rtol=1e-5, atol=0)


def test_without_steps_groups_weigh_alike():
    technique = GroupDRO(num_groups=2, step_size=0.0, signals=SIGNALS)
    assert _fit(technique).losses[0] == pytest.approx(float(_group_losses().mean()), rel=1e-5)


def test_the_worst_group_is_the_loss():
    technique = WorstGroupLoss(num_groups=2, signals=SIGNALS)
    assert _fit(technique).losses[0] == pytest.approx(float(_group_losses().max()), rel=1e-5)


def test_gaps_between_groups_are_added():
    technique = WorstGroupLoss(num_groups=2, form="gap", lam=0.7, signals=SIGNALS)
    losses, share = _group_losses(), torch.tensor([0.75, 0.25])
    mean = (share * losses).sum()
    expected = mean + 0.7 * (losses - mean).abs().sum()
    assert _fit(technique).losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_one_group_is_the_plain_mean():
    one = torch.zeros(64, dtype=torch.long)
    losses = F.cross_entropy(Grouped()(INPUTS[:16]), LABELS[:16]).item()
    for technique in (
        GroupDRO(num_groups=1, signals=SIGNALS),
        WorstGroupLoss(num_groups=1, signals=SIGNALS),
        WorstGroupLoss(num_groups=1, form="gap", signals=SIGNALS),
    ):
        assert _fit(technique, one).losses[0] == pytest.approx(losses, rel=1e-6)


def test_a_group_without_samples_has_no_say():
    counts = torch.tensor([3.0, 0.0, 1.0, 2.0])
    losses = torch.tensor([0.5, 0.0, 0.2, 0.3])
    assert worst_group_loss(-losses, counts) == -0.2
    present = torch.tensor([0, 2, 3])
    without = fairness_gap(losses[present], counts[present], 0.3)
    torch.testing.assert_close(fairness_gap(losses, counts, 0.3), without)


def test_unknown_groups_are_named():
    with pytest.raises(RegularizationError, match="knows groups 0 to 1, got 2"):
        _fit(GroupDRO(num_groups=2, signals=SIGNALS), GROUPS + 1)


def moved_on_ranks(groups):
    technique = GroupDRO(num_groups=2, step_size=2.0, signals=SIGNALS)
    run = rank_trainer(callbacks=[technique], max_steps=1)
    data = DataLoader(TensorDataset(INPUTS, LABELS, groups), batch_size=16)
    module = Grouped()
    run.fit(module, data)
    return technique.weights_of_groups


def test_ranks_agree_where_one_has_no_sample_of_a_group(ranks):
    # Four of 64 samples, of which a shuffled joint batch of 32 gives a rank few or none.
    groups = torch.zeros(64, dtype=torch.long)
    groups[:4] = 1
    one, other = ranks.run(moved_on_ranks, groups)
    assert torch.equal(one, other)
    assert not torch.equal(one, torch.full((2,), 0.5))


# ---------------------------------------------------------------------- KL balls


def test_tilted_loss_goes_from_the_largest_to_the_mean():
    torch.testing.assert_close(kl_robust_loss(LOSSES, 1e-3), LOSSES.max(), rtol=0, atol=1e-3 * 1.4)
    torch.testing.assert_close(kl_robust_loss(LOSSES, 1e4), LOSSES.mean(), rtol=1e-4, atol=0)


def test_weights_are_the_gradient_of_the_tilted_loss():
    losses = LOSSES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl_robust_loss(losses, 0.7), losses)
    torch.testing.assert_close(kl_robust_weights(LOSSES, 0.7) / 4, gradient)


def test_best_lambda_puts_the_weights_on_the_border_of_the_ball():
    """The dual of the worst case over ``KL(w || 1/n) <= rho`` is tight at the best lambda."""
    rho = 0.2
    found = minimize_scalar(
        lambda lam: float(kl_robust_loss(LOSSES, lam)) + lam * rho,
        bounds=(1e-2, 50.0),
        method="bounded",
        options={"xatol": 1e-10},
    )
    w = kl_robust_weights(LOSSES, float(found.x)) / 4
    assert float((w * (4 * w).log()).sum()) == pytest.approx(rho, abs=1e-6)


def test_normalizer_is_the_moving_average_of_exponentials():
    technique = KLRobustReweighting(lam=0.8, average=0.25)
    module = Grouped()
    data = DataLoader(TensorDataset(INPUTS, LABELS, GROUPS), batch_size=16)
    trainer([technique], max_steps=3).fit(module, data)
    losses = F.cross_entropy(Grouped()(INPUTS), LABELS, reduction="none").detach().double()
    means = (losses / 0.8).exp().view(4, 16).mean(1)
    u = means[0]
    for mean in means[1:3]:
        u = 0.75 * u + 0.25 * mean
    assert float(technique.log_normalizer) == pytest.approx(float(u.log()), abs=1e-5)
    last = losses.view(4, 16)[2]
    expected = ((last / 0.8).exp() / u * last).mean()
    assert module.losses[2] == pytest.approx(float(expected), rel=1e-4)


def test_large_losses_do_not_overflow():
    weights = kl_robust_weights(torch.tensor([1e4, 1.0]), 0.5)
    # Rounding of an exponent of 2e4.
    assert weights.tolist() == pytest.approx([2.0, 0.0], rel=1e-3)
