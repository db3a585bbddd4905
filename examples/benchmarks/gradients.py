"""Step times of gradient techniques, beside the autograd loops that one would write by hand.

Run ``python examples/benchmarks/gradients.py``; a small convnet at batch 64, one thread. Each
technique, its loop and the plain step are interleaved in one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from timing import SmallConvnet, measure, ratios
from torch import Tensor

import lightning_reg as reg

EPSILON = 8 / 255
Loop = Callable[[Any, Tensor, Tensor], Tensor]


class Convnet(SmallConvnet):
    """The convnet, with a training step that a callback may write by hand."""

    loop: Loop | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, or the loop."""
        if self.loop is None:
            return super().training_step(batch, batch_idx)
        return self.loop(*batch)


class ByHand(Callback):
    """Puts a loop in place of the training step."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Bind the loop to the module."""
        pl_module.loop = self._loop.__get__(pl_module)  # type: ignore[attr-defined]


def attack_loop(steps: int) -> Loop:
    """Projected ascent by the inputs, then the loss at the end."""

    def loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
        moved, size = x, EPSILON if steps == 1 else 2.5 * EPSILON / steps
        for _ in range(steps):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(module(moved), y), moved)
            moved = x + (moved + size * gradient.sign() - x).clamp(-EPSILON, EPSILON)
        return F.cross_entropy(module(moved.detach()), y)

    return loop


def linearity_loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """A single step, and the error of interpolation on one batch of three times the size."""
    loss = attack_loop(1)(module, x, y)
    ends = x.repeat(2, 1, 1, 1)
    ends = ends + EPSILON * (2 * torch.rand_like(ends) - 1)
    alpha = torch.rand(len(x), 1, 1, 1)
    first, second = ends.chunk(2)
    points = torch.cat([ends, (1 - alpha) * first + alpha * second])
    a, b, c = F.cross_entropy(module(points), y.repeat(3), reduction="none").chunk(3)
    share = alpha.flatten()
    return loss + 1000.0 * (c - (1 - share) * a - share * b).square().mean()


def norm_loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """The squared norm of the gradient, one weight after the other."""
    loss = F.cross_entropy(module(x), y)
    gradients = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    return loss + 0.0025 * sum(g.square().sum() for g in gradients)


def fisher_loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """The trace of the Fisher information by the inputs, class by class."""
    x = x.requires_grad_()
    logits = module(x)
    log_p = logits.log_softmax(1)
    total = torch.zeros(())
    for label in range(log_p.shape[1]):
        (score,) = torch.autograd.grad(log_p[:, label].sum(), x, create_graph=True)
        total = total + (log_p[:, label].exp() * score.flatten(1).square().sum(1)).mean()
    return F.cross_entropy(logits, y) + 0.01 * total


PAIRS: dict[str, tuple[Callable[[], Sequence[Callback]], Loop | None]] = {
    "AdversarialTraining": (
        lambda: [reg.AdversarialTraining(epsilon=EPSILON)],
        attack_loop(1),
    ),
    "AdversarialTraining(steps=3)": (
        lambda: [reg.AdversarialTraining(epsilon=EPSILON, steps=3)],
        attack_loop(3),
    ),
    "AAER": (lambda: [reg.AAER(epsilon=EPSILON)], attack_loop(1)),
    "ELLE": (lambda: [reg.ELLE(1000.0, epsilon=EPSILON)], linearity_loop),
    "GradientNormPenalty": (lambda: [reg.GradientNormPenalty()], norm_loop),
    "FiniteDifferenceGradientRegularizer": (
        lambda: [reg.FiniteDifferenceGradientRegularizer()],
        None,
    ),
    "FisherInformationPenalty": (lambda: [reg.FisherInformationPenalty()], fisher_loop),
    "Flooding": (lambda: [reg.Flooding(level=0.1)], None),
    "SpectralNormalization": (lambda: [reg.SpectralNormalization()], None),
}


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", nargs="*", choices=list(PAIRS))
    arguments = parser.parse_args()
    print("| technique | step time / plain step | the loop / plain step |\n| --- | --- | --- |")
    for name, (make, loop) in PAIRS.items():
        if arguments.only and name not in arguments.only:
            continue
        variants: dict[str, Callable[[], list[Callback]]] = {"plain": list}
        variants["ours"] = lambda make=make: list(make())  # type: ignore[misc]
        if loop is not None:
            variants["loop"] = lambda loop=loop: [ByHand(loop)]  # type: ignore[misc]
        times = measure(variants, steps=arguments.steps, rounds=arguments.rounds, module=Convnet)
        found = ratios(times, "plain")
        row = [
            f"{found[key][0]:.2f} ± {found[key][1]:.2f}" if key in found else "–"
            for key in ("ours", "loop")
        ]
        print(f"| `{name}` | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
