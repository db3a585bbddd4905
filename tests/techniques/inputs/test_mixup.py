"""Mixup: the formula, the distribution of its shares, and what it does to a linear model."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.inputs.mixup import Mixup, mixup
from tests.engine.simple import CLASSES, INPUTS, LABELS, Host, trainer, weights


def test_rows_are_combinations_of_partners():
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    mixed = mixup(x, torch.tensor([2, 0, 1]), torch.tensor([0.75, 0.5, 0.0]))
    expected = torch.tensor([[25.75, 51.5], [5.5, 11.0], [10.0, 20.0]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_a_share_of_one_leaves_a_sample_bit_for_bit():
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    assert torch.equal(mixup(x, torch.tensor([1, 2, 3, 4, 0]), torch.ones(1)), x)


# Behind its eight features a sample carries its own position, so that a mixed sample says of
# which samples it consists, and of how much of each.
MARKED = torch.cat([INPUTS, torch.eye(64)], 1)


class Seen(Host):
    """Keeps the batches that its step gets."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr=lr)
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return F.cross_entropy(self(batch[0][:, :8]), batch[1])


def run(technique: Mixup, module=None, targets=LABELS, size: int = 64, epochs: int = 1):
    module = module if module is not None else Seen()
    loader = DataLoader(TensorDataset(MARKED, targets), batch_size=size)
    trainer([technique], max_epochs=epochs).fit(module, loader)
    return module


def parts(x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """How much of each sample of its batch (B, B) a mixed batch holds."""
    return x[:, 8 + start : 8 + start + len(x)]


def kept(technique: Mixup, epochs: int) -> torch.Tensor:
    """The share that each sample kept (batches, 64); NaN where it was its own partner."""
    batches = [parts(x) for x, _ in run(technique, epochs=epochs).batches]
    rows = [p.diagonal().masked_fill((p > 0).sum(1) == 1, torch.nan) for p in batches]
    return torch.stack(rows)


def test_one_share_serves_a_batch_and_samples_have_their_own_where_asked():
    for row in kept(Mixup(1.0), 3):
        assert row[row == row].unique().numel() == 1
    for row in kept(Mixup(1.0, per="sample"), 3):
        assert row[row == row].unique().numel() > 50


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_shares_follow_the_beta_distribution(alpha):
    lam = kept(Mixup(alpha, per="sample"), 40)
    lam = lam[lam == lam]
    # The variance of Beta(a, a); 2500 draws leave a standard error below 0.01.
    assert abs(float(lam.mean()) - 0.5) < 0.03
    assert abs(float(lam.var()) - 1 / (4 * (2 * alpha + 1))) < 0.015


def test_partners_are_a_permutation_of_the_batch():
    x, _ = run(Mixup(1.0)).batches[0]
    torch.testing.assert_close(parts(x).sum(0), torch.ones(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(parts(x).sum(1), torch.ones(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_training_equals_a_loop_with_the_loss_against_both_labels(per):
    module = run(Mixup(1.0, per=per), Seen(lr=0.1), size=16)
    reference = Host()
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9)
    for index, (x, y) in enumerate(module.batches):
        logits = reference(x[:, :8])
        by_label = torch.stack([F.cross_entropy(logits, o.expand(16), reduction="none") for o in y])
        # Row i of the parts says which labels sample i is made of.
        loss = (parts(x, 16 * index) * by_label.T).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(reference), rtol=0, atol=1e-6)


def test_probability_is_the_share_of_batches_and_the_rest_is_untouched():
    module = run(Mixup(1.0, probability=0.25), size=32, epochs=150)
    pairs = [(x, MARKED[32 * (i % 2) :][:32]) for i, (x, _) in enumerate(module.batches)]
    clean = [torch.equal(x, own) for x, own in pairs]
    # 300 batches: a standard error of 0.025.
    assert abs(1 - sum(clean) / len(clean) - 0.25) < 0.09


def test_float_targets_are_mixed_in_the_batch_as_the_inputs_are():
    one_hot = F.one_hot(LABELS, CLASSES).float()
    for x, y in run(Mixup(1.0, per="sample"), targets=one_hot).batches:
        torch.testing.assert_close(y, parts(x) @ one_hot, rtol=0, atol=1e-6)
        assert (y.amax(1) < 0.999).any()


def test_equal_seeds_draw_equal_mixes_and_batches_differ():
    first, second = (run(Mixup(1.0), epochs=2).batches for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], first[1][0])


@pytest.mark.parametrize(
    "arguments",
    [{"alpha": 0}, {"alpha": float("nan")}, {"probability": 1.1}, {"per": "pixel"}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="Mixup"):
        Mixup(**arguments)
