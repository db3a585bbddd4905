"""Which samples teach which network, the official values, and two networks trained by hand."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_reg import CoTeaching, NestedDropout
from lightning_reg.engine import Communicator
from lightning_reg.engine.schedule import LinearSchedule
from lightning_reg.techniques.noisy_labels.co_teaching import (
    co_teaching,
    forget_share,
    small_loss_weights,
)
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, fit, weights

OWN = [[1.0, -2.0, 0.5], [0.2, 0.1, -0.3], [-1.0, 2.5, 0.0], [0.3, 0.0, 1.2], [2.0, -1.0, 0.0]]
PEER = [[0.1, 0.4, -0.5], [1.0, -0.1, 0.6], [0.0, 0.5, 2.0], [-0.4, 0.9, 0.2], [0.5, 1.5, -1.0]]
TRUE = torch.tensor([0, 2, 1, 2, 1])


def losses(scores):
    return F.cross_entropy(scores, TRUE, reduction="none")


# ---------------------------------------------------------------------- the function


def test_equals_the_official_code():
    # bhanML/Co-teaching@7c7fbe2, loss.py, forget rate 0.4, run in float32; its division of a mean
    # by the number of samples (3 of 5) is taken back.
    own, peer = (torch.tensor(rows, requires_grad=True) for rows in (OWN, PEER))
    value, peer_value = co_teaching(losses(own), losses(peer), 0.4)
    (value + peer_value).backward()
    assert value.item() == pytest.approx(1.69842362, abs=1e-6)
    assert peer_value.item() == pytest.approx(1.38036287, abs=1e-6)
    official = [
        [-0.13208370, 0.01001963, 0.12206408],
        [0.13272980, 0.12009887, -0.25282866],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.28126490, -0.31932998, 0.03806507],
    ]
    np.testing.assert_allclose(own.grad.numpy(), official, atol=1e-6)
    official_peer = [[-0.21833810, 0.15522735, 0.06311073], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(peer.grad[:2].numpy(), official_peer, atol=1e-6)


def test_the_smallest_losses_are_kept_with_a_mean_of_one():
    found = small_loss_weights(torch.tensor([3.0, 1.0, 2.0, 0.5, 9.0]), 0.5)
    assert found.tolist() == [0.0, 2.5, 0.0, 2.5, 0.0]
    assert small_loss_weights(torch.rand(7), 0.0).tolist() == [1.0] * 7
    # (1 - 0.9) 10 is 0.99999... in binary; and the last sample is never forgotten.
    assert (small_loss_weights(torch.rand(10), 0.9) > 0).sum() == 1
    assert (small_loss_weights(torch.rand(3), 0.9) > 0).sum() == 1


def test_the_rate_rises_as_in_the_official_code():
    # main.py: linspace(0, forget_rate, num_gradual), then forget_rate.
    expected = np.concatenate([np.linspace(0, 0.45, 10), [0.45, 0.45]])
    found = [0.45 * forget_share(epoch, 10) for epoch in range(12)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert [forget_share(e, 0) for e in range(2)] == [1.0, 1.0]
    assert [forget_share(e, 1) for e in range(2)] == [0.0, 1.0]
    assert [forget_share(e, 0, start=2) for e in range(3)] == [0.0, 0.0, 1.0]
    # T^c / (T_k - 1)
    assert forget_share(2, 9, 2.0) == 0.5
    assert forget_share(5, 5, 0.5, start=1) == 0.5


# ---------------------------------------------------------------------- training


def by_hand(own, peer, rate, epochs=2):
    """Two networks and two optimizers, as in the official loop."""
    networks = [copy.deepcopy(own), copy.deepcopy(peer)]
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in networks]
    for _ in range(epochs):
        for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
            both = [F.cross_entropy(n(x), y, reduction="none") for n in networks]
            small = [loss.argsort()[: int((1 - rate) * 16)] for loss in both]
            taught = [both[0][small[1]].mean(), both[1][small[0]].mean()]
            for optimizer, loss in zip(optimizers, taught, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return networks


def train(technique, *others, module=None, **settings):
    module = Host() if module is None else module
    fit([technique, *others], module, **settings)
    return module


@pytest.mark.parametrize("select", ["train", "eval"])
def test_trains_what_two_optimizers_train(select):
    given = Host()
    torch.nn.init.normal_(given.net[0].weight, generator=torch.Generator().manual_seed(1))
    technique = CoTeaching(0.5, num_gradual=0, peer=given, select=select)
    module = train(technique)
    own, peer = by_hand(Host(), given, 0.5)
    torch.testing.assert_close(weights(module), weights(own), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(technique.peer), weights(peer), rtol=0, atol=1e-6)


def test_before_its_start_all_samples_teach():
    module = train(CoTeaching(0.9, num_gradual=0, start=2))
    alone, _ = fit([], Host())
    torch.testing.assert_close(weights(module), weights(alone), rtol=0, atol=1e-6)


class Picked(CoTeaching):
    """Keeps the weights of every pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def _weights(self, step, *both):
        found = super()._weights(step, *both)
        self.seen.append((step.is_rerun, *found))
        return found


def test_a_schedule_drives_the_rate():
    technique = Picked(LinearSchedule(0.0, 0.5, start=0, end=1, by="epoch"), num_gradual=0)
    train(technique)
    kept = [int((own > 0).sum()) for _, own, _ in technique.seen]
    assert kept == [16] * 4 + [8] * 4


def test_a_second_pass_learns_from_what_the_first_one_picked():
    technique = Picked(0.5, num_gradual=0)
    train(technique, Ascent(2.0))
    passes = [seen for seen in technique.seen if seen[0]]
    assert passes
    first = None
    for rerun, own, peer in technique.seen:
        if rerun:
            assert torch.equal(own, first[0])
            assert torch.equal(peer, first[1])
        else:
            first = own, peer


def test_disjoint_halves_teach():
    technique = Picked(0.25, num_gradual=0, disjoint=True)
    train(technique)
    for _, own, peer in technique.seen:
        # 6 of each 8 at weight 16 / 6: the second half teaches the module, the first its peer.
        assert own[:8].eq(0).all()
        assert peer[8:].eq(0).all()
        for weight in (own, peer):
            assert (weight > 0).sum() == 6
            assert weight.mean().item() == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_picks_nothing():
    class OneRank:
        comm, epoch, is_rerun, kept = Communicator(), 3, False, {}

        def strength(self, technique):
            return 0.5

    both = torch.tensor([1.0, float("nan"), 2.0, 3.0]), torch.rand(4)
    for found in CoTeaching(0.5, num_gradual=0)._weights(OneRank(), *both):
        assert found.tolist() == [1.0] * 4


# ---------------------------------------------------------------------- with compression


def test_nested_dropout_cuts_both_networks():
    # Only the first unit of sixteen is ever kept: the heads never hear of the others.
    given = Host()
    torch.nn.init.normal_(given.net[4].weight, generator=torch.Generator().manual_seed(1))
    technique = CoTeaching(0.5, num_gradual=0, peer=given)
    module = train(technique, NestedDropout(layer="net.2", sigma=1e-3))
    for start, trained in ((Host(), module), (given, technique.peer)):
        moved = trained.net[4].weight - start.net[4].weight
        assert moved[:, 1:].eq(0).all()
        assert moved[:, 0].ne(0).any()


def test_looks_are_cut_at_the_best_length():
    looked = []

    class Looking(CoTeaching):
        def per_sample_loss(self, step, logits, distribution):
            looked.append(self.answers(step))
            return super().per_sample_loss(step, logits, distribution)

    cut = NestedDropout(layer="net.2", sigma=1e-3)
    cut.best_length = 5
    technique, module = Looking(0.5, num_gradual=0, select="eval"), Host(lr=0.0)
    fit([technique, cut], module, max_epochs=1)
    for network, look in ((module, looked[0].own_look), (technique.peer, looked[0].peer_look)):
        with torch.no_grad():
            hidden = network.net[:3](INPUTS[:16])
            hidden[:, 5:] = 0
            torch.testing.assert_close(look, network.net[4](hidden))
