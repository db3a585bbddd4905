"""Modules that people really have: each trains as its own plain loop would, with techniques."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_reg.engine import IndexedDataset, RegularizeMixin, Signals, UnsupportedError
from tests.engine.simple import (
    INPUTS,
    LABELS,
    Ascent,
    Confidence,
    Host,
    Smoothing,
    fit,
    trainer,
    weights,
)


def techniques(**signals):
    source = Signals(**signals) if signals else None
    return [Confidence(0.3, signals=source), Smoothing(0.1, signals=source), Ascent(0.05)]


def reference(**kwargs) -> torch.Tensor:
    """The plain host with the same techniques, which other tests hold to a plain loop."""
    return weights(fit(techniques(), **kwargs)[0])


def batches(make, size=16):
    """A loader of whole batches that ``make`` builds from inputs and labels."""
    pairs = zip(INPUTS.split(size), LABELS.split(size), strict=True)
    return DataLoader([make(x, y) for x, y in pairs], batch_size=None)


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


class NamedTupleHost(Host):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch.image), batch.label)


@dataclass
class Graph:
    """Nodes with edges, as graph libraries batch them; nodes are the samples."""

    x: torch.Tensor
    edge_index: torch.Tensor
    y: torch.Tensor

    def to(self, device, **kwargs):
        return Graph(self.x.to(device), self.edge_index.to(device), self.y.to(device))


class GraphHost(Host):
    def training_step(self, batch, batch_idx):
        # Self-loops only: aggregation is the identity, so the plain host is the reference.
        source, target = batch.edge_index
        nodes = torch.zeros_like(batch.x).index_add(0, target, batch.x[source])
        return F.cross_entropy(self(nodes), batch.y)


class DictHost(Host):
    def training_step(self, batch):
        logits = self(batch["pixel_values"])
        return {"loss": F.cross_entropy(logits, batch["labels"]), "logits": logits}


class ModelOutputHost(Host):
    """Calls a network that returns a dict-like output and takes keyword arguments."""

    def __init__(self):
        super().__init__()
        self.model = _ReturnsDict(self.net)
        del self.net

    def training_step(self, batch, batch_idx):
        return self.model(**batch)["loss"]


class _ReturnsDict(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_values, labels):
        logits = self.net(input_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("host", "make"),
    [
        (NamedTupleHost, Pair),
        (GraphHost, lambda x, y: Graph(x, torch.arange(len(x)).expand(2, -1), y)),
        (DictHost, lambda x, y: {"pixel_values": x, "labels": y}),
        (ModelOutputHost, lambda x, y: {"input_values": x, "labels": y}),
    ],
    ids=["named tuple", "graph", "dict without batch_idx", "model output"],
)
def test_batches_of_any_kind_train_the_same_bits(host, make):
    signals = {"targets": "batch.label"} if host is NamedTupleHost else {}
    module = host()
    trainer(techniques(**signals)).fit(module, batches(make))
    assert torch.equal(weights(module), reference())


def test_own_optimizer_step_and_clipping_still_see_the_whole_gradient():
    norms: dict[str, list[float]] = {"plain": [], "own": []}

    class Own(Host):
        kind = "own"

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val, **kwargs):
            norms[self.kind].append(float(self.net[0].weight.grad.norm()))
            self.clip_gradients(optimizer, gradient_clip_val, "norm")

    class Plain(Own):
        kind = "plain"

        def optimizer_step(self, *args, **kwargs):
            return L.LightningModule.optimizer_step(self, *args, **kwargs)

    own, plain = Own(), Plain()
    for module in (own, plain):
        fit(techniques(), module=module, gradient_clip_val=0.1)
    assert torch.equal(weights(own), weights(plain))
    assert norms["own"] == norms["plain"]
    assert torch.equal(weights(own), reference(gradient_clip_val=0.1))


def test_several_losses_keep_their_other_terms():
    class Several(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            entropy = F.cross_entropy(logits, y, label_smoothing=self.smoothing)
            activity = 0.05 * self.net[0](x).square().mean()
            return {"loss": entropy + activity, "entropy": entropy.detach()}

    ours, theirs = Several(), Several()
    ours.smoothing, theirs.smoothing = 0.0, 0.1
    fit([Smoothing(0.1, replaces="term"), Ascent(0.05)], module=ours)
    fit([Ascent(0.05)], module=theirs)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)


def test_a_modules_own_moving_average_sees_restored_weights():
    class Averaged(Host):
        def on_fit_start(self):
            self.__dict__["average"] = copy.deepcopy(self)
            self.__dict__["path"] = []

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.path.append(weights(self))
            with torch.no_grad():
                for mean, weight in zip(self.average.parameters(), self.parameters(), strict=True):
                    mean.lerp_(weight, 0.1)

    module = Averaged()
    start = weights(module)
    fit(techniques(), module=module)
    expected = start
    for point in module.path:
        expected = torch.lerp(expected, point, 0.1)
    torch.testing.assert_close(weights(module.average), expected)
    assert torch.equal(weights(module), reference())


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_train_the_same_numbers(whole):
    module = Host()
    if whole:
        module = torch.compile(module, backend="aot_eager")
    else:
        module.net = torch.compile(module.net, backend="aot_eager")
    run = trainer(techniques())
    run.fit(module, DataLoader(list(zip(INPUTS, LABELS, strict=True)), batch_size=16))
    torch.testing.assert_close(weights(module), reference(), rtol=0, atol=1e-6)


class TwoOptimizers(RegularizeMixin, Host):
    """Body and head with an optimizer each, stepped one after the other by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            logits = self.net(x)
            loss = self.regularize(F.cross_entropy(logits, y), logits=logits)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[4])]


def test_several_optimizers_under_manual_optimization_equal_a_plain_loop():
    module = TwoOptimizers()
    fit([Confidence(0.3), Smoothing(0.1)], module=module)
    net = Host().net
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (net[0], net[4])]
    for _ in range(2):
        for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
            for optimizer in optimizers:
                logits = net(x)
                p = logits.softmax(-1)
                loss = F.cross_entropy(logits, y, label_smoothing=0.1)
                loss = loss + 0.3 * (p * p.log()).sum(-1).mean()
                net.zero_grad()
                loss.backward()
                optimizer.step()
    torch.testing.assert_close(weights(module), weights(net), rtol=0, atol=1e-6)


def test_several_dataloaders_are_named_by_signals():
    class Two(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch["labeled"]
            self.net(batch["unlabeled"][0])
            return F.cross_entropy(self(x), y)

    def pairs():
        return DataLoader(list(zip(INPUTS, LABELS, strict=True)), batch_size=16)

    module = Two()
    signals = {"targets": "batch.labeled.1", "inputs": "batch.labeled.0"}
    trainer(techniques(**signals)).fit(module, {"labeled": pairs(), "unlabeled": pairs()})
    assert torch.equal(weights(module), reference())


class _Drops(L.LightningDataModule):
    def train_dataloader(self):
        data = IndexedDataset(list(zip(INPUTS, LABELS, strict=True)))
        return DataLoader(data, batch_size=16)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x, y


def test_a_datamodule_whose_hook_would_get_the_sample_index_is_refused():
    with pytest.raises(UnsupportedError, match=r"_Drops.on_after_batch_transfer") as error:
        trainer([Confidence(0.1)]).fit(Host(), datamodule=_Drops())
    assert "sample_index" in str(error.value)


def test_callbacks_work_in_the_standalone_pytorch_lightning():
    legacy = pytest.importorskip("pytorch_lightning")

    class Legacy(legacy.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Host().net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    module = Legacy()
    run = legacy.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=techniques(),
    )
    before = set(vars(module))
    run.fit(module, DataLoader(list(zip(INPUTS, LABELS, strict=True)), batch_size=16))
    assert torch.equal(weights(module), reference())
    assert {"reg/confidence", "reg/ascent"} <= set(run.callback_metrics)
    assert set(vars(module)) - before <= {"_hparams"}


def test_nan_logits_that_the_user_skips_are_as_if_the_batch_had_been_skipped():
    class Guarded(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x * float("nan") if batch_idx == 1 else x
            return super().training_step((x, y), batch_idx)

        def on_before_optimizer_step(self, optimizer):
            if not all(torch.isfinite(p.grad).all() for p in self.parameters()):
                optimizer.zero_grad()

    class Skipping(Host):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    guarded, skipping = Guarded(), Skipping()
    for module in (guarded, skipping):
        fit(techniques(), module=module)
    assert torch.isfinite(weights(guarded)).all()
    assert torch.equal(weights(guarded), weights(skipping))
