"""Which rows of the logits count, and how they are averaged over ranks."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import RegularizationError
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.mechanisms.output_penalty import OutputPenalty, softmax_entropy
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import Host, fit, trainer, weights


class FirstClass(OutputPenalty):
    """The mean score of class 0: easy to compute by hand."""

    def values(self, logits):
        return logits[:, 0]


class Dense(L.LightningModule):
    """Returns fixed scores of any layout, times a weight."""

    def __init__(self, scores, labels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.scores, self.labels = scores, labels

    def train_dataloader(self):
        labels = () if self.labels is None else (self.labels,)
        return DataLoader(TensorDataset(self.scores, *labels), batch_size=len(self.scores))

    def training_step(self, batch, batch_idx):
        return {"loss": self.weight * 0.0, "logits": batch[0] * self.weight}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def logged(technique, scores, labels=None):
    """What the technique's penalty was in the only step, and its gradient by the weight."""
    module = Dense(scores, labels)
    run = trainer([technique], max_epochs=1)
    run.fit(module)
    return run.callback_metrics["reg/first_class"].item(), 1 - module.weight.item()


@pytest.fixture
def scores():
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


def test_classes_are_where_the_labels_leave_them(scores):
    last = torch.zeros(2, 3, dtype=torch.long)
    second = torch.zeros(2, 5, dtype=torch.long)
    assert logged(FirstClass(1.0), scores, last)[0] == pytest.approx(scores[..., 0].mean().item())
    assert logged(FirstClass(1.0), scores, second)[0] == pytest.approx(scores[:, 0].mean().item())


def test_images_have_their_classes_second():
    scores = torch.randn(2, 3, 4, 5)
    labels = torch.zeros(2, 4, 5, dtype=torch.long)
    value, gradient = logged(FirstClass(1.0), scores, labels)
    assert value == pytest.approx(scores[:, 0].mean().item(), abs=1e-6)
    assert gradient == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("class_dim", [1, -1])
def test_class_dim_decides_without_labels(scores, class_dim):
    expected = scores.select(class_dim, 0).mean().item()
    assert logged(FirstClass(1.0, class_dim=class_dim), scores)[0] == pytest.approx(expected)


def test_unknown_layout_is_refused(scores):
    with pytest.raises(RegularizationError, match=r"FirstClass.*\(2, 3, 5\).*class_dim=1"):
        logged(FirstClass(1.0), scores)


def test_ignored_positions_do_not_count(scores):
    labels = torch.tensor([[0, -100, 1], [-100, -100, 2]])
    expected = (scores[0, 0, 0] + scores[0, 2, 0] + scores[1, 2, 0]).item() / 3
    value, gradient = logged(FirstClass(1.0), scores, labels)
    assert value == pytest.approx(expected)
    assert gradient == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("ignore_index", "kept"), [(255, [0, 2]), (None, [0, 1, 2])])
def test_ignore_index_can_be_chosen(ignore_index, kept):
    scores = torch.arange(12.0).view(3, 4)
    labels = torch.tensor([0, 255, -100])
    value, _ = logged(FirstClass(1.0, ignore_index=ignore_index), scores, labels)
    assert value == pytest.approx(scores[kept, 0].mean().item())


def test_batch_in_which_all_is_ignored_gives_zero(scores):
    labels = torch.full((2, 3), -100)
    assert logged(FirstClass(1.0), scores, labels) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_single_score_is_refused(shape):
    with pytest.raises(RegularizationError, match="FirstClass"):
        logged(FirstClass(1.0), torch.zeros(shape))


@pytest.mark.parametrize("arguments", [{"ignore_index": 0.5}, {"class_dim": "1"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="FirstClass"):
        FirstClass(1.0, **arguments)


def test_class_dim_outside_the_logits_is_refused(scores):
    with pytest.raises(ArgumentError, match="class_dim"):
        logged(FirstClass(1.0, class_dim=3), scores)


def test_half_precision_logits_are_raised_to_float32():
    seen = []

    class Dtype(FirstClass):
        def values(self, logits):
            seen.append(logits.dtype)
            return super().values(logits)

    fit([Dtype(1.0)], precision="bf16-mixed", max_epochs=1)
    assert set(seen) == {torch.float32}


# ---------------------------------------------------------------------- entropy


def test_entropy_of_a_uniform_distribution_is_log_c():
    assert softmax_entropy(torch.full((2, 7), 3.0, dtype=torch.float64)).tolist() == pytest.approx(
        [torch.tensor(7.0, dtype=torch.float64).log().item()] * 2, abs=1e-12
    )


def test_entropy_gradient_is_the_closed_form():
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(softmax_entropy(z).sum(), z)
    p = z.softmax(-1).detach().numpy()
    entropy = -(p * np.log(p)).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient.numpy(), -p * (np.log(p) + entropy), atol=1e-12)


@pytest.mark.parametrize("row", [[1e30, 0.0, -1e30], [0.0, 1.0, float("-inf")], [500.0, 0.0, 0.0]])
def test_extreme_logits_have_finite_entropy_and_gradient(row):
    z = torch.tensor([row], requires_grad=True)
    value = softmax_entropy(z)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


def test_a_masked_class_is_as_if_it_were_not_there():
    z = torch.tensor([[0.3, 1.0, float("-inf")]])
    torch.testing.assert_close(softmax_entropy(z), softmax_entropy(z[:, :2]))


# ---------------------------------------------------------------------- ranks


class Entropy(OutputPenalty):
    def values(self, logits):
        return softmax_entropy(logits)


X = 3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, -100, 3, -100, -100, 1])
# Rank 0 keeps 3 labels of 3, rank 1 keeps 2 of 5.
SHARES = (slice(0, 3), slice(3, 8))


class Masked(Host):
    """Its own loss is the same on every rank, so that only the penalty's mean is at stake."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        decay = sum(p.square().sum() for p in self.parameters())
        return {"loss": 0.01 * decay, "logits": self(x), "targets": y}


def train(run, share):
    module = Masked()
    data = TensorDataset(X[share], LABELS[share])
    run.fit(module, DataLoader(data, batch_size=8))
    return weights(module), run.callback_metrics["reg/entropy"]


def train_on_ranks():
    share = SHARES[torch.distributed.get_rank()]
    settings = {"max_epochs": 3, "use_distributed_sampler": False}
    return train(rank_trainer(callbacks=[Entropy(2.0)], **settings), share)


def test_two_ranks_with_unequal_numbers_of_labels_equal_the_joint_batch(ranks):
    (first, value), (second, _) = ranks.run(train_on_ranks)
    joint, joint_value = train(trainer([Entropy(2.0)], max_epochs=3), slice(None))
    start = weights(Masked())
    assert (joint - start).abs().max() > 1e-2
    assert torch.equal(first, second)
    torch.testing.assert_close(first, joint, rtol=0, atol=1e-6)
    torch.testing.assert_close(value, joint_value, rtol=0, atol=1e-6)


def test_cross_entropy_loss_leaves_out_the_same_positions():
    logits = torch.randn(1, 3, 4)
    labels = torch.tensor([[1, -100, 3]])
    kept = F.cross_entropy(logits[0, [0, 2]], labels[0, [0, 2]])
    assert F.cross_entropy(logits.movedim(-1, 1), labels) == pytest.approx(kept.item())
    rows = FirstClass(1.0)._rows(logits, labels)
    assert torch.equal(rows, logits[0, [0, 2]])
