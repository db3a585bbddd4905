"""Router and load entropy of experts, and what tells them apart."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torchmetrics import MetricCollection

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    ExpertLoadEntropy,
    RouterEntropy,
    RoutingInformation,
    expert_load_entropy,
    router_entropy,
    routing_information,
)

_rng = np.random.default_rng(0)
E = 6
LOGITS = torch.tensor(_rng.normal(size=(4, 25, E)) * 2 + np.linspace(0, 2, E))
P = LOGITS.softmax(-1).reshape(-1, E).numpy()
ARGS = {"num_experts": E, "from_logits": True}


def test_router_entropy_is_the_mean_over_tokens():
    expected = scipy_entropy(P, axis=1).mean()
    assert float(router_entropy(LOGITS, **ARGS)) == pytest.approx(expected, abs=1e-12)
    normalized = router_entropy(LOGITS, normalized=True, **ARGS)
    assert float(normalized) == pytest.approx(expected / math.log(E), abs=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_load_entropy_is_that_of_the_counts(top_k):
    chosen = np.argsort(-P, axis=1)[:, :top_k]
    expected = scipy_entropy(np.bincount(chosen.ravel(), minlength=E))
    value = expert_load_entropy(LOGITS, top_k=top_k, **ARGS)
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_importance_is_the_mean_probability():
    value = expert_load_entropy(LOGITS, of="importance", **ARGS)
    assert float(value) == pytest.approx(scipy_entropy(P.mean(0)), abs=1e-12)


def test_information_is_the_mean_divergence_from_the_average_router():
    expected = np.mean([scipy_entropy(p, P.mean(0)) for p in P])
    assert float(routing_information(LOGITS, **ARGS)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (torch.eye(4), (0.0, 1.0, 1.0)),  # sure and balanced
        (torch.eye(4)[[0, 0, 0, 0]], (0.0, 0.0, 0.0)),  # collapsed
        (torch.full((4, 4), 0.25), (1.0, 1.0, 0.0)),  # knows nothing: importance is balanced
    ],
    ids=["specialised", "collapsed", "ignorant"],
)
def test_the_three_tell_states_of_a_router_apart(router, expected):
    args = {"num_experts": 4, "from_logits": False}
    values = (
        router_entropy(router, **args),
        expert_load_entropy(router, of="importance", **args),
        routing_information(router, **args),
    )
    assert [float(v) / math.log(4) for v in values] == pytest.approx(expected, abs=1e-7)


def test_padding_does_not_count():
    mask = torch.tensor(_rng.random((4, 25)) < 0.6)
    kept = LOGITS[mask]
    for function in (router_entropy, expert_load_entropy, routing_information):
        value = function(LOGITS, mask, **ARGS)
        assert float(value) == pytest.approx(float(function(kept, **ARGS)), abs=1e-12)


def test_the_load_of_joint_batches_is_not_the_mean_of_their_entropies():
    metric = ExpertLoadEntropy(num_experts=2, from_logits=False)
    metric.update(torch.tensor([[1.0, 0.0]]))
    metric.update(torch.tensor([[0.0, 1.0]]))
    assert float(metric.compute()) == pytest.approx(math.log(2))
    assert metric.shares().tolist() == [0.5, 0.5]


def test_a_collection_counts_once():
    metrics = MetricCollection(
        [kind(**ARGS) for kind in (RouterEntropy, ExpertLoadEntropy, RoutingInformation)]
    )
    metrics.update(LOGITS)
    assert len(metrics.compute_groups) == 1


@pytest.mark.parametrize(
    ("arguments", "message"), [({"top_k": 7}, "top_k"), ({"of": "weight"}, "load, importance")]
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        ExpertLoadEntropy(**ARGS, **arguments)


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ArgumentError, match="bool"):
        router_entropy(LOGITS, torch.ones(4, 25), **ARGS)
