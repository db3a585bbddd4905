"""Pixels and tokens: constant state, temporaries as large as a block, exact counts at 1e9."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_reg.metrics import (
    AttentionEntropy,
    BitsPerByte,
    CalibrationError,
    ClassEntropy,
    ConditionalEntropy,
    EntropySeparation,
    ExpectedAccuracy,
    ExpectedNormalizedCalibrationError,
    ExpertLoadEntropy,
    GaussianCRPS,
    IntervalCoverage,
    MarginalEntropy,
    MutualInformation,
    NegativeLogLikelihood,
    Perplexity,
    PITHistogram,
    PredictiveEntropy,
    QuantileCalibrationError,
    RollingEntropy,
)
from lightning_reg.metrics.blocks import split_alike

BLOCK = 2**19


class Allocations(TorchDispatchMode):
    """The largest tensor that owns new memory, in bytes."""

    def __init__(self, given):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in given}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.largest = max(self.largest, storage.nbytes())
        return result


def repeated(row, *shape):
    """``shape`` copies of a row, which take up the memory of one."""
    return row.view(*[1] * len(shape), -1).expand(*shape, row.numel())


ROW = torch.tensor([0.3, -1.0, 2.0, 0.5])
WIDE = torch.linspace(-3, 3, 512)
P = ROW.double().softmax(0)
ENTROPY = float(-(P * P.log()).sum())


def pixels(images=64, size=128):
    """4.2e6 scores, eight blocks of them, of 1e6 pixels, as (N, C, H, W)."""
    return repeated(ROW, images, size, size).movedim(-1, 1)


def labels(images=64, size=128):
    return torch.zeros(1, 1, 1, dtype=torch.int64).expand(images, size, size)


def tokens(sequences=32, length=256):
    """4.2e6 scores as (N, T, V)."""
    return repeated(WIDE, sequences, length)


def token_ids(sequences=32, length=256):
    return torch.zeros(1, 1, dtype=torch.int64).expand(sequences, length)


def numbers(value, size=2**22):
    return torch.tensor([value]).expand(size)


CASES = {
    "entropy of pixels": (PredictiveEntropy(from_logits=True), lambda: (pixels(),)),
    "entropy of tokens": (
        PredictiveEntropy(from_logits=True, class_dim=-1, ignore_index=-100),
        lambda: (tokens(), token_ids()),
    ),
    "entropy by class": (
        ClassEntropy(num_classes=4, from_logits=True, ignore_index=255),
        lambda: (pixels(), labels()),
    ),
    "marginal": (MarginalEntropy(num_classes=4, from_logits=True), lambda: (pixels(),)),
    "conditional": (
        ConditionalEntropy(num_classes=4, from_logits=True),
        lambda: (pixels(), labels()),
    ),
    "right and wrong": (EntropySeparation(from_logits=True), lambda: (pixels(), labels())),
    "calibration": (
        CalibrationError(from_logits=True, ignore_index=255),
        lambda: (pixels(), labels()),
    ),
    "likelihood": (NegativeLogLikelihood(from_logits=True), lambda: (pixels(), labels())),
    "accuracy": (ExpectedAccuracy(from_logits=True), lambda: (pixels(), labels())),
    "perplexity": (
        Perplexity(from_logits=True, ignore_index=-100),
        lambda: (tokens(), token_ids()),
    ),
    "bits per byte": (
        BitsPerByte(from_logits=True),
        lambda: (tokens(), token_ids(), torch.full((32,), 700)),
    ),
    "rolling": (RollingEntropy(from_logits=True, window=4), lambda: (tokens(),)),
    "members": (
        MutualInformation(from_logits=True),
        lambda: (pixels(16).unsqueeze(0).expand(4, *pixels(16).shape),),
    ),
    "attention": (
        AttentionEntropy(num_layers=2, num_heads=4, from_logits=True),
        lambda: (repeated(WIDE, 2, 8, 4, 256), torch.ones(256, 512, dtype=torch.bool)),
    ),
    "routing": (ExpertLoadEntropy(num_experts=512, from_logits=True), lambda: (tokens(),)),
    "crps": (
        GaussianCRPS(scale_is="std"),
        lambda: (numbers(0.0), numbers(1.0), numbers(0.5)),
    ),
    "pit": (
        PITHistogram(scale_is="std"),
        lambda: (numbers(0.0), numbers(1.0), numbers(0.5)),
    ),
    "ence": (
        ExpectedNormalizedCalibrationError(scale_is="std"),
        lambda: (numbers(0.0), numbers(1.0), numbers(0.5)),
    ),
    "intervals": (IntervalCoverage(), lambda: (numbers(0.0), numbers(1.0), numbers(0.5))),
    "quantiles": (
        QuantileCalibrationError(levels=[0.2, 0.4, 0.6, 0.8]),
        lambda: (repeated(torch.arange(4.0), 2**20), numbers(0.5, 2**20)),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """What is set up once in a process, at the first large batch, is no batch's memory."""
    PredictiveEntropy(from_logits=True).update(pixels())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_made_that_is_larger_than_a_block(name):
    metric, make = CASES[name]
    metric.reset()
    data = make()
    assert data[0].numel() >= 2**22
    state = sum(t.numel() for t in metric.metric_state.values())
    with Allocations(data) as allocations:
        metric.update(*data)
    # A block in float64 three times over (mean, scale and target); the batch in float32 has four.
    assert allocations.largest <= 3 * 8 * BLOCK < data[0].numel() * 8
    assert sum(t.numel() for t in metric.metric_state.values()) == state


def test_one_large_image_is_cut_too():
    data = pixels(1, 1024).contiguous()
    metric = PredictiveEntropy(from_logits=True)
    with Allocations([data]) as allocations:
        metric.update(data)
    assert allocations.largest <= 8 * BLOCK
    assert int(metric.count) == 2**20
    assert float(metric.compute()) == pytest.approx(ENTROPY, abs=1e-9)


@pytest.mark.parametrize("layout", ["pixels", "tokens"])
def test_a_block_s_edge_makes_no_difference(layout):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 700, 300, 4, generator=generator)  # 2.5e6 scores, cut anywhere
    metric = PredictiveEntropy(from_logits=True, class_dim=1 if layout == "pixels" else -1)
    metric.update(scores.movedim(-1, 1) if layout == "pixels" else scores.view(3, -1, 4))
    p = scores.double().log_softmax(-1)
    assert int(metric.count) == 3 * 700 * 300
    assert float(metric.compute()) == pytest.approx(float(-(p.exp() * p).sum(-1).mean()), abs=1e-9)


def test_a_billion_pixels_are_counted_one_by_one():
    metric = PredictiveEntropy(from_logits=True, ignore_index=255)
    billion = 10**9
    metric.count = metric.count + billion
    metric.total = metric.total + billion * 0.25
    target = torch.full((1, 2, 2), 255)
    target[0, 0, 0] = 1
    metric.update(repeated(ROW, 1, 2, 2).movedim(-1, 1), target)
    assert int(metric.count) == billion + 1
    assert float(metric.compute()) == pytest.approx(
        (billion * 0.25 + ENTROPY) / (billion + 1), rel=1e-14
    )


def test_a_billion_tokens_and_bytes_are_counted_one_by_one():
    metric = BitsPerByte(from_logits=True, ignore_index=-100)
    metric.bytes, metric.nats = metric.bytes + 4 * 10**9, metric.nats + 2.5e9
    metric.update(torch.zeros(1, 2, 8), torch.tensor([[3, -100]]), torch.tensor([1]))
    assert int(metric.bytes) == 4 * 10**9 + 1
    expected = (2.5e9 + math.log(8)) / math.log(2) / (4 * 10**9 + 1)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-14)


def test_histograms_of_a_billion_lose_no_count():
    metric = EntropySeparation(from_logits=True, n_bins=10)
    metric.right, metric.wrong = metric.right + 10**9, metric.wrong + 10**9
    metric.update(torch.zeros(1, 4), torch.tensor([3]))
    assert metric.histogram().wrong.tolist() == [*[10**9] * 9, 10**9 + 1]
    assert float(metric.compute()) == pytest.approx(0.5, abs=1e-9)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("limit", [1, 7, 64, 10**6])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 1, 6), (1, 1)])
def test_blocks_cover_every_position_once(shape, limit):
    wide = torch.arange(math.prod(shape) * 3).view(*shape, 3)
    narrow = torch.arange(math.prod(shape)).view(shape)
    seen = []
    for block, ids in split_alike([wide, narrow], len(shape), limit):
        assert block.numel() <= max(limit, 3)
        assert torch.equal(block[..., 0], ids * 3)
        seen += ids.flatten().tolist()
    assert sorted(seen) == list(range(math.prod(shape)))


def test_an_empty_tensor_is_one_empty_block():
    (block,) = split_alike([torch.zeros(0, 5)], 1, 2)
    assert block[0].shape == (0, 5)
