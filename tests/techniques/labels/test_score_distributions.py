"""Scores as distributions over levels: official labels, exact means, and pairwise fidelity."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lightning_reg import Mixup, ScoreDistributionSoftLabel, ThurstoneFidelityLoss
from lightning_reg.engine import MissingSignalError, RegularizationError
from lightning_reg.functional import score_distribution_soft_label, thurstone_fidelity_loss
from lightning_reg.techniques.labels.thurstone_fidelity_loss import _fidelity, _preference
from lightning_reg.testing.host import TensorItems
from tests.engine.simple import INPUTS, Host, trainer

LEVELS = torch.arange(1.0, 6.0, dtype=torch.float64)


def soft(mean, std, *args):
    mean, std = (torch.tensor([number], dtype=torch.float64) for number in (mean, std))
    return score_distribution_soft_label(mean, std, LEVELS, *args)[0]


@pytest.mark.parametrize(
    ("mean", "std", "density", "label"),
    [
        (3.37, 0.62, "cdf", [0.000799686, 0.078726547, 0.503645296, 0.383331024, 0.033497447]),
        (2.2, 0.9, "pdf", [0.185615016, 0.459863444, 0.313157186, 0.051635234, 0.0]),
        (3.9, 0.5, "cdf", [0.0, 0.002534686, 0.209445209, 0.673589087, 0.114451909]),
        (1.05, 0.62, "cdf", [0.949999991, 0.050000009, 0.0, 0.0, 0.0]),
        (2.3, 0.1, "cdf", [0.0, 0.699999996, 0.300000004, 0.0, 0.0]),
        (4.6, 1.5, "pdf", [0.0, 0.0, 0.0, 0.400000002, 0.599999998]),
    ],
)
def test_labels_are_the_official_ones_scaled_to_one(mean, std, density, label):
    # zhiyuanyou/DeQA-Score@8e4abc8, build_soft_labels/gen_soft_label.py, by its functions.
    expected = [p / sum(label) for p in label]
    assert soft(mean, std, density).tolist() == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize("density", ["cdf", "pdf"])
def test_the_mean_of_the_label_is_that_of_the_score(density):
    mean = torch.linspace(1, 5, 81, dtype=torch.float64)
    label = score_distribution_soft_label(mean, torch.full_like(mean, 0.6), LEVELS, density)
    torch.testing.assert_close(label.sum(1), torch.ones_like(mean))
    assert (label >= 0).all()
    # By less than `max_shift` for what the cut at 0 takes off.
    assert ((label @ LEVELS - mean).abs() < 0.1).all()
    uncut = (label > 0).all(1)
    assert uncut.sum() > 10
    torch.testing.assert_close((label @ LEVELS)[uncut], mean[uncut])


def test_in_the_middle_of_the_scale_the_label_is_as_its_neighbours():
    torch.testing.assert_close(soft(3.0, 0.6), soft(3.0 + 1e-4, 0.6), atol=1e-2, rtol=0)
    assert soft(3.0, 0.6)[2] > 0.5


def test_levels_may_lie_anywhere():
    levels = torch.linspace(0, 100, 5, dtype=torch.float64)
    mean, std = torch.tensor([60.0]).double(), torch.tensor([15.0]).double()
    found = score_distribution_soft_label(mean, std, levels)[0]
    torch.testing.assert_close(found, soft(3.4, 0.6))


def test_a_score_beyond_the_last_level_is_that_level():
    assert soft(7.0, 0.5).tolist() == [0, 0, 0, 0, 1]
    assert soft(4.0, 0.0).tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("fixed", "value", "by_mean", "by_std"),
    [
        (
            False,
            0.039566130323778204,
            [0.0880180528, -0.0017256903],
            [-0.0178414969, -0.0044867947],
        ),
        (True, 0.03139062878976584, [0.0472931984, 0.0064340506], None),
    ],
)
def test_fidelity_has_the_official_value_and_gradient(fixed, value, by_mean, by_std):
    # zhiyuanyou/DeQA-Score@8e4abc8, src/model/modeling_mplug_owl2.py, rating_loss, of two pairs.
    mean = torch.tensor([3.2, 1.4], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.5, 0.9], dtype=torch.float64, requires_grad=True)
    other, other_std = torch.tensor([2.9, 4.0]).double(), torch.tensor([0.7, 0.3]).double()
    stds = [torch.ones(2).double()] * 2 if fixed else [std, other_std]
    true = [torch.tensor(v).double() for v in ([2.5, 2.0], [0.4, 0.6], [3.1, 3.5], [0.8, 0.2])]
    loss = _fidelity(_preference(mean, stds[0], other, stds[1]), _preference(*true))
    loss = loss.diagonal().mean()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert torch.autograd.grad(loss, mean, retain_graph=True)[0].tolist() == pytest.approx(
        by_mean, abs=1e-8
    )
    if by_std is not None:
        assert torch.autograd.grad(loss, std)[0].tolist() == pytest.approx(by_std, abs=1e-8)


def test_fidelity_is_zero_where_preferences_agree_and_symmetric():
    mean, std = torch.tensor([1.0, 2.5, 3.0]).double(), torch.tensor([0.5, 1.0, 0.8]).double()
    # Both only see differences, in units of the deviations.
    same = thurstone_fidelity_loss(2 * mean + 3, 2 * std, mean, std)
    # 1e-8 stands under the roots.
    assert same.abs().max() < 1e-6
    other = thurstone_fidelity_loss(mean.flip(0), std, mean, std)
    torch.testing.assert_close(other, other.T)
    assert other[0, 2] > 0.5


class Scores(Host):
    """A classifier of 4 levels on a batch of inputs, levels, scores and groups."""

    def training_step(self, batch, batch_idx):
        logits = self(batch["x"])
        return {"loss": F.cross_entropy(logits, batch["y"]), "logits": logits}


def scored(groups=(0, 1)):
    generator = torch.Generator().manual_seed(3)
    score = 1 + 3 * torch.rand(16, generator=generator)
    group = torch.tensor(groups).repeat(8)
    fields = {"x": INPUTS[:16], "y": score.round().long() - 1, "score": score, "domain": group}
    return TensorItems(tuple(fields), *fields.values()), score, group


def run(*techniques, data=None):
    data = scored()[0] if data is None else data
    training = trainer(techniques, max_epochs=1)
    training.fit(Scores(), DataLoader(data, batch_size=16))
    return training


def test_labels_of_mixed_samples_are_mixtures_of_distributions():
    seen = []

    class Seeing(ScoreDistributionSoftLabel):
        def new_targets(self, distribution, strength, step):
            found = super().new_targets(distribution, strength, step)
            seen.append((found, step.mixes[0]))
            return found

    run(Seeing(mean="batch.score", std=0.4), Mixup(per="sample"))
    _, score, _ = scored()
    single = score_distribution_soft_label(score, torch.full_like(score, 0.4), torch.arange(1.0, 5))
    found, (partner, lam) = seen[0]
    weight = lam.unsqueeze(1)
    torch.testing.assert_close(found, weight * single + (1 - weight) * single[partner])


def test_pairs_of_two_groups_do_not_count():
    data, score, group = scored()
    training = run(
        ThurstoneFidelityLoss(true_mean="batch.score", true_std=0.5, groups=True), data=data
    )
    logits = Host()(INPUTS[:16]).detach()
    p, levels = logits.softmax(1), torch.arange(1.0, 5)
    mean = p @ levels
    std = (p @ levels.square() - mean.square()).sqrt()
    phi = torch.distributions.Normal(0, 1).cdf
    total, count = 0.0, 0
    for i in range(16):
        for j in range(i):
            if group[i] != group[j]:
                continue
            q = phi((score[i] - score[j]) / math.sqrt(0.5))
            guess = phi((mean[i] - mean[j]) / (std[i] ** 2 + std[j] ** 2).sqrt())
            total += 1 - (q * guess).sqrt() - ((1 - q) * (1 - guess)).sqrt()
            count += 1
    logged = training.logged_metrics["reg/thurstone_fidelity_loss"].item()
    assert logged == pytest.approx(float(total) / count, rel=1e-4)


def test_both_samples_of_a_pair_get_their_gradient():
    class Alone(Scores):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {"loss": 0.0 * outputs["loss"], "logits": outputs["logits"]}

    data, score, _ = scored()
    module, before = Alone(), Host()
    technique = ThurstoneFidelityLoss(true_mean="batch.score", true_std=0.5, std=1.0)
    trainer([technique], max_epochs=1).fit(module, DataLoader(data, batch_size=16))
    mean = before(INPUTS[:16]).softmax(1) @ torch.arange(1.0, 5)
    ones = torch.ones(16)
    losses = thurstone_fidelity_loss(mean, ones, score, 0.5 * ones)
    loss = losses[~torch.eye(16, dtype=torch.bool)].mean()
    gradient = torch.autograd.grad(loss, before.net[0].weight)[0]
    moved = (before.net[0].weight - module.net[0].weight).detach()
    torch.testing.assert_close(moved, 0.1 * gradient, rtol=1e-3, atol=1e-7)


def test_one_column_needs_a_deviation():
    technique = ThurstoneFidelityLoss(true_mean="batch.score", true_std=0.5)

    class One(Scores):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {"loss": outputs["loss"], "logits": outputs["logits"][:, :1]}

    with pytest.raises(RegularizationError, match=r"std=1\.0"):
        trainer([technique], max_epochs=1).fit(One(), DataLoader(scored()[0], batch_size=16))


def test_a_batch_without_scores_is_refused():
    with pytest.raises(MissingSignalError, match=r"batch\.mos"):
        run(ScoreDistributionSoftLabel(mean="batch.mos", std=0.4))


def test_soft_labels_rank_better_than_levels_under_noise():
    # Rank correlation with the true score, of levels and of distributions: see the margins below.
    from scipy.stats import spearmanr

    gains = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(160, 10, generator=generator)
        weight = torch.randn(10, generator=generator)
        true = (x @ weight).argsort().argsort() / 159 * 4 + 1
        noisy = (true + 0.5 * torch.randn(160, generator=generator)).clamp(1, 5)
        levels = torch.arange(1.0, 6.0)
        labels = {
            "level": F.one_hot(noisy.round().long() - 1, 5).float(),
            "soft": score_distribution_soft_label(noisy, torch.full_like(noisy, 0.7), levels),
        }
        held = torch.randn(2000, 10, generator=generator)
        rank = {}
        for name, label in labels.items():
            torch.manual_seed(0)
            net = torch.nn.Linear(10, 5)
            optimizer = torch.optim.Adam(net.parameters(), 0.05)
            for _ in range(150):
                loss = F.cross_entropy(net(x), label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            score = net(held).softmax(1).detach() @ levels
            rank[name] = spearmanr(score, held @ weight)[0]
        gains.append(rank["soft"] - rank["level"])
    assert min(gains) > 0
    assert sum(gains) / 4 > 0.005
