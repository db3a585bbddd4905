"""The second pass: other dropout masks, nothing else of the run notices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ConflictError
from lightning_reg.mechanisms.two_passes import TwoPasses, symmetric_divergence
from lightning_reg.techniques.gradients.adversarial_training import AdversarialTraining
from lightning_reg.techniques.labels.label_smoothing import LabelSmoothing
from lightning_reg.techniques.sharpness.sam import SAM
from tests.engine.simple import INPUTS, LABELS, Host, fit, trainer, weights

P = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.0]], dtype=torch.float64)
Q = torch.tensor([[1.0, 0.0, 0.5], [0.1, 0.2, 0.0]], dtype=torch.float64)


class Gap(TwoPasses):
    """The squared distance of both passes' logits."""

    def __init__(self, strength=1.0, **kwargs):
        super().__init__(strength, **kwargs)
        self.pairs = []

    def values(self, step, first, second):
        self.pairs.append((first.detach(), second.detach()))
        return (first - second).square().sum(-1)


class Masked(Host):
    """Dropout that keeps its masks, or takes one that is given."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def forward(self, x, mask=None):
        hidden = self.net[:3](x)
        if mask is None:
            mask = 2.0 * (torch.rand(hidden.shape) < 0.5)
            self.masks.append(mask)
        return self.net[4](hidden * mask)


def test_divergence_is_the_mean_of_both_directions():
    p, q = P.softmax(1).numpy(), Q.softmax(1).numpy()
    expected = 0.5 * (p * np.log(p / q) + q * np.log(q / p)).sum(1)
    np.testing.assert_allclose(symmetric_divergence(P, Q).numpy(), expected, atol=1e-15)
    assert expected[1] == 0


def test_divergence_leaves_masked_classes_out():
    mask = torch.tensor([[0.0, 0.0, -torch.inf]])
    first = (P + mask).requires_grad_()
    value = symmetric_divergence(first, Q + mask).sum()
    value.backward()
    torch.testing.assert_close(
        value.detach(), symmetric_divergence(P[:, :2], Q[:, :2]).sum(), rtol=1e-12, atol=0
    )
    assert torch.isfinite(first.grad).all()


def test_passes_differ_by_their_dropout_masks():
    technique = Gap()
    fit([technique], module=Host(dropout=0.5), max_epochs=2)
    assert all((first != second).any() for first, second in technique.pairs)
    again = Gap()
    fit([again], module=Host(dropout=0.5), max_epochs=2)
    for pair, same in zip(technique.pairs, again.pairs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, same, strict=True))


def test_without_dropout_nothing_changes():
    ours, _ = fit([Gap()], max_epochs=2)
    plain, _ = fit([], max_epochs=2)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-6)


def test_the_run_draws_and_counts_as_with_one_pass():
    found = []
    for callbacks in ([Gap(1e-30)], []):
        torch.manual_seed(3)
        module = Host(batch_norm=True, dropout=0.5, lr=0.0)
        fit(callbacks, module=module, max_epochs=1)
        found.append((torch.rand(3), module.net[1].running_mean.clone(), module.accuracy.compute()))
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def one_step(callbacks):
    module = Masked()
    run = trainer(callbacks, max_epochs=1)
    run.fit(module, DataLoader(TensorDataset(INPUTS, LABELS), batch_size=64))
    return module, run


def test_the_loss_is_the_mean_of_both_passes_and_the_term():
    module, run = one_step([Gap(0.25), LabelSmoothing(0.2)])
    plain = Masked()
    # Between the two there is one pass more in the first step, a check that it is repeatable.
    first, second = (plain(INPUTS, module.masks[i]) for i in (0, -1))
    smooth = 0.8 * F.one_hot(LABELS, 4) + 0.2 / 4
    gap = (first - second).square().sum(1).mean()
    (
        0.5 * (F.cross_entropy(first, smooth) + F.cross_entropy(second, smooth)) + 0.25 * gap
    ).backward()
    expected = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in plain.parameters()])
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-6)
    assert float(run.callback_metrics["reg/gap"]) == pytest.approx(float(gap.detach()), rel=1e-5)


def test_positions_without_a_label_are_left_out():
    technique = Gap()
    labels = LABELS.where(torch.arange(64) % 2 == 0, -100)
    loader = DataLoader(TensorDataset(INPUTS, labels), batch_size=64)
    trainer([technique], max_epochs=1).fit(Unscored(), loader)
    assert [len(logits) for logits in technique.pairs[-1]] == [32, 32]


class Unscored(Masked):
    """Without a metric, which would refuse labels that are no class."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("other", [SAM(0.05), AdversarialTraining()])
def test_another_second_pass_is_refused(other):
    with pytest.raises(ConflictError, match="excludes"):
        fit([Gap(), other], max_epochs=1)
