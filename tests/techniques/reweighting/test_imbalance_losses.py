"""Losses for imbalanced classes: official values, limits, and the decisions that they lead to."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg import LabelDistributionAwareMargin, LogitAdjustedLoss
from lightning_reg.engine import RegularizationError
from lightning_reg.functional import (
    class_balanced_loss,
    class_margins,
    label_distribution_aware_margin,
    logit_adjusted_loss,
)
from lightning_reg.mechanisms.class_frequencies import effective_number_weights
from tests.engine.simple import fit

SCORES = torch.tensor(
    [[1.0, -0.5, 0.25, 2.0], [0.0, 1.5, -1.0, 0.5], [-0.75, 0.25, 3.0, 1.0]], dtype=torch.float64
)
TRUE = torch.tensor([0, 3, 1])
LABELS = F.one_hot(TRUE, 4).double()
COUNTS = torch.tensor([100.0, 30.0, 10.0, 3.0], dtype=torch.float64)


def test_official_value_and_gradient_of_the_margin_loss():
    # kaidic/LDAM-DRW@2536330, losses.py, margin 0.5 and scale 30, in float32.
    scores = SCORES.clone().requires_grad_()
    loss = label_distribution_aware_margin(scores, LABELS, class_margins(COUNTS), 30.0).mean()
    assert loss.item() == pytest.approx(57.39260482788086, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, scores)
    official = [-10.0, 2.678637180785148e-32, 1.583214428044024e-22, 10.0]
    assert gradient[0].tolist() == pytest.approx(official, rel=1e-4)


def test_official_class_weights():
    # richardaecn/class-balanced-loss@1d7857d, src/cifar_main.py, the weights at beta 0.99; those
    # of kaidic/LDAM-DRW@2536330, cifar_train.py, are the same lines.
    official = [0.1273449706915052, 0.3101525498549749, 0.844324878701944, 2.718177600751576]
    assert effective_number_weights(COUNTS, 0.99).tolist() == pytest.approx(official, rel=1e-9)


def test_logit_adjustment_adds_the_prior_to_the_power_of_tau():
    # Pepper-lll/NCfeature@c681f7e, losses.py, adds log(pi^tau + 1e-12); here by hand, in odds.
    odds = SCORES.exp() * (COUNTS / 143) ** 0.5
    expected = -(odds / odds.sum(1, keepdim=True))[torch.arange(3), TRUE].log()
    torch.testing.assert_close(logit_adjusted_loss(SCORES, LABELS, COUNTS, 0.5), expected)


def test_focal_class_balance_by_hand():
    p = SCORES.softmax(1)[torch.arange(3), TRUE]
    weights = torch.tensor([0.2, 0.5, 1.3, 2.0], dtype=torch.float64)
    expected = -weights[TRUE] * (1 - p) ** 1.5 * p.log()
    torch.testing.assert_close(class_balanced_loss(SCORES, LABELS, weights, 1.5), expected)


def test_effective_numbers_are_those_of_the_geometric_sum():
    counts = torch.tensor([3.0, 7.0, 1.0], dtype=torch.float64)
    effective = torch.tensor([sum(0.9**i for i in range(int(n))) for n in counts])
    expected = (1 / effective) / (1 / effective).mean()
    torch.testing.assert_close(effective_number_weights(counts, 0.9), expected.double())


def test_effective_numbers_survive_float32_and_large_counts():
    weights = effective_number_weights(torch.tensor([1e6, 1e7, 1.0]), 0.9999999)
    exact = effective_number_weights(torch.tensor([1e6, 1e7, 1.0], dtype=torch.float64), 0.9999999)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=0)


def test_equal_classes_leave_the_cross_entropy():
    plain = F.cross_entropy(SCORES, TRUE, reduction="none")
    weights = effective_number_weights(torch.full((4,), 17.0).double(), 0.999)
    torch.testing.assert_close(class_balanced_loss(SCORES, LABELS, weights), plain)
    torch.testing.assert_close(
        logit_adjusted_loss(SCORES, LABELS, torch.full((4,), 17.0).double()), plain
    )


def test_focal_factor_has_a_finite_gradient_where_the_label_is_certain():
    scores = torch.tensor([[500.0, 0.0]], requires_grad=True)
    loss = class_balanced_loss(scores, torch.tensor([[1.0, 0.0]]), torch.ones(2), 0.5).sum()
    assert torch.isfinite(torch.autograd.grad(loss, scores)[0]).all()


def test_best_logits_decide_as_the_balanced_error_wants():
    """On a population p(x, y) the minimizer models p(x | y): its argmax is the balanced Bayes."""
    likelihood = torch.tensor([[0.5, 0.3], [0.3, 0.3], [0.2, 0.4]], dtype=torch.float64)
    prior = torch.tensor([0.9, 0.1], dtype=torch.float64)
    joint = likelihood * prior
    logits = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        losses = logit_adjusted_loss(logits, joint / joint.sum(1, keepdim=True), prior * 1000)
        loss = (joint.sum(1) * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach()[:, 1] - logits.detach()[:, 0]
    expected = (likelihood[:, 1] / likelihood[:, 0]).log()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_margin_is_the_fourth_root_and_largest_for_the_rarest():
    margins = class_margins(torch.tensor([16.0, 1.0, 81.0]), 0.6)
    torch.testing.assert_close(margins, torch.tensor([0.3, 0.6, 0.2]))


def test_weights_come_in_with_their_epoch_and_keep_the_size_of_the_loss():
    counts = [10.0, 40.0, 2.0, 5.0]
    seen = []

    class Watched(LabelDistributionAwareMargin):
        def losses(self, step, logits, distribution):
            found = super().losses(step, logits, distribution)
            margins = class_margins(self.counts(logits), self.max_margin)
            plain = label_distribution_aware_margin(logits, distribution, margins, self.scale)
            seen.append((step.epoch, (found / plain).detach(), distribution.argmax(1)))
            return found

    fit([Watched(class_counts=counts, scale=1.0, reweight_from=1, beta=0.9)], max_epochs=2)
    assert all((ratio - 1).abs().max() < 1e-6 for epoch, ratio, _ in seen if epoch == 0)
    late = [(ratio, labels) for epoch, ratio, labels in seen if epoch == 1]
    by_class = torch.stack(
        [torch.cat([r[y == c] for r, y in late]).mean() for c in range(4)]
    ).double()
    share = torch.tensor(counts).double() / sum(counts)
    assert float((share * by_class).sum()) == pytest.approx(1.0, abs=1e-5)
    effective = (1 - 0.9 ** torch.tensor(counts).double()) / 0.1
    expected = (1 / effective) / (1 / effective)[0]
    torch.testing.assert_close(by_class / by_class[0], expected, rtol=1e-4, atol=0)


def test_other_numbers_of_classes_are_named():
    with pytest.raises(RegularizationError, match="told of 3 classes, and the logits have 4"):
        fit([LogitAdjustedLoss(class_counts=[3, 2, 1])], max_steps=1)
