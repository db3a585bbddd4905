"""Discrete infomax codes: information of known codes."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from lightning_reg.engine import RegularizationError
from lightning_reg.techniques.features.discrete_infomax import DiscreteInfomax, discrete_infomax
from tests.engine.simple import fit


def sure(codes, k):
    """Logits of codes (N, d) that are certain."""
    return torch.nn.functional.one_hot(codes, k).double() * 200


LABELS = torch.arange(12) % 4
RANDOM = torch.randint(0, 3, (12, 2), generator=torch.Generator().manual_seed(0))


def test_a_code_that_names_the_class_has_all_of_its_information():
    value = discrete_infomax(sure(LABELS.unsqueeze(1), 4), LABELS)
    assert value.item() == pytest.approx(-math.log(4), abs=1e-9)


def test_a_code_that_ignores_the_label_has_none():
    constant = torch.zeros(12, 1, dtype=torch.long)
    assert discrete_infomax(sure(constant, 3), LABELS).item() == pytest.approx(0, abs=1e-9)
    unsure = torch.zeros(12, 2, 3, dtype=torch.float64)
    assert discrete_infomax(unsure, LABELS).item() == pytest.approx(0, abs=1e-9)


def test_sure_codes_equal_scikit_learn():
    information = sum(mutual_info_score(LABELS, RANDOM[:, i]) for i in range(2))
    redundancy = 2 * mutual_info_score(RANDOM[:, 0], RANDOM[:, 1])
    value = discrete_infomax(sure(RANDOM, 3), LABELS, 0.7)
    assert value.item() == pytest.approx(-information + 0.7 * redundancy, abs=1e-9)


def test_two_entries_that_say_the_same_are_redundant_by_their_entropy():
    twice = LABELS.unsqueeze(1).expand(12, 2)
    value = discrete_infomax(sure(twice, 4), LABELS, 1.0)
    assert value.item() == pytest.approx(-2 * math.log(4) + 2 * math.log(4), abs=1e-9)


def test_two_bits_name_four_classes_without_redundancy():
    bits = torch.stack([LABELS % 2, LABELS // 2], 1)
    value = discrete_infomax(sure(bits, 2), LABELS, 1.0)
    assert value.item() == pytest.approx(-2 * math.log(2), abs=1e-9)


def test_the_unsure_are_drawn_independently():
    # One sample with two fair bits: the joint distribution is the product, nothing is shared.
    both = torch.zeros(1, 2, 2, dtype=torch.float64)
    assert discrete_infomax(both, torch.tensor([0]), 5.0).item() == pytest.approx(0, abs=1e-12)


def test_saturated_codes_have_finite_gradients():
    z = (sure(RANDOM, 3).float() * 10).requires_grad_()
    discrete_infomax(z, LABELS).backward()
    assert z.grad.isfinite().all()


def test_shards_have_more_information_than_the_joint_batch():
    # Estimated from few samples, information is biased upwards: this is why ranks are gathered.
    joint = discrete_infomax(sure(RANDOM[:, :1], 3), LABELS)
    halves = [
        discrete_infomax(sure(RANDOM[part, :1], 3), LABELS[part])
        for part in (slice(0, 6), slice(6, 12))
    ]
    assert sum(halves) / 2 < joint - 0.05


def code_words(independence, seed):
    """How many of four classes have a code of two bits of their own after descent."""
    z = torch.randn(12, 2, 2, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        discrete_infomax(z, LABELS, independence).backward()
        optimizer.step()
    codes = z.argmax(-1)
    return len({tuple(codes[y == LABELS].mode(0).values.tolist()) for y in range(4)})


def test_independence_gives_each_class_a_word_of_its_own():
    # Over seeds 0 to 4: 2 or 3 words without, 4 with.
    for seed in range(3):
        assert code_words(0.0, seed) < 4
        assert code_words(1.0, seed) == 4


def test_a_width_that_the_entries_do_not_divide_is_refused():
    with pytest.raises(RegularizationError, match="two values or more"):
        fit([DiscreteInfomax(1.0, layer="net.0", entries=5)], max_epochs=1)
    with pytest.raises(RegularizationError, match="two values or more"):
        fit([DiscreteInfomax(1.0, layer="net.0", entries=16)], max_epochs=1)
