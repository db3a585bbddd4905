"""Where a teacher comes from, when it moves, and that nobody but the technique knows of it."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, RegularizationError, UnsupportedError
from lightning_reg.mechanisms.teacher import FrozenNetwork, Teacher
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, fit, loader, trainer, weights


class Follow(Teacher):
    """The squared distance to the teacher's logits; keeps what the teacher said."""

    def __init__(self, strength=0.1, **settings):
        super().__init__(strength, **settings)
        self.said = []

    def penalty(self, step):
        if self.teacher is None:
            return None
        self.said.append(self.predict(step))
        return step.comm.mean((step.logits - self.said[-1]).square().mean(1))


class Trace(L.Callback):
    """The student's weights after each batch and at each start of an epoch."""

    def __init__(self):
        self.after, self.starts = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts.append(weights(pl_module).clone())

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after.append(weights(pl_module).clone())


def average(start, trace, decay):
    for now in trace:
        start = decay * start + (1 - decay) * now
    return start


def test_average_is_the_closed_form():
    technique, trace = Follow(source="ema", decay=0.9), Trace()
    fit([technique, trace], max_epochs=2)
    expected = average(weights(Host()), trace.after, 0.9)
    torch.testing.assert_close(weights(technique.teacher.network), expected, rtol=0, atol=1e-6)


def test_average_moves_once_per_optimizer_step():
    technique, trace = Follow(source="ema", decay=0.5), Trace()
    fit([technique, trace], max_epochs=1, accumulate_grad_batches=2)
    expected = average(weights(Host()), trace.after[1::2], 0.5)
    torch.testing.assert_close(weights(technique.teacher.network), expected, rtol=0, atol=1e-6)


def test_past_is_the_module_at_the_start_of_the_epoch():
    technique, trace = Follow(source="past"), Trace()
    module, _ = fit([technique, trace], max_epochs=3)
    # The first epoch has no past; then four batches each.
    assert len(technique.said) == 8
    torch.testing.assert_close(weights(technique.teacher.network), trace.starts[2], rtol=0, atol=0)
    assert not torch.equal(weights(module), trace.starts[2])


def test_past_is_taken_once_an_epoch():
    # As after a resume inside an epoch, whose start has been saved.
    technique = Follow(source="past")
    _, run = fit([technique], max_epochs=3)
    before = weights(technique.teacher.network).clone()
    run.fit_loop.epoch_progress.current.completed = technique._taken_at
    run.fit_loop.epoch_progress.current.processed = technique._taken_at
    assert run.current_epoch == 2
    technique.on_train_epoch_start(run, Host())
    assert torch.equal(weights(technique.teacher.network), before)


def test_a_network_is_frozen_before_its_first_answer():
    network = FrozenNetwork(nn.Sequential(nn.Linear(2, 2), nn.Dropout())).network
    assert not network[1].training
    assert not network[0].weight.requires_grad


def test_reference_stays():
    technique = Follow(source="reference")
    fit([technique], max_epochs=2)
    assert torch.equal(weights(technique.teacher.network), weights(Host()))
    torch.testing.assert_close(technique.said[4], Host()(INPUTS[:16]).detach())


def test_random_teacher_has_weights_of_its_own_and_the_same_in_every_run():
    one, other = Follow(source="random"), Follow(source="random", name="other")
    fit([one, other], max_epochs=1)
    drawn = weights(one.teacher.network)
    assert not torch.equal(drawn, weights(Host()))
    assert not torch.equal(drawn, weights(other.teacher.network))
    again = Follow(source="random")
    fit([again], max_epochs=1)
    assert torch.equal(drawn, weights(again.teacher.network))


def test_random_teacher_draws_nothing_from_the_global_generator():
    with_it, without = (Host(dropout=0.5) for _ in range(2))
    torch.manual_seed(1)
    fit([Follow(1e-30, source="random")], module=with_it)
    torch.manual_seed(1)
    fit([], module=without)
    assert torch.equal(weights(with_it), weights(without))


def test_teacher_is_in_eval_mode_and_not_trained():
    technique = Follow(source="reference")
    module = Host(batch_norm=True, dropout=0.5)
    fit([technique], module=module, max_epochs=1)
    network = technique.teacher.network
    assert not any(part.training for part in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(said.requires_grad for said in technique.said)
    # Eval-mode BatchNorm with the statistics of the start, and no dropout.
    still = Host(batch_norm=True).eval()
    torch.testing.assert_close(technique.said[3], still(INPUTS[48:]).detach())


def test_module_does_not_notice():
    technique = Follow(source="ema")
    module, run = fit([technique], max_epochs=1)
    assert len(list(module.parameters())) == len(list(Host().parameters()))
    assert module.state_dict().keys() == Host().state_dict().keys()
    assert sum(len(g["params"]) for g in run.optimizers[0].param_groups) == 4


def test_buffers_are_those_of_the_module():
    technique = Follow(source="ema", decay=0.9)
    module, _ = fit([technique], module=Host(batch_norm=True), max_epochs=1)
    student, teacher = module.net[1], technique.teacher.network.net[1]
    assert torch.equal(student.running_mean, teacher.running_mean)
    assert teacher.num_batches_tracked == 4


def test_weights_that_are_not_finite_are_not_taken():
    frozen, student = FrozenNetwork(nn.Linear(2, 2)), nn.Linear(2, 2)
    before = weights(frozen.network)
    with torch.no_grad():
        student.weight[0, 0] = float("nan")

    class Alone:
        world_size = 1

    for share in (1.0, 0.1):
        frozen.follow(student, share, Alone())
        assert torch.equal(frozen.network.weight.flatten(), before[:4])
    assert torch.equal(weights(frozen.network).isfinite(), torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("source", ["ema", "past", "reference", "random"])
def test_resume_inside_an_epoch_keeps_the_teacher(source, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "six.ckpt")

    whole, again = Follow(source=source, decay=0.8), Follow(source=source, decay=0.8)
    first, _ = fit([whole, Save()], max_epochs=2)
    second, run = Host(), trainer([again], max_epochs=2)
    # A plain loader starts the epoch again: give it what is left.
    rest = DataLoader(TensorDataset(INPUTS[32:], LABELS[32:]), batch_size=16)
    both = _Rest(rest)
    run.fit(second, both, ckpt_path=tmp_path / "six.ckpt", weights_only=True)
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(weights(whole.teacher.network), weights(again.teacher.network))


class _Rest:
    """A loader of four batches that begins with the third, as a stateful one would."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return 4

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_fit_from_step_zero_takes_a_new_reference():
    technique = Follow(source="reference")
    fit([technique], max_epochs=1)
    other = Host()
    with torch.no_grad():
        other.net[0].bias += 1.0
    start = weights(other)
    fit([technique], module=other, max_epochs=1)
    assert torch.equal(weights(technique.teacher.network), start)


def test_module_without_forward_is_refused():
    class NoForward(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 4)

        def training_step(self, batch):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(UnsupportedError, match=r"Follow.*no `forward`.*Try: def forward"):
        fit([Follow()], module=NoForward())


def test_logits_that_are_not_those_of_forward_are_refused():
    class Other(Host):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            loss = nn.functional.cross_entropy(logits, batch[1])
            return {"loss": loss, "logits": logits[:, :3]}

    with pytest.raises(RegularizationError, match=r"Follow.*\(16, 4\).*\(16, 3\)"):
        fit([Follow()], module=Other())


@pytest.mark.parametrize("arguments", [{"source": "future"}, {"decay": 1.1}, {"decay": -0.1}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="Follow"):
        Follow(**arguments)


# ---------------------------------------------------------------------- ranks


def train_on_ranks(source):
    technique = Follow(source=source, decay=0.9)
    run = rank_trainer(callbacks=[technique], max_epochs=2)
    run.fit(Host(batch_norm=True), loader(batch_size=8))
    return {k: v.numpy().copy() for k, v in technique.state_dict()["teacher"].items()}


@pytest.mark.parametrize("source", ["ema", "past", "random"])
def test_teachers_are_equal_on_all_ranks_buffers_included(source, ranks):
    first, second = ranks.run(train_on_ranks, source)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value == second[name]).all(), name
    if source != "random":
        assert first["net.1.num_batches_tracked"] > 0
