"""Mann-Whitney: all pairs, a bound of the AUC, blindness to shifts, and pairs across ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from lightning_reg import MannWhitneyContrastive, MannWhitneyLoss
from lightning_reg.functional import mann_whitney_loss
from lightning_reg.techniques.contrastive import mann_whitney_loss as file
from tests.engine.simple import INPUTS, LABELS, Host, fit


def fixed(size, step=1.7):
    """Numbers that need no generator."""
    return (torch.arange(size, dtype=torch.float64) * step).sin() * 3


def plain(positives, negatives, temperature=1.0):
    margins = (negatives[None] - positives[:, None]) / temperature
    return torch.log1p(margins.exp()).mean()


def test_blocks_give_the_value_and_gradient_of_all_pairs(monkeypatch):
    monkeypatch.setattr(file, "_PAIRS_AT_ONCE", 23)
    a, b = fixed(11).requires_grad_(), fixed(7, 2.3).requires_grad_()
    found, expected = mann_whitney_loss(a, b, 0.7), plain(a, b, 0.7)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b))
    )


@pytest.mark.parametrize("step", [0.3, 1.1, 2.9])
def test_it_bounds_one_minus_the_auc(step):
    scores, labels = fixed(60, step), (fixed(60, 2.3) > 0.5).numpy()
    loss = mann_whitney_loss(scores[labels], scores[~labels])
    assert loss.item() / math.log(2) >= 1 - roc_auc_score(labels, scores)


def test_separated_scores_cost_nothing_and_equal_ones_a_coin():
    high, low = torch.full((3,), 30.0), torch.full((5,), -30.0)
    assert mann_whitney_loss(high, low).item() < 1e-20
    assert mann_whitney_loss(high, high).item() == pytest.approx(math.log(2))


def test_without_a_pair_it_is_zero():
    a = fixed(4).requires_grad_()
    value = mann_whitney_loss(a, fixed(0))
    assert value.item() == 0
    assert torch.autograd.grad(value, a)[0].tolist() == [0, 0, 0, 0]


def views(shift):
    """Similarities of 4 queries whose rows are shifted, as unnormalized embeddings."""
    similarity = fixed(16).view(4, 4) + shift[:, None]
    return similarity, torch.eye(4, dtype=torch.float64)


def test_a_constant_for_a_query_counts_here_and_not_in_info_nce():
    technique = MannWhitneyContrastive(normalize=False, temperature=1.0)
    none, same = torch.zeros(4).double(), torch.full((4,), 2.5).double()
    one = torch.tensor([0.0, 3.0, 0.0, 0.0]).double()
    base = technique.value(*views(none))
    torch.testing.assert_close(technique.value(*views(same)), base)
    assert technique.value(*views(one)) > base + 0.1
    target = torch.arange(4)
    info_nce = [F.cross_entropy(views(shift)[0], target) for shift in (none, one)]
    torch.testing.assert_close(*info_nce)


class Binary(Host):
    """One output, with the labels 0, 1 and an ignored one."""

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])[:, :1]
        labels = torch.where(batch[1] == 3, -100, (batch[1] == 1).long())
        return {"loss": 0.0 * logits.sum(), "logits": logits, "targets": labels}


def test_one_output_is_the_score_itself_and_ignored_labels_have_no_pair():
    _, run = fit(
        [MannWhitneyLoss(task="multilabel")], Binary(), max_epochs=1, limit_train_batches=1
    )
    scores, y = Host()(INPUTS[:16])[:, 0].detach(), LABELS[:16]
    expected = plain(scores[y == 1].double(), scores[(y == 0) | (y == 2)].double())
    assert run.logged_metrics["reg/mann_whitney_loss"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_log_odds_of_sure_predictions_are_exact():
    logits = torch.tensor([[20.0, 0.0, 0.0], [-20.0, 0.0, 1.0]], dtype=torch.float64)
    found = file._log_odds(logits)
    rest = torch.logaddexp(logits[:, 1], logits[:, 2])
    torch.testing.assert_close(found[:, 0], logits[:, 0] - rest)


class Soft(Host):
    """Labels of 0.3, 0, 1, 0.3, 0, 1, ..."""

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])[:, :1]
        labels = torch.tensor([0.3, 0.0, 1.0] * 6)[: len(logits)].unsqueeze(1)
        return {"loss": 0.0 * logits.sum(), "logits": logits, "targets": labels}


def test_soft_labels_weight_pairs():
    _, run = fit([MannWhitneyLoss(task="multilabel")], Soft(), max_epochs=1, limit_train_batches=1)
    scores = Host()(INPUTS[:16])[:, 0].detach().double()
    y = torch.tensor([0.3, 0.0, 1.0] * 6)[:16].double()
    weights = y[:, None] * (1 - y)[None]
    margins = torch.log1p((scores[None] - scores[:, None]).exp())
    expected = (weights * margins).sum() / weights.sum()
    assert run.logged_metrics["reg/mann_whitney_loss"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )
