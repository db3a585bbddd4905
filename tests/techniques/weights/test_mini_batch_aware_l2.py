"""Mini-batch aware L2: rows of the batch only, by their rarity, whatever splits the batch."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, UnsupportedError
from lightning_reg.techniques.weights.mini_batch_aware_l2 import (
    MiniBatchAwareL2,
    mini_batch_aware_l2,
)
from tests.engine.simple import Host, fit, trainer

# Row 9 never occurs, row 8 once, in the first batch.
IDS = torch.tensor([[0, 1], [0, 8], [2, 0], [3, 3], [1, 0], [4, 5], [6, 7], [0, 0]])
COUNTS = torch.bincount(IDS.flatten(), minlength=10)


class Embedded(L.LightningModule):
    def __init__(self, sparse=False, padding=None, bag=False, loss=0.0, decay=0.0):
        super().__init__()
        torch.manual_seed(0)
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.table = kind(10, 3, sparse=sparse, padding_idx=padding)
        self.loss, self.decay = loss, decay

    def training_step(self, batch, batch_idx):
        return self.table(batch[0]).square().sum() * self.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, weight_decay=self.decay)


def train(technique, module=None, batch=4, **options):
    module = module if module is not None else Embedded()
    data = DataLoader(TensorDataset(IDS), batch_size=batch)
    run = trainer([technique] if technique else [], **{"max_epochs": 1, **options})
    run.fit(module, data)
    return module.table.weight.detach(), run


def counts():
    return {"table.weight": COUNTS.tolist()}


def test_value_counts_each_row_once_and_by_its_rarity():
    w = torch.arange(12.0, dtype=torch.float64).view(4, 3).requires_grad_()
    value = mini_batch_aware_l2(w, torch.tensor([[1, 1], [3, 1]]), torch.tensor([1, 4, 2, 1]))
    rows = w.detach().square().sum(1)
    assert value.item() == pytest.approx(float(rows[1] / 4 + rows[3]) / 2)
    (slope,) = torch.autograd.grad(value, w)
    expected = w.detach() * torch.tensor([0, 0.25, 0, 1.0])[:, None]
    torch.testing.assert_close(slope, expected.double())


@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"bag": True}])
def test_rows_shrink_in_batches_that_hold_them_and_never_otherwise(options):
    start = Embedded(**options).table.weight.detach()
    found, _ = train(MiniBatchAwareL2(2.0, counts=counts()), Embedded(**options))
    batches = [IDS[:4], IDS[4:]]
    times = torch.tensor([sum(bool((b == j).any()) for b in batches) for j in range(10)])
    factors = (1 - 0.1 * 2.0 / COUNTS.clamp_min(1)) ** times
    torch.testing.assert_close(found, start * factors[:, None])
    assert torch.equal(found[9], start[9])
    decayed, _ = train(None, Embedded(decay=2.0))
    assert not torch.equal(decayed[9], start[9])


def test_padding_is_left_alone():
    start = Embedded(padding=0).table.weight.detach()
    with torch.no_grad():
        start[0] = 1.0
    module = Embedded(padding=0)
    module.table.weight.data.copy_(start)
    found, _ = train(MiniBatchAwareL2(2.0, counts=counts()), module)
    assert torch.equal(found[0], start[0])
    assert not torch.equal(found[1], start[1])


def test_micro_batches_of_one_step_count_a_row_once():
    whole, _ = train(MiniBatchAwareL2(2.0, counts=counts()), batch=8)
    parts, _ = train(MiniBatchAwareL2(2.0, counts=counts()), batch=2, accumulate_grad_batches=4)
    torch.testing.assert_close(parts, whole)


def test_first_epoch_counts_and_later_ones_keep_the_counts():
    technique = MiniBatchAwareL2(1.0)
    train(technique, max_epochs=3)
    assert torch.equal(technique.state_dict()["counts"]["table.weight"], COUNTS)


def test_rarity_decides_how_much_a_row_is_pulled_per_occurrence():
    # Without a loss: ln(w / w0) = batches * ln(1 - lr s / n).
    start = Embedded().table.weight.detach()
    found, _ = train(MiniBatchAwareL2(1.0, counts=counts()))
    shrunk = 1 - found.norm(dim=1) / start.norm(dim=1)
    once, often = float(shrunk[8]), float(shrunk[0])
    assert once == pytest.approx(0.1, abs=1e-5)
    assert often == pytest.approx(1 - (1 - 0.1 / int(COUNTS[0])) ** 2, abs=1e-5)


def test_log_shows_the_penalty():
    module = Embedded()
    expected = mini_batch_aware_l2(module.table.weight.detach(), IDS, COUNTS)
    _, run = train(MiniBatchAwareL2(2.0, counts=counts()), module, batch=8)
    assert run.callback_metrics["reg/mini_batch_aware_l2"] == pytest.approx(float(expected))


def test_layers_that_are_no_embeddings_are_refused():
    with pytest.raises(UnsupportedError, match=r"net\.0\.weight"):
        fit([MiniBatchAwareL2(1.0, parameters="net.0.weight")], module=Host())
    with pytest.raises(ArgumentError, match="10 numbers"):
        train(MiniBatchAwareL2(1.0, counts={"table.weight": [1, 2]}))


def test_negative_strength_is_refused():
    with pytest.raises(ArgumentError, match="MiniBatchAwareL2"):
        MiniBatchAwareL2(-1.0)
