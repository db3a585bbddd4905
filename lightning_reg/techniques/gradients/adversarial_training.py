"""Trains on inputs that an attack has moved to where the loss is larger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import RunContext
from lightning_reg.mechanisms.adversarial_inputs import (
    AdversarialInputs,
    Attack,
    Labels,
    Norm,
    check_attack,
)

__all__ = ["AdversarialTraining", "pgd_attack"]


def pgd_attack(
    network: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    epsilon: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 10,
    norm: Norm = "linf",
    random_start: float = 0.0,
    bounds: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Inputs within ``epsilon`` of ``inputs`` at which the loss is larger: projected ascent.

    ``x <- P(x + a s(g))`` with the gradient ``g`` of the loss by ``x``, ``s`` the sign
    (``"linf"``) or the direction (``"l2"``) of each sample's gradient, and ``P`` back into the
    ball and the bounds. ``steps=1`` without a random start is the fast gradient sign method. The
    network is used as it is: call ``network.eval()`` first to attack the one that is deployed.

    Args:
        network: takes (B, ...) and gives logits.
        inputs: (B, ...).
        targets: (B,) classes, or what ``loss`` takes; the network's own answers for an attack
            that does not know the labels.
        epsilon: the radius, in the inputs' unit.
        step_size: ``a``; by default ``2.5 epsilon / steps``, and ``epsilon`` for one step.
        steps: how many.
        norm: ``"linf"`` or ``"l2"``.
        random_start: the radius of a uniform random start, in units of ``epsilon``.
        bounds: the least and the largest valid input.
        generator: where the start is drawn from.
        loss: of logits and targets; a sum or mean over samples.

    Returns:
        (B, ...), detached.

    Raises:
        ArgumentError: if a setting has no meaning.
    """
    limits: Any = bounds if bounds is None else tuple(bounds)
    attack = Attack(epsilon, step_size, steps, norm, random_start, True, limits)
    check_attack("pgd_attack", attack)
    clean = inputs.detach()
    points = attack.start(clean, generator)
    with torch.enable_grad():
        for _ in range(steps):
            points = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(network(points), targets), points)
            points = attack.step(clean, points, gradient)
    return points


class AdversarialTraining(AdversarialInputs):
    """Trains on inputs moved to where the loss is larger, so that small changes fool it less.

    Madry, Makelov, Schmidt, Tsipras, Vladu (2018), Towards Deep Learning Models Resistant to
    Adversarial Attacks, arXiv:1706.06083. Single steps: Goodfellow, Shlens, Szegedy (2015),
    Explaining and Harnessing Adversarial Examples, arXiv:1412.6572; Wong, Rice, Kolter (2020),
    Fast is better than free, arXiv:2001.03994; de Jorge et al. (2022), Make Some Noise,
    arXiv:2202.01181.

    The loss becomes ``(1 - s) L(x) + s L(x + d)``, with ``d`` found by ascent from a start in the
    ball ``||d|| <= epsilon``: ``d <- P(d + a sign(dL/dx))`` (for ``"l2"`` the direction of each
    sample's gradient). No gradient passes through ``d``. The methods are settings:

    - FGSM: the defaults (``steps=1``, no random start); with ``strength=0.5`` Goodfellow's mix;
    - RS-FGSM: ``random_start=1.0`` (the step is then ``1.25 epsilon``);
    - N-FGSM: ``random_start=2.0, project=False``;
    - PGD-10: ``steps=10, random_start=1.0``.

    Their steps were compared with tmllab/2023_NeurIPS_AAER (``CIFAR10/AAER.py``) and
    LIONS-EPFL/ELLE (``core/utils/train.py``). 8/255 is the field's usual radius for color images
    in [0, 1]; the default step of PGD, ``2.5 epsilon / steps``, is Madry's at 10 steps. Inputs that
    were normalized have another unit: put the normalization into the network, or scale
    ``epsilon`` and ``bounds`` with it.

    Args:
        strength: ``s``, the share of the adversarial loss, in [0, 1]. Below 1 the clean loss is
            needed too, which costs a further pass if there is a random start.
        epsilon: the radius, in the inputs' own unit.
        step_size: ``a``; see above.
        steps: ascent steps.
        norm: ``"linf"`` or ``"l2"``.
        random_start: the radius of the uniform random start, in units of ``epsilon``.
        project: bring steps back into the ball.
        bounds: the least and the largest valid input.
        labels: ``"true"``: raise the loss that is trained; ``"predicted"``: the cross-entropy of
            the class that the network answers, so that no label leaks into a single step.
        signals: where ``inputs`` (and ``logits``) are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: if inputs are integers, under manual optimization, and where weights are
            sharded over ranks.

    Note:
        The log shows the rise of the loss from the start of the attack to its end. Over ranks:
        global; each sample is attacked by itself, nothing is communicated, and each rank and
        micro-batch draws its own random starts. BatchNorm in training mode mixes the samples.
        The user's own logs, metrics and BatchNorm's running statistics are those of the first
        pass: at the clean inputs, or at the random start.
        Cost: ``steps`` more forward passes and as many backward passes; the first step of a run
        takes one more pass, to see whether ``training_step`` can be repeated.

        It costs clean accuracy. Training with one step can suddenly lose all robustness
        (catastrophic overfitting): watch ``pgd_attack`` on held-out data, and see AAER and ELLE.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AdversarialTraining
        >>> trainer = L.Trainer(callbacks=[AdversarialTraining(epsilon=8 / 255)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Towards Deep Learning Models Resistant to Adversarial Attacks",
            "Madry et al.",
            2018,
            "1706.06083",
        ),
        Paper(
            "Explaining and Harnessing Adversarial Examples", "Goodfellow et al.", 2015, "1412.6572"
        ),
        Paper(
            "Fast is better than free: Revisiting adversarial training",
            "Wong et al.",
            2020,
            "2001.03994",
        ),
        Paper(
            "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training",
            "de Jorge et al.",
            2022,
            "2202.01181",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(pgd_attack)
    exemptions: ClassVar[Mapping[str, str]] = {
        "gradient": "the attack is a constant of the loss: no gradient passes through it"
    }
    explanation: ClassVar[str] = "trains at inputs + d, with d along the gradient by the inputs"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        epsilon: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 1,
        norm: Norm = "linf",
        random_start: float = 0.0,
        project: bool = True,
        bounds: Sequence[float] | None = None,
        labels: Labels = "true",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            norm=norm,
            random_start=random_start,
            project=project,
            bounds=bounds,
            labels=labels,
            signals=signals,
            name=name,
        )
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, 1, cure="AdversarialTraining(1.0)")

    def active(self, context: RunContext) -> bool:
        """Off at a share or a radius of 0."""
        return super().active(context) and context.strength(self) != 0

    def keeps_clean(self, step: Step) -> bool:
        """The clean loss has a share."""
        return step.strength(self) != 1

    def combine(self, step: Step, clean: Tensor | None, adversarial: Tensor) -> Tensor:
        """The shares of both."""
        if clean is None:
            return adversarial
        share = step.strength(self)
        return (1 - share) * clean + share * adversarial

    def report(self, step: Step, first: Tensor, adversarial: Tensor) -> None:
        """How much the attack raised the loss."""
        step.log(self, adversarial - first)
