"""The entropy of attention against SciPy, under masks and over layers and heads."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import AttentionEntropy, attention_entropy

_rng = np.random.default_rng(0)
L, B, H, T, S = 2, 4, 3, 5, 5
LOGITS = torch.tensor(_rng.normal(size=(L, B, H, T, S)) * 2)
ARGS = {"num_layers": L, "num_heads": H, "from_logits": True}
LENGTHS = torch.tensor([5, 3, 1, 4])
KEYS = (torch.arange(S) < LENGTHS.unsqueeze(1))[:, None, None, :]
CAUSAL = torch.ones(T, S, dtype=torch.bool).tril()


def by_loop(mask=None, normalized=False):
    """Each row by itself, over the keys that it may look at."""
    mask = torch.ones(B, H, T, S, dtype=torch.bool) if mask is None else mask.expand(B, H, T, S)
    means = np.zeros((L, H))
    for layer in range(L):
        for head in range(H):
            rows = []
            for b in range(B):
                for t in range(T):
                    keys = mask[b, head, t]
                    if int(keys.sum()) < (2 if normalized else 1):
                        continue
                    row = LOGITS[layer, b, head, t][keys].softmax(0).numpy()
                    scale = math.log(int(keys.sum())) if normalized else 1.0
                    rows.append(scipy_entropy(row) / scale)
            means[layer, head] = np.mean(rows)
    return means


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    "mask", [None, KEYS, CAUSAL, KEYS & CAUSAL], ids=["none", "keys", "causal", "both"]
)
def test_equals_scipy_row_by_row(mask, normalized):
    value = attention_entropy(LOGITS, mask, normalized=normalized, **ARGS)
    np.testing.assert_allclose(value.numpy(), by_loop(mask, normalized), atol=1e-12)


def test_probabilities_and_logits_agree_under_a_mask():
    given = LOGITS.masked_fill(~KEYS, -math.inf).softmax(-1)
    value = attention_entropy(given, KEYS, **{**ARGS, "from_logits": False})
    np.testing.assert_allclose(value.numpy(), by_loop(KEYS), atol=1e-12)


def test_a_list_of_layers_may_have_other_lengths():
    layers = [LOGITS[0], LOGITS[1, :, :, :2, :3]]
    value = attention_entropy(layers, **ARGS)
    expected = scipy_entropy(LOGITS[1, :, :, :2, :3].softmax(-1).numpy(), axis=-1).mean((0, 2))
    np.testing.assert_allclose(value[1].numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(value[0].numpy(), by_loop()[0], atol=1e-12)


def test_one_key_has_no_entropy_and_all_alike_the_logarithm():
    one_hot = torch.eye(4).view(1, 1, 1, 4, 4)
    args = {"num_layers": 1, "num_heads": 1, "from_logits": False}
    assert float(attention_entropy(one_hot, **args)) == 0.0
    assert float(attention_entropy(torch.full((1, 1, 1, 1, 9), 1 / 9), **args)) == pytest.approx(
        math.log(9), abs=1e-6
    )


def test_uniform_causal_attention_is_one_when_normalized_and_less_of_log_s():
    zeros = torch.zeros(1, 1, 1, 16, 16)
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    args = {"num_layers": 1, "num_heads": 1, "from_logits": True}
    assert float(attention_entropy(zeros, causal, normalized=True, **args)) == pytest.approx(1.0)
    expected = np.log(np.arange(1, 17)).mean()
    assert float(attention_entropy(zeros, causal, **args)) == pytest.approx(expected, abs=1e-12)


def test_a_query_that_may_look_at_nothing_does_not_count():
    mask = torch.ones(B, 1, T, S, dtype=torch.bool)
    mask[1, :, 2] = False
    metric = AttentionEntropy(**ARGS)
    metric.update(LOGITS, mask)
    assert metric.count.tolist() == [[B * T - 1] * H] * L
    np.testing.assert_allclose(metric.compute().numpy(), by_loop(mask), atol=1e-12)


def test_what_is_masked_may_be_anything():
    given = LOGITS.clone()
    given[:, 1, :, :, 3:] = math.nan  # behind the end of the second sample
    value = attention_entropy(given, KEYS, **ARGS)
    np.testing.assert_allclose(value.numpy(), by_loop(KEYS), atol=1e-12)


def test_a_sample_that_is_not_finite_in_one_layer_is_left_out_of_all():
    given = LOGITS.clone()
    given[1, 2, 0, 0, 0] = math.nan
    metric = AttentionEntropy(**ARGS)
    metric.update(given)
    kept = torch.tensor([0, 1, 3])
    assert int(metric.invalid) == 1
    expected = attention_entropy(LOGITS[:, kept], **ARGS)
    torch.testing.assert_close(metric.value(), expected, atol=1e-12, rtol=0)


def test_the_weights_of_multihead_attention_can_be_given():
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.tensor(_rng.normal(size=(3, 6, 8)))
    _, weights = layer(x, x, x, average_attn_weights=False)
    metric = AttentionEntropy(num_layers=1, num_heads=2, from_logits=False)
    metric.update([weights])
    expected = scipy_entropy(weights.detach().numpy(), axis=-1).mean((0, 2))
    np.testing.assert_allclose(metric.compute()[0].numpy(), expected, atol=1e-12)


def test_probabilities_of_dropped_attention_are_refused():
    dropped = torch.nn.functional.dropout(LOGITS.softmax(-1), 0.5)
    with pytest.raises(ArgumentError, match="sum to one"):
        attention_entropy(dropped, **{**ARGS, "from_logits": False})


def test_the_figure_shows_the_value():
    metric = AttentionEntropy(**ARGS)
    metric.update(LOGITS)
    _, axes = metric.plot()
    np.testing.assert_allclose(axes.images[0].get_array(), metric.compute().numpy())


@pytest.mark.parametrize(
    "arguments", [{"num_layers": 0}, {"num_heads": 1.5}, {"from_logits": "yes"}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        AttentionEntropy(**{**ARGS, **arguments})
