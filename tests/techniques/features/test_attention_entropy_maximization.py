"""AEM: its values, those of the official code, and what it does to a bag."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, MissingSignalError
from lightning_reg.techniques.features.attention_entropy_maximization import (
    AttentionEntropyMaximization,
    attention_entropy_maximization,
)


def fixed(*shape):
    """Numbers that need no generator."""
    return (torch.arange(math.prod(shape), dtype=torch.float64).view(shape) * 1.7).sin() * 3


def test_value_and_gradient_are_those_of_the_official_code():
    # dazhangyu123/AEM@4a928a8, main.py, of the logits of two heads over six instances.
    z = fixed(1, 2, 1, 6).requires_grad_()
    value = attention_entropy_maximization(z.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.item() == pytest.approx(-0.929444232917449, abs=1e-12)
    expected = [-0.03400214, 0.13241066, -0.02067652, -0.00448174, -0.06028957, -0.0129607]
    assert gradient[0, 0, 0].tolist() == pytest.approx(expected, abs=1e-8)


def test_all_alike_is_the_least_and_one_instance_the_largest():
    alike = torch.zeros(2, 1, 1, 7).log_softmax(-1)
    one = torch.tensor([[[[0.0, -torch.inf, -torch.inf]]]])
    assert attention_entropy_maximization(alike).tolist() == pytest.approx([-math.log(7)] * 2)
    assert attention_entropy_maximization(one).item() == 0.0


def test_the_gradient_vanishes_where_all_are_alike():
    z = torch.zeros(1, 1, 1, 5, dtype=torch.float64, requires_grad=True)
    attention_entropy_maximization(z.log_softmax(-1)).sum().backward()
    assert z.grad.abs().max() < 1e-15


@pytest.mark.parametrize("normalized", [False, True])
def test_padding_changes_nothing(normalized):
    z = fixed(2, 3, 1, 4)
    padded = torch.cat([z, torch.full((2, 3, 1, 6), -torch.inf)], -1).requires_grad_()
    value = attention_entropy_maximization(padded.log_softmax(-1), normalized)
    expected = attention_entropy_maximization(z.log_softmax(-1), normalized)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), padded)
    assert gradient.isfinite().all()
    assert (gradient[..., 4:] == 0).all()


def test_normalized_values_do_not_depend_on_the_size_of_a_bag():
    sizes = [2, 30]
    values = [
        attention_entropy_maximization(torch.zeros(1, 1, 1, n).log_softmax(-1), True).item()
        for n in sizes
    ]
    assert values == pytest.approx([-1.0, -1.0])
    lonely = torch.zeros(1, 1, 1, 1).log_softmax(-1)
    assert attention_entropy_maximization(lonely, True).item() == 0.0


class Bags(L.LightningModule):
    """Attention pooling over bags: (B, 12, 4) to (B, 2)."""

    def __init__(self, probabilities=False):
        super().__init__()
        self.score = nn.Linear(4, 1)
        self.attention = nn.Softmax(-1) if probabilities else nn.Identity()
        self.head = nn.Linear(4, 2)
        self.probabilities = probabilities

    def weights(self, x):
        out = self.attention(self.score(x).squeeze(-1))
        return out if self.probabilities else out.softmax(-1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        pooled = (self.weights(x).unsqueeze(-1) * x).sum(1)
        return nn.functional.cross_entropy(self.head(pooled), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


def bags(count=64, seed=0):
    """Half of the bags have three of twelve instances that are shifted."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, 4, generator=generator)
    y = torch.arange(count) % 2
    x[y == 1, :3] += 2.0
    return x, y


def train(techniques, seed, probabilities=False):
    torch.manual_seed(seed)
    module = Bags(probabilities)
    trainer = L.Trainer(
        max_epochs=15,
        callbacks=techniques,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, DataLoader(TensorDataset(*bags()), batch_size=16))
    x, y = bags(seed=9)
    with torch.no_grad():
        weights = module.weights(x)
        right = module.head((weights.unsqueeze(-1) * x).sum(1)).argmax(1) == y
    return weights.amax(1).mean().item(), right.float().mean().item()


def test_attention_spreads_and_bags_are_still_told_apart():
    # Measured over seeds 0 to 3: the largest weight is 0.44 to 0.54 without and 0.21 to 0.23 with;
    # 0.80 to 1.0 and 1.0 of the bags are right.
    aem = {"layers": "attention", "from_logits": True}
    for seed in range(2):
        plain, plain_right = train([], seed)
        spread, right = train([AttentionEntropyMaximization(0.1, **aem)], seed)
        assert spread < 0.75 * plain
        assert right >= plain_right - 0.05


def test_probabilities_train_as_their_logits_do():
    runs = [
        train(
            [AttentionEntropyMaximization(0.1, layers="attention", from_logits=not given)], 0, given
        )
        for given in (False, True)
    ]
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


class Transformer(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.thresholds = nn.Parameter(torch.full((2,), 0.5))

    def training_step(self, batch, batch_idx):
        out, _ = self.mha(batch[0], batch[0], batch[0], average_attn_weights=False)
        return out.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit_transformer(technique):
    module = Transformer()
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[technique],
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    return module, trainer, x


def test_the_weights_of_multihead_attention_are_taken_from_its_tuple():
    technique = AttentionEntropyMaximization(0.0001, layers="mha", from_logits=False, element=1)
    _, trainer, x = fit_transformer(technique)
    fresh = Transformer()
    _, weights = fresh.mha(x, x, x, average_attn_weights=False)
    expected = (weights * weights.log()).sum(-1).mean().detach()
    logged = trainer.callback_metrics["reg/attention_entropy_maximization"]
    assert float(logged) == pytest.approx(float(expected), abs=1e-6)


def test_several_layers_count_as_their_mean():
    logged = []
    for layers in ("mha", ["mha", "mha"]):
        technique = AttentionEntropyMaximization(
            0.0001, layers=layers, from_logits=False, element=1
        )
        _, trainer, _ = fit_transformer(technique)
        logged.append(float(trainer.callback_metrics["reg/attention_entropy_maximization"]))
    assert logged[0] == pytest.approx(logged[1], abs=1e-6)


def test_an_element_that_is_not_there_names_the_cure():
    technique = AttentionEntropyMaximization(0.1, layers="mha", from_logits=False, element=5)
    with pytest.raises(MissingSignalError, match="element=1"):
        fit_transformer(technique)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="never guessed"):
        AttentionEntropyMaximization(layers="a", from_logits=None)
    with pytest.raises(ArgumentError, match="layers"):
        AttentionEntropyMaximization(layers=[], from_logits=True)
