"""WSAM's weighted sharpness against its definition, a port of the official code, and SAM."""

import lightning as L
import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.sharpness.sam import SAM
from lightning_reg.techniques.sharpness.wsam import WSAM, wsam_gradient
from tests.engine.simple import Host, fit, weights
from tests.techniques.sharpness.family import START, Quadratic, hessian, on_quadratic, trainer

# pytorch_optimizer 4.1.0, optimizer/sam.py: WSAM(SGD, rho=0.3, gamma, decouple, lr=0.05,
# momentum=0.9) on the quadratic in float64, after three steps.
PORT = {
    (0.9, True): [0.2911392232205304, -0.3457534233575197, -0.1937332132574234, 0.4242919225082674],
    (0.8, False): [0.0002947362413095, -0.4973312359948122, -0.5359846604191152, 0.25722808056079],
    (0.5, True): [0.4367304575354443, -0.5240140465273949, -0.216385737864336, 0.1903694306939145],
}


@pytest.mark.parametrize(("gamma", "decouple"), PORT)
@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_trains_as_the_port_of_the_official_optimizer(gamma, decouple, sharpness):
    technique = WSAM(0.3, gamma=gamma, decouple=decouple, sharpness=sharpness)
    found = on_quadratic(technique, 3, lr=0.05, momentum=0.9)
    # The port takes the norm in float32.
    np.testing.assert_allclose(found, PORT[gamma, decouple], rtol=0, atol=5e-8)


def test_gradient_is_that_of_the_loss_plus_weighted_sharpness():
    clean, perturbed = [torch.tensor([1.0, -2.0])], [torch.tensor([0.5, 4.0])]
    (found,) = wsam_gradient(clean, perturbed, 0.75)
    torch.testing.assert_close(found, clean[0] + 3 * (perturbed[0] - clean[0]))
    assert torch.equal(wsam_gradient(clean, perturbed, 0.0)[0], clean[0])
    assert torch.equal(wsam_gradient(clean, perturbed, 0.5)[0], perturbed[0])


@pytest.mark.parametrize("sharpness", ["micro", "rank", "global"])
def test_half_is_sam_bit_for_bit(sharpness):
    settings = {"batch_size": 4, "accumulate_grad_batches": 3}
    ours, _ = fit([WSAM(0.2, gamma=0.5, decouple=False, sharpness=sharpness)], **settings)
    sam, _ = fit([SAM(0.2, sharpness=sharpness)], **settings)
    assert torch.equal(weights(ours), weights(sam))


def test_decoupled_half_is_sam_without_momentum():
    h = hessian()
    g = h @ START
    sam = START - 0.1 * h @ (START + 0.3 * g / np.linalg.norm(g))
    np.testing.assert_allclose(on_quadratic(WSAM(0.3, gamma=0.5), 1), sam, rtol=1e-10)


@pytest.mark.parametrize("decouple", [True, False])
def test_gamma_zero_is_the_plain_optimizer(decouple):
    plain, _ = fit([], batch_size=8, accumulate_grad_batches=2)
    ours, _ = fit(
        [WSAM(0.2, gamma=0.0, decouple=decouple)], batch_size=8, accumulate_grad_batches=2
    )
    assert torch.equal(weights(ours), weights(plain))


def test_momentum_does_not_see_the_decoupled_part():
    """With the gradient clipped to nothing the optimizer stands still and sharpness acts alone."""
    module = Quadratic()
    run = trainer(
        [WSAM(0.3, gamma=0.8)],
        max_epochs=1,
        precision="64-true",
        limit_train_batches=1,
        gradient_clip_val=1e-12,
    )
    run.fit(module)
    h = hessian()
    g = h @ START
    moved = START - 0.1 * 4 * (h @ (0.3 * g / np.linalg.norm(g)))
    found = torch.cat([module.a, module.b]).detach().numpy()
    np.testing.assert_allclose(found, moved, rtol=1e-9)


@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_window_of_micro_batches_moves_by_its_mean(sharpness):
    whole, _ = fit([WSAM(0.2, gamma=0.7)], batch_size=16)
    split, _ = fit(
        [WSAM(0.2, gamma=0.7, sharpness=sharpness)], batch_size=4, accumulate_grad_batches=4
    )
    gap = (weights(split) - weights(whole)).abs().max()
    assert gap < 2e-6 if sharpness == "rank" else 1e-4 < gap < 0.05


def test_the_learning_rate_is_that_of_the_step_not_of_the_next():
    class Scheduled(Host):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    settings = {"limit_train_batches": 1, "max_epochs": 1}
    ours, _ = fit([WSAM(0.3, gamma=0.7)], module=Scheduled(), **settings)
    expected, _ = fit([WSAM(0.3, gamma=0.7)], module=Host(), **settings)
    assert torch.equal(weights(ours), weights(expected))


def test_an_overflow_skips_the_decoupled_part_too():
    class Overflows(Host):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if batch_idx == 1 else 1.0)

    class Watches(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.seen.append(weights(pl_module))

    watches = Watches()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    technique = WSAM(0.2, gamma=0.7)
    fit([technique, watches], module=Overflows(), plugins=[plugin], max_epochs=1)
    assert torch.equal(watches.seen[0], watches.seen[1])
    assert not torch.equal(watches.seen[1], watches.seen[2])
    assert torch.isfinite(watches.seen[-1]).all()
    assert technique._kept == []


@pytest.mark.parametrize("arguments", [{"gamma": 1.0}, {"gamma": -0.1}, {"rho": -1.0}])
def test_bad_arguments_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match=r"WSAM: .*Try: WSAM\("):
        WSAM(**arguments)
