"""Derivatives by the input inside the loss: what is differentiated by, and in which runs."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import RegularizationError, RegularizeMixin, Signals, UnsupportedError
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.mechanisms.gradient_penalty import (
    GradientPenalty,
    input_gradient,
    squared_jacobian,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, fit, trainer, weights


class Slope(GradientPenalty):
    """The squared Jacobian, exact."""

    def values(self, outputs, points, generator):
        return squared_jacobian(outputs, points)


def explicit_jacobian(function, x):
    """(B, C, D), one sample at a time, by torch's own Jacobian."""
    rows = [torch.autograd.functional.jacobian(function, sample[None]) for sample in x]
    return torch.stack([row[0, :, 0] for row in rows])


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# ---------------------------------------------------------------------- the norm


def test_exact_norm_is_that_of_the_explicit_jacobian():
    network, x = mlp(), X.clone().requires_grad_()
    expected = explicit_jacobian(network, X).square().sum((1, 2))
    torch.testing.assert_close(squared_jacobian(network(x), x), expected, rtol=0, atol=1e-12)


def test_norm_of_maps_counts_all_outputs_and_inputs():
    torch.manual_seed(0)
    network = nn.Conv2d(2, 3, 3, padding=1).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(network, x.detach()[:1])
    expected = jacobian.square().sum().expand(2)
    torch.testing.assert_close(squared_jacobian(network(x), x), expected)


def test_random_projections_are_right_in_the_mean():
    network, x = mlp(), X.clone().requires_grad_()
    exact = squared_jacobian(network(x), x)
    estimate = squared_jacobian(network(x), x, 3000, torch.Generator().manual_seed(0))
    # A projection's relative spread is below sqrt(2); 3000 of them leave less than 2.6 %, and
    # five standard deviations of that never happen with this seed.
    torch.testing.assert_close(estimate, exact, rtol=0.05, atol=0)
    assert not torch.equal(estimate, exact)


def test_one_output_needs_one_projection_only():
    x = X.clone().requires_grad_()
    y = x.square().sum(1, keepdim=True)
    estimate = squared_jacobian(y, x, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate, 4 * X.square().sum(1))


def test_gradients_agree_with_finite_differences():
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def exact(x, weight):
        return squared_jacobian(torch.tanh(x @ weight.T), x)

    def projected(x, weight):
        generator = torch.Generator().manual_seed(0)
        return squared_jacobian(torch.tanh(x @ weight.T), x, 2, generator)

    assert torch.autograd.gradcheck(exact, (X.clone().requires_grad_(), weight))
    assert torch.autograd.gradcheck(projected, (X.clone().requires_grad_(), weight))


def test_outputs_without_a_path_to_the_points_are_refused():
    x = X.clone().requires_grad_()
    for outputs in (X * 2, x.detach() * nn.Parameter(torch.ones(3))):
        with pytest.raises(RegularizationError, match=r"no path.*detach"):
            input_gradient(outputs, x)


# ---------------------------------------------------------------------- runs


def reference(epochs=2, size=16, strength=0.1, module=None):
    """The same training as a plain loop with an explicit Jacobian."""
    module = module or Host()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for _ in range(epochs):
        for x, y in zip(INPUTS.split(size), LABELS.split(size), strict=True):
            jacobian = torch.func.vmap(torch.func.jacrev(lambda s: module.net(s[None])[0]))(x)
            penalty = jacobian.square().sum((1, 2)).mean()
            optimizer.zero_grad()
            (F.cross_entropy(module(x), y) + strength * penalty).backward()
            optimizer.step()
    return weights(module)


def test_equals_a_plain_loop():
    module, _ = fit([Slope(0.1)])
    torch.testing.assert_close(weights(module), reference(), rtol=0, atol=1e-6)


def test_micro_batches_equal_one_batch():
    module, _ = fit([Slope(0.1)], batch_size=4, accumulate_grad_batches=4)
    torch.testing.assert_close(weights(module), reference(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"precision": "bf16-mixed"}, 2e-2),
        ({"precision": "64-true"}, 1e-6),
    ],
)
def test_precisions_agree(settings, tolerance):
    class Casts(Host):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].to(self.dtype), batch[1]), batch_idx)

    module, _ = fit([Slope(0.1)], module=Casts(), **settings)
    assert (weights(module).float() - reference()).abs().max() < tolerance


def test_fp16_scaler_does_not_change_the_strength():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module, _ = fit([Slope(0.1)], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert (weights(module) - reference()).abs().max() < 2e-3


def test_batch_norm_trains_on_and_counts_each_batch_once():
    module, _ = fit([Slope(0.1)], module=Host(batch_norm=True))
    assert module.net[1].num_batches_tracked == 8
    assert torch.isfinite(weights(module)).all()


def test_the_users_own_tensors_stay_as_they_were():
    inputs = torch.randn(8, 8)

    class Keeps(Host):
        def train_dataloader(self):
            return DataLoader([(inputs, LABELS[:8])], batch_size=None)

    trainer([Slope(0.1)], max_epochs=1).fit(Keeps())
    assert not inputs.requires_grad
    assert inputs.grad is None


def test_step_that_needs_no_gradient_of_inputs_otherwise():
    seen = []

    class Sees(Host):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].requires_grad)
            return super().training_step(batch, batch_idx)

    fit([Slope(0.1)], module=Sees(), max_epochs=1)
    fit([Slope(0.0)], module=Sees(), max_epochs=1)
    assert seen == [True] * 4 + [False] * 4


class Attention(Host):
    """A network whose fused attention kernel has no second derivative."""

    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = x.view(-1, 2, 4)
        return self.net(self.mix(tokens, tokens, tokens, need_weights=False)[0].flatten(1))


def test_attention_is_differentiated_twice():
    plain = weights(Attention())
    module, _ = fit([Slope(0.1)], module=Attention(), max_epochs=1)
    assert torch.isfinite(weights(module)).all()
    assert not torch.equal(weights(module), plain)


def test_cudnn_is_left_for_recurrent_networks_only():
    seen = []

    class Recurrent(Host):
        def __init__(self, recurrent):
            super().__init__()
            self.rnn = nn.GRU(8, 8) if recurrent else nn.Linear(8, 8)

        def training_step(self, batch, batch_idx):
            seen.append(torch.backends.cudnn.enabled)
            return super().training_step(batch, batch_idx)

    before = torch.backends.cudnn.enabled
    for recurrent in (True, False):
        fit([Slope(0.1)], module=Recurrent(recurrent), max_epochs=1, batch_size=64)
    assert seen == [False, before]
    assert torch.backends.cudnn.enabled == before


# ---------------------------------------------------------------------- tokens and layers


class Tokens(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(1, 1)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


TOKENS = torch.arange(32).view(8, 4) % 10


def fit_tokens(technique, **settings):
    module = Tokens()
    run = trainer([technique], max_epochs=1, **settings)
    run.fit(module, DataLoader(TensorDataset(TOKENS, torch.arange(8) % 3), batch_size=8))
    return run.callback_metrics["reg/slope"].item()


def test_integer_inputs_are_refused_with_the_layer_that_cures_it():
    with pytest.raises(UnsupportedError, match=r'Slope: .*int64.*Slope\(layer="embedding"\)'):
        fit_tokens(Slope(0.1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_layer_can_be_differentiated_by(precision):
    value = fit_tokens(Slope(0.1, layer="embedding"), precision=precision)
    module = Tokens()

    def rest(embedded):
        return module.head(torch.tanh(embedded).mean(1))

    points = module.embedding(TOKENS).detach()
    rows = [torch.autograd.functional.jacobian(rest, p[None]).square().sum() for p in points]
    expected = torch.stack(rows).mean().item()
    assert value == pytest.approx(expected, rel=1e-5 if precision == "32-true" else 2e-2)


def test_a_half_precision_layer_can_be_differentiated_by():
    module, _ = fit([Slope(0.1, layer="net.0")], precision="bf16-mixed")
    exact, _ = fit([Slope(0.1, layer="net.0")])
    assert (weights(module) - weights(exact)).abs().max() < 2e-2


# ---------------------------------------------------------------------- refusals


def test_compiled_networks_are_refused():
    class Compiled(Host):
        def __init__(self):
            super().__init__()
            self.fast = torch.compile(self.net, backend="aot_eager")

        def forward(self, x):
            return self.fast(x)

    with pytest.raises(UnsupportedError, match=r"Slope: .*twice.*torch\.compile"):
        fit([Slope(0.1)], module=Compiled(), max_epochs=1)


def test_eagerly_compiled_networks_are_fine():
    class Compiled(Host):
        def __init__(self):
            super().__init__()
            self.fast = torch.compile(self.net, backend="eager")

        def forward(self, x):
            return self.fast(x)

    module, _ = fit([Slope(0.1)], module=Compiled())
    torch.testing.assert_close(weights(module), reference(), rtol=0, atol=1e-6)


def test_a_dict_of_inputs_is_refused_and_one_key_of_it_is_not():
    class Nested(Host):
        def train_dataloader(self):
            return DataLoader(
                [{"inputs": {"x": x}, "y": y} for x, y in zip(INPUTS, LABELS, strict=True)],
                batch_size=16,
            )

        def training_step(self, batch, batch_idx):
            return super().training_step((batch["inputs"]["x"], batch["y"]), batch_idx)

    with pytest.raises(RegularizationError, match=r"one tensor, got dict.*batch\.<key>"):
        trainer([Slope(0.1)]).fit(Nested())
    module = Nested()
    trainer([Slope(0.1, signals=Signals(inputs="batch.inputs.x"))]).fit(module)
    torch.testing.assert_close(weights(module), reference(), rtol=0, atol=1e-6)


def test_a_step_that_detaches_is_named():
    class Detaches(Host):
        def forward(self, x):
            return self.net(x.detach())

    with pytest.raises(RegularizationError, match="no path"):
        fit([Slope(0.1)], module=Detaches())


def test_points_and_outputs_have_to_belong_together():
    class Halves(Host):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0][:8], batch[1][:8]), batch_idx)

    with pytest.raises(RegularizationError, match=r"one output per point.*\(8, 4\).*\(16, 8\)"):
        fit([Slope(0.1)], module=Halves())


def test_bad_layers_are_refused():
    with pytest.raises(ArgumentError, match="Slope"):
        Slope(0.1, layer="")
    with pytest.raises(ArgumentError, match=r"Slope: `layer` is 'backbone'.*net"):
        fit([Slope(0.1, layer="backbone")])


def test_manual_optimization_gives_the_same_weights():
    class Manual(RegularizeMixin, Host):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            logits = self.net(batch[0])
            optimizer.zero_grad()
            self.manual_backward(self.regularize(F.cross_entropy(logits, batch[1]), logits=logits))
            optimizer.step()

    manual, _ = fit([Slope(0.1)], module=Manual())
    torch.testing.assert_close(weights(manual), reference(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- ranks


def train_on_ranks():
    module = Host()
    settings = {"max_epochs": 2, "use_distributed_sampler": False}
    rank = torch.distributed.get_rank()
    data = TensorDataset(INPUTS[rank::2], LABELS[rank::2])
    rank_trainer(callbacks=[Slope(0.1)], **settings).fit(module, DataLoader(data, batch_size=8))
    return weights(module)


def test_two_ranks_equal_the_joint_batch(ranks):
    first, second = ranks.run(train_on_ranks)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, reference(), rtol=0, atol=1e-6)


UNEQUAL = (slice(0, 3), slice(3, 16))


def value_on_unequal_ranks():
    share = UNEQUAL[torch.distributed.get_rank()]
    data = TensorDataset(INPUTS[share], LABELS[share])
    settings = {"max_epochs": 1, "use_distributed_sampler": False}
    run = rank_trainer(callbacks=[Slope(0.1)], **settings)
    run.fit(Host(), DataLoader(data, batch_size=16))
    return run.callback_metrics["reg/slope"].item()


def test_each_sample_of_unequal_ranks_counts_once(ranks):
    x = INPUTS[:16].clone().requires_grad_()
    values = squared_jacobian(Host().net(x), x).detach()
    of_ranks = (values[UNEQUAL[0]].mean() + values[UNEQUAL[1]].mean()) / 2
    assert (values.mean() - of_ranks).abs() > 1e-3
    for value in ranks.run(value_on_unequal_ranks):
        assert value == pytest.approx(values.mean().item(), rel=1e-5)
