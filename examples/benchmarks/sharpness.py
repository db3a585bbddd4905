"""Step times of the techniques for flat minima, as ratios to the plain step of the same round.

Run ``python examples/benchmarks/sharpness.py``: a small ResNet and a small transformer at batch
64, one thread, all variants interleaved in one run. Beside ours stand the optimizers of
``pytorch_optimizer`` (``pip install pytorch_optimizer``; left out if it is missing), under manual
optimization as their documentation has them. ``--only plain SAM`` measures some of them.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from timing import measure, ratios
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_reg as reg

Variants = dict[str, Callable[[], list[Callback]]]

# Those with a start act from the first step on.
OURS: Variants = {
    "plain": list,
    "SAM": lambda: [reg.SAM(0.05)],
    "SAM, interval=5": lambda: [reg.SAM(0.05, interval=5)],
    "ASAM": lambda: [reg.SAM(0.5, adaptive=True)],
    "GSAM": lambda: [reg.GSAM(0.05)],
    "WSAM": lambda: [reg.WSAM(0.05)],
    "LookSAM(5)": lambda: [reg.LookSAM(0.05, k=5)],
    "ESAM": lambda: [reg.ESAM(0.05)],
    "SAF": lambda: [reg.SAF(0.3, lag=3, start=0)],
    "MESA": lambda: [reg.MESA(0.8, start=0)],
    "AMP": lambda: [reg.AdversarialModelPerturbation(0.5)],
    "EMA": lambda: [reg.EMA(0.999)],
}
PEERS = ("SAM", "GSAM", "WSAM", "LookSAM")


class Peer(Callback):
    """Makes the module train with one of ``pytorch_optimizer``'s optimizers.

    Args:
        name: its class.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the optimizer is made."""
        pl_module.peer = self.name
        pl_module.automatic_optimization = False


class Classifier(L.LightningModule):
    """Cross-entropy of ten classes with SGD, or with a peer's optimizer.

    Args:
        net: logits (B, 10) from inputs.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.peer = ""

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """One step."""
        if not self.peer:
            return F.cross_entropy(self(batch[0]), batch[1])
        self._peers_step(batch)
        return None

    def _peers_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            loss.backward()
            return loss

        if self.peer == "GSAM":
            optimizer.set_closure(F.cross_entropy, *batch)
            optimizer.step()
            return
        if self.peer != "WSAM":
            # WSAM runs its first pass by itself.
            closure()
        optimizer.step(closure)

    def configure_optimizers(self) -> Any:
        """SGD with momentum."""
        settings: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
        if not self.peer:
            return torch.optim.SGD(self.parameters(), **settings)
        from pytorch_optimizer.optimizer import sam

        make = getattr(sam, self.peer)
        if self.peer == "GSAM":
            base = torch.optim.SGD(self.parameters(), **settings)
            return make(self.parameters(), base, self, _Constant(0.05))
        if self.peer == "WSAM":
            return make(self, self.parameters(), torch.optim.SGD, rho=0.05, **settings)
        more = {"k": 5} if self.peer == "LookSAM" else {}
        return make(self.parameters(), torch.optim.SGD, rho=0.05, **more, **settings)


class _Constant:
    """A schedule of the radius, as GSAM's port asks for."""

    def __init__(self, value: float) -> None:
        self._value = value

    def step(self) -> float:
        return self._value


class Block(nn.Module):
    """Two convolutions and a shortcut.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet() -> Classifier:
    """Three residual blocks on 32 x 32 images (175 k parameters)."""
    blocks = [Block(3, 16, 2), Block(16, 32, 2), Block(32, 96, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)]
    return Classifier(nn.Sequential(*blocks, *head))


class Transformer(nn.Module):
    """Two encoder layers over 32 tokens of a row of pixels each (200 k parameters)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.0)
        self.embed = nn.Linear(96, 64)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 3, 32, 32)."""
        tokens = self.embed(x.permute(0, 2, 1, 3).flatten(2))
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


def transformer() -> Classifier:
    """The small transformer."""
    return Classifier(Transformer())


def images(variant: str) -> DataLoader[Any]:
    """Random images in batches of 64, whose positions are known to who needs them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64 * 16, 3, 32, 32, generator=generator)
    data: Any = TensorDataset(x, torch.randint(0, 10, (64 * 16,), generator=generator))
    return DataLoader(reg.IndexedDataset(data) if variant == "SAF" else data, batch_size=64)


def variants() -> Variants:
    """Ours, and the peers that are installed."""
    found = dict(OURS)
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        for name in PEERS:
            found[f"pytorch_optimizer {name}"] = lambda name=name: [Peer(name)]  # type: ignore[misc]
    return found


def main() -> None:
    """Measure and print a table in Markdown for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=list(variants()))
    arguments = parser.parse_args()
    chosen = variants()
    if arguments.only:
        chosen = {name: chosen[name] for name in dict.fromkeys(["plain", *arguments.only])}
    for model in (resnet, transformer):
        times = measure(
            chosen,
            steps=arguments.steps,
            rounds=arguments.rounds,
            module=model,
            loader=images,
        )
        print(f"| {model.__name__} | step time / plain step |\n| --- | --- |")
        for name, (ratio, spread) in ratios(times, "plain").items():
            print(f"| {name} | {ratio:.2f} ± {spread:.2f} |", flush=True)
        print()


if __name__ == "__main__":
    main()
