"""Cut cross-entropy is the plain one, in values and gradients, without its logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_reg import CutCrossEntropyMixin
from lightning_reg.engine import ArgumentError
from lightning_reg.functional import cut_cross_entropy


def _case(dtype=torch.float64, bias=True, rows=11, width=5, vocabulary=23):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    shift = torch.randn(vocabulary, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return features, weight, targets, shift if bias else None


def _gradients(loss, *inputs):
    return torch.autograd.grad(loss, [i for i in inputs if i is not None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1, 4, 11, 100])
def test_equals_the_plain_loss_in_value_and_gradients(bias, block):
    features, weight, targets, shift = _case(bias=bias)
    targets[2] = -100
    plain = F.cross_entropy(F.linear(features, weight, shift), targets)
    found = cut_cross_entropy(features, weight, targets, shift, block=block)
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=0)
    expected = _gradients(plain, features, weight, shift)
    for one, other in zip(_gradients(found, features, weight, shift), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_gradients_are_scaled_by_what_comes_back():
    features, weight, targets, shift = _case()
    loss = cut_cross_entropy(features, weight, targets, shift, block=3)
    once = _gradients(3.0 * loss**2, features, weight, shift)
    plain = F.cross_entropy(F.linear(features, weight, shift), targets)
    expected = _gradients(3.0 * plain**2, features, weight, shift)
    for one, other in zip(once, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_backward_is_the_first():
    features, weight, targets, shift = _case()
    loss = cut_cross_entropy(features, weight, targets, shift, block=3)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], first, rtol=0, atol=0)


def test_positions_keep_their_shape():
    features, weight, targets, shift = _case(rows=12)
    batch = cut_cross_entropy(features.view(3, 4, 5), weight, targets.view(3, 4), shift)
    torch.testing.assert_close(batch, cut_cross_entropy(features, weight, targets, shift))


def test_without_any_target_the_loss_is_zero():
    features, weight, targets, shift = _case()
    loss = cut_cross_entropy(features, weight, torch.full_like(targets, -100), shift)
    assert loss == 0
    assert all(g.abs().max() == 0 for g in _gradients(loss, features, weight, shift))


def test_autocast_agrees_with_full_precision_to_rounding():
    features, weight, targets, shift = _case(torch.float32)
    exact = cut_cross_entropy(features, weight, targets, shift)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = cut_cross_entropy(features, weight, targets, shift)
    assert half.dtype == torch.float32
    # Eight bits of mantissa.
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=0)
    one, other = (_gradients(loss, weight)[0] for loss in (half, exact))
    assert one.dtype == weight.dtype
    assert (one - other).norm() < 2e-2 * other.norm()


def test_filtering_leaves_out_what_is_below_the_threshold():
    features, weight, targets, shift = _case(rows=4, vocabulary=64)
    with torch.no_grad():
        weight.mul_(4)
    eps = 1e-3
    p = F.linear(features, weight, shift).softmax(1)
    matter = (p.amax(0) >= eps) | F.one_hot(targets, 64).bool().any(0)
    assert 0 < matter.sum() < 32
    exact = _gradients(cut_cross_entropy(features, weight, targets, shift), weight)[0]
    loss = cut_cross_entropy(features, weight, targets, shift, filter_eps=eps)
    filtered = _gradients(loss, weight)[0]
    torch.testing.assert_close(filtered[matter], exact[matter])
    assert filtered[~matter].abs().max() == 0
    # What is left out is small: below eps times the mean feature of the batch.
    bound = eps * features.detach().abs().mean(0)
    assert (exact[~matter].abs() <= bound + 1e-12).all()


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // 4)
        return result


def test_nothing_of_the_size_of_the_logits_is_made():
    features, weight, targets, _ = _case(torch.float32, rows=512, width=2, vocabulary=2000)
    with LargestTensor() as watch:
        cut_cross_entropy(features, weight, targets, block=16).backward()
    assert watch.largest == 16 * 2000
    with LargestTensor() as plain:
        F.cross_entropy(features @ weight.T, targets).backward()
    assert plain.largest == 512 * 2000


def test_derivative_by_finite_differences():
    features, weight, targets, shift = _case(rows=4, vocabulary=6)
    torch.autograd.gradcheck(
        lambda f, w, b: cut_cross_entropy(f, w, targets, b, block=3), (features, weight, shift)
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((torch.zeros(3, 5), torch.zeros(3).long(), nn.Conv1d(5, 7, 1)), "must be an nn.Linear"),
        ((torch.zeros(3, 5), torch.zeros(4).long(), nn.Linear(5, 7)), "need targets of shape"),
        ((torch.zeros(3, 4), torch.zeros(3).long(), nn.Linear(5, 7)), "a head that reads 4"),
    ],
)
def test_wrong_arguments_are_named(arguments, problem):
    with pytest.raises(ArgumentError, match=problem):
        CutCrossEntropyMixin.cut_cross_entropy(None, *arguments)
