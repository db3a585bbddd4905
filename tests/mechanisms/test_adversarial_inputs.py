"""Training on adversarial inputs: the ball, the passes, and what they leave alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import MissingSignalError, RegularizationError, UnsupportedError
from lightning_reg.mechanisms.adversarial_inputs import Attack
from lightning_reg.techniques.gradients.adversarial_training import AdversarialTraining
from lightning_reg.techniques.gradients.jacobian_penalty import JacobianPenalty
from lightning_reg.techniques.inputs.mixup import Mixup
from lightning_reg.techniques.sharpness.sam import SAM
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, fit, loader, trainer, weights


def moved_by(attack, gradient=None, start=None):
    x = INPUTS[:8]
    start = x if start is None else start
    return attack.step(x, start, torch.randn(x.shape) if gradient is None else gradient) - x


def test_a_sign_step_goes_to_the_corner_of_the_ball():
    gradient = torch.randn(8, 8)
    moved = moved_by(Attack(0.3), gradient)
    torch.testing.assert_close(moved, 0.3 * gradient.sign())


def test_a_direction_step_has_its_length_whatever_the_gradients():
    direction = F.normalize(torch.randn(8, 8), dim=1)
    moved = moved_by(Attack(0.3, norm="l2"), direction * torch.logspace(-30, 5, 8)[:, None])
    torch.testing.assert_close(moved, 0.3 * direction)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_are_brought_back_into_the_ball_only_if_asked(norm):
    def radius(project):
        moved = moved_by(Attack(0.3, step_size=1.0, norm=norm, project=project))
        return moved.abs().max().item() if norm == "linf" else moved.norm(dim=1).max().item()

    assert radius(True) == pytest.approx(0.3, rel=1e-5)
    assert radius(False) == pytest.approx(1.0, rel=1e-5)


def test_bounds_hold_at_the_start_and_after_a_step():
    attack = Attack(0.5, random_start=1.0, bounds=(-0.2, 0.3))
    start = attack.start(INPUTS[:8].clamp(-0.2, 0.3), torch.Generator().manual_seed(0))
    assert start.min() >= -0.2
    assert start.max() <= 0.3
    end = attack.step(INPUTS[:8], start, torch.randn(8, 8))
    assert end.min() >= -0.2
    assert end.max() <= 0.3


@pytest.mark.parametrize(("norm", "moment"), [("linf", 1 / 3), ("l2", 8 / 10)])
def test_starts_are_uniform_in_the_ball(norm, moment):
    # E u^2 = 1/3 of a uniform number in [-1, 1]; E r^2 = d / (d + 2) of a point in a ball.
    attack = Attack(0.5, random_start=2.0, norm=norm)
    x = torch.zeros(20000, 8)
    start = attack.start(x, torch.Generator().manual_seed(0))
    size = start.square().mean() if norm == "linf" else start.square().sum(1).mean()
    # A standard error is 0.001.
    assert size.item() == pytest.approx(moment, abs=0.005)


def test_a_gradient_that_is_not_finite_moves_nothing():
    gradient = torch.randn(8, 8)
    gradient[0] = float("nan")
    gradient[1] = float("inf")
    moved = moved_by(Attack(0.3), gradient)
    assert not moved[:2].any()
    assert moved[2:].abs().min() > 0.2


class Seen(Host):
    """Remembers every pass: the inputs, whether it trains, the dropout mask."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.passes = []

    def training_step(self, batch, batch_idx):
        noise = torch.rand(3)
        self.passes.append((batch[0].detach().clone(), noise))
        return super().training_step(batch, batch_idx)


def one_step(technique, *others, **kwargs):
    module = Seen(**kwargs)
    fit([technique, *others], module=module, max_epochs=1, limit_train_batches=1)
    # The first step's check of repeatability is the second pass.
    return module, [module.passes[0], *module.passes[2:]]


def test_one_step_takes_two_passes_and_moves_along_the_sign_of_the_gradient():
    _, passes = one_step(AdversarialTraining(epsilon=0.25))
    (clean, first), (moved, second) = passes
    x = clean.clone().requires_grad_()
    labels = next(iter(loader()))[1]
    (gradient,) = torch.autograd.grad(F.cross_entropy(Host().net(x), labels), x)
    torch.testing.assert_close(moved, clean + 0.25 * gradient.sign())
    assert torch.equal(first, second)


def test_the_number_of_passes():
    def count(**kwargs):
        return len(one_step(AdversarialTraining(epsilon=0.25, **kwargs))[1])

    assert count(steps=3) == 4
    assert count(random_start=1.0) == 2
    assert count(strength=0.5) == 2
    # The clean loss is trained as well, and the attack starts elsewhere.
    assert count(strength=0.5, random_start=1.0) == 3


def test_the_first_pass_is_at_the_start():
    _, passes = one_step(AdversarialTraining(epsilon=0.25, random_start=1.0))
    data = next(iter(loader()))[0]
    away = (passes[0][0] - data).abs()
    assert 0.2 < away.max() <= 0.25
    assert (passes[1][0] - data).abs().max() <= 0.2501


def test_a_clean_first_pass_is_followed_by_one_at_the_start():
    _, passes = one_step(AdversarialTraining(0.5, epsilon=0.25, random_start=1.0))
    data = next(iter(loader()))[0]
    assert torch.equal(passes[0][0], data)
    away = (passes[1][0] - data).abs()
    assert 0.2 < away.max() <= 0.2501


def test_batch_norm_and_metrics_count_the_first_pass_only():
    module, _ = one_step(AdversarialTraining(epsilon=5.0), batch_norm=True)
    plain = Seen(batch_norm=True)
    fit(module=plain, max_epochs=1, limit_train_batches=1)
    assert torch.equal(module.net[1].running_mean, plain.net[1].running_mean)
    assert module.net[1].num_batches_tracked == 1


def test_predicted_labels_are_attacked_instead_of_the_true_ones():
    _, passes = one_step(AdversarialTraining(epsilon=0.25, labels="predicted"))
    clean, moved = passes[0][0], passes[1][0]
    x = clean.clone().requires_grad_()
    logits = Host().net(x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), x)
    torch.testing.assert_close(moved, clean + 0.25 * gradient.sign())


def test_it_comes_after_mixing_and_before_a_second_pass():
    _, passes = one_step(AdversarialTraining(epsilon=0.25), Mixup(), SAM(0.05))
    data = next(iter(loader()))[0]
    mixed, moved, at_moved_weights = (x for x, _ in passes)
    assert not torch.equal(mixed, data)
    torch.testing.assert_close((moved - mixed).abs(), torch.full_like(moved, 0.25))
    assert torch.equal(moved, at_moved_weights)


def test_penalties_on_derivatives_are_taken_at_the_moved_inputs():
    fit([AdversarialTraining(epsilon=0.25), JacobianPenalty(0.1)], max_epochs=2)


def test_no_gradient_is_left_behind():
    class Checked(Host):
        def on_before_backward(self, loss):
            assert all(p.grad is None for p in self.parameters())

    fit([AdversarialTraining(epsilon=0.25, steps=3)], module=Checked(), max_epochs=1)


class Detached(Host):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].detach(), batch[1]), batch_idx)


def test_a_cut_path_is_named():
    with pytest.raises(RegularizationError, match="found no path"):
        fit([AdversarialTraining(epsilon=0.1)], module=Detached())


def test_integers_are_refused():
    class Tokens(Host):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(32, 4))

    data = DataLoader(TensorDataset(INPUTS.abs().long(), LABELS), 16)
    with pytest.raises(UnsupportedError, match="AdversarialTraining"):
        trainer([AdversarialTraining(epsilon=0.1)]).fit(Tokens(), data)


def test_missing_logits_are_named_where_they_are_needed():
    class Hidden(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net.forward(x), y)

    fit([AdversarialTraining(epsilon=0.1)], module=Hidden(), max_epochs=1)
    with pytest.raises(MissingSignalError, match="logits"):
        fit([AdversarialTraining(epsilon=0.1, labels="predicted")], module=Hidden())


def train_with_random_starts():
    run = rank_trainer(
        callbacks=[AdversarialTraining(epsilon=0.3, random_start=1.0)],
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    module = Seen()
    run.fit(module, loader(8))
    return weights(module), module.passes[0][0] - INPUTS[: len(module.passes[0][0])]


def test_replicas_stay_equal_and_starts_differ(ranks):
    (one, first), (other, second) = ranks.run(train_with_random_starts)
    assert torch.equal(one, other)
    assert not torch.equal(first, second)
