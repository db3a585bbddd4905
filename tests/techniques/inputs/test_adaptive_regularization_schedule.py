"""Progressive learning: the paper's stages, antialiased sizes, own values that come back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.techniques.inputs.adaptive_regularization_schedule import (
    AdaptiveRegularizationSchedule,
    progressive_value,
    resize_images,
)
from lightning_reg.techniques.inputs.mixup import Mixup
from tests.engine.simple import Host, fit, trainer


class Images(Host):
    """A network for images of any size that keeps what every step saw."""

    def __init__(self, magnitude=9):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.7)
        )
        self.magnitude, self.seen = magnitude, []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0].shape[-2:], self.net[3].p, self.magnitude))
        return F.cross_entropy(self(batch[0]), batch[1])


def _loader(height=12, width=12):
    x = torch.rand(8, 1, height, width, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, torch.arange(8) % 4), batch_size=4)


def test_settings_of_the_paper_at_every_stage():
    """V2-S: sizes 128 to 300, RandAugment 5 to 15, dropout 0.1 to 0.3, in four stages."""
    shares = np.linspace(0, 1, 4)
    sizes = [AdaptiveRegularizationSchedule(sizes=[128, 300]).size(share) for share in shares]
    assert sizes == [128, 185, 243, 300]
    assert [progressive_value(5, 15, share) for share in shares] == [5, 8, 12, 15]
    rates = [progressive_value(0.1, 0.3, share) for share in shares]
    assert rates == pytest.approx(list(np.linspace(0.1, 0.3, 4)))
    assert (rates[0], rates[-1]) == (0.1, 0.3)


def test_each_stage_has_its_size_and_its_rates_and_the_own_ones_come_back():
    module = Images()
    technique = AdaptiveRegularizationSchedule(
        sizes=[4, 12], dropout=[0.1, 0.5], knobs={"magnitude": [5, 15]}, stages=3
    )
    trainer([technique], max_epochs=3).fit(module, _loader())
    stages = [((4, 4), 0.1, 5), ((8, 8), 0.3, 10), ((12, 12), 0.5, 15)]
    expected = [stage for stage in stages for _ in range(2)]
    for (shape, p, magnitude), wanted in zip(module.seen, expected, strict=True):
        assert (tuple(shape), magnitude) == (wanted[0], wanted[2])
        assert p == pytest.approx(wanted[1])
    assert (module.net[3].p, module.magnitude) == (0.7, 9)


def test_callbacks_are_reached_and_sizes_are_multiples():
    mixup = Mixup(1.0, probability=0.25)
    technique = AdaptiveRegularizationSchedule(
        sizes=[6, 12], knobs={"callbacks.Mixup.strength": [0.0, 1.0]}, stages=2, multiple=4
    )
    module = Images()
    trainer([technique, mixup], max_epochs=2).fit(module, _loader())
    assert [shape[0] for shape, _, _ in module.seen] == [8, 8, 12, 12]
    assert mixup.strength == 0.25


def test_resize_averages_what_is_too_fine():
    stripes = torch.zeros(1, 1, 32, 32)
    stripes[..., ::4] = 1
    small = resize_images(stripes, 4)
    # Two pixels a sample without antialiasing, of which one is bright.
    torch.testing.assert_close(small[..., 1:3], torch.full((1, 1, 4, 2), 0.25), rtol=0, atol=0.05)


def test_resize_keeps_proportions_and_a_full_image():
    wide = torch.rand(2, 1, 10, 25)
    assert resize_images(wide, 4).shape == (2, 1, 4, 10)
    assert resize_images(wide, 10) is wide


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(RegularizationError, match="resizes images"):
        fit([AdaptiveRegularizationSchedule(sizes=[4, 8])])
    with pytest.raises(ArgumentError, match="nothing to schedule"):
        AdaptiveRegularizationSchedule()
    with pytest.raises(ArgumentError, match="finds no dropout layer"):
        fit([AdaptiveRegularizationSchedule(dropout=[0.0, 0.1], pattern="head")])
