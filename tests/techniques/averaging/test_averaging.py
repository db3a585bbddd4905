"""Where the average is, where the weights of training are, and what becomes of BatchNorm."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, ConflictError, UnsupportedError
from lightning_reg.techniques.averaging.ema import EMA
from lightning_reg.techniques.averaging.swa import SWA
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, loader, trainer, weights


class Watched(Host):
    """Notes its weights in every kind of step."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = {"fit": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        if self.training and torch.is_grad_enabled():
            self.seen["fit"].append(weights(self))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(weights(self))

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(weights(self))

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(weights(self))


class After(L.Callback):
    """Weights after each optimizer step."""

    def __init__(self):
        self.history = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.history.append(weights(pl_module))


def train(callbacks, module=None, **settings):
    module = module or Watched()
    run = trainer(callbacks, num_sanity_val_steps=0, **settings)
    run.fit(module, loader(), loader())
    return module, run


def averages(history, decay):
    average, found = history[0], []
    for now in history:
        average = decay * average + (1 - decay) * now
        found.append(average)
    return found


# ---------------------------------------------------------------------- EMA


def test_validation_sees_the_average_and_training_does_not():
    after = After()
    module, _ = train([EMA(0.8), after])
    plain, _ = train([])
    for ours, theirs in zip(module.seen["fit"], plain.seen["fit"], strict=True):
        assert torch.equal(ours, theirs)
    expected = averages(after.history, 0.8)
    torch.testing.assert_close(module.seen["val"][0], expected[3], rtol=0, atol=1e-6)
    torch.testing.assert_close(module.seen["val"][-1], expected[7], rtol=0, atol=1e-6)
    assert torch.equal(weights(module), module.seen["val"][-1])


def test_equals_torch_and_lightning():
    ours, _ = train([EMA(0.9)])
    theirs, _ = train([EMAWeightAveraging(decay=0.9)])
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)
    source, after = Watched(), After()
    train([after], module=source)
    model = AveragedModel(nn.Linear(1, 1), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    single = nn.Linear(1, 1)
    for value in after.history:
        with torch.no_grad():
            single.weight.fill_(float(value[5]))
        model.update_parameters(single)
    assert float(model.module.weight.detach()) == pytest.approx(float(weights(ours)[5]), abs=1e-6)


def test_warmup_forgets_the_first_weights_soon():
    after = After()
    module, _ = train([EMA(0.999, warmup=True), after])
    average = after.history[0]
    for n, now in enumerate(after.history):
        if n:
            decay = (1 + n) / (10 + n)
            average = decay * average + (1 - decay) * now
    torch.testing.assert_close(weights(module), average, rtol=0, atol=1e-6)


def test_every_nth_step_moves_the_average():
    after = After()
    module, _ = train([EMA(0.5, every=4), after])
    expected = 0.5 * after.history[3] + 0.5 * after.history[7]
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-6)


def test_without_evaluate_validation_sees_the_weights_of_training():
    after = After()
    module, _ = train([EMA(0.8, evaluate=False), after])
    assert torch.equal(module.seen["val"][0], after.history[3])


def test_test_and_predict_see_the_average_after_training():
    for final in (True, False):
        after = After()
        module, run = train([EMA(0.8, final=final), after])
        average = averages(after.history, 0.8)[-1]
        before = weights(module)
        run.test(module, loader(), verbose=False)
        run.predict(module, loader())
        for stage in ("test", "predict"):
            torch.testing.assert_close(module.seen[stage][-1], average, rtol=0, atol=1e-6)
        assert torch.equal(weights(module), before)
        assert torch.equal(before, after.history[-1]) == (not final)


def test_half_precision_weights_have_a_precise_average():
    module = Watched(lr=0.1).bfloat16()
    technique = EMA(0.999)
    run = trainer([technique], precision="bf16-true", max_epochs=1)
    run.fit(module, loader())
    assert all(v.dtype == torch.float32 for v in technique._average.values())
    # In bfloat16 a thousandth of a small step is lost, and the average would stand still.
    assert any((v != v.bfloat16().float()).any() for v in technique._average.values())


def test_an_exception_in_validation_puts_the_weights_of_training_back():
    class Fails(Watched):
        def validation_step(self, batch, batch_idx):
            raise OSError("the disk is full")

    after, module = After(), Fails()
    with pytest.raises(OSError, match="the disk is full"):
        train([EMA(0.5), after], module=module)
    assert torch.equal(weights(module), after.history[-1])


@pytest.mark.parametrize("only", [False, True])
def test_checkpoints_hold_the_average_whoever_writes_them(tmp_path, only):
    after = After()
    saving = ModelCheckpoint(tmp_path, save_weights_only=only, every_n_train_steps=3, save_top_k=-1)
    train([EMA(0.8), after, saving], enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=0-step=3.ckpt", weights_only=True)
    flat = torch.cat([saved["state_dict"][n].flatten() for n, _ in Host().named_parameters()])
    torch.testing.assert_close(flat, averages(after.history, 0.8)[2], rtol=0, atol=1e-6)
    if not only:
        raw = saved["lightning_reg.raw_weights"]
        flat = torch.cat([raw[n].flatten() for n, _ in Host().named_parameters()])
        assert torch.equal(flat, after.history[2])


@pytest.mark.parametrize("technique", [lambda: EMA(0.8), lambda: SWA(1, lr=0.05)])
def test_going_on_from_the_last_checkpoint_is_bit_equal(tmp_path, technique):
    whole, _ = train([technique()], max_epochs=4)
    _, run = train([technique()], max_epochs=2)
    run.save_checkpoint(tmp_path / "last.ckpt")
    saving = ModelCheckpoint(tmp_path, filename="end", save_top_k=-1)
    train([technique(), saving], max_epochs=2, enable_checkpointing=True)
    resumed, other = Watched(), trainer([technique()], num_sanity_val_steps=0, max_epochs=4)
    path = next(tmp_path.glob("end*.ckpt"))
    other.fit(resumed, loader(), loader(), ckpt_path=path)
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(resumed.seen["fit"][-1], whole.seen["fit"][-1])


def test_testing_a_checkpoint_tests_the_average(tmp_path):
    after = After()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    train([EMA(0.8), after, saving], enable_checkpointing=True)
    module = Watched()
    run = trainer([EMA(0.8)])
    run.test(module, loader(), ckpt_path=tmp_path / "epoch=0-step=3.ckpt", verbose=False)
    expected = averages(after.history, 0.8)[2]
    torch.testing.assert_close(module.seen["test"][0], expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- SWA


def test_ends_of_the_last_epochs_are_averaged_with_equal_shares():
    after = After()
    module, _ = train([SWA(0.5, statistics="current"), after], max_epochs=4)
    ends = after.history[3::4]
    torch.testing.assert_close(weights(module), (ends[2] + ends[3]) / 2, rtol=0, atol=1e-6)
    seen = module.seen["val"]
    assert torch.equal(seen[4], ends[1])
    torch.testing.assert_close(seen[8], ends[2], rtol=0, atol=0)
    torch.testing.assert_close(seen[12], (ends[2] + ends[3]) / 2, rtol=0, atol=1e-6)


def test_every_second_epoch_closes_a_cycle():
    after = After()
    module, _ = train([SWA(1, every=2), after], max_epochs=6)
    ends = after.history[3::4]
    expected = (ends[1] + ends[3] + ends[5]) / 3
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("epochs", [0, 3])
def test_learning_rate_is_that_of_torch(anneal, epochs):
    class Rates(L.Callback):
        seen = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.seen.append(optimizer.param_groups[0]["lr"])

    class Scheduled(Host):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    used = []

    class Steps(Scheduled):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            used.append(optimizer.param_groups[0]["lr"])

    technique = SWA(2, lr=0.01, anneal_epochs=epochs, anneal=anneal)
    run = trainer([technique], max_epochs=7)
    run.fit(Steps(), loader())
    optimizer = torch.optim.SGD(Host().parameters(), 0.025)
    schedule = SWALR(optimizer, 0.01, anneal_epochs=epochs, anneal_strategy=anneal)
    expected = []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    if epochs == 0:
        # torch keeps the old rate for the first epoch.
        expected[0] = 0.01
    assert used[:8:4] == [0.1, 0.05]
    assert used[8::4] == pytest.approx(expected)


# ---------------------------------------------------------------------- BatchNorm


def test_statistics_are_those_of_torch_for_the_averaged_weights():
    module, _ = train([SWA(1)], module=Watched(batch_norm=True), max_epochs=3)
    twin = copy.deepcopy(module)
    update_bn(DataLoader(TensorDataset(INPUTS), batch_size=16), _Inputs(twin))
    torch.testing.assert_close(module.net[1].running_mean, twin.net[1].running_mean)
    torch.testing.assert_close(module.net[1].running_var, twin.net[1].running_var)


class _Inputs(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x[0] if isinstance(x, list) else x)


def test_validation_has_fresh_statistics_and_training_its_own():
    class Notes(Watched):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.means = getattr(self, "means", [])
            self.means.append(self.net[1].running_mean.clone())

    ours, plain = Notes(batch_norm=True, dropout=0.3), Notes(batch_norm=True, dropout=0.3)
    for module, callbacks in ((ours, [SWA(1, final=False)]), (plain, [])):
        torch.manual_seed(3)
        train(callbacks, module=module, max_epochs=3)
    assert torch.equal(weights(ours), weights(plain))
    assert torch.equal(ours.net[1].running_mean, plain.net[1].running_mean)
    assert ours.net[1].num_batches_tracked == plain.net[1].num_batches_tracked
    with torch.no_grad():
        twin = copy.deepcopy(ours)
        nn.utils.vector_to_parameters(ours.seen["val"][-1], twin.parameters())
        update_bn(DataLoader(TensorDataset(INPUTS), batch_size=16), _Inputs(twin))
    torch.testing.assert_close(ours.means[-1], twin.net[1].running_mean)
    assert not torch.allclose(ours.means[-1], plain.means[-1], atol=1e-3)


def test_averaged_statistics_follow_the_decay():
    class Means(L.Callback):
        def __init__(self):
            self.history = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.history.append(pl_module.net[1].running_var.clone())

    means = Means()
    module, _ = train([EMA(0.8), means], module=Watched(batch_norm=True))
    torch.testing.assert_close(module.net[1].running_var, averages(means.history, 0.8)[-1])


def statistics():
    module = Watched(batch_norm=True)
    run = rank_trainer(callbacks=[SWA(0)], max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, loader(batch_size=8), loader())
    return weights(module), module.net[1].running_mean, module.net[1].running_var


def test_statistics_are_those_of_all_ranks(ranks):
    one, other = ranks.run(statistics)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)
    module = Watched(batch_norm=True)
    nn.utils.vector_to_parameters(one[0], module.parameters())
    # Each rank's batches are made of its own samples: every second one.
    order = torch.cat([torch.arange(rank, 64, 2) for rank in (0, 1)])
    update_bn(DataLoader(TensorDataset(INPUTS[order]), batch_size=8), _Inputs(module))
    torch.testing.assert_close(one[1], module.net[1].running_mean)
    torch.testing.assert_close(one[2], module.net[1].running_var)


# ---------------------------------------------------------------------- refusals


def test_two_averages_are_refused():
    with pytest.raises(ConflictError, match=r"both swap averaged weights in and out"):
        train([EMA(), SWA(0.5)])
    with pytest.raises(ConflictError, match="excludes Lightning's EMAWeightAveraging"):
        train([EMA(), EMAWeightAveraging()])


def test_statistics_of_a_stream_are_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(INPUTS, LABELS, strict=True))

    run = trainer([SWA(0)], max_epochs=1)
    with pytest.raises(UnsupportedError, match=r'map-style.*Try: SWA\(statistics="average"\)'):
        run.fit(Watched(batch_norm=True), DataLoader(Stream(), batch_size=16))


def test_a_share_of_endless_training_is_refused():
    with pytest.raises(ArgumentError, match=r"max_epochs.*Try: SWA\(start=150\)"):
        train([SWA(0.5)], max_epochs=-1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMA(1.5),
        lambda: EMA(every=0),
        lambda: EMA(statistics="all"),
        lambda: SWA(-1),
        lambda: SWA(2.0),
        lambda: SWA(lr=-1.0),
        lambda: SWA(anneal="step"),
        lambda: SWA(anneal_epochs=-1),
        lambda: SWA(every=0),
    ],
)
def test_bad_arguments_are_refused_with_a_cure(make):
    with pytest.raises(ArgumentError, match=r"Try: (EMA|SWA)\("):
        make()
