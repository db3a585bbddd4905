"""Step times of gradient and weight techniques, beside what a user would take today.

Run ``python examples/benchmarks/gradients.py``: a small ResNet and a small transformer at batch
32, one thread, CPU time, all variants of a model interleaved in one run. Beside ours stand the
autograd loops that one would write by hand, and what timm (left out where it cannot be imported),
torch and Lightning have. ``--only EMA ELLE`` measures some of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from models import BATCH, MODELS, images
from peers import Loop, Make, by_hand, optional, print_table, variants
from timing import measure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

import lightning_reg as reg

COLUMNS = ("ours", "by hand", "library")
EPSILON = 8 / 255


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


def orthogonal_loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """The squared products of different filters, one layer after the other."""
    loss = F.cross_entropy(module(x), y)
    for weight in matrices(module):
        rows = weight.flatten(1)
        gram = rows @ rows.T
        loss = loss + 1e-4 * (gram - gram.diag().diag()).square().sum()
    return loss


def matrices(module: nn.Module) -> list[Tensor]:
    """Weights with two dimensions or more."""
    return [weight for weight in module.parameters() if weight.ndim > 1]


class SpectralNorm(Callback):
    """Torch's parametrization of every matrix and kernel."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the optimizer is made."""
        for part in list(pl_module.modules()):
            for name, weight in list(part.named_parameters(recurse=False)):
                if weight.ndim > 1:
                    spectral_norm(part, name)


class ClipUnits(Callback):
    """timm's clipping, where a user would call it.

    Args:
        clip: the function, of parameters.
    """

    def __init__(self, clip: Callable[..., None]) -> None:
        self._clip = clip

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are there."""
        self._clip(pl_module.parameters(), clip_factor=0.01)


def rows() -> dict[str, dict[str, Make]]:
    """Ours, and what stands beside it."""
    found: dict[str, dict[str, Make]] = {
        "AdversarialTraining": {
            "ours": lambda: [reg.AdversarialTraining(epsilon=EPSILON)],
            "by hand": by_hand(attack_loop(1)),
        },
        "AdversarialTraining(steps=3)": {
            "ours": lambda: [reg.AdversarialTraining(epsilon=EPSILON, steps=3)],
            "by hand": by_hand(attack_loop(3)),
        },
        "AAER": {"ours": lambda: [reg.AAER(epsilon=EPSILON)], "by hand": by_hand(attack_loop(1))},
        "ELLE": {
            "ours": lambda: [reg.ELLE(1000.0, epsilon=EPSILON)],
            "by hand": by_hand(linearity_loop),
        },
        "GradientNormPenalty": {
            "ours": lambda: [reg.GradientNormPenalty()],
            "by hand": by_hand(norm_loop),
        },
        "FiniteDifferenceGradientRegularizer": {
            "ours": lambda: [reg.FiniteDifferenceGradientRegularizer()],
        },
        "FisherInformationPenalty": {
            "ours": lambda: [reg.FisherInformationPenalty()],
            "by hand": by_hand(fisher_loop),
        },
        "Flooding": {"ours": lambda: [reg.Flooding(level=0.1)]},
        "OrthogonalRegularizer": {
            "ours": lambda: [reg.OrthogonalRegularizer(1e-4)],
            "by hand": by_hand(orthogonal_loop),
        },
        "SpectralNormalization": {
            "ours": lambda: [reg.SpectralNormalization()],
            "library": lambda: [SpectralNorm()],
        },
        "EMA": {
            "ours": lambda: [reg.EMA(0.999)],
            "library": lambda: [EMAWeightAveraging(decay=0.999)],
        },
        "AdaptiveGradientClipping": {"ours": lambda: [reg.AdaptiveGradientClipping(clip=0.01)]},
    }
    agc = optional("timm.utils.agc")
    if agc is not None:
        clip = agc.adaptive_clip_grad
        found["AdaptiveGradientClipping"]["library"] = lambda: [ClipUnits(clip)]
    return found


def main() -> None:
    """Measure and print a table in Markdown for each model."""
    chosen = rows()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=list(chosen))
    arguments = parser.parse_args()
    if arguments.only:
        chosen = {name: cells for name, cells in chosen.items() if name in arguments.only}
    for model in arguments.model:
        # The fused kernels of attention have no second gradient.
        with sdpa_kernel(SDPBackend.MATH):
            times = measure(
                variants(chosen),
                steps=arguments.steps,
                rounds=arguments.rounds,
                module=MODELS[model],
                loader=lambda name: images(),
            )
        print_table(f"{model}, batch {BATCH}: step / plain step", times, chosen, COLUMNS)


if __name__ == "__main__":
    main()
