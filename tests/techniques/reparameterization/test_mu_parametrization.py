"""muP: the exponents, the mup package's training, and changes that do not grow with the width."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import MuParametrization
from lightning_reg.engine import ArgumentError, UnsupportedError
from lightning_reg.techniques.reparameterization.mu_parametrization import (
    base_shapes,
    mu_parametrization,
)

X = torch.sin(torch.arange(15.0, dtype=torch.float64)).view(5, 3)
Y = torch.cos(torch.arange(10.0, dtype=torch.float64)).view(5, 2)

# microsoft/mup@1981497 on this network with a MuReadout, base width 4, width 16, three steps on the
# mean squared error with MuSGD, MuAdam and MuAdamW: the first and the last output.
START = [0.9351830767165965, 0.6006358180766849]
OFFICIAL = {
    "momentum": (
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        [0.01515954233410946, -0.35589995819584525],
        [0.015298501158831357, -0.39757941459796303],
    ),
    "sgd": (
        lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1),
        [0.3994078382342358, 0.03272439539760841],
        [0.3986023354645884, 0.007026274613777861],
    ),
    "adam": (
        lambda p: torch.optim.Adam(p, 0.02),
        [0.4274841342939765, -0.08244090864991727],
        [0.43256244854931136, -0.118059180634006],
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
        [0.42432876910406847, -0.08457082748950723],
        [0.42926320852809696, -0.11978493836311283],
    ),
}


class Net(L.LightningModule):
    def __init__(self, n, make=None):
        super().__init__()
        self.make = make
        self.first, self.norm = nn.Linear(3, n), nn.LayerNorm(n)
        self.second, self.third = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)
        self.head = nn.Linear(n, 2)
        self.double()
        self.before = None

    def hidden(self, x):
        return torch.tanh(self.third(torch.tanh(self.second(self.norm(self.first(x))))))

    def forward(self, x):
        return self.head(self.hidden(x))

    def on_train_start(self):
        with torch.no_grad():
            self.before = self.hidden(X), self(X)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


def fill(net):
    """Weights that follow from their position alone."""
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            k = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(0.5 * torch.sin(0.7 * k + i).view_as(parameter))
    return net


def train(net, *techniques, epochs=3):
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(techniques),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(TensorDataset(X, Y), 5))
    return net


def rule(kind):
    return "adam" if "adam" in kind else "sgd"


@pytest.mark.parametrize("kind", OFFICIAL)
def test_trains_the_functions_of_the_mup_package(kind):
    make, first, last = OFFICIAL[kind]
    technique = MuParametrization(base_shapes(Net(4)), optimizer=rule(kind))
    net = train(fill(Net(16, make)), technique)
    torch.testing.assert_close(net.before[1][0], torch.tensor(START, dtype=torch.float64))
    found = net(X).detach()
    expected = torch.tensor([first, last], dtype=torch.float64)
    # Adam's eps of 1e-8 counts relative to gradients of another scale.
    tolerance = 1e-5 if rule(kind) == "adam" else 1e-9
    torch.testing.assert_close(found[[0, 4]], expected, rtol=0, atol=tolerance)


def test_multipliers_are_the_exponents_of_the_paper():
    one, n = torch.ones((), dtype=torch.float64), 9.0
    layers = {"input": (1, n), "hidden": (n, n), "output": (n, 1)}
    sgd = {name: float(mu_parametrization(one, *r, "sgd")) for name, r in layers.items()}
    assert sgd == {"input": n**0.5, "hidden": 1.0, "output": pytest.approx(n**-0.5)}
    adam = {name: float(mu_parametrization(one, *r, "adam")) for name, r in layers.items()}
    assert adam == {"input": 1.0, "hidden": pytest.approx(1 / n), "output": pytest.approx(1 / n)}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.2),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
}
WIDTHS = (32, 512)


def changes(kind, technique):
    """How far three steps move the hidden layer and the output, by width, over three seeds."""
    found = []
    for width in WIDTHS:
        moved = torch.zeros(2)
        for seed in range(3):
            torch.manual_seed(seed)
            net = train(Net(width, OPTIMIZERS[kind]), *technique(kind))
            with torch.no_grad():
                after = net.hidden(X), net(X)
            sizes = [(a - b).square().mean().sqrt() for a, b in zip(after, net.before, strict=True)]
            moved += torch.stack(sizes).float() / 3
        found.append(moved)
    return torch.stack(found)


def mup(kind):
    return [MuParametrization(base_shapes(Net(WIDTHS[0])), optimizer=kind)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_coordinate_check(kind):
    ours, usual = changes(kind, mup), changes(kind, lambda kind: [])
    # From 32 to 512, measured: 0.87 to 1.0, against 15 and 624 (SGD), 5 and 7 (Adam).
    growth = ours[-1] / ours[0]
    assert (growth > 0.75).all(), growth
    assert (growth < 1.3).all(), growth
    assert (usual[-1] / usual[0]).min() > 3, usual


def test_embeddings_are_inputs_and_transposed_convolutions_have_inputs_first():
    class Images(L.LightningModule):
        def __init__(self, n):
            super().__init__()
            self.table = nn.Embedding(7, n)
            self.up = nn.ConvTranspose2d(n, 3, 2)
            self.position = nn.Module()
            self.position.code = nn.Parameter(torch.zeros(1, 5, n))
            self.deep = nn.Conv2d(n, n, 3, groups=n)

    technique = MuParametrization(base_shapes(Images(2)), optimizer="sgd")
    module = Images(8)
    technique.reparametrized(module)
    assert technique._multipliers == {
        "table.weight": 2.0,
        "up.weight": 0.5,
        "up.bias": 1.0,
        "position.code": 2.0,
        "deep.weight": 2.0,
        "deep.bias": 2.0,
    }


def test_initialization_is_rescaled_once():
    technique = MuParametrization(base_shapes(Net(4)), optimizer="sgd")
    net = fill(Net(16, lambda p: torch.optim.SGD(p, 0.0)))
    start = copy.deepcopy(net.state_dict())
    for _ in range(2):
        train(net, technique, epochs=1)
        torch.testing.assert_close(net.head.weight.detach(), start["head.weight"] / 2)
        torch.testing.assert_close(net.head.bias.detach(), start["head.bias"] * 2)
        torch.testing.assert_close(net.second.bias.detach(), start["second.bias"] * 2)
        torch.testing.assert_close(net.second.weight.detach(), start["second.weight"])
        torch.testing.assert_close(net.first.bias.detach(), start["first.bias"])
        torch.testing.assert_close(net.norm.weight.detach(), start["norm.weight"])


def test_trained_module_keeps_its_weights():
    net = fill(Net(16, lambda p: torch.optim.SGD(p, 0.0)))
    start = copy.deepcopy(net.state_dict())
    train(net, MuParametrization(base_shapes(Net(4)), optimizer="sgd", rescale=False), epochs=1)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, start[name])


def test_optimizer_of_the_other_kind_is_refused():
    with pytest.raises(ArgumentError, match="the optimizer is AdamW"):
        train(
            Net(16, lambda p: torch.optim.AdamW(p, 0.1)),
            MuParametrization(base_shapes(Net(4)), optimizer="sgd"),
        )


def test_head_that_is_tied_to_an_embedding_is_refused():
    class Tied(Net):
        def __init__(self, n, make=None):
            super().__init__(n, make)
            self.table = nn.Embedding(2, n).double()
            self.head.weight = self.table.weight

    with pytest.raises(UnsupportedError, match="share one weight"):
        train(Tied(16, OPTIMIZERS["sgd"]), MuParametrization(base_shapes(Tied(4)), optimizer="sgd"))


def test_kernel_that_grows_is_refused():
    class Conv(L.LightningModule):
        def __init__(self, kernel):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, kernel)

    with pytest.raises(UnsupportedError, match=r"conv\.weight grows"):
        MuParametrization(base_shapes(Conv(1))).reparametrized(Conv(3))
