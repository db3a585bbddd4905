"""Two teachers: the official trajectory of both balances, their fixed points, and the passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import MTARD, ConfidencePenalty
from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.functional import balanced_weights, matched_temperatures, mtard, pgd_attack
from tests.engine.simple import INPUTS, LABELS, Host, fit, loader, trainer, weights

# zhaoshiji123/MTARD-extension@93506d6, resnet18_mtard_cifar10.py: its balances and its loss, run
# for four steps on the logits below: loss, clean weight, clean and robust temperature, and the
# gradients by the first row of clean and the last of adversarial logits.
OFFICIAL = [
    (
        (0.06624630957897823, 0.5, 1.001, 1.0),
        [0.003992525790670762, -0.016505359670478826, 0.009007977961082754, 0.0035048559187253053],
        [-0.009211206799738381, 0.004588722343371648, 0.005711103708137745, -0.001088619251771013],
    ),
    (
        (0.05808491809102524, 0.49660350468520625, 1.002, 1.0),
        [-0.014630426328462651, 0.009181530955183113, 0.0030471576277583874, 0.0024017377455211562],
        [0.00016308591843373872, -0.011400875560423837, 0.008778907978841207, 0.00245888166314889],
    ),
    (
        (0.05953767895077989, 0.4941404111339703, 1.003, 1.0),
        [-0.0067105641737335514, 0.0027594780859098137, 0.0013913558370493, 0.0025597302507743935],
        [0.006609580758984837, -0.0008170643223902079, -0.012375847333524627, 0.006583330896929996],
    ),
    (
        (0.07072394599481688, 0.4921080064165555, 1.004, 1.0),
        [0.007616997069795271, 0.003609209315031226, -0.01466870274637572, 0.003442496361549219],
        [-0.00980900796741265, 0.0064339585186284935, -0.005619535352843796, 0.008994584801627944],
    ),
]


def _logits(index, scale):
    places = torch.arange(12, dtype=torch.float64).view(3, 4)
    return scale * torch.sin(places * (1.3 + 0.4 * index) + index)


def _entropy(logits):
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def test_official_losses_gradients_and_balances():
    """Means over four classes there, and 1e-5 in a logarithm, which moves the fifth digit."""
    w = torch.full((2,), 0.5, dtype=torch.float64)
    tau, initial = torch.ones(2, dtype=torch.float64), None
    for step, (numbers, clean_gradient, robust_gradient) in enumerate(OFFICIAL):
        students = [_logits(step + shift, 1.0).requires_grad_() for shift in (0, 0.5)]
        teachers = [_logits(step + 0.2, 3.0), _logits(step + 0.7, 1.0)]
        softened = [t / x for t, x in zip(teachers, tau, strict=True)]
        losses = torch.stack([mtard(s, t).mean() for s, t in zip(students, softened, strict=True)])
        entropies = torch.stack(
            [-(t.softmax(1) * t.log_softmax(1)).sum(1).mean() for t in softened]
        )
        initial = losses.detach() if initial is None else initial
        w = balanced_weights(w, losses.detach(), initial, 0.025)
        value = (w * losses).sum() / 4
        gradients = torch.autograd.grad(value, students)
        tau = matched_temperatures(tau, entropies, 0.001)
        found = torch.tensor([value, w[0], *tau], dtype=torch.float64)
        expected = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=3e-4, atol=1e-5)
        for gradient, row in (
            (gradients[0][0], clean_gradient),
            (gradients[1][2], robust_gradient),
        ):
            expected = torch.tensor(row, dtype=torch.float64)
            torch.testing.assert_close(gradient, expected, rtol=3e-4, atol=1e-7)


def test_weights_approach_the_shares_of_constant_losses_geometrically():
    losses, initial = torch.tensor([3.0, 2.0]).double(), torch.tensor([2.0, 4.0]).double()
    w, shares = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.75, 0.25]).double()
    for t in range(1, 6):
        w = balanced_weights(w, losses, initial, 0.1)
        torch.testing.assert_close(w, shares + 0.9**t * (0.5 - shares))


def test_temperatures_move_until_entropies_are_equal():
    """Logits of scale 1 and 3 have equal entropy at temperatures of 1 and 3."""
    logits, tau = _logits(0, 1.0), torch.ones(2)
    for _ in range(400):
        softened = logits / tau[0], 3 * logits / tau[1]
        entropies = torch.stack(
            [-(t.softmax(1) * t.log_softmax(1)).sum(1).mean() for t in softened]
        )
        tau = matched_temperatures(tau, entropies.float(), 0.01)
    torch.testing.assert_close(tau, torch.tensor([1.0, 3.0]), rtol=0, atol=0.011)


def test_temperatures_stay_within_their_bounds():
    tau = matched_temperatures(torch.tensor([1.0, 9.9]), torch.tensor([0.2, 0.1]), 0.5)
    assert tau.tolist() == [1.0, 10.0]


def _teachers():
    torch.manual_seed(3)
    return {"clean_teacher": nn.Linear(8, 4), "robust_teacher": nn.Linear(8, 4)}


SETTINGS = {"epsilon": 0.3, "step_size": 0.2, "steps": 3}


def test_first_step_learns_both_halves_and_keeps_the_penalties_of_others():
    teachers = _teachers()
    technique = MTARD(0.8, **teachers, **SETTINGS, weight_rate=0.0)
    module, _ = fit([technique, ConfidencePenalty(0.5)], max_steps=1)
    host, x, y = Host(), INPUTS[:16], LABELS[:16]

    def total(points):
        z = host(points)
        return F.cross_entropy(z, y), -0.5 * _entropy(z)

    def attacked(points):
        return sum(total(points))

    moved = pgd_attack(lambda p: p, x, y, 0.3, 0.2, 3, loss=lambda points, _: attacked(points))
    halves = []
    for teacher, points in ((teachers["clean_teacher"], x), (teachers["robust_teacher"], moved)):
        p = teacher(points).softmax(1).detach()
        halves.append((p * (p.log() - host(points).log_softmax(1))).sum(1).mean())
    loss, penalty = total(moved)
    host.zero_grad()
    (0.2 * loss + penalty + 0.8 * (0.5 * halves[0] + 0.5 * halves[1])).backward()
    host.configure_optimizers().step()
    torch.testing.assert_close(weights(module), weights(host), rtol=1e-4, atol=1e-6)


def test_balances_follow_the_losses_of_the_run():
    technique = MTARD(**_teachers(), **SETTINGS, weight_rate=0.1, temperature_rate=0.01)
    fit([technique], max_steps=3)
    assert float(technique.weights.sum()) == pytest.approx(1.0)
    assert technique.weights[0] != 0.5
    assert (technique.initial > 0).all()
    # The less certain teacher stays at the bound; the other has moved off it.
    assert technique.temperatures.min() == 1.0 < technique.temperatures.max()


def test_another_teacher_on_resume_is_refused(tmp_path):
    run = trainer([MTARD(**_teachers(), **SETTINGS)], max_steps=1)
    run.fit(Host(), loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    teachers = {**_teachers(), "robust_teacher": nn.Linear(8, 4)}
    other = trainer([MTARD(**teachers, **SETTINGS)], max_steps=2)
    with pytest.raises(RegularizationError, match="the robust_teacher is not the one"):
        other.fit(Host(), loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=False)


def test_a_teacher_of_other_classes_is_named():
    teachers = {**_teachers(), "clean_teacher": nn.Linear(8, 3)}
    with pytest.raises(RegularizationError, match=r"clean_teacher answers \(16, 3\)"):
        fit([MTARD(**teachers, **SETTINGS)], max_steps=1)
    with pytest.raises(ArgumentError, match="`clean_teacher` must be a torch module"):
        MTARD(**{**teachers, "clean_teacher": print})
