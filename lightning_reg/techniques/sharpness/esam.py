"""SAM at a lower cost: some weights are perturbed, and the samples that suffer most are used."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine.criterion import as_distribution, belong, soft_cross_entropy
from lightning_reg.engine.errors import RegularizationError, UnsupportedError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.step import Step
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.normalized_ascent import NormalizedAscent
from lightning_reg.mechanisms.weight_perturbation import Sharpness

SampleLoss = Callable[[Tensor, Tensor], Tensor]


def esam_samples(before: Tensor, after: Tensor, gamma: float = 0.5) -> Tensor:
    """The samples whose loss rises most from the clean to the perturbed weights.

    Args:
        before: (B,) losses at the weights.
        after: (B,) losses at the perturbed weights.
        gamma: the share that is taken, in (0, 1].

    Returns:
        The positions of ``max(1, int(gamma * B))`` samples, in ascending order.
    """
    count = max(1, int(gamma * len(before)))
    return (after - before).topk(count).indices.sort().values


class ESAM(NormalizedAscent):
    r"""Efficient SAM, ESAM (Du et al. 2022): stochastic perturbation, selected samples.

    SAM with two savings. Stochastic weight perturbation: each step perturbs every parameter
    tensor with probability ``beta``, by

    .. math:: e = \frac{\rho}{\beta} \frac{g}{\lVert g \rVert_2}

    with the gradient and its norm over the chosen tensors only, so that the first backward is
    shorter. Sharpness-sensitive data selection: the second pass is taken on the share ``gamma`` of
    the batch whose loss rises most, :math:`\ell_i(w + e) - \ell_i(w)`, at the price of one forward
    pass on the whole batch.

    Confirmed with the official code (dydjw9/Efficient_SAM, ``utils/Esam.py``): tensors are chosen
    whole, the norm is that of the chosen ones, the second loss is the mean over the selected
    samples. There the choice is made at the end of the step before, tensors are all chosen in the
    first step, and selection leaves out the sample at the threshold, so that one less is taken;
    here a fresh choice is made in every step, and exactly ``int(gamma * B)`` samples are
    selected. Settings of its ``run.sh`` are ``beta=0.5, gamma=0.5`` (and 0.6 for small ones).
    ``reg/esam`` is :math:`L(w + e) - L(w)` of the whole batch, in the unit of the loss.

    Args:
        rho: the radius; a number or a :class:`Schedule`. 0 turns ESAM off.
        beta: the probability of each parameter tensor to be perturbed, in (0, 1]; 1 is all.
        gamma: the share of samples in the second pass, in (0, 1]; 1 is all. With both at 1 ESAM
            is SAM, bit for bit.
        sample_loss: ``sample_loss(logits, targets)`` gives one loss a sample, to select by;
            default: the cross-entropy.
        adaptive: scale the neighbourhood by the weights (ASAM).
        eta: the floor of that scale.
        sharpness: whose gradient gives :math:`e`. ``"micro"``: each micro-batch's on its rank;
            ``"rank"``: that of a rank's whole accumulation window; ``"global"``: that of all
            ranks' windows. Samples are always selected within a micro-batch.
        signals: where ``logits`` and ``targets`` are, for the selection.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        MissingSignalError: in the first step, if samples are to be selected and logits or targets
            are not found.
        RegularizationError: if they do not give one loss a sample.
        UnsupportedError: if samples are to be selected and the batch is mixed (Mixup), if a second
            run of ``training_step`` gives another loss than the first, under manual optimization,
            and where weights are sharded over ranks.

    Note:
        Ranks: the same tensors on all of them, each rank selects from its own samples. With
        ``"global"`` and ``gamma=1`` N ranks train what one process does on the joined batch.
        Accumulation: each micro-batch selects by itself. Cost: a forward and the shorter backward
        for the first pass, a forward on the whole batch to select (none with ``gamma=1``), a
        forward and backward on the selected samples. BatchNorm normalizes the selected samples by
        themselves. It hurts with small batches, of which few samples are left, and with noisy
        labels, whose losses rise most.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ESAM
        >>> trainer = L.Trainer(callbacks=[ESAM(rho=0.05, beta=0.5, gamma=0.5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks",
            "Du et al.",
            2022,
            "2110.03141",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    sharded: ClassVar[bool | None] = False
    exemptions: ClassVar[Mapping[str, str]] = {
        "gradient": "the function gives positions of samples, which have no gradient",
        "accumulation": "each micro-batch selects samples of its own",
    }
    function = staticmethod(esam_samples)
    explanation: ClassVar[str] = "SAM of some weights, on the samples whose loss rises most"

    def __init__(
        self,
        rho: float | Schedule = 0.05,
        *,
        beta: float = 0.5,
        gamma: float = 0.5,
        sample_loss: SampleLoss | None = None,
        adaptive: bool = False,
        eta: float = 0.01,
        sharpness: Sharpness = "micro",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            rho, adaptive=adaptive, eta=eta, sharpness=sharpness, signals=signals, name=name
        )
        cure = "ESAM(0.05, beta=0.5, gamma=0.5)"
        check_range(self, "beta", beta, 0, 1, low_open=True, cure=cure)
        check_range(self, "gamma", gamma, 0, 1, low_open=True, cure=cure)
        self.beta = beta
        self.gamma = gamma
        self.sample_loss = sample_loss
        self._before: list[Tensor] = []

    def first_gradients(
        self, step: Step, total: Tensor, weights: list[nn.Parameter]
    ) -> list[Tensor | None]:
        """Gradients by the chosen tensors; losses of samples are noted along the way."""
        if self.gamma < 1:
            self._before.append(self._losses(step))
        chosen = [w for w, taken in zip(weights, self._choice(step, weights), strict=True) if taken]
        found = super().first_gradients(step, total, chosen) if chosen else []
        by_weight = dict(zip(chosen, found, strict=True))
        return [by_weight.get(w) for w in weights]

    def second_loss(self, step: Step) -> tuple[Tensor, Tensor]:
        """The loss of the selected samples, and that of all."""
        if self.gamma == 1:
            return super().second_loss(step)
        after: list[Tensor] = []
        value = step.rerun(look=lambda: after.append(self._losses(step))).detach()
        part = step.part(esam_samples(self._before.pop(0), after[0], self.gamma))
        loss = part.rerun()
        part.forget()
        return loss, value

    def perturbation(self, weights: Any, gradients: Any, strength: float) -> list[Tensor]:
        """One ascent step, longer as fewer tensors take it."""
        return super().perturbation(weights, gradients, strength / self.beta)

    def on_fit_close(self, trainer: Any, pl_module: Any) -> None:
        """Free what an exception left."""
        super().on_fit_close(trainer, pl_module)
        self._before = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_before": []}

    def _choice(self, step: Step, weights: list[nn.Parameter]) -> list[bool]:
        if self.beta == 1:
            return [True] * len(weights)
        # Drawn on the host, which has to know: the same on all ranks and in all micro-batches.
        draws = random.Random(step.rng(self, shared=True, per="step").initial_seed())
        return [draws.random() < self.beta for _ in weights]

    def _losses(self, step: Step) -> Tensor:
        """(B,) losses of the samples, without a gradient."""
        step.asked_by(self)
        if step.mixes:
            raise UnsupportedError(
                self, "selects samples, and those of this batch are mixed", cure="ESAM(gamma=1.0)"
            )
        logits, targets = step.logits.detach(), step.targets
        if self.sample_loss is not None:
            losses = self.sample_loss(logits, targets)
        elif isinstance(targets, Tensor) and belong(logits, targets):
            losses = _cross_entropy(logits, targets)
        else:
            raise RegularizationError(
                self,
                f"selects samples by their cross-entropy, and logits {tuple(logits.shape)} and the "
                "targets do not belong to one",
                cure="ESAM(sample_loss=lambda logits, y: (logits - y).square().mean(1))",
            )
        return losses.detach().flatten(1).mean(1) if losses.ndim > 1 else losses.detach()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, ...) of logits (B, C, ...) or (B, ..., C); labels that are no class cost nothing."""
    if targets.shape != logits.shape[:-1] and logits.ndim > 2:
        logits = logits.movedim(1, -1)
        targets = targets.movedim(1, -1) if targets.is_floating_point() else targets
    if targets.is_floating_point():
        return soft_cross_entropy(logits, targets)
    real = (targets >= 0) & (targets < logits.shape[-1])
    distribution = as_distribution(targets.where(real, torch.zeros_like(targets)), logits)
    return soft_cross_entropy(logits, distribution) * real


__all__ = ["ESAM", "esam_samples"]
