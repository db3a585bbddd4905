"""The targets, their use, the official values, and what it does to wrong labels."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_reg.engine import ArgumentError, IndexedDataset, RegularizationError
from lightning_reg.techniques.noisy_labels.early_learning import EarlyLearning, early_learning
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, trainer, weights

SCORES = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.2, 0.1, -0.3, 0.4], [-1.0, 2.5, 0.0, 1.5]])
TARGETS = torch.tensor([3, 0, 2])


def test_gradient_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64, generator=generator).requires_grad_()
    t = 0.8 * torch.randn(6, 5, dtype=torch.float64, generator=generator).softmax(1)
    (grad,) = torch.autograd.grad(early_learning(z, t).sum(), z)
    p = z.detach().softmax(1)
    agreement = (p * t).sum(1, keepdim=True)
    # p_j / (1 - <p, t>) * sum_k (t_k - t_j) p_k
    torch.testing.assert_close(grad, p * (agreement - t) / (1 - agreement))


def test_the_class_of_the_target_is_boosted():
    z = torch.zeros(1, 3, requires_grad=True)
    early_learning(z, torch.tensor([[0.9, 0.0, 0.0]])).sum().backward()
    # A step against the gradient raises class 0 and lowers the others.
    assert z.grad[0, 0] < 0 < z.grad[0, 1]


def test_is_finite_where_prediction_and_target_are_sure():
    z = torch.tensor([[200.0, 0.0]], requires_grad=True)
    value = early_learning(z, torch.tensor([[1.0, 0.0]]))
    value.sum().backward()
    assert value.item() == pytest.approx(np.log(1e-4), rel=1e-3)
    assert torch.equal(z.grad, torch.zeros_like(z))


# shengliu66/ELR@934af53 ELR/model/loss.py with lambda 3 and beta 0.7, on SCORES, then on twice
# SCORES: the loss, the first row of its gradient, the first row of the targets.
OFFICIAL = (
    (
        0.98811358,
        [0.06078329, 0.00324447, 0.03796792, -0.10199569],
        [0.03316613, 0.00165124, 0.02011627, 0.24506639],
    ),
    (
        0.93728757,
        [0.03968877, 0.00010301, 0.01490188, -0.05469388],
        [0.02857615, 0.00118587, 0.01605317, 0.46418482],
    ),
)


class Fixed(Host):
    """Logits that are the first parameters, visited twice: as they are and doubled."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(SCORES.clone())
        self.gradients = []

    def training_step(self, batch, batch_idx):
        factor = 1 + self.trainer.current_epoch
        logits = factor * self.scores
        logits.register_hook(lambda gradient: self.gradients.append(factor * gradient))
        return {"loss": F.cross_entropy(logits, TARGETS), "logits": logits}

    def configure_optimizers(self):
        return torch.optim.SGD([self.scores], 0.0)


def test_equals_the_official_code_over_two_visits():
    technique, module, losses = EarlyLearning(3.0, beta=0.7), Fixed(), []
    tables = []
    data = DataLoader(IndexedDataset(TensorDataset(INPUTS[:3], LABELS[:3])), batch_size=3)
    run = trainer([technique, _Keeper(technique, losses, tables)], max_epochs=2)
    run.fit(module, data)
    for visit, (loss, gradient, target) in enumerate(OFFICIAL):
        assert losses[visit] == pytest.approx(loss, abs=1e-6)
        np.testing.assert_allclose(module.gradients[visit][0].numpy(), gradient, atol=1e-6)
        np.testing.assert_allclose(tables[visit][0].numpy(), target, atol=1e-6)


class _Keeper(L.Callback):
    def __init__(self, technique, losses, tables):
        self.technique, self.losses, self.tables = technique, losses, tables

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.tables.append(self.technique.memory.memory.table.clone())


def indexed(**settings):
    data = TensorDataset(INPUTS[:31], LABELS[:31])
    return DataLoader(IndexedDataset(data), **{"batch_size": 8, **settings})


def test_targets_become_the_predictions_of_a_model_that_stays():
    technique = EarlyLearning(3.0, beta=0.7)
    trainer([technique], max_epochs=40).fit(Host(lr=0.0), indexed())
    p = Host()(INPUTS[:31]).softmax(1).detach()
    torch.testing.assert_close(technique.memory.memory.table, p, rtol=0, atol=1e-5)


def test_targets_move_once_in_two_passes():
    alone, beside = EarlyLearning(), EarlyLearning()
    trainer([alone], max_epochs=2).fit(Host(lr=0.0), indexed())
    trainer([beside, Ascent(0.05)], max_epochs=2).fit(Host(lr=0.0), indexed())
    torch.testing.assert_close(beside.memory.memory.table, alone.memory.memory.table)


def test_logits_of_tokens_are_refused():
    class Tagger(Host):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            return {"loss": loss, "logits": logits.unsqueeze(1)}

    with pytest.raises(RegularizationError, match=r"EarlyLearning.*\(B, C\)"):
        trainer([EarlyLearning()], max_epochs=1).fit(Tagger(), indexed())


def test_num_classes_that_do_not_fit_are_named():
    with pytest.raises(RegularizationError, match=r"EarlyLearning\(num_classes=4\)"):
        trainer([EarlyLearning(num_classes=10)], max_epochs=1).fit(Host(), indexed())


@pytest.mark.parametrize("arguments", [{"beta": 1.0}, {"strength": -3.0}, {"num_classes": 0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="EarlyLearning"):
        EarlyLearning(**arguments)


# ---------------------------------------------------------------------- ranks


def train_shuffled(distributed, lr, epochs):
    technique = EarlyLearning(3.0, num_classes=4)
    settings = {"callbacks": [technique], "max_epochs": epochs}
    run = rank_trainer(**settings) if distributed else trainer(**settings)
    module = Host(lr=lr)
    run.fit(module, indexed(batch_size=4 if distributed else 8, shuffle=True))
    memory = technique.memory.memory
    return memory.table, memory.seen, weights(module)


def test_table_of_two_ranks_is_that_of_one_process(ranks):
    # 31 samples on two ranks: one is repeated to fill up, and shuffling moves all of them.
    (first, seen, _), (second, _, _) = ranks.run(train_shuffled, True, 0.0, 3)
    alone, _, _ = train_shuffled(False, 0.0, 3)
    p = Host()(INPUTS[:31]).softmax(1).detach()
    assert torch.equal(first, second)
    assert seen.all()
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-6)
    # After three visits each: (1 - beta^3) p, neither lost nor counted twice.
    torch.testing.assert_close(first, (1 - 0.7**3) * p, rtol=0, atol=1e-6)


def test_replicas_that_learn_agree_in_weights_and_table(ranks):
    (table, seen, one), (other_table, _, other) = ranks.run(train_shuffled, True, 0.1, 3)
    assert seen.all()
    assert torch.equal(table, other_table)
    assert torch.equal(one, other)


def train_joint(distributed):
    technique = EarlyLearning(3.0)
    settings = {"callbacks": [technique], "max_epochs": 3}
    run = rank_trainer(**settings) if distributed else trainer(**settings)
    module, data = Host(), IndexedDataset(TensorDataset(INPUTS[:32], LABELS[:32]))
    # The Trainer's own sampler would shuffle.
    sampler = DistributedSampler(data, shuffle=False) if distributed else None
    run.fit(module, DataLoader(data, batch_size=4 if distributed else 8, sampler=sampler))
    return technique.memory.memory.table, weights(module)


def test_two_ranks_with_joint_batches_train_as_one_process(ranks):
    (table, trained), _ = ranks.run(train_joint, True)
    joint_table, joint = train_joint(False)
    torch.testing.assert_close(trained, joint, rtol=0, atol=1e-5)
    torch.testing.assert_close(table, joint_table, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- the paper's claim


def memorized(callbacks, seed):
    """The share of wrong labels that the model reproduces, and its accuracy on clean ones."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.arange(200) % 4
    x = 3.0 * F.one_hot(clean, 4) + torch.randn(200, 4, generator=generator)
    x = torch.cat([x, torch.randn(200, 30, generator=generator)], 1)
    wrong = torch.rand(200, generator=generator) < 0.4
    other = clean + 1 + torch.randint(0, 3, (200,), generator=generator)
    noisy = torch.where(wrong, other % 4, clean)
    data = TensorDataset(x, noisy)

    module = Host(lr=0.04)
    module.net = nn.Sequential(nn.Linear(34, 64), nn.ReLU(), nn.Linear(64, 4))
    data = IndexedDataset(data) if callbacks else data
    trainer(callbacks, max_epochs=60).fit(module, DataLoader(data, batch_size=100))
    with torch.no_grad():
        said = module(x).argmax(1)
    return (said == noisy)[wrong].float().mean().item(), (said == clean).float().mean().item()


def test_wrong_labels_are_memorized_less():
    with_it = [memorized([EarlyLearning(3.0, beta=0.7)], seed) for seed in range(2)]
    without = [memorized([], seed) for seed in range(2)]
    # 40 % of the labels are wrong; a network of this size fits all of them.
    assert max(fit for fit, _ in with_it) < 0.5 < 0.95 < min(fit for fit, _ in without)
    assert min(right for _, right in with_it) > max(right for _, right in without)


def test_no_gradient_passes_through_the_targets():
    logits = torch.zeros(2, 3, requires_grad=True)
    targets = torch.full((2, 3), 0.2, requires_grad=True)
    early_learning(logits, targets).sum().backward()
    assert logits.grad is not None
    assert targets.grad is None
