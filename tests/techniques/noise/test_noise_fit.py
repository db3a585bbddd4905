"""NoiseFiT: the scale of its noise, the layers that get it, and predictions that stand it."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import RegularizationError
from lightning_reg.techniques.noise.noise_fit import (
    NoiseFiT,
    noise_fit,
    noise_fit_scale,
    noise_fit_snr,
)
from tests.engine.simple import INPUTS, Host, fit


def _hidden():
    sizes = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64).view(1, 3, 1)
    return torch.sin(torch.arange(24, dtype=torch.float64)).view(2, 3, 4) * sizes


def test_official_scale():
    """akhadangi/NoiseFiT@48c61c8: adaptive_noise_injection with draws of 1 and a base of s std.

    It rounds the base to float32.
    """
    official = [0.015913380825290358, 0.010706839030715343, 0.010204411098264643]
    official += [0.017586993234019632, 0.18225619719653885, 0.16491226768753697]
    official += [0.1439154755521878, 0.09055353328668736, 0.019805632914710547]
    scale = noise_fit_scale(_hidden(), 0.1, 0.1)
    assert scale.flatten()[:9].tolist() == pytest.approx(official, rel=1e-7)
    assert scale.sum().item() == pytest.approx(1.5829665599666312, rel=1e-7)


def test_official_loss_and_gradients():
    """The loss of NoiseFiT.py there at temperature 2 with a cross-entropy of 1.25, l = 0.05."""
    steps = torch.arange(12, dtype=torch.float64)
    clean = 2 * torch.sin(steps).view(3, 4)
    first = (clean + torch.cos(steps).view(3, 4)).requires_grad_()
    second = (clean - 0.5 * torch.cos(2 * steps).view(3, 4)).requires_grad_()
    value = 0.5 * noise_fit(clean, first, second, 0.5, 0.05, 2.0).mean()
    assert 0.5 * 1.25 + value.item() == pytest.approx(0.6807567763952284, rel=1e-9)
    value.backward()
    official = [0.016940919478718907, 0.014528349574818375, -0.018621426725864972]
    assert first.grad[0, :3].tolist() == pytest.approx(official, rel=1e-9)
    assert second.grad.abs().sum().item() == pytest.approx(0.06741997132218384, rel=1e-9)


def test_equal_predictions_cost_nothing_and_targets_take_no_gradient():
    clean = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    first, second = torch.randn(2, 4, 5, dtype=torch.float64)
    assert noise_fit(clean, clean, clean).abs().max().item() < 1e-15
    assert noise_fit(clean, first, second).min().item() > 0
    assert not noise_fit(clean, first, second).requires_grad


def test_ratio_is_that_of_many_draws():
    hidden = _hidden()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(20_000, 2, 3, 4, dtype=torch.float64, generator=generator)
    noise = (draws * noise_fit_scale(hidden)).abs().mean()
    expected = hidden.abs().mean() / noise
    assert noise_fit_snr(hidden).item() == pytest.approx(expected.item(), rel=0.01)


class Scaled(nn.Module):
    """Keeps what it returned; as a tuple, like a transformer's block."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.outputs = factor, []

    def forward(self, x):
        return self.factor * x, None


class Blocks(Host):
    """A classifier with three blocks, of outputs of very different sizes."""

    def __init__(self, lr=0.1):
        super().__init__(lr=lr)
        self.blocks = nn.ModuleList([Scaled(f) for f in (10.0, 0.01, 10.0)])
        self.hidden = []

    def forward(self, x):
        h = x
        for block in self.blocks:
            h = block(h)[0]
            self.hidden.append(h.detach())
        return self.net(h)


BLOCKS = [f"blocks.{i}" for i in range(3)]


@pytest.mark.parametrize(("choose", "selected"), [("largest", [1, 2]), ("lowest", [0, 2])])
def test_layers_are_chosen_by_their_ratio(choose, selected):
    # The noise is std(h) times the deviation: the ratio falls with the size of the hidden state.
    technique = NoiseFiT(layers=BLOCKS, k=2, choose=choose)
    fit([technique], module=Blocks(), max_epochs=1)
    assert technique.selected == [BLOCKS[i] for i in selected]


def test_clean_pass_is_clean_and_two_more_have_noise_in_the_chosen_layer_alone():
    module = Blocks(lr=0.0)
    technique = NoiseFiT(layers=BLOCKS, k=1, noise_std=1.0)
    fit([technique], module=module, max_epochs=1, limit_train_batches=1)
    # The engine runs the first step once more to see whether it can.
    passes = [module.hidden[i : i + 3] for i in range(0, 12, 3)]
    clean, again, first, second = passes
    assert torch.equal(clean[2], again[2])
    for noisy in (first, second):
        assert torch.equal(noisy[0], clean[0])
        assert not torch.equal(noisy[1], clean[1])
        # Behind it nothing is added.
        torch.testing.assert_close(noisy[2], 10 * noisy[1])
    assert not torch.equal(first[1], second[1])
    assert len(passes) * 3 == len(module.hidden)


def test_noise_is_centred_on_the_hidden_state():
    technique = NoiseFiT(layers="blocks.0", k=1, noise_std=1.0)
    hidden = _hidden().float().repeat(20_000, 1, 1)
    noisy = technique.noisy_output(hidden, 1.0, torch.Generator().manual_seed(0)) - hidden
    scale = noise_fit_scale(hidden, 1.0)[:2]
    # 20,000 draws for each entry: five standard errors.
    means = noisy.view(-1, 2, 3, 4).mean(0)
    assert (means.abs() / scale).max().item() < 5 / 20_000**0.5
    deviations = noisy.view(-1, 2, 3, 4).std(0) / scale
    torch.testing.assert_close(deviations, torch.ones_like(scale), rtol=0, atol=0.03)


def _spread(module):
    """How far predictions move under the noise, in nats."""
    with torch.no_grad():
        h = INPUTS
        clean = module.net(h).log_softmax(-1)
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(50, *h.shape, generator=generator) * noise_fit_scale(h, 0.3)
        noisy = module.net(h + noise).log_softmax(-1)
        return (clean.exp() * (clean - noisy)).sum(-1).mean().item()


class Embedded(Host):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Identity()

    def forward(self, x):
        return self.net(self.embedding(x))


def test_predictions_stand_the_noise_better():
    """Labels are random: 0.68 nats without and 0.20 with the technique, as measured."""
    spreads = []
    for callbacks in ([], [NoiseFiT(1.0, layers="embedding", k=1, noise_std=0.3)]):
        module, _ = fit(callbacks, module=Embedded(), max_epochs=25)
        spreads.append(_spread(module))
    assert spreads[1] < 0.5 * spreads[0]


def test_a_layer_that_is_called_twice_is_refused():
    class Twice(Embedded):
        def forward(self, x):
            return self.net(self.embedding(self.embedding(x)))

    with pytest.raises(RegularizationError, match="saw 2 calls"):
        fit([NoiseFiT(layers="embedding", k=1)], module=Twice())
