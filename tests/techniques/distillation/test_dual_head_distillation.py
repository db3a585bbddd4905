"""The divergence, the one-sided alignment, and a student that does not keep its teacher."""

import copy
import pickle

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.distillation.dual_head_distillation import (
    DualHeadDistillationMixin,
    alignment_factor,
    dual_head_distillation,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, loader, trainer, weights

SCORES = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.2, 0.1, -0.3, 0.4], [-1.0, 2.5, 0.0, 1.5]])
TEACHER = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 0.0, -0.5, 0.3], [0.0, 0.0, 1.0, -1.0]])


# ---------------------------------------------------------------------- the divergence


def test_equals_the_official_code():
    # penghui-yang/DHKD@7976c69 distiller_zoo/BinaryKLNorm.py at temperature 2.
    s = SCORES.clone().requires_grad_()
    value = dual_head_distillation(s, TEACHER).mean()
    value.backward()
    assert value.item() == pytest.approx(1.08917058, abs=1e-6)
    row = [0.04145102, -0.08163954, -0.11945247, 0.21171631]
    np.testing.assert_allclose(s.grad[0].numpy(), row, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_is_the_divergence_of_a_coin_from_an_even_one(temperature):
    s, t = SCORES.double(), TEACHER.double()
    q = ((s - t) / temperature).sigmoid()
    kl = 0.5 * (0.5 / q).log() + 0.5 * (0.5 / (1 - q)).log()
    expected = temperature**2 * kl.sum(1)
    torch.testing.assert_close(dual_head_distillation(s, t, temperature), expected)


def test_is_zero_for_equal_logits_and_positive_otherwise():
    assert dual_head_distillation(SCORES, SCORES).abs().max() < 1e-6
    assert (dual_head_distillation(SCORES, TEACHER) > 0).all()


def test_is_an_eighth_of_the_squared_distance_at_a_high_temperature():
    s, t = SCORES.double(), TEACHER.double()
    expected = (s - t).square().sum(1) / 8
    torch.testing.assert_close(dual_head_distillation(s, t, 1e4), expected, rtol=1e-5, atol=1e-6)


def test_is_finite_for_far_apart_logits():
    s = torch.full((1, 2), 1e4, requires_grad=True)
    value = dual_head_distillation(s, torch.zeros(1, 2))
    value.sum().backward()
    assert value.item() == pytest.approx(4 * 2 * (5e3 / 2 - np.log(2)), rel=1e-5)
    assert s.grad.isfinite().all()


# ---------------------------------------------------------------------- the alignment


def test_conflict_is_projected_away():
    task, other = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([-3.0, 1.0, 0.5])
    projected = other - (other @ task) / (task @ task) * task
    assert projected @ task == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(alignment_factor(task, other) * task + other, task + projected)


def test_agreement_is_left_alone():
    task = torch.tensor([2.0, 0.0, 1.0])
    assert alignment_factor(task, task) == 1
    assert alignment_factor(task, torch.zeros(3)) == 1


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_gradients_without_a_direction_leave_the_factor_at_one(bad):
    assert alignment_factor(torch.full((3,), bad), torch.tensor([-1.0, 2.0, 0.0])) == 1


def test_equals_the_official_alignment():
    # penghui-yang/DHKD@7976c69 helper/optimizer.py, ga_backward, on the same two losses.
    h = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    w = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], requires_grad=True)
    head = torch.tensor([1.0, 0.7], requires_grad=True)
    aux = torch.tensor([0.3, -0.2], requires_grad=True)
    z = h @ w
    task = ((z * head).sum(1) - torch.tensor([1.0, 2.0])).square().mean()
    other = ((z * aux).sum(1) - torch.tensor([3.0, -4.0])).square().mean()
    gradients = []
    for loss in (task, other):
        found = torch.autograd.grad(loss, (w, head, aux), retain_graph=True, allow_unused=True)
        parts = [torch.zeros(2) if g is None else g.flatten() for g in found]
        gradients.append(torch.cat(parts))
    (alignment_factor(*gradients) * task + other).backward()
    expected = [[0.74336588, 0.98160613], [-4.05541182, -6.52878857]]
    np.testing.assert_allclose(w.grad.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(head.grad.numpy(), [7.83627796, -1.21597409], atol=1e-5)
    np.testing.assert_allclose(aux.grad.numpy(), [-10.125, 2.25], atol=1e-5)


# ---------------------------------------------------------------------- the mixin


def make_teacher():
    """One whose gradient is against that of the labels, which few are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(40)
        layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5)]
        network = nn.Sequential(*layers, nn.Linear(16, 4))
    with torch.no_grad():
        network[-1].weight *= 8
    return network


class Student(DualHeadDistillationMixin, L.LightningModule):
    """A backbone with two heads."""

    def __init__(self, lr=0.1, teacher=None, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.backbone, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4)
        given = make_teacher() if teacher is None else teacher
        self.add_dual_head(given, in_features=16, num_classes=4, **settings)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        hidden = self.backbone(batch[0])
        loss = F.cross_entropy(self.head(hidden), batch[1])
        return self.distill(loss, features=hidden, inputs=batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Manual(Student):
    automatic = False

    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def train(module, epochs=2, batch_size=16, **settings):
    run = trainer(max_epochs=epochs, **settings)
    run.fit(module, loader(batch_size))
    return weights(module), run


def reference_step(module, strength, align):
    """The official step, written with two gradients as vectors."""
    teacher = make_teacher().eval()
    hidden = module.backbone(INPUTS)
    task = F.cross_entropy(module.head(hidden), LABELS)
    x = (module.dual_head(hidden) - teacher(INPUTS).detach()) / 2
    other = strength * 4 * (torch.log(torch.cosh(x / 2))).sum(1).mean()
    parameters = list(module.parameters())
    flat = []
    for loss in (task, other):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        flat.append(torch.cat([(p * 0 if g is None else g).flatten() for p, g in pairs]))
    dot = flat[0] @ flat[1]
    if align and dot < 0:
        flat[1] = flat[1] - dot / flat[0].square().sum() * flat[0]
    return weights(module) - 0.1 * (flat[0] + flat[1]).detach(), dot


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("strength", [0.3, 5.0])
def test_one_step_is_the_official_one(align, strength):
    settings = {"strength": strength, "align": align}
    expected, dot = reference_step(Student(**settings), strength, align)
    trained, _ = train(Student(**settings), epochs=1, batch_size=64)
    assert dot < 0, "the case shows nothing unless the gradients conflict"
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)


def test_manual_optimization_trains_the_same():
    ours, _ = train(Manual(strength=2.0))
    torch.testing.assert_close(ours, train(Student(strength=2.0))[0], rtol=0, atol=1e-6)


def test_teacher_is_no_part_of_the_student():
    module = Student()
    _, run = train(module)
    names = dict(module.named_parameters())
    assert set(names) == {
        *(f"backbone.0.{n}" for n in ("weight", "bias")),
        *(f"{head}.{n}" for head in ("head", "dual_head") for n in ("weight", "bias")),
    }
    assert module.state_dict().keys() == names.keys()
    assert len(run.optimizers[0].param_groups[0]["params"]) == 6


def test_teacher_stays_as_it_was_in_eval_mode():
    teacher = make_teacher()
    module = Student(teacher=teacher)
    train(module)
    assert not teacher.training
    assert teacher[1].num_batches_tracked == 0
    assert torch.equal(weights(teacher), weights(make_teacher()))


def test_second_head_is_not_used_at_inference():
    module = Student()
    train(module)
    said = module.eval()(INPUTS)
    del module.dual_head
    assert torch.equal(module(INPUTS), said)


def test_only_the_second_head_learns_from_the_teacher_without_alignment():
    hidden = Student().backbone(INPUTS).detach()
    module = Student(align=False)
    loss = module.distill(F.cross_entropy(module.head(hidden), LABELS), hidden, INPUTS)
    loss.backward()
    expected = torch.autograd.grad(
        F.cross_entropy(module.head(hidden), LABELS), module.head.weight
    )[0]
    torch.testing.assert_close(module.head.weight.grad, expected)
    assert module.dual_head.weight.grad.abs().sum() > 0


def test_strength_zero_is_the_task_alone():
    class Bare(Student):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    assert torch.equal(train(Student(strength=0.0))[0], train(Bare(strength=0.0))[0])


def test_nonlinear_head_is_that_of_the_official_code():
    head = Student(nonlinear=True).dual_head
    kinds = [type(part).__name__ for part in head]
    assert kinds == ["Linear", "Dropout", "BatchNorm1d", "ReLU", "Linear"]
    assert (head[0].out_features, head[1].p) == (200, 0.1)


def test_logs_the_divergence_and_the_factor():
    _, run = train(Student(lr=0.0, strength=5.0), epochs=1, batch_size=64)
    module, teacher = Student(strength=5.0), make_teacher().eval()
    said = module.dual_head(module.backbone(INPUTS))
    expected = dual_head_distillation(said, teacher(INPUTS)).mean().item()
    assert run.callback_metrics["reg/dual_head_distillation"].item() == pytest.approx(expected)
    assert run.callback_metrics["reg/dual_head_distillation_factor"] > 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_teacher_follows_the_precision(precision):
    module = Student()
    start = weights(module)
    trained, _ = train(module, precision=precision)
    assert trained.isfinite().all()
    assert not torch.equal(trained.to(start), start)


def test_fp16_scale_does_not_change_the_alignment():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    half, _ = train(Student(strength=5.0), epochs=1, batch_size=64, plugins=[plugin])
    full, _ = train(Student(strength=5.0), epochs=1, batch_size=64)
    # One step of rounding; a scale that only one of the losses has would be off by a thousand.
    torch.testing.assert_close(half, full, rtol=0, atol=1e-3)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_student_can_be_copied_with_its_teacher(how):
    module = Student(strength=2.0)
    assert torch.equal(train(how(module))[0], train(module)[0])


def test_teacher_of_other_classes_is_named():
    with pytest.raises(ArgumentError, match=r"DualHeadDistillationMixin.*\(16, 3\).*num_classes"):
        train(Student(teacher=nn.Linear(8, 3)))


def test_distill_before_the_head_is_made_is_named():
    class Forgot(DualHeadDistillationMixin, L.LightningModule):
        pass

    with pytest.raises(ArgumentError, match=r"add_dual_head"):
        Forgot().distill(torch.zeros(()), torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize(
    "arguments", [{"strength": -1.0}, {"temperature": 0.0}, {"teacher": "net"}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=r"DualHeadDistillationMixin.*add_dual_head"):
        Student(**arguments)


# ---------------------------------------------------------------------- ranks


def train_on_ranks(distributed, settings):
    module, data = Student(**settings), TensorDataset(INPUTS, LABELS)
    sampler = DistributedSampler(data, shuffle=False) if distributed else None
    run = (rank_trainer if distributed else trainer)(max_epochs=2)
    run.fit(module, DataLoader(data, batch_size=8 if distributed else 16, sampler=sampler))
    return weights(module), run.callback_metrics["reg/dual_head_distillation_factor"]


@pytest.mark.parametrize("settings", [{"strength": 5.0}, {"strength": 1.0, "align": False}])
def test_two_ranks_train_as_one_process_with_the_joint_batch(settings, ranks):
    (first, factor), (second, _) = ranks.run(train_on_ranks, True, settings)
    joint, joint_factor = train_on_ranks(False, settings)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, joint, rtol=0, atol=1e-5)
    torch.testing.assert_close(factor, joint_factor, rtol=0, atol=1e-4)


def test_strength_zero_has_no_unused_parameter_on_ranks(ranks):
    class_settings = {"strength": 0.0}
    first, second = ranks.run(train_without, class_settings)
    assert torch.equal(first, second)


def train_without(settings):
    module = Student(**settings)
    rank_trainer(max_epochs=1).fit(module, loader(8))
    return weights(module)
