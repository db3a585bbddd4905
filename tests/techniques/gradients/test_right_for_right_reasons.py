"""Right for the right reasons: the formula by hand, and a decoy that stops to work."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import MissingSignalError, RegularizationError
from lightning_reg.mechanisms.input_mask import read_mask
from lightning_reg.techniques.gradients.right_for_right_reasons import (
    RightForRightReasons,
    right_for_right_reasons,
)
from tests.engine.simple import Host, trainer

W = (torch.arange(12, dtype=torch.float64).view(4, 3) * 0.5).sin()
X = (torch.arange(6, dtype=torch.float64).view(2, 3) * 0.9).cos()


def test_a_linear_classifier_in_closed_form():
    # d/dx sum_k log p_k = sum_k w_k - C E_p w.
    x = X.clone().requires_grad_()
    mask = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
    p = (x @ W.T).softmax(1).detach()
    gradient = W.sum(0) - 4 * p @ W
    expected = (mask * gradient).square().sum(1)
    torch.testing.assert_close(right_for_right_reasons(x @ W.T, x, mask), expected)


def decoy(seed, size=64):
    """Eight numbers: the first gives the label away, two others know it too, with noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (size,), generator=generator)
    x = torch.randn(size, 8, generator=generator) * 0.4
    x[:, 0] += 2 * y - 3
    x[:, 1] += torch.tensor([-1.0, -1.0, 1.0, 1.0])[y]
    x[:, 2] += torch.tensor([-1.0, 1.0, -1.0, 1.0])[y]
    return x, y


class Reader(Host):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


def accuracy_without_decoy(callbacks, seed):
    x, y = decoy(seed)
    mask = torch.zeros_like(x)
    mask[:, 0] = 1.0
    module = Reader(lr=0.05)
    data = DataLoader(TensorDataset(x, y, mask), batch_size=16)
    trainer(callbacks, max_epochs=40).fit(module, data)
    x, y = decoy(seed + 100, 400)
    x[:, 0] = x[torch.randperm(400, generator=torch.Generator().manual_seed(seed)), 0]
    return (module.net(x).argmax(1) == y).float().mean().item()


def test_a_shuffled_decoy_fools_a_plain_network_alone():
    for seed in range(3):
        plain = accuracy_without_decoy([], seed)
        ours = accuracy_without_decoy([RightForRightReasons(0.3, mask="2")], seed)
        # Measured: 0.54 to 0.58 without, 0.97 to 0.99 with it.
        assert plain < 0.75
        assert ours > 0.9


def test_a_mask_without_channels_covers_all_of_them():

    class Batch:
        batch = {"mask": torch.tensor([[[True, False], [False, False]]] * 3)}
        outputs, hook = None, "training_step"

    mask = read_mask("RightForRightReasons", Batch(), "mask", torch.zeros(3, 2, 2, 2))
    assert mask.shape == (3, 1, 2, 2)
    assert mask.sum() == 3


def test_a_missing_mask_and_a_wrong_shape_are_named():
    x, y = decoy(0)
    with pytest.raises(MissingSignalError, match="mask"):
        trainer([RightForRightReasons()]).fit(Reader(), DataLoader(TensorDataset(x, y), 16))
    data = DataLoader(TensorDataset(x, y, torch.zeros(64, 3)), 16)
    with pytest.raises(RegularizationError, match="fits the inputs"):
        trainer([RightForRightReasons(mask="2")]).fit(Reader(), data)


def test_the_mean_over_samples_counts_those_without_annotation():
    x, y = decoy(0, 16)
    mask = torch.zeros_like(x)
    mask[:4, 0] = 1.0
    module = Reader(lr=0.0)
    run = trainer([RightForRightReasons(1.0, mask="2")], max_epochs=1)
    run.fit(module, DataLoader(TensorDataset(x, y, mask), 16))
    points = x[:4].clone().requires_grad_()
    total = F.log_softmax(module.net(points), 1).sum()
    (gradient,) = torch.autograd.grad(total, points)
    expected = gradient[:, 0].square().sum() / 16
    assert run.callback_metrics["reg/right_for_right_reasons"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )
