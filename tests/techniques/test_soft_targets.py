"""What labels of mixed samples mean to each technique that looks at labels.

A batch is mixed by Mixup or CutMix. Two runs without mixing then take the same mixed inputs, one
with the labels of the first partners, one with those of the second: where a loss is linear in its
labels, the mixed run has the mixture of their steps, in the value and in every weight.
"""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_reg as reg
from lightning_reg import functional
from lightning_reg.engine import UnsupportedError
from lightning_reg.engine.memory import IndexedDataset
from lightning_reg.metrics.calibration import CalibrationError, calibration_error
from lightning_reg.monitors import OverfitMonitor
from tests.engine.simple import trainer

CLASSES, SIZE = 4, 16
_generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(SIZE, 1, 4, 4, generator=_generator)
LABELS = torch.randint(0, CLASSES, (SIZE,), generator=_generator)
COUNTS = [40.0, 20.0, 10.0, 5.0]
MIXERS = {"mixup": lambda: reg.Mixup(1.0), "cutmix": lambda: reg.CutMix(1.0)}
every_mixer = pytest.mark.parametrize("mixer", list(MIXERS))


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    """With which both mixers draw a real mixture."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


class Host(L.LightningModule):
    """A linear classifier of images; keeps what it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(16, 8), nn.Linear(8, CLASSES)
        self.seen = []

    def forward(self, x):
        return self.head(self.encoder(x.flatten(1)).tanh())

    def training_step(self, batch, batch_idx):
        x, y = batch[:2]
        logits = self(x)
        self.seen.append((x.detach(), logits.detach()))
        self.labels = y
        return F.cross_entropy(logits, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class Mixed(L.Callback):
    """Keeps how the batch was mixed."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pipeline = next(c.pipeline for c in trainer.callbacks if hasattr(c, "pipeline"))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.mixes = list(self.pipeline.step.mixes)


def _step(techniques, x=IMAGES, y=LABELS, module=None, indexed=False, companions=()):
    module = module or Host()
    before = _weights(module)
    data = TensorDataset(x, y)
    loader = DataLoader(IndexedDataset(data) if indexed else data, batch_size=SIZE)
    run = trainer([*techniques, *companions], max_steps=1)
    run.fit(module, loader)
    return _weights(module) - before, run.callback_metrics, module


def _weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def _mixed(technique, mixer, **settings):
    """The step on a mixed batch, and how it was mixed."""
    kept = Mixed()
    moved, logged, module = _step([technique, MIXERS[mixer]()], companions=[kept], **settings)
    permutation, lam = kept.mixes[0]
    assert 0.1 < float(lam[0]) < 0.9
    return moved, logged, module.seen[0], permutation, float(lam[0])


def _teacher():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def _self_distillation():
    technique = reg.WeightedSelfDistillation(0.4)
    _step([technique])
    return technique


LINEAR = {
    "acls": lambda: reg.ACLS(0.5),
    "class balanced": lambda: reg.ClassBalancedLoss(class_counts=COUNTS),
    "class relation": lambda: reg.ClassRelationDistillation(0.5, known=3, source="random"),
    "confidence penalty": lambda: reg.ConfidencePenalty(0.3),
    "dual focal": lambda: reg.FocalLoss(gamma=2.0),
    "generalized cross-entropy": lambda: reg.GeneralizedCrossEntropy(q=0.7),
    "hinton": lambda: reg.HintonDistillation(2.0, teacher=_teacher()),
    "label smoothing": lambda: reg.LabelSmoothing(0.2),
    "logit adjusted": lambda: reg.LogitAdjustedLoss(class_counts=COUNTS),
    "mdca": lambda: reg.MDCA(0.0),
    "norm and direction": lambda: reg.NormDirectionDistillation(
        2.0,
        layer="encoder",
        teacher=_teacher(),
        teacher_layer="1",
        class_means=torch.arange(32.0).view(4, 8).sin(),
    ),
    "self-distillation": _self_distillation,
    "stable max": lambda: reg.StableMax(),
    "symmetric, cross-entropy half": lambda: reg.SymmetricCrossEntropy(alpha=1.0, beta=0.0),
}


@every_mixer
@pytest.mark.parametrize("name", list(LINEAR))
def test_step_of_a_mixture_is_the_mixture_of_steps(name, mixer):
    moved, logged, (x, _), permutation, lam = _mixed(LINEAR[name](), mixer)
    one, first, _ = _step([LINEAR[name]()], x)
    other, second, _ = _step([LINEAR[name]()], x, LABELS[permutation])
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(moved, lam * one + (1 - lam) * other, rtol=1e-4, atol=2e-6)
    for key in first.keys() & logged.keys():
        if key.startswith("reg/"):
            expected = lam * float(first[key]) + (1 - lam) * float(second[key])
            assert float(logged[key]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


LARGEST = {
    "decoupled": lambda: reg.DecoupledDistillation(1.0, teacher=_teacher()),
    "plackett-luce": lambda: reg.PlackettLuceDistillation(1.0, teacher=_teacher()),
}


@every_mixer
@pytest.mark.parametrize("name", list(LARGEST))
def test_a_ranking_or_a_target_class_takes_the_larger_part(name, mixer):
    _, logged, (x, _), permutation, lam = _mixed(LARGEST[name](), mixer)
    larger = LABELS if lam > 0.5 else LABELS[permutation]
    _, expected, _ = _step([LARGEST[name]()], x, larger)
    key = next(key for key in expected if key.startswith("reg/"))
    assert float(logged[key]) == pytest.approx(float(expected[key]), rel=1e-5)


def _symmetric(logits, q):
    p = logits.softmax(1)
    return (-0.1 * q * p.log() - p * q.clamp_min(1e-4).log()).sum(1).mean()


def _margins(logits, q):
    margins = torch.tensor(COUNTS) ** -0.25
    lowered = logits - q * 0.5 * margins / margins.max()
    return -(q * (3 * lowered).log_softmax(1)).sum(1).mean()


def _robust(logits, q):
    own = (logits * q).sum(1, keepdim=True)
    margins = logits - own + 0.3 * (1 - q)
    return ((margins / 2).exp().mean(1).log() * 2).mean()


def _mass(logits, q):
    confidence, top = logits.softmax(1).max(1)
    return confidence, q.gather(1, top[:, None]).squeeze(1)


AS_THEY_ARE = {
    "symmetric cross-entropy": (lambda: reg.SymmetricCrossEntropy(), _symmetric),
    "margins": (
        lambda: reg.LabelDistributionAwareMargin(class_counts=COUNTS, scale=3.0),
        _margins,
    ),
    "robust": (
        lambda: reg.LDRLoss(lam=2.0, margin=0.3, normalization="none"),
        _robust,
    ),
    "correctness": (
        lambda: reg.CorrectnessAwarePenalty(1.0, balanced=False),
        lambda z, q: (_mass(z, q)[0] - _mass(z, q)[1]).square().mean(),
    ),
    "kernel calibration": (
        lambda: reg.MMCE(1.0),
        lambda z, q: functional.mmce(*_mass(z, q)),
    ),
    "soft bins": (
        lambda: reg.SoftBinnedECE(1.0),
        lambda z, q: functional.soft_binned_ece(*_mass(z, q)),
    ),
    "class differences": (
        lambda: reg.MDCA(1.0),
        lambda z, q: (z.softmax(1).mean(0) - q.mean(0)).abs().mean(),
    ),
}


@pytest.mark.parametrize("name", list(AS_THEY_ARE))
def test_a_definition_for_distributions_is_taken_at_the_mixed_label(name):
    make, definition = AS_THEY_ARE[name]
    _, logged, (_, logits), permutation, lam = _mixed(make(), "mixup")
    one_hot = F.one_hot(LABELS, CLASSES).float()
    expected = definition(logits, lam * one_hot + (1 - lam) * one_hot[permutation])
    key = next(key for key in logged if key.startswith("reg/") and "mix" not in key)
    assert float(logged[key]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_weights_of_samples_come_from_the_loss_of_the_mixed_label():
    moved, _, (x, _), permutation, lam = _mixed(reg.KLRobustReweighting(lam=0.5), "mixup")
    host = Host()
    logits = host(x)
    one_hot = F.one_hot(LABELS, CLASSES).float()
    q = lam * one_hot + (1 - lam) * one_hot[permutation]
    losses = -(q * logits.log_softmax(1)).sum(1)
    ((losses.detach() / 0.5).softmax(0) * losses).sum().backward()
    expected = torch.cat([-p.grad.flatten() for p in host.parameters()])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_a_mixed_sample_belongs_to_its_classes_by_their_shares():
    technique = reg.DiscreteInfomax(0.5, layer="encoder", entries=2)
    _, logged, (x, _), permutation, lam = _mixed(technique, "mixup")
    p = Host().encoder(x.flatten(1)).view(SIZE, 2, 4).softmax(-1)
    one_hot = F.one_hot(LABELS, CLASSES).float()
    q = lam * one_hot + (1 - lam) * one_hot[permutation]
    information = torch.zeros(2)
    for c in range(CLASSES):
        mean = (q[:, c, None, None] * p).sum(0) / q[:, c].sum()
        information += q[:, c].mean() * (mean * (mean / p.mean(0)).log()).sum(-1)
    joint = torch.einsum("nk,nl->kl", p[:, 0], p[:, 1]) / SIZE
    apart = p.mean(0)[0][:, None] * p.mean(0)[1][None]
    expected = 2 * (joint * (joint / apart).log()).sum() - information.sum()
    value = float(logged["reg/discrete_infomax"])
    assert value == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_information_of_one_hot_shares_is_that_of_class_indices():
    codes = torch.randn(12, 2, 3, dtype=torch.float64, generator=_generator)
    labels = torch.randint(0, 3, (12,), generator=_generator)
    soft = functional.discrete_infomax(codes, F.one_hot(labels, 5).double())
    torch.testing.assert_close(soft, functional.discrete_infomax(codes, labels))


REFUSED = {
    "early learning": lambda: reg.EarlyLearning(3.0),
    "past predictions": lambda: reg.ProgressiveSelfDistillation(0.8, epochs=2),
    "selected samples": lambda: reg.ESAM(),
    "gradients of samples": lambda: reg.UDIM(0.05, layer="encoder", start=0.0),
}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["early learning", "past predictions"])
def test_what_is_kept_of_each_sample_refuses_mixtures(name, soft):
    labels = F.one_hot(LABELS, CLASSES).float() if soft else LABELS
    with pytest.raises(UnsupportedError, match="of this batch are mixed"):
        _step([REFUSED[name](), reg.Mixup(1.0)], y=labels, indexed=True)


@pytest.mark.parametrize("name", ["selected samples", "gradients of samples"])
def test_what_compares_samples_refuses_mixtures(name):
    with pytest.raises(UnsupportedError, match="of this batch are mixed"):
        _step([REFUSED[name](), reg.Mixup(1.0)])


# ---------------------------------------------------------------------- one run


class Measured(Host):
    """Updates metrics with the labels that it gets."""

    def __init__(self):
        super().__init__()
        self.ece = CalibrationError(num_classes=CLASSES, from_logits=True)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        logits, y = self.seen[-1][1].detach(), batch[1]
        self.ece.update(logits, y)
        self.accuracy.update(logits, y.argmax(1) if y.is_floating_point() else y)
        return loss

    def validation_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self(batch[0]), batch[1]), "logits": self(batch[0])}


def _techniques(mixer, teacher):
    return [
        MIXERS[mixer](),
        reg.LabelSmoothing(0.1),
        reg.FocalLoss(gamma=2.0),
        reg.HintonDistillation(1.5, teacher=teacher, temperature=2.0),
        reg.MDCA(0.7),
    ]


@every_mixer
@pytest.mark.parametrize("soft", [False, True])
def test_mixing_smoothing_a_loss_a_penalty_a_teacher_and_metrics_in_one_run(mixer, soft):
    teacher, kept, module = _teacher(), Mixed(), Measured()
    one_hot = F.one_hot(LABELS, CLASSES).float()
    # A sharp head, so that predictions are not all near 1/4.
    with torch.no_grad():
        module.head.weight.mul_(6)
    targets = one_hot if soft else LABELS
    moved, _, _ = _step(_techniques(mixer, teacher), y=targets, module=module, companions=[kept])
    x, logits = module.seen[0]
    if soft:
        # Mixed in the batch, as the step has seen it.
        q = module.labels
        assert (q.max(1).values < 1).any()
    else:
        permutation, lam = kept.mixes[0][0], float(kept.mixes[0][1][0])
        q = lam * one_hot + (1 - lam) * one_hot[permutation]
    host = Measured()
    with torch.no_grad():
        host.head.weight.mul_(6)
    z = host(x)
    p, smooth = z.softmax(1), 0.9 * q + 0.1 / CLASSES
    focal = (smooth * (1 - p) ** 2 * -p.log()).sum(1).mean()
    taught = (teacher(x) / 2).softmax(1).detach()
    kl = (taught * (taught.log() - (z / 2).log_softmax(1))).sum(1).mean()
    difference = (p.mean(0) - q.mean(0)).abs().mean()
    (focal + 1.5 * 4 * kl + 0.7 * difference).backward()
    expected = torch.cat([-w.grad.flatten() for w in host.parameters()])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    # Metrics see what the step sees: shares of soft labels, or the classes of the batch.
    given = q if soft else LABELS
    ece = calibration_error(logits, given, from_logits=True)
    torch.testing.assert_close(module.ece.compute(), ece, rtol=1e-5, atol=1e-6)
    right = logits.argmax(1) == (q.argmax(1) if soft else LABELS)
    torch.testing.assert_close(module.accuracy.compute(), right.float().mean())


@every_mixer
def test_the_training_side_of_a_gap_is_measured_on_mixed_labels(mixer):
    kept, module = Mixed(), Measured()
    monitor = OverfitMonitor(figures=False)
    data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=SIZE)
    run = trainer([MIXERS[mixer](), monitor, kept], max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, data, data)
    (permutation, lam), (_, logits) = kept.mixes[0], module.seen[0]
    one_hot, weight = F.one_hot(LABELS, CLASSES).float(), lam[:, None].float()
    q = weight * one_hot + (1 - weight) * one_hot[permutation]
    sides = monitor.history["val"][-1]
    assert sides["train_loss"] == pytest.approx(float(F.cross_entropy(logits, q)), rel=1e-5)
    right = q.gather(1, logits.argmax(1, keepdim=True)).mean()
    assert sides["train_accuracy"] == pytest.approx(float(right), rel=1e-5)
