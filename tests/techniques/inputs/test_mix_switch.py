"""The switch: one mixer a batch, by its share, and why two mixers stand in one."""

import pytest
import torch

from lightning_reg.engine import ArgumentError, ConflictError, Signals
from lightning_reg.engine.closed_loop import ClosedLoop
from lightning_reg.techniques.inputs.cutmix import CutMix
from lightning_reg.techniques.inputs.cutout import Cutout
from lightning_reg.techniques.inputs.mix_switch import MixSwitch
from lightning_reg.techniques.inputs.mixup import Mixup
from lightning_reg.testing import HostOptions, ImageHost
from lightning_reg.testing.runs import quiet
from tests.engine.simple import trainer
from tests.hosts.loaders import Batches


class Seen(ImageHost):
    """Keeps the images that its step gets; all are constant, so that a pixel tells its image."""

    def __init__(self) -> None:
        super().__init__(HostOptions(lr=0.0))
        self.images = []

    def training_step(self, batch, batch_idx):
        self.images.append(batch[0])
        return super().training_step(batch, batch_idx)


def seen(technique, batches: int) -> list[torch.Tensor]:
    colour = torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 1, 8, 8).clone()
    batch = (colour, torch.arange(8) % 4)
    module = Seen()
    with quiet():
        trainer([technique], max_epochs=1).fit(module, Batches(*[batch] * batches))
    return module.images


def kind(images: torch.Tensor) -> str:
    """Which mixer made these images of constant colour."""
    if (images == 0).any():
        return "cutout"
    if (images == images.round()).all():
        flat = images.flatten(1)
        return "cutmix" if (flat != flat[:, :1]).any() else "nothing"
    return "mixup"


def test_batches_fall_to_mixers_by_their_shares():
    mixers = [Mixup(5.0), Cutout(3)]
    kinds = [kind(x) for x in seen(MixSwitch(mixers, probabilities=[0.2, 0.8]), 300)]
    # A standard error of 0.023.
    assert abs(kinds.count("mixup") / 300 - 0.2) < 0.08
    assert kinds.count("mixup") + kinds.count("cutout") == 300


def test_equal_shares_are_the_default_and_each_batch_has_one_mixer():
    kinds = [kind(x) for x in seen(MixSwitch([Mixup(5.0), CutMix(5.0)]), 200)]
    assert abs(kinds.count("mixup") / 200 - 0.5) < 0.12
    assert abs(kinds.count("cutmix") / 200 - 0.5) < 0.15


def test_a_mixers_own_probability_holds_for_the_batches_that_fall_to_it():
    switch = MixSwitch([Mixup(5.0, probability=0.5), Cutout(3)], probabilities=[1.0, 0.0])
    kinds = [kind(x) for x in seen(switch, 200)]
    assert abs(kinds.count("nothing") / 200 - 0.5) < 0.12
    assert kinds.count("cutout") == 0


def test_two_mixers_side_by_side_are_refused_with_the_line_that_works():
    callbacks = [Mixup(0.2), CutMix(1.0)]
    with pytest.raises(ConflictError, match=r"MixSwitch\(\[") as refusal:
        trainer(callbacks).fit(Seen(), Batches((torch.zeros(8, 1, 8, 8), torch.zeros(8).long())))
    assert "Mixup(...)" in refusal.value.cure
    assert "CutMix(...)" in refusal.value.cure


@pytest.mark.parametrize(
    ("mixers", "arguments"),
    [
        ([Mixup()], {}),
        ([Mixup(), 1.0], {}),
        ([Mixup(), MixSwitch([Mixup(), CutMix()])], {}),
        ([Mixup(signals=Signals(inputs="batch.0")), CutMix()], {}),
        ([Mixup(replaces="term"), CutMix()], {}),
        ([Mixup(probability=ClosedLoop("val/ece", 0.0, 1.0)), CutMix()], {}),
        ([Mixup(), CutMix()], {"probabilities": [0.5, 0.4]}),
        ([Mixup(), CutMix()], {"probabilities": [1.0]}),
        ([Mixup(), CutMix()], {"probabilities": [1.5, -0.5]}),
    ],
)
def test_bad_arguments_are_refused(mixers, arguments):
    with pytest.raises(ArgumentError, match="MixSwitch"):
        MixSwitch(mixers, **arguments)
