"""Mixout: values of the official code, the closed form of its effect, and its reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.engine import ArgumentError, ParameterSelection, RegularizationError
from lightning_reg.techniques.noise.mixout import Mixout, mixout
from tests.engine.simple import Host, fit, loader, trainer


def test_the_forward_pass_is_that_of_the_official_code():
    # bloodwass/mixout@18f377d, mixout/mixout.py: `Mixout.apply(W, W_ref, 0.75, True)` for a draw
    # that kept columns 0 and 3.
    weight = torch.arange(1.0, 9.0).view(2, 4)
    reference = torch.tensor([[0.0, 1, 0, 1], [2, 2, 2, 2]])
    mask = torch.tensor([[1.0, 0, 0, 1]])
    expected = torch.tensor([[4.0, 1, 0, 13], [14, 2, 2, 26]])
    torch.testing.assert_close(mixout(weight, reference, mask, 0.75), expected)


def every_mask(size: int, p: float):
    """All masks with their probabilities."""
    for bits in itertools.product([0.0, 1.0], repeat=size):
        mask = torch.tensor(bits, dtype=torch.float64)
        kept = int(mask.sum())
        yield mask, (1 - p) ** kept * p ** (size - kept)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_the_mean_is_the_weight_and_the_effect_is_a_ridge_towards_the_reference(p):
    generator = torch.Generator().manual_seed(0)
    w, ref, x = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    y = 0.7
    mean, loss = torch.zeros(5, dtype=torch.float64), 0.0
    for mask, probability in every_mask(5, p):
        mixed = mixout(w, ref, mask, p)
        mean += probability * mixed
        loss += probability * float((y - x @ mixed) ** 2)
    torch.testing.assert_close(mean, w, rtol=0, atol=1e-12)
    ridge = p / (1 - p) * (x**2 * (w - ref) ** 2).sum()
    assert abs(loss - float((y - x @ w) ** 2 + ridge)) < 1e-10


def test_the_gradient_has_the_factor_of_the_formula():
    weight = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    mixout(weight, torch.zeros(2, 3, dtype=torch.float64), mask, 0.75).sum().backward()
    expected = torch.tensor([[4.0, 0.0, 4.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(weight.grad, expected)


class Watched(Host):
    """Keeps the weights that its step computes with."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.used = []

    def training_step(self, batch, batch_idx):
        self.used.append(self.net[4].weight.detach().clone())
        return super().training_step(batch, batch_idx)


class Push(torch.optim.Optimizer):
    """Adds one to every weight at each step, whatever the gradient."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(1.0)


class Pushed(Watched):
    def configure_optimizers(self):
        return Push(self.parameters())


@pytest.mark.parametrize("mask", ["neuron", "weight"])
def test_steps_compute_with_mixed_weights_of_the_start(mask):
    module = Pushed()
    start = module.net[4].weight.detach().clone()
    fit([Mixout(0.75, mask=mask)], module=module, max_epochs=1, batch_size=8)
    # After k steps W - W_ref = k, so a kept part is W_ref + 4k and a mixed one W_ref.
    steps = torch.stack([(used - start) / 4 for used in module.used])
    steps = steps[1:] / torch.arange(1, len(steps)).view(-1, 1, 1)
    kept = steps.round()
    torch.testing.assert_close(steps, kept, rtol=0, atol=1e-5)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert ((kept == kept[:, :1]).all()) == (mask == "neuron")
    assert abs(float(kept.mean()) - 0.25) < 0.12


def test_at_the_start_nothing_is_mixed_since_both_are_equal():
    module = Watched(lr=0.0)
    start = module.net[4].weight.detach().clone()
    fit([Mixout(0.9)], module=module)
    assert all(torch.equal(used, start) for used in module.used)


def test_only_linear_layers_are_mixed_and_a_head_can_be_left_out():
    class Net(Pushed):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append((self.conv.weight, self.net[0].weight, self.net[4].weight))
            return F.cross_entropy(self.net(self.conv(batch[0][:, None])[:, 0]), batch[1])

    module = Net()
    selection = ParameterSelection(types=["Linear"], exclude=r"net\.4")
    fit([Mixout(0.5, parameters=selection)], module=module, max_epochs=1)
    conv, body, head = module.seen[-1]
    assert conv is module.conv.weight
    assert head is module.net[4].weight
    assert body is not module.net[0].weight


def test_a_new_fit_takes_a_new_reference_and_a_resume_keeps_the_old(tmp_path):
    technique = Mixout(0.5)
    module = Pushed()
    first = module.net[4].weight.detach().clone()
    _, run = fit([technique], module=module, max_epochs=1, enable_checkpointing=True)
    torch.testing.assert_close(technique.state_dict()["reference"]["net.4.weight"], first)
    run.save_checkpoint(tmp_path / "end.ckpt")

    fit([technique], module=module, max_epochs=1)
    second = technique.state_dict()["reference"]["net.4.weight"]
    torch.testing.assert_close(second, first + 4)

    resumed = Mixout(0.5)
    again = trainer([resumed], max_epochs=2)
    again.fit(Pushed(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert again.global_step == 8
    torch.testing.assert_close(resumed.state_dict()["reference"]["net.4.weight"], first)


def test_a_layer_that_is_unfrozen_later_refers_to_what_it_was():
    class Unfreezes(Pushed):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[0].requires_grad_(True)

        def configure_optimizers(self):
            return Push([p for p in self.parameters() if p.requires_grad])

    module, technique = Unfreezes(), Mixout(0.5)
    body = module.net[0].weight.detach().clone()
    fit([technique], module=module, max_epochs=2)
    assert torch.equal(technique.state_dict()["reference"]["net.0.weight"], body)


def test_a_reference_of_another_shape_is_refused():
    technique = Mixout(0.5)
    technique.load_state_dict({"reference": {"net.4.weight": torch.zeros(3, 3)}})
    with pytest.raises(RegularizationError, match="another model"):
        fit([technique])


def test_the_reference_pulls_as_the_ridge_says():
    """Least squares with one output: the mean gradient of 400 draws is that of the ridge."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 3, generator=generator), torch.randn(32, generator=generator)
    ref, start = torch.zeros(3), torch.tensor([[1.0, -1.0, 0.5]])

    class Linear(Host):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net = nn.Linear(3, 1, bias=False)
            nn.init.zeros_(self.net.weight)
            self.gradients = []

        def training_step(self, batch, batch_idx):
            return (y - self.net(x)[:, 0]).square().mean()

        def on_before_optimizer_step(self, optimizer):
            self.gradients.append(self.net.weight.grad.clone())

    class Move(Mixout):
        """Takes zeros as the reference, then starts elsewhere."""

        def on_reference(self, trainer, pl_module):
            super().on_reference(trainer, pl_module)
            with torch.no_grad():
                pl_module.net.weight.copy_(start)

    module = Linear()
    fit([Move(0.5)], module=module, max_epochs=400, batch_size=64)
    found = torch.stack(module.gradients).mean(0)[0]
    w = start[0]
    ridge = 2 * (x * (x @ w - y)[:, None]).mean(0) + 2 * (x**2).mean(0) * (w - ref)
    # A standard error of about 0.07 with 400 draws.
    assert (found - ridge).abs().max() < 0.3
    plain = 2 * (x * (x @ w - y)[:, None]).mean(0)
    assert (ridge - plain).abs().max() > 0.8


@pytest.mark.parametrize("arguments", [{"p": 1.0}, {"p": -0.1}, {"mask": "row"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="Mixout"):
        Mixout(**arguments)
