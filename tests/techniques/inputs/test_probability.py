"""With one draw a sample, the probability is the share of samples, and the rest is untouched."""

import pytest
import torch

from lightning_reg.techniques.inputs.cutmix import CutMix
from lightning_reg.techniques.inputs.cutout import Cutout
from lightning_reg.techniques.inputs.mixup import Mixup
from lightning_reg.testing import HostOptions, ImageHost
from tests.engine.simple import trainer
from tests.hosts.loaders import Batches


class Seen(ImageHost):
    """Keeps the images that its step gets."""

    def __init__(self) -> None:
        super().__init__(HostOptions(lr=0.0))
        self.images = []

    def training_step(self, batch, batch_idx):
        self.images.append(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "technique",
    [
        Mixup(50.0, probability=0.3, per="sample"),
        CutMix(50.0, probability=0.3, per="sample"),
        Cutout(6, probability=0.3),
    ],
)
def test_samples_are_transformed_by_their_own_draw(technique):
    # 64 images of a colour each: a pair of half and half always shows.
    images = torch.arange(1.0, 65.0).view(64, 1, 1, 1).expand(64, 1, 8, 8).clone()
    module = Seen()
    batch = (images, torch.arange(64) % 4)
    trainer([technique], max_epochs=1).fit(module, Batches(*[batch] * 20))
    changed = torch.stack([(x != images).flatten(1).any(1) for x in module.images])
    # 1280 draws leave a standard error of 0.013; one sample in 64 is its own partner.
    assert abs(float(changed.float().mean()) - 0.3) < 0.05
