"""Policies on batches: seeded draws, the user's generator, ranges, and those of torchvision."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import AugmentationPolicy
from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.functional import augmentation_policy
from tests.engine.simple import LABELS, Host, trainer

IMAGES = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(2)) * 0.8 + 0.1


def shift(image):
    """A random number that is added to an image."""
    return image + torch.rand(())


class Seeing(Host):
    """Keeps its batches; draws a number of its own in each step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        self.seen, self.draws = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0])
        self.draws.append(torch.rand(()).item())
        return F.cross_entropy(self(batch[0]), batch[1])


def run(technique=None, images=IMAGES, **kwargs):
    module = Seeing()
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(images, LABELS), 32)
    technique = [] if technique is None else [technique]
    training = trainer(technique, max_epochs=1, **kwargs)
    training.fit(module, data)
    return module, training


def test_draws_follow_from_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = augmentation_policy(IMAGES[:4], shift, 7, torch.ones(4, dtype=torch.bool))
    assert torch.equal(torch.rand(3), expected)
    two = augmentation_policy(IMAGES[:4], shift, 7, torch.ones(4, dtype=torch.bool))
    other = augmentation_policy(IMAGES[:4], shift, 8, torch.ones(4, dtype=torch.bool))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_images_have_draws_of_their_own_and_a_batch_has_one():
    each = augmentation_policy(IMAGES[:8], shift, 1, torch.ones(8, dtype=torch.bool)) - IMAGES[:8]
    together = augmentation_policy(IMAGES[:8], shift, 1) - IMAGES[:8]
    assert len({round(float(d.mean()), 4) for d in each}) == 8
    assert together.std() < 1e-6


def test_the_users_own_draws_stay_what_they_were():
    plain, _ = run()
    with_it, _ = run(AugmentationPolicy(shift))
    assert with_it.draws == plain.draws
    assert not torch.equal(with_it.seen[0], plain.seen[0])


def test_images_that_are_not_chosen_stay_bit_for_bit():
    module, training = run(AugmentationPolicy(shift, probability=0.5, mean=[0.4], std=[0.3]))
    seen = torch.cat(module.seen)
    same = (seen == IMAGES).flatten(1).all(1)
    assert 16 < same.sum() < 48
    logged = training.logged_metrics["reg/augmentation_policy"].item()
    assert logged == pytest.approx(1 - same[32:].float().mean().item())


def test_normalized_images_are_distorted_in_their_own_range():
    seen = []

    def record(image):
        seen.append(image.clone())
        return image.clamp(0.3, 0.6)

    normalized = (IMAGES - 0.4) / 0.25
    module, _ = run(AugmentationPolicy(record, mean=[0.4], std=[0.25]), normalized)
    torch.testing.assert_close(torch.stack(seen), IMAGES)
    torch.testing.assert_close(torch.cat(module.seen), (IMAGES.clamp(0.3, 0.6) - 0.4) / 0.25)


def test_a_policy_that_crops_is_refused():
    with pytest.raises(RegularizationError, match="keeps the shape"):
        run(AugmentationPolicy(lambda image: image[..., :2]))


def test_without_torchvision_the_message_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_reg\[vision\]"):
        AugmentationPolicy("rand_augment")


@pytest.fixture
def fake(monkeypatch):
    """A torchvision whose policies remember their settings."""

    class Policy:
        def __init__(self, num_ops=2, magnitude=9):
            self.settings = num_ops, magnitude

        def __call__(self, image):
            return image

    v2 = types.ModuleType("torchvision.transforms.v2")
    for name in ("RandAugment", "TrivialAugmentWide", "AutoAugment", "AugMix"):
        setattr(v2, name, type(name, (Policy,), {}))
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", v2)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("rand_augment", "RandAugment"),
        ("trivial_augment", "TrivialAugmentWide"),
        ("auto_augment", "AutoAugment"),
        ("aug_mix", "AugMix"),
    ],
)
def test_policies_by_name_are_those_of_torchvision_with_the_settings(fake, policy, kind):
    made = AugmentationPolicy(policy, settings={"magnitude": 5})._policy
    assert type(made).__name__ == kind
    assert made.settings == (2, 5)


def test_settings_that_a_policy_does_not_have_are_refused(fake):
    with pytest.raises(ArgumentError, match="strengths"):
        AugmentationPolicy("rand_augment", settings={"strengths": 5})


@pytest.mark.parametrize("policy", ["rand_augment", "trivial_augment", "auto_augment", "aug_mix"])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_torchvisions_policies_distort_images_within_their_range(policy, per):
    pytest.importorskip("torchvision.transforms.v2")
    made = AugmentationPolicy(policy, per=per)._policy
    images = IMAGES.repeat(1, 3, 2, 2)
    chosen = torch.ones(64, dtype=torch.bool) if per == "sample" else None
    state = torch.get_rng_state()
    changed = augmentation_policy(images, made, 3, chosen)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert per == "batch" or not torch.equal(changed, images)
