"""Masked experts and masked mixtures: rates, the product they stand for, and less over-fitting."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.techniques.noise.expert_dropout import ExpertDropout, mask_tokens
from tests.engine.simple import Host, fit, trainer


class Mixture(nn.Module):
    """Top-2 of several experts; keeps what is combined."""

    def __init__(self, width=16, experts=4, hidden=16):
        super().__init__()
        layers = [
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
            for _ in range(experts)
        ]
        self.experts, self.router = nn.ModuleList(layers), nn.Linear(width, experts)
        self.seen = {}

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        gates = torch.zeros(len(x), len(self.experts)).scatter(1, chosen, weights)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        self.seen = {"gates": gates, "outputs": outputs, "x": x}
        return (gates.unsqueeze(-1) * outputs).sum(1)


class MixtureHost(Host):
    """The tiny classifier with a mixture, which may return a tuple."""

    def __init__(self, in_tuple=False):
        super().__init__()
        self.moe, self.in_tuple, self.combined = Mixture(), in_tuple, []

    def forward(self, x):
        h = self.net[:3](x)
        mixed = self.layer(h) if self.in_tuple else self.moe(h)
        self.combined.append(mixed[0] if self.in_tuple else mixed)
        return self.net[4](h + self.combined[-1])


class InTuple(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x):
        return self.moe(x), "auxiliary"


def test_masked_experts_are_inverted_dropout_on_the_gate_weights():
    module = MixtureHost()
    fit([ExpertDropout(0.5, layers="moe.experts")], module=module, max_epochs=1)
    seen, combined = module.moe.seen, module.combined[-1]
    masks = (seen["outputs"].abs().sum(-1) > 0).float()
    assert 0.2 < masks.mean() < 0.8
    dropped = seen["gates"] * masks
    expected = torch.einsum("ne,ned->nd", dropped, seen["outputs"])
    torch.testing.assert_close(combined, expected)


def test_a_kept_expert_counts_more_by_the_share_that_is_dropped():
    outputs = torch.randn(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dropped = torch.rand(2000, generator=torch.Generator().manual_seed(1)) < 0.25
    masked = mask_tokens(outputs, dropped, 0.25).numpy()
    kept = ~dropped.numpy()
    assert (masked[~kept] == 0).all()
    assert masked[kept] / outputs.numpy()[kept] == pytest.approx(4 / 3)


@pytest.mark.parametrize("in_tuple", [False, True])
def test_final_masking_leaves_tokens_to_the_residual_connection(in_tuple):
    module = MixtureHost(in_tuple)
    layer = "moe"
    if in_tuple:
        module.layer, layer = InTuple(module.moe), "layer"
    fit([ExpertDropout(0.5, layers=layer, kind="final")], module=module, max_epochs=4)
    zero = torch.cat([(combined == 0).all(1) for combined in module.combined])
    # 256 tokens: five standard errors of a rate of a half are 0.16.
    assert zero.float().mean().item() == pytest.approx(0.5, abs=0.16)
    # Its experts themselves were left alone.
    assert (module.moe.seen["outputs"].abs().sum(-1) > 0).all()


def test_each_expert_draws_its_own_mask_and_validation_none():
    module = MixtureHost()
    fit([ExpertDropout(0.5, layers="moe.experts")], module=module, max_epochs=1)
    masks = module.moe.seen["outputs"].abs().sum(-1) > 0
    assert not torch.equal(masks[:, 0], masks[:, 1])
    module.moe(torch.randn(50, 16))
    assert (module.moe.seen["outputs"].abs().sum(-1) > 0).all()


def _digits():
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]


class DigitsNet(L.LightningModule):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.moe = Mixture(64, 6, 128)

    def forward(self, x):
        h = self.stem(x)
        return self.head(F.relu(h + self.moe(h)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def _test_loss(masking, seed):
    x, y = _digits()
    net = DigitsNet(seed)
    data = DataLoader(TensorDataset(x[:50], y[:50]), batch_size=25)
    trainer(masking, max_epochs=30).fit(net, data)
    with torch.no_grad():
        return F.cross_entropy(net(x[500:]), y[500:]).item()


def test_masking_keeps_a_large_mixture_from_over_fitting_a_small_task():
    """50 digits, 6 experts; measured means over two seeds: 1.76 without, EOM 1.03, FOM 1.05."""
    plain = sum(_test_loss([], seed) for seed in (0, 1)) / 2
    for kind, layers in (("expert", "moe.experts"), ("final", "moe")):
        masked = [
            _test_loss([ExpertDropout(0.5, layers=layers, kind=kind)], seed) for seed in (0, 1)
        ]
        assert sum(masked) / 2 < plain - 0.3
