"""A gate between a shared network and experts, and the budget that it is held to."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.noise.conditional_moe_routing import (
    ConditionalMoE,
    ConditionalMoERouting,
    conditional_moe,
    routing_budget,
)
from tests.engine.simple import INPUTS, Host, fit


class Times(nn.Module):
    def __init__(self, factor, shift=0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x):
        return self.factor * x + self.shift


def _layer(dropout=0.0):
    layer = ConditionalMoE(Times(-1, 1), Times(2), features=2, gate_dropout=dropout).double()
    with torch.no_grad():
        layer.gate.projection.weight.copy_(torch.tensor([[1.5, -0.5]]))
        layer.gate.projection.bias.copy_(torch.tensor([0.25]))
    return layer


def test_official_output_gates_budget_and_gradients():
    """fairseq, branch nllb: CMRLayer and the criterion's CMR loss, run on these inputs."""
    layer = _layer()
    x = torch.arange(12).double().view(2, 3, 2) / 10 - 0.5
    padding = torch.tensor([[False, False, True], [False, False, False]])
    gates, counted = layer.gate(x, padding)
    official = [
        [0.425557483188341, 0.47502081252106, 0.0],
        [0.574442516811659, 0.6224593312018546, 0.6681877721681662],
    ]
    torch.testing.assert_close(gates, torch.tensor(official, dtype=torch.float64))
    assert layer(x, padding=padding).sum().item() == pytest.approx(4.563689746362936, abs=1e-12)
    loss = routing_budget((gates * counted).sum() / counted.sum(), 0.8)
    assert loss.item() == pytest.approx(0.24686641682178379, abs=1e-12)
    loss.backward()
    gradient = layer.gate.projection.weight.grad.flatten().tolist()
    assert gradient == pytest.approx([-0.0017522827145733944, -0.025652467695955132], abs=1e-12)
    bias = layer.gate.projection.bias.grad.item()
    assert bias == pytest.approx(-0.23900184981381745, abs=1e-12)


def test_a_closed_gate_is_the_shared_network_and_an_open_one_the_experts():
    shared, routed = torch.randn(3, 4), torch.randn(3, 4)
    gates = torch.tensor([0.0, 1.0, 0.0])
    mixed = conditional_moe(shared, routed, gates)
    torch.testing.assert_close(mixed[[0, 2]], shared[[0, 2]])
    torch.testing.assert_close(mixed[1], routed[1])


def test_gate_dropout_closes_gates_in_training_and_keeps_the_mean_output():
    layer = _layer(dropout=0.25).train()
    x = torch.full((20_000, 2), 0.5, dtype=torch.float64)
    torch.manual_seed(0)
    gates, _ = layer.gate(x, None)
    closed = (gates == 0).double().mean().item()
    assert closed == pytest.approx(0.25, abs=0.015)
    torch.manual_seed(0)
    mean = layer(x).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x[0]), rtol=0, atol=0.02)


class TupleMixture(Times):
    def forward(self, x):
        return super().forward(x), {"router_logits": x}


def test_what_else_the_mixture_returns_is_passed_on():
    layer = ConditionalMoE(TupleMixture(3.0), Times(1.0), features=8, gate_dropout=0.0)
    mixed, extra = layer(INPUTS)
    assert extra["router_logits"] is INPUTS
    gates, _ = layer.gate(INPUTS, None)
    torch.testing.assert_close(mixed, INPUTS * (1 + 2 * gates.unsqueeze(-1)))


class Routed(Host):
    """Two conditional layers on the same input, of which the second is called twice."""

    def __init__(self):
        super().__init__(lr=0.5)
        self.one = ConditionalMoE(Times(1.0), Times(1.0), 8, gate_dropout=0.0)
        self.two = ConditionalMoE(Times(1.0), Times(1.0), 8, gate_dropout=0.0)

    def forward(self, x):
        # Both paths are the same map: the task has no say about the gates.
        return self.net(self.two(self.two(self.one(x))))

    def mean_gate(self):
        with torch.no_grad():
            gates = [layer.gate(INPUTS, None)[0] for layer in (self.one, self.two, self.two)]
            return torch.stack(gates).mean().item()


@pytest.mark.parametrize("budget", [0.2, 0.9])
def test_the_mean_gate_of_all_layers_comes_to_the_budget(budget):
    module = Routed()
    with torch.no_grad():
        module.two.gate.projection.bias.fill_(1.5)
    fit([ConditionalMoERouting(1.0, budget=budget)], module=module, max_epochs=30)
    # The gradient of an absolute value does not fall: it swings by a step around the budget.
    assert module.mean_gate() == pytest.approx(budget, abs=0.06)


def test_layers_may_differ_where_their_mean_keeps_the_budget():
    """|mean| and mean |.| differ: gates of 0.1 and 0.9 keep a budget of 0.5 without a gradient."""
    gates = torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert routing_budget(gates.mean(), 0.5).item() == pytest.approx(0.0, abs=1e-15)


def test_a_module_without_a_conditional_layer_is_refused():
    with pytest.raises(ArgumentError, match="finds no ConditionalMoE"):
        fit([ConditionalMoERouting()])
    with pytest.raises(ArgumentError, match="gate_dropout"):
        ConditionalMoE(Times(1.0), Times(1.0), 8, gate_dropout=1.0)
