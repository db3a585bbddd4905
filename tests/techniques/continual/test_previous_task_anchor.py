"""One task after the other, with the pull between them."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, UnsupportedError
from lightning_reg.techniques.continual.previous_task_anchor import (
    PreviousTaskAnchor,
    previous_task_anchor,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import Host, fit, trainer, weights


def test_function_is_the_weighted_square_with_gradient_two_o_d():
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([0.5, 1.0], dtype=torch.float64)
    o = torch.tensor([2.0, 3.0], dtype=torch.float64)
    value = previous_task_anchor(w, r, o)
    (gradient,) = torch.autograd.grad(value, w)
    assert value.item() == 2 * 0.25 + 3 * 9
    assert gradient.tolist() == [2 * 2 * 0.5, 2 * 3 * -3.0]
    assert previous_task_anchor(w, r).item() == 0.25 + 9


def test_uniform_importance_equals_a_fisher_information_of_one():
    ones = torch.ones(3)
    w, r = torch.randn(3), torch.randn(3)
    assert previous_task_anchor(w, r) == previous_task_anchor(w, r, ones)


# ---------------------------------------------------------------------- tasks


def test_first_task_is_pulled_to_its_start_unless_told_otherwise():
    start = Host()
    pulled = PreviousTaskAnchor(0.5, parameters="net")
    free = PreviousTaskAnchor(0.5, parameters="net", from_start=False)
    assert not torch.equal(weights(fit([pulled])[0]), weights(fit()[0]))
    assert torch.equal(weights(fit([free])[0]), weights(fit()[0]))
    assert pulled.references_taken == 2
    assert free.references_taken == 1
    assert not torch.equal(pulled.reference["net.0.weight"], start.net[0].weight)


@pytest.mark.parametrize("same_instance", [True, False])
def test_second_task_is_pulled_to_the_end_of_the_first(same_instance):
    technique = PreviousTaskAnchor(2.0, parameters="net", from_start=False)
    module, _ = fit([technique], max_epochs=1)
    end = weights(module)
    if not same_instance:
        after = PreviousTaskAnchor(2.0, parameters="net", from_start=False)
        after.load_state_dict(technique.state_dict())
        technique = after
    plain = fit([], copy.deepcopy(module), max_epochs=3)[0]
    pulled = fit([technique], copy.deepcopy(module), max_epochs=3)[0]
    assert (weights(pulled) - end).norm() < 0.8 * (weights(plain) - end).norm()


def test_a_task_that_fails_leaves_the_reference_as_it_was():
    class Failing(Host):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                raise RuntimeError("no")
            return super().training_step(batch, batch_idx)

    technique = PreviousTaskAnchor(0.5, from_start=False, parameters="net")
    with pytest.raises(RuntimeError, match="no"):
        fit([technique], Failing())
    assert technique.references_taken == 0


def test_classifiers_are_left_out():
    module = Host()
    module.head, module.fc1 = nn.Linear(2, 2), nn.Linear(2, 2)
    module.encoder = nn.ModuleDict({"classifier": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    chosen = PreviousTaskAnchor().selection.select(module)
    assert {"fc1.weight", "fc1.bias", "encoder.norm.weight", "net.0.bias"} <= chosen.keys()
    assert not [n for n in chosen if "head" in n or "classifier" in n]


def two_moons_of_digits(classes):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    kept = np.isin(y, classes)
    x = torch.tensor(x[kept] / 16, dtype=torch.float32)
    return x, torch.tensor(y[kept] % 2, dtype=torch.long)


class Digits(L.LightningModule):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def forgetting(technique, seed):
    """How much accuracy on task one is lost by training on task two; domain-incremental digits."""
    tasks = [two_moons_of_digits([0, 1]), two_moons_of_digits([2, 3])]
    module = Digits(seed)
    accuracies = []
    for x, y in tasks:
        data = DataLoader(TensorDataset(x, y), batch_size=60)
        trainer([technique] if technique else [], max_epochs=8).fit(module, data)
        first_x, first_y = tasks[0]
        accuracies.append((module(first_x).argmax(1) == first_y).float().mean().item())
    return accuracies[0] - accuracies[1]


def test_it_forgets_less_than_fine_tuning_in_every_seed():
    for seed in range(2):
        plain = forgetting(None, seed)
        uniform = forgetting(PreviousTaskAnchor(0.3, parameters="net", from_start=False), seed)
        assert uniform < 0.5 * plain, (uniform, plain)
        fisher = PreviousTaskAnchor(300.0, importance="fisher", parameters="net")
        lost = forgetting(fisher, seed)
        assert lost < 0.5 * plain, (lost, plain)


# ---------------------------------------------------------------------- Fisher information


X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 2, (12,), generator=torch.Generator().manual_seed(1))


class Logistic(L.LightningModule):
    """Logits (0, w x), at learning rate 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def training_step(self, batch, batch_idx):
        z = self.drop(batch[0]) @ self.w
        logits = torch.stack([torch.zeros_like(z), z], 1)
        loss = F.cross_entropy(logits, batch[1])
        self.log("loss", loss)
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def logistic_fisher(rows):
    """mean_n (sigma(w x_n) - y_n)^2 x_n^2, by hand."""
    x, y = X[rows].numpy(), Y[rows].numpy()
    p = 1 / (1 + np.exp(-x @ np.array([0.3, -1.0, 0.5])))
    return ((p - y)[:, None] ** 2 * x**2).mean(0)


def measured(technique, share=slice(None), batch_size=5, run=trainer, **settings):
    module = Logistic()
    data = DataLoader(TensorDataset(X[share], Y[share]), batch_size=batch_size)
    run(callbacks=[technique], max_epochs=1, **settings).fit(module, data)
    return technique.importance["w"].numpy()


def make(**kwargs):
    return PreviousTaskAnchor(1.0, importance="fisher", parameters="w", **kwargs)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_fisher_information_squares_the_gradient_of_each_sample(batch_size):
    # In evaluation mode: with the dropout on, it would be random and larger.
    expected = logistic_fisher(slice(None))
    np.testing.assert_allclose(measured(make(), batch_size=batch_size), expected, rtol=1e-10)


def test_fisher_information_can_take_part_of_the_samples():
    expected = logistic_fisher(slice(0, 7))
    np.testing.assert_allclose(measured(make(fisher_samples=7)), expected, rtol=1e-10)


def test_fisher_information_adds_up_over_tasks():
    technique = make()
    measured(technique, slice(0, 6))
    got = measured(technique, slice(6, 12))
    expected = logistic_fisher(slice(0, 6)) + logistic_fisher(slice(6, 12))
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_taking_it_leaves_modes_random_numbers_and_gradients_alone():
    class Seeing(L.Callback):
        def on_train_end(self, trainer, pl_module):
            self.seen.append(torch.get_rng_state())
            self.seen.append((pl_module.training, pl_module.drop.training, pl_module.w.grad))

    before, after = Seeing(), Seeing()
    before.seen, after.seen = [], []
    data = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    trainer([before, make(), after], max_epochs=1).fit(Logistic(), data)
    assert torch.equal(before.seen[0], after.seen[0])
    assert before.seen[1] == after.seen[1]


def fisher_on_rank():
    share = (slice(0, 3), slice(3, 12))[torch.distributed.get_rank()]
    return measured(make(), share, batch_size=9, run=rank_trainer, use_distributed_sampler=False)


def test_fisher_information_of_two_unequal_ranks_is_the_joint_one(ranks):
    first, second = ranks.run(fisher_on_rank)
    np.testing.assert_allclose(first, logistic_fisher(slice(None)), rtol=1e-10)
    assert (first == second).all()


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments", [{"strength": -1.0}, {"importance": "ewc"}, {"fisher_samples": 0}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=r"PreviousTaskAnchor.*Try: "):
        PreviousTaskAnchor(**arguments)


def test_fisher_information_is_refused_under_manual_optimization():
    module = Logistic()
    module.automatic_optimization = False
    with pytest.raises(UnsupportedError, match="uniform"):
        trainer([make()]).fit(module, DataLoader(TensorDataset(X, Y)))
