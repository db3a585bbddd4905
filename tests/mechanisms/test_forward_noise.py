"""Noise while a step runs: where it is, that it is gone afterwards, and whose gradient it is."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_reg.engine import ArgumentError, RegularizationError, UnsupportedError
from lightning_reg.mechanisms.forward_noise import ActivationNoise, ForwardNoise
from lightning_reg.mechanisms.selected_weights import EVERYTHING
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, fit, loader, trainer, weights
from tests.hosts.loaders import Batches


class Double(ForwardNoise):
    """Runs the step with twice the weights."""

    def noisy_weights(self, weights, strength, generator):
        return {name: (1 + strength) * weight for name, weight in weights.items()}


class Draw(ForwardNoise):
    """Adds a draw to the weights, and keeps it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.draws = []

    def noisy_weights(self, weights, strength, generator):
        drawn = {n: torch.randn(w.shape, generator=generator) for n, w in weights.items()}
        self.draws.append(next(iter(drawn.values())))
        return {name: weight + strength * drawn[name] for name, weight in weights.items()}


class Gauss(ActivationNoise):
    """Adds a draw to the output of layers, and keeps it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.draws = []

    def noisy_output(self, output, strength, generator):
        drawn = torch.randn(output.shape, generator=generator)
        self.draws.append(drawn)
        return output + strength * drawn


def doubled_by_hand() -> torch.Tensor:
    module = Host()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    names = ["net.0.weight", "net.4.weight"]
    for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
        now = {n: p * 2 if n in names else p for n, p in module.named_parameters()}
        loss = F.cross_entropy(torch.func.functional_call(module, now, (x,)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights(module)


def test_gradients_flow_through_the_noise_to_the_parameters():
    module, _ = fit([Double(1.0)], max_epochs=1)
    torch.testing.assert_close(weights(module), doubled_by_hand(), rtol=0, atol=1e-6)


def test_layers_see_noisy_weights_in_the_step_and_their_own_everywhere_else():
    class Watch(Host):
        inside, outside = [], []

        def training_step(self, batch, batch_idx):
            self.inside.append(self.net[0].weight)
            return super().training_step(batch, batch_idx)

        def on_after_backward(self):
            self.outside.append(self.net[0].weight)

        def validation_step(self, batch, batch_idx):
            self.outside.append(self.net[0].weight)

    module = Watch(lr=0.0)
    own, names = module.net[0].weight, [n for n, _ in module.named_parameters()]
    trainer([Double(1.0)]).fit(module, loader(), loader())
    assert all(weight is own for weight in module.outside)
    assert all(torch.equal(weight, 2 * own) for weight in module.inside)
    assert [n for n, _ in module.named_parameters()] == names


def test_an_exception_in_the_step_leaves_the_parameters_in_their_places():
    class Fails(Host):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    module = Fails()
    own = [id(p) for p in module.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"):
        fit([Double(1.0)], module=module)
    assert [id(p) for p in module.parameters()] == own


def test_a_tied_weight_is_noisy_in_all_its_places_and_drawn_once():
    class Tied(Host):
        def __init__(self):
            super().__init__(lr=0.0)
            self.embedding = nn.Embedding(4, 16)
            self.net[4].weight = self.embedding.weight

        def training_step(self, batch, batch_idx):
            self.same = self.embedding.weight is self.net[4].weight
            self.used = self.embedding.weight.detach()
            return super().training_step(batch, batch_idx)

    module, technique = Tied(), Draw(1.0, parameters="embedding|net.4")
    fit([technique], module=module, max_epochs=1, batch_size=64)
    assert module.same
    torch.testing.assert_close(module.used, module.net[4].weight + technique.draws[0])
    assert module.embedding.weight is module.net[4].weight


def test_recurrent_layers_compute_with_the_noisy_weights():
    class Recurrent(Host):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net = nn.GRU(8, 4, batch_first=True)

        def forward(self, x):
            return self.net(x[:, None])[0][:, 0]

        def training_step(self, batch, batch_idx):
            self.inside = self(batch[0]).detach()
            return F.cross_entropy(self(batch[0]), batch[1])

    module = Recurrent()
    fit([Double(1.0, parameters=EVERYTHING)], module=module, max_epochs=1, batch_size=64)
    twin = Recurrent()
    with torch.no_grad():
        for parameter, own in zip(twin.parameters(), module.parameters(), strict=True):
            parameter.copy_(2 * own)
    torch.testing.assert_close(module.inside, twin(INPUTS))
    assert not torch.allclose(module(INPUTS), module.inside)


def test_two_techniques_add_their_noise_up():
    class Watch(Host):
        def training_step(self, batch, batch_idx):
            self.used = self.net[0].weight.detach()
            return super().training_step(batch, batch_idx)

    module = Watch(lr=0.0)
    callbacks = [Double(1.0), Double(2.0, name="again")]
    fit(callbacks, module=module, max_epochs=1)
    torch.testing.assert_close(module.used, 6 * module.net[0].weight)


@pytest.mark.parametrize("technique", [Draw(0.1), Gauss(0.1, layers="net.0")])
def test_a_second_pass_has_the_same_noise(technique):
    fit([technique, Ascent(0.1)], max_epochs=1, batch_size=64)
    first, *others = technique.draws
    assert len(others) == 2
    assert all(torch.equal(first, other) for other in others)


def test_noise_on_weights_is_drawn_once_an_optimizer_step_and_on_activations_each_micro_batch():
    technique, activations = Draw(0.1), Gauss(0.1, layers="net.0")
    fit([technique, activations], max_epochs=1, batch_size=16, accumulate_grad_batches=2)
    one, two, three, _ = technique.draws
    assert torch.equal(one, two)
    assert not torch.equal(two, three)
    one, two, *_ = activations.draws
    assert not torch.equal(one, two)


def test_a_compiled_module_trains_with_the_noise():
    module = Host()
    compiled = torch.compile(module, backend="eager")
    trainer([Double(1.0)], max_epochs=1).fit(compiled, loader())
    torch.testing.assert_close(weights(module), doubled_by_hand(), rtol=0, atol=1e-6)


def test_activation_noise_acts_in_steps_and_nowhere_else():
    class Watch(Host):
        outputs = {}

        def training_step(self, batch, batch_idx):
            self.outputs["train"] = self.net[0](batch[0]).detach()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.outputs["validate"] = self.net[0](batch[0])

    module, technique = Watch(lr=0.0), Gauss(1.0, layers=["net.0"])
    trainer([technique], max_epochs=1).fit(module, loader(64), loader(64))
    clean = module.net[0](INPUTS)
    torch.testing.assert_close(module.outputs["validate"], clean)
    torch.testing.assert_close(module.outputs["train"], clean + technique.draws[0])
    assert not module.net[0]._forward_hooks


def test_layers_that_are_not_there_or_return_no_tensor_are_refused():
    with pytest.raises(ArgumentError, match="no layer 'body'"):
        fit([Gauss(1.0, layers="body")])
    with pytest.raises(ArgumentError, match="`layers`"):
        Gauss(1.0, layers=[])

    class Recurrent(Host):
        def __init__(self):
            super().__init__()
            self.net = nn.GRU(8, 4, batch_first=True)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0][:, None])[0].mean()

    with pytest.raises(RegularizationError, match="must be a tensor"):
        fit([Gauss(1.0, layers="net")], module=Recurrent())


class FSDPInName(SingleDeviceStrategy):
    """Stands for a strategy that splits weights over ranks."""


def test_noise_on_weights_that_are_split_over_ranks_is_refused():
    with pytest.raises(UnsupportedError, match="Double: acts on whole weights"):
        fit([Double(1.0)], strategy=FSDPInName("cpu"))
    fit([Gauss(0.1, layers="net.0")], strategy=FSDPInName("cpu"))


def weights_of_this_rank(find_unused: bool) -> tuple[list[float], list[float]]:
    """A rank's weights after training, and its first draw of noise on weights."""
    module, technique = Host(), Draw(0.3)
    strategy = "ddp_find_unused_parameters_true" if find_unused else "ddp"
    run = rank_trainer(callbacks=[technique], strategy=strategy, max_epochs=2)
    run.fit(module, Batches((INPUTS[:16], LABELS[:16]), (INPUTS[16:32], LABELS[16:32])))
    return weights(module).tolist(), technique.draws[0].flatten().tolist()


@pytest.mark.parametrize("find_unused", [False, True])
def test_all_ranks_have_the_same_noise_on_weights_and_train_the_same(ranks, find_unused):
    one, other = ranks.run(weights_of_this_rank, find_unused)
    assert one == other
    alone, technique = Host(), Draw(0.3)
    run = trainer([technique])
    run.fit(alone, Batches((INPUTS[:16], LABELS[:16]), (INPUTS[16:32], LABELS[16:32])))
    # Both ranks saw the same batches, so that DDP's mean is that of one process.
    torch.testing.assert_close(torch.tensor(one[0]), weights(alone), rtol=0, atol=1e-6)
