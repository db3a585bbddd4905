"""Distillation of predictions: official values, limits, and what a teacher gives a student."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    ClassRelationDistillation,
    CutMix,
    DecoupledDistillation,
    HintonDistillation,
    LabelSmoothing,
    RandomTeacherDistillation,
)
from lightning_reg.engine import RegularizationError
from lightning_reg.functional import (
    class_relation_distillation,
    decoupled_distillation,
    hinton_distillation,
    interpolated_initialization,
    plackett_luce_distillation,
    random_teacher_distillation,
)
from tests.engine.simple import INPUTS, LABELS, Host, fit, loader, trainer, weights

STUDENT = torch.tensor(
    [[1.0, -0.5, 0.25, 2.0], [0.0, 1.5, -1.0, 0.5], [-0.75, 0.25, 3.0, 1.0]], dtype=torch.float64
)
TEACHER = torch.tensor(
    [[0.5, 1.0, -1.5, 0.0], [2.0, -0.5, 0.5, 1.0], [1.25, 0.0, -0.25, -2.0]], dtype=torch.float64
)
TRUE = torch.tensor([0, 3, 1])

# megvii-research/mdistiller@a08d46f, mdistiller/distillers/KD.py and DKD.py (alpha 1, beta 8).
KD = 1.5000550325787512
KD_GRADIENT = [-0.017257405770340573, -0.175982865038787, 0.06759542595422705, 0.12564484485490054]
DKD = 15.764944545904351
DKD_GRADIENT = [-0.017257405770340607, -1.9873397555350722, 0.6956405527694435, 1.3089566085359698]
# kleinzcy/Cr-KD-NCD@0f55bea, model/losses.py, with two known classes, temperatures 1 and 0.7.
RELATION = 1.0064336221807537
RELATION_GRADIENT = [
    0.027627313135956358,
    -0.08226729223027004,
    0.0041448893704934325,
    0.05049508972382027,
]


def _value_and_gradient(loss):
    student = STUDENT.clone().requires_grad_()
    value = loss(student)
    return value, torch.autograd.grad(value, student)[0]


def test_official_value_and_gradient_of_distillation():
    value, gradient = _value_and_gradient(lambda s: hinton_distillation(s, TEACHER, 4.0).mean())
    assert value.item() == pytest.approx(KD, rel=1e-12)
    torch.testing.assert_close(gradient[0], torch.tensor(KD_GRADIENT, dtype=torch.float64))


def test_official_value_and_gradient_of_decoupled_distillation():
    value, gradient = _value_and_gradient(
        lambda s: decoupled_distillation(s, TEACHER, TRUE, 1.0, 8.0, 4.0).mean()
    )
    assert value.item() == pytest.approx(DKD, rel=1e-12)
    torch.testing.assert_close(gradient[0], torch.tensor(DKD_GRADIENT, dtype=torch.float64))


def _relation(student):
    losses, gate = class_relation_distillation(student, TEACHER, 2, 0.7)
    return (gate * losses).sum() / gate.sum()


def test_official_value_and_gradient_of_class_relations():
    value, gradient = _value_and_gradient(_relation)
    assert value.item() == pytest.approx(RELATION, rel=1e-12)
    torch.testing.assert_close(gradient[0], torch.tensor(RELATION_GRADIENT, dtype=torch.float64))


def test_gradient_tends_to_the_difference_of_centred_logits():
    _, gradient = _value_and_gradient(lambda s: hinton_distillation(s, TEACHER, 1e4).sum())
    difference = STUDENT - TEACHER
    expected = (difference - difference.mean(1, keepdim=True)) / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_decoupled_at_its_special_weights_is_the_ordinary_loss():
    p = (TEACHER / 4).softmax(1).gather(1, TRUE[:, None]).squeeze(1)
    for row in range(3):
        ordinary = hinton_distillation(STUDENT[row : row + 1], TEACHER[row : row + 1], 4.0)
        beta = float(1 - p[row])
        args = (STUDENT[row : row + 1], TEACHER[row : row + 1], TRUE[row : row + 1])
        torch.testing.assert_close(decoupled_distillation(*args, 1.0, beta, 4.0), ordinary)


def test_decoupled_is_finite_where_both_are_certain():
    sure = 200 * F.one_hot(TRUE, 4).double()
    student = sure.clone().requires_grad_()
    value = decoupled_distillation(student, sure.roll(1, 1), TRUE, 1.0, 8.0, 1.0).sum()
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_ranking_with_all_weight_on_the_label_is_the_cross_entropy():
    teacher = 1e3 * F.one_hot(TRUE, 4).double()
    torch.testing.assert_close(
        plackett_luce_distillation(STUDENT, teacher, TRUE),
        F.cross_entropy(STUDENT, TRUE, reduction="none"),
    )


def test_ranking_without_weights_is_the_likelihood_of_the_order():
    """With equal weights 1/C the loss is -log P(order) / C; all orders together have P = 1."""
    student, total = STUDENT[0], 0.0
    for order in itertools.permutations(range(4)):
        # Nearly equal logits that fall along the order.
        teacher = torch.zeros(4, dtype=torch.float64)
        teacher[list(order)] = -1e-9 * torch.arange(4.0, dtype=torch.float64)
        label = torch.tensor([order[0]])
        loss = plackett_luce_distillation(student[None], teacher[None], label)
        total += float((-4 * loss).exp())
    assert total == pytest.approx(1.0, abs=1e-6)


def test_ranking_ignores_a_common_shift_and_the_names_of_classes():
    loss = plackett_luce_distillation(STUDENT, TEACHER, TRUE)
    torch.testing.assert_close(plackett_luce_distillation(STUDENT + 5, TEACHER, TRUE), loss)
    names = torch.tensor([2, 0, 3, 1])
    renamed = names.argsort()[TRUE]
    shuffled = plackett_luce_distillation(STUDENT[:, names], TEACHER[:, names], renamed)
    torch.testing.assert_close(shuffled, loss)


def test_ranking_is_convex_in_the_students_logits():
    """The paper's claim, which pairs of choices in another order do not change."""
    for row in range(3):
        args = TEACHER[row : row + 1], TRUE[row : row + 1]
        hessian = torch.autograd.functional.hessian(
            lambda s, args=args: plackett_luce_distillation(s[None], *args).sum(),
            3 * STUDENT[row],
        )
        values = torch.linalg.eigvalsh(hessian)
        # A common shift changes nothing: one eigenvalue is 0.
        assert abs(values[0]) < 1e-12
        assert values[1] > 1e-6


def test_detached_gate_has_no_gradient_where_both_agree():
    student = TEACHER.clone().requires_grad_()
    losses, gate = class_relation_distillation(student, TEACHER, 2, 0.7)
    value = (gate.detach() * losses).sum() / gate.detach().sum()
    (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
    assert gradient.abs().max() < 1e-12
    through_gate = torch.autograd.grad((gate * losses).sum() / gate.sum(), student)[0]
    assert through_gate.abs().max() > 1e-3


def test_only_unlabeled_samples_are_related():
    labels = LABELS.clone()
    labels[::2] = -1
    technique = ClassRelationDistillation(
        1.0, known=2, source="random", temperature=1.0, unlabeled=-1
    )
    seen = []
    original = technique._counted
    technique._counted = lambda step, gate: seen.append(original(step, gate)) or seen[-1]

    class Ignoring(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            return {"loss": F.cross_entropy(logits, y, ignore_index=-1), "logits": logits}

    trainer([technique], max_steps=1).fit(
        Ignoring(), DataLoader(TensorDataset(INPUTS, labels), batch_size=8)
    )
    assert seen[0].tolist() == [1.0, 0.0] * 4


# ---------------------------------------------------------------------- the mechanism


def _teacher(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))


def test_a_given_teacher_stays_as_it_is():
    teacher = _teacher()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    fit([HintonDistillation(1.0, teacher=teacher)], max_steps=4)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_first_step_has_the_gradient_of_the_formula():
    teacher = _teacher().eval()
    module, _ = fit([HintonDistillation(2.0, teacher=teacher, temperature=3.0)], max_steps=1)
    expected = Host()
    x, y = INPUTS[:16], LABELS[:16]
    logits = expected(x)
    p = (teacher(x) / 3).softmax(1).detach()
    kl = (p * (p.log() - (logits / 3).log_softmax(1))).sum(1).mean()
    (F.cross_entropy(logits, y) + 2 * 9 * kl).backward()
    optimizer = expected.configure_optimizers()
    optimizer.step()
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-5, atol=1e-6)


def test_another_teacher_on_resume_is_refused(tmp_path):
    run = trainer([HintonDistillation(1.0, teacher=_teacher())], max_steps=2)
    run.fit(Host(), loader())
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    same = trainer([HintonDistillation(1.0, teacher=_teacher())], max_steps=4)
    same.fit(Host(), loader(), ckpt_path=path, weights_only=False)
    other = trainer([HintonDistillation(1.0, teacher=_teacher(4))], max_steps=4)
    with pytest.raises(RegularizationError, match="teacher is not the one of the checkpoint"):
        other.fit(Host(), loader(), ckpt_path=path, weights_only=False)


def test_a_given_teacher_is_not_in_the_checkpoint():
    technique = HintonDistillation(1.0, teacher=_teacher())
    fit([technique], max_steps=1)
    state = technique.state_dict()
    assert state["teacher"] == {}
    assert state["mark"].shape == (6, 2)
    assert technique.teacher is technique.given


def test_a_teacher_of_other_classes_is_named():
    with pytest.raises(RegularizationError, match="teacher answers 16 rows of 3 classes"):
        fit([HintonDistillation(1.0, teacher=nn.Linear(8, 3))], max_steps=1)


@pytest.mark.parametrize("technique", [HintonDistillation, DecoupledDistillation])
def test_teaches_beside_mixed_and_smoothed_labels(technique):
    """The teacher sees the mixed inputs; the label of a mixture is its larger part."""
    seen = []

    class Watched(technique):
        def divergence(self, student, teacher, labels):
            seen.append((student.shape, None if labels is None else labels.shape))
            return super().divergence(student, teacher, labels)

    class Images(Host):
        def forward(self, x):
            return super().forward(x.flatten(1))

    teacher = nn.Sequential(nn.Flatten(), _teacher())
    data = TensorDataset(INPUTS.view(-1, 1, 1, 8), LABELS)
    callbacks = [Watched(1.0, teacher=teacher), CutMix(1.0), LabelSmoothing(0.1)]
    trainer(callbacks, max_steps=2).fit(Images(), DataLoader(data, batch_size=8))
    expected = None if technique is HintonDistillation else (8,)
    assert seen == [((8, 4), expected)] * 2


# ---------------------------------------------------------------------- random teachers


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_interpolated_weights_keep_their_variance(alpha):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(200_000, generator=generator) for _ in range(2))
    mixed = interpolated_initialization(one, other, alpha)
    # Four standard errors of a variance estimate.
    assert mixed.var().item() == pytest.approx(1.0, abs=4 * (2 / 200_000) ** 0.5)


def test_at_the_teacher_nothing_moves():
    """The official cross-entropy has the same gradient as the divergence: none at the teacher."""
    technique = RandomTeacherDistillation(alpha=0.0)

    class OnlyTeacher(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            return {"loss": 0.0 * F.cross_entropy(logits, y), "logits": logits}

    module = OnlyTeacher()
    trainer([technique], max_steps=4).fit(module, loader())
    torch.testing.assert_close(
        weights(module), weights(technique.teacher.network), rtol=0, atol=1e-6
    )


def test_divergence_is_the_cross_entropy_less_the_entropy():
    p = (TEACHER / 0.5).softmax(1)
    expected = -(p * (STUDENT / 2).log_softmax(1)).sum(1) + (p * p.log()).sum(1)
    torch.testing.assert_close(random_teacher_distillation(STUDENT, TEACHER, 0.5, 2.0), expected)
