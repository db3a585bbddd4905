"""Which past a prediction is compared with, by how much, and that no past is no change."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from lightning_reg.engine import ArgumentError, IndexedDataset, RegularizationError
from lightning_reg.techniques.sharpness.mesa import MESA, mesa_divergence
from lightning_reg.techniques.sharpness.saf import SAF, trajectory_loss
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, fit, trainer, weights

LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.2, 0.1, -0.3, 0.4]], dtype=torch.float64)
PAST = torch.tensor([[0.5, 1.0, -0.5, 2.0], [1.2, 0.0, 0.3, -0.4]], dtype=torch.float64)


@pytest.mark.parametrize("function", [trajectory_loss, mesa_divergence])
def test_equals_the_official_value_and_gradient(function):
    # AngusDujw/SAF@6e85600, SAF_train.py line 736 and MESA_train.py line 730, T = 5.
    z = LOGITS.clone().requires_grad_()
    value = function(z, PAST, 5.0).mean()
    value.backward()
    assert float(value.detach()) == pytest.approx(0.7478359336382974, rel=1e-12)
    official = [0.04867253830404329, -0.29873861315387856, 0.0944101131425337, 0.15565596170730106]
    torch.testing.assert_close(z.grad[0], torch.tensor(official, dtype=torch.float64))


def test_gradient_is_the_difference_of_tempered_predictions():
    z = LOGITS.clone().requires_grad_()
    trajectory_loss(z, PAST, 3.0).sum().backward()
    expected = 3 * ((LOGITS / 3).softmax(1) - (PAST / 3).softmax(1))
    torch.testing.assert_close(z.grad, expected)


def test_present_that_is_the_past_costs_nothing():
    z = LOGITS.clone().requires_grad_()
    value = trajectory_loss(z, LOGITS, 2.0)
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(z.grad, torch.zeros_like(z))
    assert not trajectory_loss(LOGITS, PAST.clone().requires_grad_()).requires_grad


def test_masked_classes_are_no_nan():
    masked = torch.tensor([[0.0, 1.0, -math.inf]])
    assert torch.equal(trajectory_loss(masked, masked), torch.zeros(1))


# ---------------------------------------------------------------------- which past


def indexed(count=64, **settings):
    data = IndexedDataset(TensorDataset(INPUTS[:count], LABELS[:count]))
    return DataLoader(data, **{"batch_size": 16, **settings})


def train(callbacks, epochs=4, data=None, module=None, **settings):
    module, run = module or Host(), trainer(callbacks, max_epochs=epochs, **settings)
    run.fit(module, indexed() if data is None else data)
    return module, run


class Watches(SAF):
    """Keeps each sample's logits by epoch, and what it was compared with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.now, self.past, self.known = {}, {}, {}

    def recall_past(self, step, width):
        rows, known = super().recall_past(step, width)
        for i, index in enumerate(step.sample_index.tolist()):
            self.now[step.epoch, index] = step.logits[i].detach()
            self.past[step.epoch, index] = rows[i]
            self.known[step.epoch, index] = bool(known[i])
        return rows, known


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_past_is_that_of_so_many_epochs_ago(lag):
    technique = Watches(1.0, lag=lag, start=0)
    train([technique], epochs=6, data=indexed(shuffle=True))
    for epoch, index in technique.now:
        assert technique.known[epoch, index] == (epoch >= lag)
        if epoch >= lag:
            assert torch.equal(technique.past[epoch, index], technique.now[epoch - lag, index])


def test_sample_left_out_of_an_epoch_has_no_past_of_another():
    technique = Watches(1.0, lag=1, start=0)
    # 64 samples in batches of 24: each epoch leaves 16 out, other ones.
    train([technique], epochs=6, data=indexed(batch_size=24, shuffle=True, drop_last=True))
    for epoch, index in technique.now:
        assert technique.known[epoch, index] == ((epoch - 1, index) in technique.now)
    assert not all(technique.known[key] for key in technique.known if key[0] > 0)


def test_nothing_changes_before_the_start_or_without_a_past():
    plain, _ = train([], epochs=2, data=DataLoader(TensorDataset(INPUTS, LABELS), batch_size=16))
    late, run = train([SAF(5.0, lag=1, start=2)], epochs=2)
    assert torch.equal(weights(late), weights(plain))
    assert "reg/saf" not in run.callback_metrics
    young, run = train([SAF(5.0, lag=2, start=0)], epochs=2)
    torch.testing.assert_close(weights(young), weights(plain))
    assert float(run.callback_metrics["reg/saf"]) == pytest.approx(0.0, abs=1e-7)
    old, _ = train([SAF(5.0, lag=1, start=1)], epochs=2)
    assert (weights(old) - weights(plain)).abs().max() > 1e-3


def test_one_epoch_later_the_step_is_the_formula():
    technique = SAF(2.0, temperature=3.0, lag=1, start=1)
    module, _ = train([technique], epochs=2, data=indexed(64, batch_size=64))
    other = Host()
    optimizer = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    past = None
    for _ in range(2):
        logits = other(INPUTS)
        loss = F.cross_entropy(logits, LABELS)
        if past is not None:
            p, q = (past / 3).softmax(1), (logits / 3).softmax(1)
            loss = loss + 2 * 9 * (p * (p / q).log()).sum(1).mean()
        past = logits.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(other), rtol=0, atol=1e-6)


def test_second_pass_is_compared_with_the_same_past():
    plain, _ = train([SAF(2.0, lag=1, start=0)], epochs=3)
    ours, _ = train([SAF(2.0, lag=1, start=0), Ascent(0.0)], epochs=3)
    assert torch.equal(weights(plain), weights(ours))
    up, _ = train([SAF(2.0, lag=1, start=0), Ascent(0.1)], epochs=3)
    assert torch.isfinite(weights(up)).all()


def test_a_second_fit_starts_without_a_past():
    technique = SAF(3.0, lag=1, start=0)
    first, _ = train([technique], epochs=3)
    again, _ = train([technique], epochs=3)
    assert torch.equal(weights(first), weights(again))


def tables(distributed):
    data = IndexedDataset(TensorDataset(INPUTS[:60], LABELS[:60]))
    technique = SAF(1.0, lag=1, start=0)
    if distributed:
        sampler = DistributedSampler(data, shuffle=False)
        loader = DataLoader(data, batch_size=10, sampler=sampler)
        run = rank_trainer(callbacks=[technique], max_epochs=3, use_distributed_sampler=False)
    else:
        loader = DataLoader(data, batch_size=20)
        run = trainer([technique], max_epochs=3)
    run.fit(Host(), loader)
    return [table.state_dict()["table"] for table in technique.tables]


def test_tables_of_two_ranks_are_those_of_one_process(ranks):
    one, other = ranks.run(tables, True)
    for mine, theirs, alone in zip(one, other, tables(False), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, alone, rtol=0, atol=1e-5)


def test_subset_of_an_indexed_dataset_keeps_its_positions():
    data = Subset(IndexedDataset(TensorDataset(INPUTS, LABELS)), range(0, 64, 2))
    module, _ = train([SAF(1.0, lag=1, start=0)], data=DataLoader(data, batch_size=8))
    assert torch.isfinite(weights(module)).all()


def test_logits_of_tokens_are_refused():
    class Tokens(Host):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return {"loss": logits.mean(), "logits": logits[:, None].expand(-1, 3, -1)}

    with pytest.raises(RegularizationError, match=r"SAF: keeps one prediction per sample"):
        train([SAF(1.0, start=0)], module=Tokens())


@pytest.mark.parametrize(
    "arguments",
    [
        {"strength": -1.0},
        {"temperature": 0.0},
        {"lag": 0},
        {"lag": 1.5},
        {"start": -1},
        {"num_classes": 0},
    ],
)
def test_bad_arguments_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match=r"SAF: .*Try: SAF\("):
        SAF(**arguments)


# ---------------------------------------------------------------------- MESA


def test_mesa_follows_averaged_weights():
    module, _ = fit([MESA(2.0, decay=0.6, temperature=3.0, start=1)], batch_size=64, max_epochs=4)
    other, average = Host(), Host()
    optimizer = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    for epoch in range(4):
        logits = other(INPUTS)
        loss = F.cross_entropy(logits, LABELS)
        if epoch >= 1:
            with torch.no_grad():
                p = (average(INPUTS) / 3).softmax(1)
            q = (logits / 3).softmax(1)
            loss = loss + 2 * 9 * (p * (p / q).log()).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for a, w in zip(average.parameters(), other.parameters(), strict=True):
                a.mul_(0.6).add_(w, alpha=0.4)
    torch.testing.assert_close(weights(module), weights(other), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "arguments", [{"strength": -1.0}, {"temperature": 0.0}, {"decay": 1.1}, {"start": 0.5}]
)
def test_bad_arguments_of_mesa_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match=r"MESA: .*Try: MESA\("):
        MESA(**arguments)
