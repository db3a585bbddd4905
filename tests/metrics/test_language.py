"""Perplexity, bits per byte and rolling entropy against NumPy and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torchmetrics.text import Perplexity as TorchmetricsPerplexity

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    BitsPerByte,
    HighEntropyShare,
    Perplexity,
    PredictiveEntropy,
    RollingEntropy,
    bits_per_byte,
    high_entropy_share,
    perplexity,
    rolling_entropy,
)

_rng = np.random.default_rng(0)
N, T, V = 6, 9, 5
LOGITS = torch.tensor(_rng.normal(size=(N, T, V)) * 2)
IDS = torch.tensor(_rng.integers(0, V, (N, T)))
LENGTHS = np.array([9, 1, 4, 7, 2, 9])
PADDED = IDS.masked_fill(torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1), -100)
P = LOGITS.softmax(2).numpy()
NLL = -np.log(np.take_along_axis(P, IDS.numpy()[..., None], 2))[..., 0]
KEPT = (PADDED != -100).numpy()
ENTROPY = scipy_entropy(P, axis=2)


def test_perplexity_is_the_exponential_of_the_mean_over_tokens():
    value = perplexity(LOGITS, PADDED, from_logits=True, ignore_index=-100)
    assert float(value) == pytest.approx(math.exp(NLL[KEPT].mean()), rel=1e-12)
    given = perplexity(LOGITS.softmax(2), IDS, from_logits=False)
    assert float(given) == pytest.approx(math.exp(NLL.mean()), rel=1e-12)


def test_perplexity_equals_torchmetrics():
    reference = TorchmetricsPerplexity(ignore_index=-100)
    reference.update(LOGITS, PADDED)
    value = perplexity(LOGITS, PADDED, from_logits=True, ignore_index=-100)
    assert float(value) == pytest.approx(float(reference.compute()), rel=1e-6)


def test_perplexity_of_batches_is_not_the_mean_of_their_perplexities():
    metric = Perplexity(from_logits=True)
    parts = [math.exp(NLL[:4].mean()), math.exp(NLL[4:].mean())]
    metric.update(LOGITS[:4], IDS[:4])
    metric.update(LOGITS[4:], IDS[4:])
    assert float(metric.compute()) == pytest.approx(math.exp(NLL.mean()), rel=1e-12)
    assert abs(float(metric.compute()) - np.mean(parts)) > 1e-3


def test_an_impossible_token_makes_perplexity_infinite():
    value = perplexity(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[1]]), from_logits=False)
    assert float(value) == math.inf


def test_token_entropy_is_the_predictive_entropy_along_the_last_dimension():
    metric = PredictiveEntropy(from_logits=True, class_dim=-1, ignore_index=-100)
    metric.update(LOGITS, PADDED)
    assert float(metric.compute()) == pytest.approx(ENTROPY[KEPT].mean(), abs=1e-12)


# ---------------------------------------------------------------- bits per byte


def test_a_uniform_model_of_bytes_needs_eight_bits():
    text = torch.tensor([list(b"Wo liegt der Hund?")])
    value = bits_per_byte(
        torch.zeros(1, text.shape[1], 256), text, torch.tensor([18]), from_logits=True
    )
    assert float(value) == pytest.approx(8.0, abs=1e-12)


def test_it_is_the_sum_of_bits_over_the_sum_of_bytes():
    counts = torch.tensor([20, 3, 9, 14, 5, 31])
    value = bits_per_byte(LOGITS, PADDED, counts, from_logits=True, ignore_index=-100)
    assert float(value) == pytest.approx(NLL[KEPT].sum() / math.log(2) / 82, abs=1e-12)


def test_merging_tokens_changes_nothing():
    # "ab" as two tokens, each 1/2, then "c" 1/4; or as one token of 1/4 and "c".
    two = torch.tensor([[[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0]]])
    one = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.25, 0.5, 0.25, 0]]])
    values = [
        float(bits_per_byte(p, torch.tensor([ids]), torch.tensor([3]), from_logits=False))
        for p, ids in ((two, [0, 1, 2]), (one, [3, 2]))
    ]
    assert values == pytest.approx([4 / 3, 4 / 3], abs=1e-12)


def test_text_is_counted_in_bytes_and_without_what_is_ignored():
    pieces = ["a", "ß", "日", "𝄞", "xyz"]
    seen = []

    def decode(tokens):
        seen.append(tokens)
        return "".join(pieces[t] for t in tokens)

    metric = BitsPerByte(from_logits=True, decode=decode, ignore_index=-100)
    metric.update(LOGITS, PADDED)
    sizes = np.array([1, 2, 3, 4, 3])
    assert int(metric.bytes) == sizes[IDS.numpy()[KEPT]].sum()
    assert [len(tokens) for tokens in seen] == LENGTHS.tolist()
    assert int(metric.tokens) == KEPT.sum()


def test_a_sequence_that_is_not_finite_is_left_out_with_its_bytes():
    logits = LOGITS.clone()
    logits[2, 1, 0] = math.nan
    metric = BitsPerByte(from_logits=True)
    metric.update(logits, IDS, torch.full((N,), 10))
    kept = np.arange(N) != 2
    assert float(metric.value()) == pytest.approx(NLL[kept].sum() / math.log(2) / 50, abs=1e-12)


def test_nothing_finite_is_asked_of_padding():
    logits = LOGITS.clone()
    logits[1, 1:] = math.nan  # the sequence has one token
    metric = RollingEntropy(from_logits=True, window=2, ignore_index=-100)
    metric.update(logits, PADDED)
    assert int(metric.invalid) == 0
    assert not math.isnan(float(metric.compute()))


def test_byte_counts_are_asked_for_once():
    with pytest.raises(ArgumentError, match="either byte counts or"):
        bits_per_byte(LOGITS, IDS, from_logits=True)
    with pytest.raises(ArgumentError, match="decode=tokenizer"):
        BitsPerByte(from_logits=True, decode="utf-8")


# ---------------------------------------------------------------- rolling entropy


def rolling(window):
    """By a loop over windows: the mean over the tokens that count."""
    means = []
    for n, t in zip(*np.nonzero(KEPT), strict=True):
        inside = slice(max(0, t - window + 1), t + 1)
        means.append(ENTROPY[n, inside][KEPT[n, inside]].mean())
    return np.array(means)


@pytest.mark.parametrize("window", [1, 3, 20])
def test_rolling_entropy_equals_a_loop(window):
    value = rolling_entropy(LOGITS, PADDED, from_logits=True, window=window, ignore_index=-100)
    assert float(value) == pytest.approx(rolling(window).mean(), abs=1e-12)


def test_the_share_above_a_threshold():
    threshold = float(np.median(rolling(3)))
    value = high_entropy_share(
        LOGITS, PADDED, from_logits=True, window=3, threshold=threshold, ignore_index=-100
    )
    assert float(value) == pytest.approx((rolling(3) > threshold).mean(), abs=1e-12)


def test_full_windows_are_a_convolution():
    sequence = torch.tensor(ENTROPY[:1]).unsqueeze(1)
    kernel = torch.full((1, 1, 4), 0.25, dtype=torch.float64)
    expected = torch.nn.functional.conv1d(sequence, kernel).mean()
    whole = rolling(4)[3 : LENGTHS[0]].mean()  # the first sequence has no padding
    assert whole == pytest.approx(float(expected), abs=1e-12)


def test_uniform_predictions_have_log_v_at_every_token():
    value = rolling_entropy(torch.zeros(2, 5, 7), from_logits=True, window=3)
    assert float(value) == pytest.approx(math.log(7), abs=1e-12)


def test_a_gap_in_a_sequence_is_left_out_of_the_window():
    p = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]]])
    ids = torch.tensor([[0, -1, 0]])
    value = rolling_entropy(p, ids, from_logits=False, window=3, ignore_index=-1)
    assert float(value) == pytest.approx((math.log(2) + math.log(2) / 2) / 2, abs=1e-7)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (RollingEntropy, {"window": 0}, "window"),
        (HighEntropyShare, {"window": 2, "threshold": -1.0}, "threshold"),
        (HighEntropyShare, {"window": 2, "threshold": math.nan}, "threshold"),
        (Perplexity, {"task": "binary"}, "vocabulary"),
        (RollingEntropy, {"window": 2, "from_logits": None}, "never guessed"),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        kind(**{"from_logits": True, **arguments})


def test_targets_that_are_not_shifted_are_refused_with_the_line_that_shifts():
    with pytest.raises(ArgumentError, match=r"logits\[:, :-1\], tokens\[:, 1:\]"):
        bits_per_byte(LOGITS[:, :-1], IDS, torch.ones(N).long(), from_logits=True)
