"""What a test with adaptation computes, and that nothing is left of it."""

import contextlib
import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, ConflictError, UnsupportedError
from lightning_reg.mechanisms.adaptation import TestTimeAdaptation as Adaptation
from lightning_reg.techniques.adaptation.tent import Tent
from lightning_reg.testing.ranks import rank_trainer
from lightning_reg.testing.snapshot import changed, snapshot
from tests.engine.simple import trainer, weights

X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


class Net(L.LightningModule):
    """A network with one norm; keeps the logits that its test saw."""

    def __init__(self, norm=nn.BatchNorm1d, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        self.norm = norm(4).double()
        self.drop = nn.Dropout(0.5)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.fail_at, self.seen = fail_at, []
        if norm is nn.BatchNorm1d:
            self.norm.running_mean.fill_(0.3)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.body(x)))))

    def test_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("failed")
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.seen.append(logits.detach().clone())
        return {"logits": logits}

    def validation_step(self, batch, batch_idx):
        self.seen.append(self(batch[0]).detach().clone())

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Square(Adaptation):
    """Half the squared first logit; counts the samples that ``keeps`` says."""

    def __init__(self, keeps=None, **kwargs):
        super().__init__(**{"lr": 0.5, **kwargs})
        self.keeps = keeps

    def sample_losses(self, step):
        first = step.logits[:, 0]
        counted = torch.ones(len(first), dtype=torch.bool)
        if self.keeps is not None:
            counted = torch.tensor([self.keeps(row) for row in step.inputs])
        return 0.5 * first**2, counted


def data(x=X, size=4):
    return DataLoader(TensorDataset(x, Y[: len(x)]), batch_size=size)


def evaluate(technique, module=None, x=X, size=4, run=trainer, verb="test", **settings):
    module = Net() if module is None else module
    run = run([technique] if technique else [], **settings)
    getattr(run, verb)(module, data(x, size), **({} if verb == "predict" else {"verbose": False}))
    return module, run


def by_hand(module, batches, lr=0.5, steps=1, episodic=False):
    """The logits of each batch, and the weights of the norm, by plain autograd and SGD."""
    module = copy.deepcopy(module)
    start = [p.detach().clone() for p in module.norm.parameters()]
    momentum = [torch.zeros_like(p) for p in start]
    shown = []
    for x in batches:
        if episodic:
            for p, s, m in zip(module.norm.parameters(), start, momentum, strict=True):
                p.data.copy_(s)
                m.zero_()
        for _ in range(steps):
            hidden = module.body(x)
            if isinstance(module.norm, nn.BatchNorm1d):
                hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
                hidden = hidden * module.norm.weight + module.norm.bias
            else:
                hidden = module.norm(hidden)
            logits = module.head(torch.tanh(hidden))
            loss = (0.5 * logits[:, 0] ** 2).mean()
            gradients = torch.autograd.grad(loss, list(module.norm.parameters()))
            for p, g, m in zip(module.norm.parameters(), gradients, momentum, strict=True):
                m.mul_(0.9).add_(g)
                p.data.sub_(lr * m)
        shown.append(logits.detach())
    return shown, torch.cat([p.detach() for p in module.norm.parameters()])


def norm_of(module):
    return torch.cat([p.detach() for p in module.norm.parameters()])


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, lambda c: nn.GroupNorm(2, c)])
@pytest.mark.parametrize("settings", [{}, {"steps": 2}, {"episodic": True, "steps": 2}])
def test_predictions_and_weights_are_those_of_a_loop_by_hand(norm, settings):
    # Predictions come from before the update: the first batch is that of the trained weights.
    shown, expected = by_hand(Net(norm), X.split(4), **settings)
    module, _ = evaluate(Square(keep=True, **settings), Net(norm))
    torch.testing.assert_close(norm_of(module), expected)
    # Passes before the last of a batch leave no trace in what the step collects.
    for one, other in zip(module.seen, shown, strict=True):
        torch.testing.assert_close(one, other)
    assert (expected - norm_of(Net(norm))).abs().max() > 1e-2


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_every_stage_can_adapt(verb):
    _, expected = by_hand(Net(), X.split(4))
    module, _ = evaluate(Square(keep=True, stages=[verb]), verb=verb)
    torch.testing.assert_close(norm_of(module), expected)


def test_predictions_are_handed_on_without_their_graph():
    module = Net()
    run = trainer([Square(stages=["predict"])])
    for logits in run.predict(module, data()):
        assert not logits.requires_grad
    for one, other in zip(run.predict(module, data()), by_hand(module, X.split(4))[0], strict=True):
        torch.testing.assert_close(one, other)


def test_only_norms_move_and_metrics_count_once():
    module, run = evaluate(Square(keep=True))
    start = Net()
    assert torch.equal(module.head.weight, start.head.weight)
    assert torch.equal(module.body.weight, start.body.weight)
    right = (torch.cat(module.seen).argmax(1) == Y).double().mean()
    assert run.callback_metrics["accuracy"].item() == pytest.approx(right.item())
    for parameter in module.parameters():
        assert parameter.grad is None


# ---------------------------------------------------------------------- what is left


def left_behind(module, *callbacks):
    """What a test changes in a module, whether or not it fails; its tensors stay as they are."""
    before, values = snapshot(module), copy.deepcopy(module.state_dict())
    run = trainer(callbacks)
    with contextlib.suppress(RuntimeError):
        run.test(module, data(), verbose=False)
    assert run.test_loop.inference_mode is True
    for name, value in module.state_dict().items():
        assert torch.equal(value, values[name]), name
    return changed(before, snapshot(module)).keys()


@pytest.mark.parametrize("fail_at", [None, 0, 2])
def test_a_test_leaves_nothing_behind(fail_at):
    module, plain = Net(fail_at=fail_at), Net(fail_at=fail_at)
    for net in (module, plain):
        net.norm.weight.requires_grad_(False)
    assert left_behind(module, Square()) == left_behind(plain)
    assert not module.norm.weight.requires_grad
    assert module.norm.running_mean.eq(0.3).all()


def test_metrics_that_a_plain_test_has_used_can_be_used_again():
    # The plain test resets them in inference mode.
    class Counting(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, value):
            self.total += value

        def compute(self):
            return self.total

    module = Net()
    module.accuracy = Counting()
    module.accuracy.forward = lambda logits, labels: module.accuracy.update(len(labels))
    for technique in (None, Square(), None):
        _, run = evaluate(technique, module)
        assert run.callback_metrics["accuracy"].item() == 12


def test_a_second_test_repeats_the_first():
    module, technique = Net(), Square()
    for _ in range(2):
        evaluate(technique, module)
    for one, other in zip(module.seen[:3], module.seen[3:], strict=True):
        assert torch.equal(one, other)


def test_strength_zero_is_a_test_without_it():
    off, plain = evaluate(Square(strength=0.0))[0], evaluate(None)[0]
    assert all(map(torch.equal, off.seen, plain.seen))


def test_a_fit_is_not_adapted():
    def fitted(*callbacks):
        module = Net()
        torch.manual_seed(1)
        trainer(callbacks, max_epochs=1).fit(module, data(), data())
        return module

    with_it = fitted(Square(stages=["test", "validate"]))
    without = fitted()
    assert torch.equal(weights(with_it), weights(without))
    assert all(map(torch.equal, with_it.seen, without.seen))


# ---------------------------------------------------------------------- no step


def test_a_batch_of_which_nothing_counts_makes_no_step_and_no_momentum():
    # The second batch counts nothing: its logits leave no trace, and the momentum waits.
    second = X[4:8]
    technique = Square(lambda row: not (second == row).all(1).any(), keep=True)
    module, run = evaluate(technique)
    _, expected = by_hand(Net(), [X[:4], X[8:]])
    torch.testing.assert_close(norm_of(module), expected)
    assert run.callback_metrics["reg/square_kept"].item() == pytest.approx(2 / 3)


def test_a_batch_of_nan_makes_no_step():
    x = X.clone()
    x[5] = float("nan")
    module, _ = evaluate(Square(keep=True), x=x)
    _, expected = by_hand(Net(), [X[:4], X[8:]])
    torch.testing.assert_close(norm_of(module), expected)


# ---------------------------------------------------------------------- ranks


def positive(row):
    return bool(row[0] > 0)


def evaluate_on_ranks(x, sizes):
    rank = torch.distributed.get_rank()
    module = Net(nn.LayerNorm)
    run = rank_trainer(callbacks=[Square(positive, keep=True)], use_distributed_sampler=False)
    set_ = TensorDataset(x[rank], Y[: len(x[rank])])
    loader = DataLoader(set_, batch_sampler=sizes[rank])
    run.test(module, loader, verbose=False)
    return norm_of(module), run.callback_metrics["reg/square"]


def test_two_ranks_that_keep_different_numbers_equal_the_joint_batch(ranks):
    # In the first batch rank 1 keeps nothing at all.
    order = torch.cat([X[:, 0].argsort(descending=True)[:3], X[:, 0].argsort()[:3]])
    rest = torch.tensor([i for i in range(12) if i not in order.tolist()])
    joint = torch.cat([X[order], X[rest]])
    x = [torch.cat([joint[:3], joint[6:8]]), torch.cat([joint[3:6], joint[8:]])]
    sizes = [[[0, 1, 2], [3, 4]], [[0, 1, 2], [3, 4, 5, 6]]]
    (first, value), (second, _) = ranks.run(evaluate_on_ranks, x, sizes)
    technique = Square(positive, keep=True)
    module, run = evaluate(technique, Net(nn.LayerNorm), joint, 6)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, norm_of(module), rtol=0, atol=1e-12)
    assert (first - norm_of(Net(nn.LayerNorm))).abs().max() > 1e-2
    assert value.isfinite()
    assert run.callback_metrics["reg/square"].isfinite()


# ---------------------------------------------------------------------- refusals


def test_a_network_without_norms_is_refused_before_the_first_batch():
    module = Net(lambda c: nn.Identity())
    with pytest.raises(UnsupportedError, match=r"Square.*BatchNorm1d"):
        evaluate(Square(), module)
    assert module.seen == []


def test_two_adaptations_are_refused():
    with pytest.raises(ConflictError, match="adaptation in a test"):
        trainer([Square(), Tent()]).test(Net(), data(), verbose=False)


@pytest.mark.parametrize(
    "arguments",
    [{"lr": -1.0}, {"steps": 0}, {"stages": ["fit"]}, {"stages": "test"}, {"optimizer": 1}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=r"Square.*Try: "):
        Square(**arguments)
