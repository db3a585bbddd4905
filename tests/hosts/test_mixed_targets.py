"""Mixed and smoothed targets in the training steps that people have."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import RegularizationError, RegularizeMixin, Signals
from lightning_reg.techniques.inputs.cutmix import CutMix
from lightning_reg.techniques.inputs.mixup import Mixup
from lightning_reg.techniques.labels.label_smoothing import LabelSmoothing
from tests.engine.simple import trainer, weights

CLASSES = 4
SIZE = 16
_generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(64, 1, 8, 8, generator=_generator)
LABELS = torch.randint(0, CLASSES, (64,), generator=_generator)
TECHNIQUES = {
    "mixup": lambda **kwargs: [Mixup(1.0, **kwargs)],
    "cutmix": lambda **kwargs: [CutMix(1.0, **kwargs)],
    "smoothing": lambda **kwargs: [LabelSmoothing(0.2, **kwargs)],
    "mixup and smoothing": lambda **kwargs: [Mixup(1.0, **kwargs), LabelSmoothing(0.2, **kwargs)],
    "cutmix and smoothing": lambda **kwargs: [CutMix(1.0, **kwargs), LabelSmoothing(0.2, **kwargs)],
}
MIXING = [name for name in TECHNIQUES if name != "smoothing"]
every_technique = pytest.mark.parametrize("technique", list(TECHNIQUES))


class Host(L.LightningModule):
    """A step with a loss, a logged loss and a metric that is updated with the labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.seen, self.correct = [], []

    def forward(self, x):
        return self.net(x)

    def loss(self, logits, y):
        return F.cross_entropy(logits, y)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = self.loss(logits, y)
        self.accuracy(logits, y)
        self.correct.append((logits.argmax(1) == y).float().mean())
        self.seen.append((x.clone(), y.clone()))
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(callbacks, module, targets=LABELS, **kwargs):
    loader = DataLoader(TensorDataset(IMAGES, targets), batch_size=SIZE)
    run = trainer(callbacks, max_epochs=1, **kwargs)
    run.fit(module, loader)
    return run


def distributions(callbacks) -> list[torch.Tensor]:
    """The target distributions (B, C) that these techniques mean, found without labels.

    Images are replaced by one-hot labels spread over pixels, which Mixup and CutMix mix as they
    mix images; the mean over pixels is then the mixed label.
    """

    class Reader(Host):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0])
            return self.net[1].weight.sum() * 0

    one_hot = F.one_hot(LABELS, CLASSES).float()
    planes = one_hot[:, :, None, None].expand(64, CLASSES, 8, 8)
    module = Reader()
    mixers = [c for c in callbacks if not isinstance(c, LabelSmoothing)]
    for mixer in mixers:
        mixer.replaces = "loss"
    marked = TensorDataset(planes, torch.zeros(64, 1))
    trainer(mixers, max_epochs=1).fit(module, DataLoader(marked, batch_size=SIZE))
    found = [x.mean((2, 3)) for x in module.seen]
    smooth = any(isinstance(c, LabelSmoothing) for c in callbacks)
    return [0.8 * q + 0.2 / CLASSES for q in found] if smooth else found


def reference(seen, targets) -> torch.Tensor:
    """The weights that a plain loop trains on the batches that the step saw."""
    module = Host()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for (x, _), q in zip(seen, targets, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(module(x), q).backward()
        optimizer.step()
    return weights(module)


def check(module, technique) -> None:
    """The module was trained on the mixed and smoothed targets, and its labels were whole."""
    expected = reference(module.seen, distributions(TECHNIQUES[technique]()))
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([y for _, y in module.seen]), LABELS)


@every_technique
def test_a_step_that_updates_an_accuracy_counts_whole_labels(technique):
    module = Host()
    run = fit(TECHNIQUES[technique](), module)
    check(module, technique)
    expected = torch.stack(module.correct).mean()
    torch.testing.assert_close(run.callback_metrics["accuracy"], expected, rtol=0, atol=1e-6)


@every_technique
def test_a_loss_that_takes_class_indices_only_is_served(technique):
    class IndexOnly(Host):
        def forward(self, x):
            return F.log_softmax(self.net(x), 1)

        def loss(self, logits, y):
            return nn.NLLLoss()(logits, y)

    module = IndexOnly()
    fit(TECHNIQUES[technique](), module)
    check(module, technique)


@every_technique
def test_the_loss_that_is_logged_is_the_users(technique):
    module = Host()
    run = fit(TECHNIQUES[technique](), module, limit_train_batches=1)
    start = Host()
    (x, y) = module.seen[0]
    torch.testing.assert_close(run.callback_metrics["loss"], F.cross_entropy(start(x), y))


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0, 1.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=["weight", "label_smoothing", "ignore_index", "sum"],
)
@every_technique
def test_another_loss_is_refused_before_it_is_replaced(technique, criterion, zero_head):
    """On a head of zeros all of them but the sum have the value of the plain loss."""

    class Other(Host):
        def __init__(self):
            super().__init__()
            if zero_head:
                nn.init.zeros_(self.net[1].weight)
                nn.init.zeros_(self.net[1].bias)

        def loss(self, logits, y):
            return criterion(logits, y)

    module = Other()
    with pytest.raises(RegularizationError, match='replaces="loss"'):
        fit(TECHNIQUES[technique](), module)
    assert len(module.seen) == 1


@pytest.mark.parametrize("ignored", [-100, -1, 255])
def test_labels_that_the_loss_ignores_do_not_count(ignored):
    class Ignores(Host):
        def loss(self, logits, y):
            return F.cross_entropy(logits, y, ignore_index=ignored)

        def training_step(self, batch, batch_idx):
            return self.loss(self(batch[0]), batch[1])

    labels = LABELS.masked_fill(torch.arange(64) % 5 == 1, ignored)
    module, plain = Ignores(), Host()
    fit([LabelSmoothing(0.2)], module, labels)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for x, y in zip(IMAGES.split(SIZE), labels.split(SIZE), strict=True):
        kept = y != ignored
        optimizer.zero_grad()
        F.cross_entropy(plain(x[kept]), y[kept], label_smoothing=0.2).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


@every_technique
def test_further_terms_of_the_loss_are_kept_where_asked(technique):
    class Several(Host):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.01 * self.net[1].weight.sum()

    module = Several()
    fit(TECHNIQUES[technique](replaces="term"), module)
    targets = distributions(TECHNIQUES[technique]())
    plain = Host()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for (x, _), q in zip(module.seen, targets, strict=True):
        optimizer.zero_grad()
        (F.cross_entropy(plain(x), q) + 0.01 * plain.net[1].weight.sum()).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("technique", ["mixup", "cutmix"])
@pytest.mark.parametrize("task", ["soft labels", "regression", "binary", "multilabel"])
def test_float_targets_are_mixed_in_the_batch_for_the_users_own_loss(technique, task):
    one_hot = F.one_hot(LABELS, CLASSES).float()
    targets = {
        "soft labels": one_hot,
        "regression": IMAGES.mean((1, 2, 3)),
        "binary": (LABELS > 1).float(),
        "multilabel": (IMAGES[:, 0, 0, :CLASSES] > 0).float(),
    }[task]
    losses = {
        "soft labels": F.cross_entropy,
        "regression": lambda z, y: F.mse_loss(z[:, 0], y),
        "binary": lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y),
        "multilabel": F.binary_cross_entropy_with_logits,
    }

    class Floats(Host):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return losses[task](self(batch[0]), batch[1])

    module = Floats()
    fit(TECHNIQUES[technique](), module, targets)
    # The mix of each batch, from the mix of its one-hot positions.
    mixes = shares(technique)
    for (_, y), mix, own in zip(module.seen, mixes, targets.split(SIZE), strict=True):
        torch.testing.assert_close(y, mix @ own, rtol=0, atol=1e-5)
    plain = Host()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for x, y in module.seen:
        optimizer.zero_grad()
        losses[task](plain(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


def shares(technique) -> list[torch.Tensor]:
    """Of which samples each mixed sample of a batch consists: (B, B) a batch."""

    class Reader(Host):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0].mean((2, 3)))
            return self.net[1].weight.sum() * 0

    positions = torch.eye(SIZE)[:, :, None, None].expand(SIZE, SIZE, 8, 8).repeat(4, 1, 1, 1)
    module = Reader()
    marked = TensorDataset(positions, torch.zeros(64, 1))
    trainer(TECHNIQUES[technique](), max_epochs=1).fit(module, DataLoader(marked, batch_size=SIZE))
    return module.seen


@every_technique
def test_soft_labels_are_smoothed_too(technique):
    class Soft(Host):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return self.loss(self(batch[0]), batch[1])

    module = Soft()
    fit(TECHNIQUES[technique](), module, F.one_hot(LABELS, CLASSES).float())
    expected = reference(module.seen, distributions(TECHNIQUES[technique]()))
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("technique", ["mixup", "cutmix"])
def test_binary_labels_that_are_integers_are_told_what_to_do(technique):
    class Binary(Host):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return F.binary_cross_entropy_with_logits(logits[:, 0], batch[1].float())

    with pytest.raises(RegularizationError, match="one column") as error:
        fit(TECHNIQUES[technique](), Binary(), (LABELS > 1).long())
    assert "y.float()" in error.value.cure


def test_regression_targets_are_not_smoothed():
    class Regression(Host):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[1])

    with pytest.raises(RegularizationError, match="LabelSmoothing"):
        fit([LabelSmoothing(0.2)], Regression(), torch.randn(64, CLASSES))


@pytest.mark.parametrize("technique", MIXING)
def test_a_label_per_pixel_is_refused(technique):
    class Segmenter(Host):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, CLASSES, 1)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    with pytest.raises(RegularizationError, match="one label per sample"):
        fit(TECHNIQUES[technique](), Segmenter(), torch.zeros(64, 8, 8, dtype=torch.long))


def test_labels_per_pixel_are_smoothed():
    class Segmenter(Host):
        smoothing = 0.0

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Conv2d(1, CLASSES, 1)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=self.smoothing)

    pixels = (IMAGES[:, 0] * 2).long() % CLASSES
    ours, native = Segmenter(), Segmenter()
    native.smoothing = 0.2
    fit([LabelSmoothing(0.2)], ours, pixels)
    fit([], native, pixels)
    torch.testing.assert_close(weights(ours), weights(native), rtol=0, atol=1e-6)


class DictData(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"pixel_values": IMAGES[index], "labels": LABELS[index], "name": f"image {index}"}


@every_technique
def test_dict_batches_are_served(technique):
    class Dicts(Host):
        def training_step(self, batch, batch_idx):
            assert batch["name"][0] == f"image {SIZE * batch_idx}"
            return super().training_step((batch["pixel_values"], batch["labels"]), batch_idx)

    module = Dicts()
    loader = DataLoader(DictData(), batch_size=SIZE)
    trainer(TECHNIQUES[technique](), max_epochs=1).fit(module, loader)
    check(module, technique)


@every_technique
def test_one_of_several_loaders_is_named_by_signals(technique):
    class TwoLoaders(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch["labeled"]
            logits = self(x)
            loss = F.cross_entropy(logits, y)
            self.seen.append((x, y))
            spread = self(batch["unlabeled"][0]).square().mean()
            return {"loss": loss + 0.1 * spread, "logits": logits}

    labeled = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=SIZE)
    unlabeled = DataLoader(TensorDataset(IMAGES.flip(0)), batch_size=SIZE)
    signals = Signals(inputs="batch.labeled.0", targets="batch.labeled.1")
    module = TwoLoaders()
    callbacks = TECHNIQUES[technique](signals=signals, replaces="term")
    loaders = CombinedLoader({"labeled": labeled, "unlabeled": unlabeled}, "min_size")
    trainer(callbacks, max_epochs=1).fit(module, loaders)
    assert torch.equal(torch.cat([y for _, y in module.seen]), LABELS)
    plain = Host()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    targets = distributions(TECHNIQUES[technique]())
    others = IMAGES.flip(0).split(SIZE)
    for (x, _), q, other in zip(module.seen, targets, others, strict=True):
        optimizer.zero_grad()
        (F.cross_entropy(plain(x), q) + 0.1 * plain(other).square().mean()).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


@every_technique
def test_manual_optimization_is_served_through_regularize(technique):
    class Manual(RegularizeMixin, Host):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            self.accuracy(logits, y)
            self.seen.append((x, y))
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.regularize(F.cross_entropy(logits, y), logits=logits))
            optimizer.step()

    module = Manual()
    fit(TECHNIQUES[technique](), module)
    check(module, technique)


@pytest.mark.parametrize("technique", ["mixup", "cutmix"])
def test_classes_that_are_masked_out_cost_nothing(technique):
    class Masked(Host):
        def forward(self, x):
            return torch.cat([self.net(x), torch.full((len(x), 1), -torch.inf)], 1)

    module = Masked()
    module.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES + 1)
    fit(TECHNIQUES[technique](), module)
    check(module, technique)


@every_technique
def test_explain_says_what_becomes_of_labels(technique):
    from lightning_reg.engine import explain

    table = explain(trainer(TECHNIQUES[technique]()))
    notes = list(table.columns[-1].cells)
    assert notes
    assert all("stay in the batch" in note for note in notes)
