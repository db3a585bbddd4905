"""When an output anchor takes its reference, what it compares with it, and over which ranks."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import (
    ArgumentError,
    MissingSignalError,
    RegularizationError,
    UnsupportedError,
)
from lightning_reg.mechanisms.output_anchor import OutputAnchor
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, fit, loader, trainer, weights


class Squares(OutputAnchor):
    """The squared distance; keeps what was compared, and how many hooks were left."""

    def __init__(self, strength=0.1, **settings):
        super().__init__(strength, **settings)
        self.compared, self.hooks = [], []

    def distance(self, now, then):
        self.hooks.append(sum(len(p._forward_hooks) for p in self.teacher.network.modules()))
        self.compared.append((now.detach().clone(), then.clone()))
        return (now - then).square().flatten(1).mean(1)


def moved(module=None):
    module = copy.deepcopy(module) if module is not None else Host()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
    return module


def with_reference(module, **settings):
    technique = Squares(**settings)
    technique.take_reference(module)
    return technique


class Growing(L.LightningModule):
    """A trunk and one head a task; logits of all heads side by side."""

    def __init__(self, *widths):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, width) for width in widths)

    def forward(self, x):
        return torch.cat([head(self.trunk(x)) for head in self.heads], 1)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


# ---------------------------------------------------------------------- references


def test_the_first_fit_is_left_alone_and_gives_the_reference():
    technique = Squares(5.0)
    module, run = fit([technique])
    assert torch.equal(weights(module), weights(fit()[0]))
    assert technique.compared == []
    assert "reg/squares" not in run.callback_metrics
    assert technique.references_taken == 1
    assert torch.equal(weights(technique.teacher.network), weights(module))


@pytest.mark.parametrize("way", ["same instance", "state handed on"])
def test_the_second_fit_is_pulled_to_the_end_of_the_first(way):
    technique = Squares(0.5)
    module, _ = fit([technique], max_epochs=1)
    end = copy.deepcopy(module).eval()
    if way == "state handed on":
        technique, first = Squares(0.5), technique
        technique.load_state_dict(first.state_dict())
    fit([technique], module, max_epochs=2)
    # Eight steps, all of them against the same network.
    assert len(technique.compared) == 8
    for i in (0, 5):
        rows = slice(16 * (i % 4), 16 * (i % 4 + 1))
        torch.testing.assert_close(technique.compared[i][1], end(INPUTS[rows]).detach())
    assert technique.references_taken == 2
    assert torch.equal(weights(technique.teacher.network), weights(module))


def test_from_start_takes_the_first_reference_from_the_start():
    technique = Squares(0.5, from_start=True)
    fit([technique], max_epochs=1)
    torch.testing.assert_close(technique.compared[3][1], Host().eval()(INPUTS[48:]).detach())
    assert technique.references_taken == 2


def test_the_reference_answers_in_eval_mode_without_a_gradient_and_is_no_part_of_the_module():
    start = moved(Host(batch_norm=True, dropout=0.5))
    technique = with_reference(start)
    module = Host(batch_norm=True, dropout=0.5)
    fit([technique], module, max_epochs=1)
    torch.testing.assert_close(technique.compared[3][1], start.eval()(INPUTS[48:]).detach())
    assert not technique.compared[3][1].requires_grad
    assert module.state_dict().keys() == Host(batch_norm=True).state_dict().keys()


def test_resume_in_the_second_task_keeps_the_reference_of_the_first(tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    whole, again = with_reference(moved()), Squares()
    fit([whole, Save()], Host(), max_epochs=2)
    module, run = Host(), trainer([again], max_epochs=2)
    run.fit(module, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert len(again.compared) == 4
    for one, other in zip(whole.compared[4:], again.compared, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_a_fit_that_fails_leaves_the_reference_as_it_was():
    class Failing(Host):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                raise RuntimeError("no")
            return super().training_step(batch, batch_idx)

    technique = Squares()
    with pytest.raises(RuntimeError, match="no"):
        fit([technique], Failing())
    assert technique.references_taken == 0
    assert technique.teacher is None


def test_weights_that_are_not_finite_are_not_taken():
    technique = with_reference(Host())
    kept = weights(technique.teacher.network).clone()
    broken = Host()
    with torch.no_grad():
        broken.net[4].bias[1] = float("inf")
    with pytest.warns(UserWarning, match="Squares.*not finite"):
        technique.take_reference(broken)
    assert torch.equal(weights(technique.teacher.network), kept)
    assert technique.references_taken == 1


def test_a_state_without_a_reference_takes_away_the_one_that_is_there():
    technique = with_reference(Host())
    technique.load_state_dict(Squares().state_dict())
    fit([technique], max_epochs=1)
    assert technique.compared == []


def test_a_module_that_cannot_be_copied_is_refused_before_the_first_task():
    module = Host()
    module.kept = module.net(INPUTS)
    with pytest.raises(UnsupportedError, match=r"Squares.*copies the module.*Try: "):
        fit([Squares()], module, max_epochs=1)
    assert torch.equal(weights(module), weights(Host()))


def test_state_comes_back_whole():
    one, other = with_reference(Host()), Squares()
    one.take_reference(moved())
    other.load_state_dict(one.state_dict())
    assert other.references_taken == 2
    state = other.state_dict()
    assert state["references_taken"] == 2
    for name, value in moved().state_dict().items():
        assert torch.equal(state["teacher"][name], value)


# ---------------------------------------------------------------------- what is compared


def test_gradient_is_that_of_the_distance_through_the_module_alone():
    start, module = moved(), Host()
    expected = copy.deepcopy(module)
    loss = nn.functional.cross_entropy(expected(INPUTS[:16]), LABELS[:16])
    pull = (expected(INPUTS[:16]) - start(INPUTS[:16]).detach()).square().mean()
    (loss + 0.7 * pull).backward()
    with torch.no_grad():
        for p in expected.parameters():
            p -= 0.1 * p.grad
    fit([with_reference(start, strength=0.7)], module, max_epochs=1, limit_train_batches=1)
    torch.testing.assert_close(weights(module), weights(expected))


def test_layer_compares_what_it_returns():
    start, module = moved(), Host()
    now = module.net[:3](INPUTS[:16]).detach()
    technique = with_reference(start, layer="net.2")
    fit([technique], module, max_epochs=1, limit_train_batches=1)
    torch.testing.assert_close(technique.compared[0][0], now)
    torch.testing.assert_close(technique.compared[0][1], start.net[:3](INPUTS[:16]).detach())
    assert technique.hooks == [0]


@pytest.mark.parametrize("settings", [{"classes": 3}, {"classes": [2, 0]}, {"layer": "net.2"}])
def test_copies_compare_the_same(settings):
    technique = with_reference(moved(), **settings)
    twin = copy.deepcopy(technique)
    results = [weights(fit([t], Host(), max_epochs=1)[0]) for t in (technique, twin)]
    assert torch.equal(*results)


@pytest.mark.parametrize("classes", [2, [3, 1]])
def test_classes_choose_logits(classes):
    start = moved()
    chosen = [0, 1] if classes == 2 else classes
    technique = with_reference(start, classes=classes)
    fit([technique], Host(), max_epochs=1, limit_train_batches=1)
    now, then = technique.compared[0]
    torch.testing.assert_close(now, Host()(INPUTS[:16])[:, chosen].detach())
    torch.testing.assert_close(then, start(INPUTS[:16])[:, chosen].detach())


def test_classes_can_be_set_before_each_task():
    technique = with_reference(moved(), classes=2)
    fit([technique], Host(), max_epochs=1, limit_train_batches=1)
    technique.classes = 3
    fit([technique], Host(), max_epochs=1, limit_train_batches=1)
    assert [now.shape[1] for now, _ in technique.compared] == [2, 3]
    technique.classes = 0
    with pytest.raises(ArgumentError, match="`classes`"):
        fit([technique], Host(), max_epochs=1)


@pytest.mark.parametrize("way", ["same instance", "state handed on"])
def test_a_head_that_grew_is_compared_on_the_classes_before(way):
    start, module = Growing(3), Growing(5)
    technique = with_reference(start)
    if way == "state handed on":
        technique, first = Squares(), technique
        technique.load_state_dict(first.state_dict())
    fit([technique], module, max_epochs=1, limit_train_batches=1)
    now, then = technique.compared[0]
    assert now.shape == then.shape == (16, 3)
    torch.testing.assert_close(then, start(INPUTS[:16]).detach())


def test_a_saved_reference_without_the_new_head_needs_the_classes_before():
    start = Growing(3)
    state = with_reference(start).state_dict()
    technique, told = Squares(), Squares(classes=3)
    technique.load_state_dict(state)
    told.load_state_dict(state)
    with pytest.raises(RegularizationError, match=r"heads\.1\.bias.*Try: Squares\(classes="):
        fit([technique], Growing(3, 2), max_epochs=1)
    fit([told], Growing(3, 2), max_epochs=1, limit_train_batches=1)
    torch.testing.assert_close(told.compared[0][1], start(INPUTS[:16]).detach())


def test_a_saved_reference_with_parts_that_are_gone_is_refused():
    technique = Squares()
    technique.load_state_dict(with_reference(Growing(3, 2)).state_dict())
    with pytest.raises(RegularizationError, match=r"Squares.*heads\.1\.bias.*Try: "):
        fit([technique], Growing(5), max_epochs=1)


def test_ignored_positions_are_left_out_of_token_logits():
    class Tagger(Host):
        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    x, y = INPUTS[:8].view(4, 2, 8), LABELS[:8].view(4, 2).clone()
    y[0, 1] = y[2, 0] = -100
    start = moved()
    technique = with_reference(start)
    data = DataLoader(TensorDataset(x, y), batch_size=4)
    trainer([technique], max_epochs=1).fit(Tagger(), data)
    kept = [0, 2, 3, 5, 6, 7]
    torch.testing.assert_close(technique.compared[0][1], start(INPUTS[kept]).detach())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("classes", [0, -1, True, 1.5, [], [0, 0], [-1], "all"])
def test_classes_that_are_none_are_refused(classes):
    with pytest.raises(ArgumentError, match=r"Squares: `classes`.*Try: Squares\("):
        Squares(classes=classes)


def test_classes_that_the_reference_does_not_know_are_refused():
    with pytest.raises(ArgumentError, match=r"class 4.*knows 3.*Try: Squares\(classes=3\)"):
        fit([with_reference(Growing(3), classes=5)], Growing(5), max_epochs=1)


def test_a_head_that_shrank_is_refused():
    with pytest.raises(RegularizationError, match=r"5 classes.*rows of 4"):
        fit([with_reference(Growing(5))], Growing(4), max_epochs=1)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ArgumentError, match=r"Squares: `layer` is 'body'.*it has net"):
        fit([Squares(layer="body")], max_epochs=1)


def test_a_layer_of_another_width_is_refused():
    technique = with_reference(Growing(3), layer="heads.0")
    with pytest.raises(RegularizationError, match=r"heads.0.*\(16, 5\).*\(16, 3\).*reference"):
        fit([technique], Growing(5), max_epochs=1)


def test_a_layer_that_forward_does_not_call_is_refused():
    class Around(Growing):
        def forward(self, x):
            return super().forward(x) if self.training else self.trunk(x)

    technique = with_reference(Around(4), layer="heads.0")
    with pytest.raises(UnsupportedError, match=r"heads.0.*0 calls.*Try: def forward"):
        fit([technique], Around(4), max_epochs=1)


def test_a_layer_that_the_step_does_not_call_is_a_missing_signal():
    class Unused(Host):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.raises(MissingSignalError, match=r"Squares.*'spare'"):
        fit([with_reference(Unused(), layer="spare")], Unused(), max_epochs=1)


# ---------------------------------------------------------------------- ranks


def second_task_on_rank(settings, rank_sizes):
    """One step on uneven shares; the value, the weights, and the next reference."""
    start = moved(Host(batch_norm=True))
    technique = with_reference(start, strength=0.7, **settings)
    rank = torch.distributed.get_rank()
    first = sum(rank_sizes[:rank])
    rows = slice(first, first + rank_sizes[rank])
    data = DataLoader(TensorDataset(INPUTS[rows], LABELS[rows]), batch_size=32)
    module = Alone(batch_norm=True)
    run = rank_trainer(callbacks=[technique], max_epochs=1, use_distributed_sampler=False)
    run.fit(module, data)
    state = {k: v.numpy().copy() for k, v in technique.state_dict()["teacher"].items()}
    return run.callback_metrics["reg/squares"].item(), weights(module).numpy(), state


class Alone(Host):
    """Nothing but the pull moves it; BatchNorm runs in eval mode, which knows no batch."""

    def training_step(self, batch, batch_idx):
        self.net[1].eval()
        self.net[1].running_mean += self.global_rank if self.trainer.world_size > 1 else 0
        return 0.0 * self(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("settings", [{"classes": 3}, {"layer": "net.0"}])
def test_two_ranks_stay_equal_and_so_does_their_next_reference(settings, ranks):
    first, second = ranks.run(second_task_on_rank, settings, (4, 12))
    assert first[0] == second[0]
    assert (first[1] == second[1]).all()
    for name, value in first[2].items():
        # Buffers that differ between ranks are those of rank 0 in the next reference.
        assert (value == second[2][name]).all(), name
    assert abs(first[2]["net.1.running_mean"]).max() == 0


def test_value_and_step_of_two_ranks_are_those_of_the_joint_batch(ranks):
    technique = with_reference(moved(Host(batch_norm=True)), strength=0.7, layer="net.0")
    module = Alone(batch_norm=True)
    data = DataLoader(TensorDataset(INPUTS[:16], LABELS[:16]), batch_size=16)
    run = trainer([technique], max_epochs=1)
    run.fit(module, data)
    for value, trained, _ in ranks.run(second_task_on_rank, {"layer": "net.0"}, (4, 12)):
        assert value == pytest.approx(run.callback_metrics["reg/squares"].item(), rel=1e-6)
        torch.testing.assert_close(torch.from_numpy(trained), weights(module))
