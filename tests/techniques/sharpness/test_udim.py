"""UDIM's inconsistency against the official value, its perturbed inputs, and SAM."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_reg.engine import ArgumentError, RegularizationError, UnsupportedError
from lightning_reg.techniques.inputs.mixup import Mixup
from lightning_reg.techniques.sharpness.sam import SAM
from lightning_reg.techniques.sharpness.udim import UDIM, domain_inconsistency
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, fit, weights

DOUBLE = {"dtype": torch.float64}
H = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-1.2, 0.4]], **DOUBLE)
Z = torch.tensor([[0.2, -0.1, 0.5], [1.0, 0.3, -0.4], [-0.6, 0.9, 0.1]], **DOUBLE)
H_NEW = H + torch.tensor([[0.4, 0.1], [-0.2, 0.3], [0.5, -0.6]], **DOUBLE)
Z_NEW = torch.tensor([[0.7, -0.3, 0.1], [0.2, 0.6, -0.9], [-0.1, 0.4, 0.8]], **DOUBLE)
Y = torch.tensor([0, 2, 1])


def test_equals_the_official_value_and_gradient():
    # aailabkaist/UDIM@808f1b2, domainbed/iada/iada_final.py: _compute_distance_grads_var of
    # _get_grads_var, plus _grads_norm_syn, on the gradients of a linear head in float64.
    h, z_new = H.clone().requires_grad_(), Z_NEW.clone().requires_grad_()
    value = domain_inconsistency(h, Z, H_NEW, z_new, Y)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.3952630919837314, rel=1e-12)
    of_h = torch.tensor([0.0005678327420065262, -2.7587493318994275e-05], **DOUBLE)
    of_z = torch.tensor(
        [0.005554116466031731, 0.04488661560812417, -0.050440732074155864], **DOUBLE
    )
    torch.testing.assert_close(h.grad[0], of_h)
    torch.testing.assert_close(z_new.grad[1], of_z)


def test_gradients_of_samples_are_those_of_autograd():
    """The closed form of a linear head, against torch.func on an explicit head."""
    head = nn.Linear(2, 3).double()
    parameters = {n: p.detach() for n, p in head.named_parameters()}

    def loss(p, h, y):
        return F.cross_entropy(functional_call(head, p, h), y)

    per_sample = vmap(grad(loss), (None, 0, 0))
    here, there = per_sample(parameters, H, Y), per_sample(parameters, H_NEW, Y)

    def flat(g):
        return torch.cat([g["weight"].flatten(1), g["bias"]], 1)

    centre = flat(here).mean(0)
    gap = (flat(here) - centre).square().mean(0) - (flat(there) - centre).square().mean(0)
    norms = sum(there[n].flatten(1).square().mean() for n in there)
    expected = gap.square().mean() / 4 + norms
    found = domain_inconsistency(H, head(H), H_NEW, head(H_NEW), Y)
    torch.testing.assert_close(found.detach(), expected)


def test_equal_domains_have_no_variance_between_them():
    same = domain_inconsistency(H, Z, H, Z, Y)
    sure = 60 * (2 * F.one_hot(Y, 3).double() - 1)
    assert float(domain_inconsistency(H, sure, H, sure, Y)) == pytest.approx(0.0, abs=1e-12)
    gap = Z.softmax(1) - F.one_hot(Y, 3)
    norms = (gap[:, :, None] * H[:, None]).square().mean() + gap.square().mean()
    torch.testing.assert_close(same, norms)


# ---------------------------------------------------------------------- in a run


class Headed(Host):
    """The host with its last layer apart, in float64."""

    def __init__(self, lr=0.1):
        super().__init__(lr=lr)
        self.features, self.head = self.net[:4], self.net[4]
        self.double()

    def forward(self, x):
        return self.head(self.features(x.double()))


def reference(normalize, rho=0.2, weight=0.7, rho_x=0.9):
    """One step as a plain loop."""
    module = Headed()
    learned = list(module.parameters())
    x = INPUTS.double().requires_grad_()
    loss = F.cross_entropy(module(x), LABELS)
    g = torch.autograd.grad(loss, learned, create_graph=True)
    length = torch.cat([t.flatten() for t in g]).norm()
    (slope,) = torch.autograd.grad(loss + rho * length, x, retain_graph=True)
    size = slope.norm(dim=0, keepdim=True) if normalize == "batch" else slope.norm(dim=1)[:, None]
    new = (x + rho_x * slope / size).detach()
    h, h_new = module.features(x), module.features(new)
    extra = torch.autograd.grad(
        domain_inconsistency(h, module.head(h), h_new, module.head(h_new), LABELS), learned
    )
    start = [p.detach().clone() for p in learned]
    with torch.no_grad():
        for p, t in zip(learned, g, strict=True):
            p += rho * t / length
    second = torch.autograd.grad(F.cross_entropy(module(INPUTS), LABELS), learned)
    pairs = zip(start, second, extra, strict=True)
    return torch.cat([(p - 0.1 * (s + weight * e)).flatten() for p, s, e in pairs]).detach()


@pytest.mark.parametrize("normalize", ["sample", "batch"])
@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_one_step_is_the_formula(normalize, sharpness):
    technique = UDIM(
        0.2,
        layer="features",
        weight=0.7,
        rho_x=0.9,
        start=0.0,
        normalize=normalize,
        sharpness=sharpness,
    )
    module, run = fit([technique], Headed(), batch_size=64, max_epochs=1, precision="64-true")
    torch.testing.assert_close(weights(module), reference(normalize), rtol=1e-9, atol=1e-10)
    assert float(run.callback_metrics["reg/udim_inconsistency"]) > 0


@pytest.mark.parametrize("sharpness", ["micro", "rank", "global"])
def test_without_weight_or_before_the_start_it_is_sam(sharpness):
    settings = {"batch_size": 8, "accumulate_grad_batches": 2}
    sam, _ = fit([SAM(0.2, sharpness=sharpness)], Headed(), **settings)
    off, _ = fit(
        [UDIM(0.2, layer="features", weight=0.0, sharpness=sharpness)], Headed(), **settings
    )
    assert torch.equal(weights(off), weights(sam))
    late, _ = fit(
        [UDIM(0.2, layer="features", start=1.0, sharpness=sharpness)], Headed(), **settings
    )
    torch.testing.assert_close(weights(late), weights(sam), rtol=0, atol=1e-12)
    half, _ = fit(
        [UDIM(0.2, layer="features", start=0.5, sharpness=sharpness)], Headed(), **settings
    )
    assert (weights(half) - weights(sam)).abs().max() > 1e-4


def test_unperturbed_inputs_leave_the_norm_of_the_gradients():
    class Watches(UDIM):
        seen = []

        def _perturbed(self, step, total, gradients, points):
            new = super()._perturbed(step, total, gradients, points)
            self.seen.append((new - points.detach()).norm(dim=1))
            return new

    fit([Watches(0.2, layer="features", rho_x=0.9, start=0.0)], Headed(), max_epochs=1)
    for lengths in Watches.seen:
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.9), rtol=1e-5, atol=0)


class Shifted(UDIM):
    """Perturbs inputs by a rule of their own, where the direction would be that of the rank."""

    def _perturbed(self, step, total, gradients, points):
        return (points + points.flip(1)).detach()


def on_ranks():
    module = Headed()
    technique = Shifted(0.1, layer="features", weight=3.0, start=0.0, sharpness="global")
    run = rank_trainer(callbacks=[technique], max_epochs=2, use_distributed_sampler=False)
    data = TensorDataset(INPUTS, LABELS)
    sampler = DistributedSampler(data, shuffle=False)
    run.fit(module, DataLoader(data, batch_size=8, sampler=sampler))
    return weights(module)


def test_moments_are_those_of_all_ranks(ranks):
    """With inputs that are perturbed alike, ranks equal one process."""
    one, other = ranks.run(on_ranks)
    assert torch.equal(one, other)
    technique = Shifted(0.1, layer="features", weight=3.0, start=0.0)
    alone, _ = fit([technique], Headed(), batch_size=16)
    torch.testing.assert_close(one, weights(alone), rtol=0, atol=1e-6)


class Attentive(Headed):
    """Attention, whose fast kernels have no second derivative."""

    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True).double()

    def forward(self, x):
        tokens = x.double().view(-1, 2, 4)
        mixed, _ = self.mix(tokens, tokens, tokens, need_weights=False)
        return super().forward(mixed.flatten(1))


def test_attention_is_differentiated_twice():
    module, _ = fit([UDIM(0.2, layer="features", start=0.0)], module=Attentive(), max_epochs=1)
    sam, _ = fit([SAM(0.2)], module=Attentive(), max_epochs=1)
    assert torch.isfinite(weights(module)).all()
    assert not torch.equal(module.mix.in_proj_weight, sam.mix.in_proj_weight)


def test_refusals():
    with pytest.raises(UnsupportedError, match="UDIM: compares the gradients of samples"):
        fit([UDIM(layer="features", start=0.0), Mixup(1.0)], Headed())

    class Soft(Headed):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return {"loss": logits.square().mean(), "logits": logits, "targets": logits.detach()}

    with pytest.raises(RegularizationError, match=r"UDIM: needs features \(B, D\)"):
        fit([UDIM(layer="features", start=0.0)], Soft())
    for bad in (
        {"weight": -1.0},
        {"rho_x": -0.1},
        {"start": 1.5},
        {"layer": ""},
        {"normalize": "all"},
        {"rho": -1.0},
    ):
        with pytest.raises(ArgumentError, match=r"UDIM: .*Try: UDIM\("):
            UDIM(**{"layer": "features", **bad})
