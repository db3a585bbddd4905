"""Step times of the techniques for flat minima, as ratios to the plain step of the same round.

Run ``python examples/benchmarks/sharpness.py``: a small ResNet and a small transformer at batch
32, one thread, all variants interleaved in one run. Beside ours stand the optimizers of
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
from models import MODELS, Classifier, images
from timing import measure, ratios
from torch import Tensor

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


class Trained(Classifier):
    """Trained with SGD, or with a peer's optimizer."""

    peer = ""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        """One step."""
        if not self.peer:
            return super().training_step(batch, batch_idx)
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
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=list(variants()))
    arguments = parser.parse_args()
    chosen = variants()
    if arguments.only:
        chosen = {name: chosen[name] for name in dict.fromkeys(["plain", *arguments.only])}
    for model in arguments.model:
        make = MODELS[model]
        times = measure(
            chosen,
            steps=arguments.steps,
            rounds=arguments.rounds,
            module=lambda make=make: make(Trained),  # type: ignore[misc]
            loader=lambda name: images(reg.IndexedDataset if name == "SAF" else None),
        )
        print(f"| {model} | step time / plain step |\n| --- | --- |")
        for name, (ratio, spread) in ratios(times, "plain").items():
            print(f"| {name} | {ratio:.2f} ± {spread:.2f} |", flush=True)
        print()


if __name__ == "__main__":
    main()
