"""ESAM's chosen weights and samples against their definition, the official code, and SAM."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, RegularizationError, UnsupportedError
from lightning_reg.techniques.inputs.mixup import Mixup
from lightning_reg.techniques.sharpness.esam import ESAM, esam_samples
from lightning_reg.techniques.sharpness.sam import SAM
from tests.engine.simple import Host, fit, weights
from tests.techniques.sharpness.family import KINDS, POINTS, Points, on_points


def test_samples_whose_loss_rises_most_are_selected():
    before = torch.tensor([5.0, 0.1, 2.0, 1.0, 0.0])
    after = torch.tensor([5.1, 2.1, 1.0, 1.5, 0.9])
    assert esam_samples(before, after, 0.5).tolist() == [1, 4]
    assert esam_samples(before, after, 0.1).tolist() == [1]
    assert esam_samples(before, after, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_trains_as_the_official_optimizer_on_the_selected_samples():
    # dydjw9/Efficient_SAM@1e06840, utils/Esam.py: ESAM(SGD(0.2), rho=0.5, beta=1, gamma=0.75) on
    # the eight points in float64, after three steps. Its threshold leaves five of eight samples.
    official = [
        0.7824687602155473,
        -0.22480800518368357,
        -0.18246876021554745,
        0.4248080051836836,
        0.004231922342361453,
        -0.004231922342361492,
    ]
    found = on_points(ESAM(0.5, beta=1.0, gamma=0.625), 3)
    # The official norm has 1e-7 added to it.
    np.testing.assert_allclose(found, official, rtol=1e-6, atol=1e-7)
    other = on_points(ESAM(0.5, beta=1.0, gamma=0.75), 3)
    assert np.abs(other - official).max() > 1e-3


@pytest.mark.parametrize("sharpness", ["micro", "rank", "global"])
def test_with_both_parts_off_it_is_sam_bit_for_bit(sharpness):
    settings = {"batch_size": 4, "accumulate_grad_batches": 3}
    ours, _ = fit([ESAM(0.2, beta=1.0, gamma=1.0, sharpness=sharpness)], **settings)
    sam, _ = fit([SAM(0.2, sharpness=sharpness)], **settings)
    assert torch.equal(weights(ours), weights(sam))


class Chooses(ESAM):
    """Perturbs the weight and leaves the bias in place."""

    def _choice(self, step, weights):
        return [True, False]


def test_chosen_tensors_move_by_rho_over_beta_along_their_own_gradient():
    module = Points()
    loss = F.cross_entropy(module(POINTS), KINDS)
    (g,) = torch.autograd.grad(loss, [module.net.weight])
    with torch.no_grad():
        start = [p.clone() for p in module.parameters()]
        module.net.weight += 0.3 / 0.5 * g / g.norm()
    second = torch.autograd.grad(F.cross_entropy(module(POINTS), KINDS), list(module.parameters()))
    expected = torch.cat([(p - 0.2 * s).flatten() for p, s in zip(start, second, strict=True)])
    found = on_points(Chooses(0.3, beta=0.5, gamma=1.0), 1)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-10)


def test_every_tensor_is_chosen_with_the_probability_beta():
    class Watches(ESAM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = {}

        def _choice(self, step, weights):
            choice = super()._choice(step, weights)
            self.seen.setdefault(step.global_step, []).append(choice)
            return choice

    technique = Watches(0.1, beta=0.3, gamma=1.0)
    fit([technique], batch_size=8, accumulate_grad_batches=2, max_epochs=40)
    choices = [c[0] for c in technique.seen.values()]
    assert all(first == second for first, second in technique.seen.values())
    assert len(choices) == 160
    # Four standard deviations of a share of 160 draws.
    np.testing.assert_allclose(np.mean(choices, axis=0), 0.3, atol=4 * 0.0362)
    assert len({tuple(c) for c in choices}) > 5


def test_the_second_pass_sees_the_selected_samples_only():
    class Sizes(Host):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def forward(self, x):
            self.sizes.append(len(x))
            return super().forward(x)

    module = Sizes()
    fit([ESAM(0.1, gamma=0.25)], module=module, max_epochs=1, batch_size=32)
    # First pass, the check of the first step, selection, second pass.
    assert module.sizes == [32, 32, 32, 8, 32, 32, 8]


def test_the_logged_rise_is_that_of_the_whole_batch():
    ours, run = fit([ESAM(0.3, beta=1.0, gamma=0.25)], module=Host(lr=0.0))
    _, sam = fit([SAM(0.3)], module=Host(lr=0.0))
    rises = [float(r.callback_metrics[k]) for r, k in ((run, "reg/esam"), (sam, "reg/sam"))]
    assert rises[0] == pytest.approx(rises[1], rel=1e-5)
    assert ours.accuracy._update_count == 0


def test_a_loss_of_ones_own_selects_where_there_are_no_classes():
    class Regression(Points):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[0])

    def run(technique):
        module = Regression()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            precision="64-true",
            callbacks=[technique],
        )
        trainer.fit(module, DataLoader(TensorDataset(POINTS, POINTS), batch_size=8))
        return weights(module)

    def squares(logits, targets):
        return (logits - targets).square()

    some = run(ESAM(0.2, beta=1.0, gamma=0.5, sample_loss=squares))
    assert (some - run(SAM(0.2))).abs().max() > 1e-3


def test_token_losses_are_averaged_over_each_sample():
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2, 3, -100]] * 3)
    from lightning_reg.techniques.sharpness.esam import _cross_entropy

    expected = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
    torch.testing.assert_close(_cross_entropy(logits, targets), expected)
    first = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
    torch.testing.assert_close(_cross_entropy(logits.movedim(-1, 1), targets), first)


def test_mixed_batches_are_refused():
    with pytest.raises(UnsupportedError, match="ESAM: selects samples, and those of this batch"):
        fit([ESAM(0.1), Mixup(1.0)])


def test_targets_without_classes_are_refused():
    class Regression(Host):
        def training_step(self, batch, batch_idx):
            return {"loss": self(batch[0]).square().mean(), "targets": batch[0]}

    with pytest.raises(RegularizationError, match="ESAM: selects samples by their cross-entropy"):
        fit([ESAM(0.1)], module=Regression())


@pytest.mark.parametrize(
    "arguments", [{"beta": 0.0}, {"beta": 1.5}, {"gamma": 0.0}, {"gamma": 2.0}, {"rho": -0.1}]
)
def test_bad_arguments_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match=r"ESAM: .*Try: ESAM\("):
        ESAM(**arguments)
