"""Minimizes sharpness on the data, and how it differs on domains made up from perturbed inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine.errors import (
    ArgumentError,
    RegularizationError,
    UnsupportedError,
    check_range,
)
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.step import Step
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.gradient_penalty import twice_differentiable
from lightning_reg.mechanisms.normalized_ascent import NormalizedAscent, joint_norm
from lightning_reg.mechanisms.tensor_lists import filled, sum_into
from lightning_reg.mechanisms.weight_perturbation import Sharpness

Normalize = Literal["sample", "batch"]
_EPSILON = 1e-12


def domain_inconsistency(
    features: Tensor,
    logits: Tensor,
    perturbed_features: Tensor,
    perturbed_logits: Tensor,
    targets: Tensor,
) -> Tensor:
    r"""How differently a linear head's gradients vary on the data and on perturbed data.

    The gradient of one sample's cross-entropy by the head's weight is
    :math:`(p_i - y_i) h_i^\top`, by its bias :math:`p_i - y_i`. With their variances
    :math:`V, \tilde V` over the samples of both domains, coordinate by coordinate, and the
    perturbed gradients :math:`\tilde g_i`,

    .. math:: \frac{1}{2} \sum_{d} \mathrm{mean}\bigl(V_d - \bar V\bigr)^2
        + \sum_{\theta \in \{W, b\}} \frac{1}{|\theta|} \mathrm{mean}_i
        \lVert \tilde g_i^\theta \rVert^2, \qquad \bar V = \tfrac{1}{2} (V + \tilde V).

    Both variances are taken around the mean gradient of the data.

    Args:
        features: (B, D) :math:`h`, the head's inputs; gradients flow through all but targets.
        logits: (B, C) the head's outputs.
        perturbed_features: (B, D) those of the perturbed inputs.
        perturbed_logits: (B, C).
        targets: (B,) class indices.

    Returns:
        A scalar, at least 0.
    """
    sums = _moments(features, logits, perturbed_features, perturbed_logits, targets)
    return _from_moments(sums, logits.shape[1], features.shape[1])


def _moments(h: Tensor, z: Tensor, h_new: Tensor, z_new: Tensor, targets: Tensor) -> Tensor:
    """Sums over samples of all that is needed, as one vector: they add up over ranks."""
    parts = []
    for features, logits in ((h, z), (h_new, z_new)):
        gap = logits.softmax(1) - nn.functional.one_hot(targets, logits.shape[1]).to(logits)
        # A bias is a weight of a feature that is always 1.
        wide = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        parts += [gap.T @ wide, gap.square().T @ wide.square()]
    count = torch.full((1,), float(len(h)), dtype=z.dtype, device=z.device)
    return torch.cat([*(part.reshape(-1) for part in parts), count])


def _from_moments(sums: Tensor, classes: int, width: int) -> Tensor:
    first, square, first_new, square_new = (sums[:-1] / sums[-1]).view(4, classes, width + 1)
    variance = square - first.square()
    variance_new = square_new - 2 * first * first_new + first.square()
    # Each of the two lies half their difference from their mean.
    spread = (variance - variance_new).square().mean() / 4
    weight, bias = square_new[:, :-1].mean(), square_new[:, -1].mean()
    total: Tensor = spread + weight + bias
    return total


class UDIM(NormalizedAscent):
    r"""Unknown domain inconsistency minimization, UDIM (Shin, Bae, Na, Kim, Moon 2024).

    SAM on the data at hand, plus the inconsistency of the loss landscape between the data and
    a domain that is made up by perturbing it. The optimizer gets

    .. math:: \nabla L(w + e; x) + \lambda \nabla L_{inc}(w; x, \tilde x), \qquad
        e = \rho \frac{g}{\lVert g \rVert}, \quad
        \tilde x = x + \rho_x \frac{\nabla_x v}{\lVert \nabla_x v \rVert}, \quad
        v = L(w; x) + \rho \lVert \nabla_w L(w; x) \rVert

    with :math:`L_{inc}` of :func:`domain_inconsistency`, from the gradients of a linear head.

    Confirmed with the official code (aailabkaist/UDIM, ``domainbed/iada/iada_final.py``), from
    which the formula of :math:`L_{inc}` is, with both variances around the mean gradient of the
    data. There ``rho`` is 0.05, :math:`\lambda` (``worst_weight``) 1, and SAM alone runs for the
    first third of the steps (``start``). It normalizes the input gradient over the samples of
    the batch, pixel by pixel, with :math:`\rho_x` (``syn_lr``) 10: ``normalize="batch"``. We
    normalize each sample's, as the paper has it from memory, so that a sample's perturbation does
    not depend on its neighbours; :math:`\rho_x` 1 is ours. There gradients of several GPUs are
    overwritten with those of one after they were averaged; here they are averaged. The head's
    inputs of both domains pass BatchNorm one after the other, there together.
    ``reg/udim`` is SAM's rise :math:`L(w + e) - L(w)`, ``reg/udim_inconsistency``
    :math:`L_{inc}`.

    Args:
        rho: the radius in weights; a number or a :class:`Schedule`. 0 turns UDIM off.
        weight: :math:`\lambda`, at least 0; 0 is SAM.
        rho_x: the size of the step in inputs, in their unit.
        layer: the layer whose output (B, D) a linear head turns into logits.
        start: the share of the run, in [0, 1], that is SAM alone.
        normalize: ``"sample"``: each input's gradient has length 1; ``"batch"``: each coordinate
            has, over the samples of the batch.
        adaptive: scale the neighbourhood by the weights (ASAM).
        eta: the floor of that scale.
        sharpness: whose gradient gives :math:`e`. ``"micro"``: each micro-batch's on its rank;
            ``"rank"``: that of a rank's whole accumulation window; ``"global"``: that of all
            ranks' windows.
        signals: where ``inputs``, ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        MissingSignalError: in the first step, if a tensor is not found.
        RegularizationError: if features and logits are not (B, D) and (B, C) with class indices.
        UnsupportedError: if the batch is mixed (Mixup), if a second run of ``training_step`` gives
            another loss than the first, under manual optimization, and where weights are sharded.

    Note:
        Ranks: the moments of the head's gradients are those of all ranks' micro-batches, reduced
        before variances are taken; inputs are perturbed by the gradient of their own micro-batch.
        Accumulation: :math:`L_{inc}` is that of each micro-batch. Cost: beside SAM's, a second
        differentiation of the first pass by weights and inputs, a forward pass on the perturbed
        inputs, a backward through both, and one reduction of 4 C (D + 1) numbers. It hurts with
        small batches, whose variances say little, and with a ``rho_x`` that makes inputs no input.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import UDIM
        >>> trainer = L.Trainer(callbacks=[UDIM(0.05, layer="encoder")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Unknown Domain Inconsistency Minimization for Domain Generalization",
            "Shin et al.",
            2024,
            None,
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "targets", "features")
    sharded: ClassVar[bool | None] = False
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "the inconsistency is that of each micro-batch's gradients"
    }
    function = staticmethod(domain_inconsistency)
    explanation: ClassVar[str] = "SAM, and alike gradients on perturbed inputs"

    def __init__(
        self,
        rho: float | Schedule = 0.05,
        *,
        layer: str,
        weight: float = 1.0,
        rho_x: float = 1.0,
        start: float = 1 / 3,
        normalize: Normalize = "sample",
        adaptive: bool = False,
        eta: float = 0.01,
        sharpness: Sharpness = "micro",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            rho, adaptive=adaptive, eta=eta, sharpness=sharpness, signals=signals, name=name
        )
        cure = 'UDIM(0.05, layer="encoder", weight=1.0, rho_x=1.0)'
        check_range(self, "weight", weight, 0, math.inf, high_open=True, cure=cure)
        check_range(self, "rho_x", rho_x, 0, math.inf, high_open=True, cure=cure)
        check_range(self, "start", start, 0, 1, cure=cure)
        if not isinstance(layer, str) or not layer:
            raise ArgumentError(
                self, f"`layer` must be the name of a submodule, got {layer!r}", cure=cure
            )
        if normalize not in ("sample", "batch"):
            raise ArgumentError(
                self, f"`normalize` must be one of sample, batch, got {normalize!r}", cure=cure
            )
        self.layer = layer
        self.layers = (layer,)
        self.weight = weight
        self.rho_x = rho_x
        self.start = start
        self.normalize: Normalize = normalize
        self._points: Tensor | None = None
        self._extra: list[Tensor | None] = []
        self._step: Step | None = None

    @property
    def combines(self) -> bool:
        """Without a weight it is SAM."""
        return self.weight != 0

    def transform_batch(self, step: Step) -> None:
        """Make the inputs a part of the graph."""
        self._points = None
        if self._looks(step):
            self._points = step.inputs.detach().clone().requires_grad_()
            # User code may write into its inputs, which it may not with a leaf.
            step.inputs = self._points.clone()

    def forward_context(self, step: Step) -> AbstractContextManager[None]:
        """The gradient by the weights is differentiated again, by the inputs."""
        return twice_differentiable() if self._looks(step) else nullcontext()

    def first_gradients(
        self, step: Step, total: Tensor, weights: list[nn.Parameter]
    ) -> list[Tensor | None]:
        """The gradient at the weights; that of the inconsistency along with it."""
        points, self._points = self._points, None
        self._step = step
        if points is None:
            return super().first_gradients(step, total, weights)
        scale = self.amp_scale(step)
        scaled = total if scale is None else total * scale
        with twice_differentiable():
            gradients = torch.autograd.grad(scaled, weights, create_graph=True, allow_unused=True)
        # The direction in the inputs does not depend on the scale.
        perturbed = self._perturbed(step, scaled, gradients, points)
        loss = self._inconsistency(step, perturbed)
        step.log(self, loss.detach(), "inconsistency")
        with twice_differentiable():
            extra = super().first_gradients(step, loss, weights)
        self._extra = sum_into(self._extra, extra)
        factor = 1.0 if scale is None else scale.reciprocal()
        return [None if g is None else g.detach() * factor for g in gradients]

    def combine(
        self, weights: list[nn.Parameter], clean: list[Tensor], perturbed: list[Tensor]
    ) -> list[Tensor]:
        """SAM's gradient, and that of the inconsistency."""
        extra, self._extra = self._extra, []
        if not extra or self._step is None:
            return perturbed
        mean = self._average(self._step, filled(weights, extra))
        return list(torch._foreach_add(perturbed, mean, alpha=self.weight))

    def on_fit_close(self, trainer: Any, pl_module: Any) -> None:
        """Free what belongs to steps."""
        super().on_fit_close(trainer, pl_module)
        self._points, self._extra, self._step = None, [], None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_points": None, "_extra": [], "_step": None}

    def _looks(self, step: Step) -> bool:
        return self.weight != 0 and step.progress >= self.start

    def _perturbed(self, step: Step, total: Tensor, gradients: Any, points: Tensor) -> Tensor:
        """The inputs of the made-up domain."""
        reached = [g for g in gradients if g is not None]
        with twice_differentiable():
            value = total + step.strength(self) * joint_norm(reached)
            (slope,) = torch.autograd.grad(value, points, retain_graph=True)
        if self.normalize == "batch":
            sizes = torch.linalg.vector_norm(slope, dim=0, keepdim=True)
        else:
            shape = [-1, *[1] * (slope.ndim - 1)]
            sizes = torch.linalg.vector_norm(slope.flatten(1), dim=1).view(shape)
        new: Tensor = (points + self.rho_x * slope / sizes.clamp_min(_EPSILON)).detach()
        return new

    def _inconsistency(self, step: Step, perturbed: Tensor) -> Tensor:
        here = self._seen(step)
        other = step.part(torch.arange(len(perturbed), device=perturbed.device)).asked_by(self)
        other.inputs = perturbed
        found: list[tuple[Tensor, Tensor]] = []
        other.rerun(look=lambda: found.append(self._seen(other)))
        other.forget()
        with torch.autocast(perturbed.device.type, enabled=False):
            sums = _moments(*here, *found[0], step.targets)
            return _from_moments(step.comm.reduce(sums), here[1].shape[1], here[0].shape[1])

    def _seen(self, step: Step) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, C) of a step."""
        step.asked_by(self)
        if step.mixes:
            raise UnsupportedError(
                self,
                "compares the gradients of samples, and those of this batch are mixed",
                cure='UDIM(0.05, layer="encoder", weight=0.0)',
            )
        logits, targets, features = step.logits, step.targets, step.features[self.layer]
        hard = isinstance(targets, Tensor) and targets.shape == logits.shape[:1]
        if features.ndim != 2 or logits.ndim != 2 or not hard or targets.is_floating_point():
            raise RegularizationError(
                self,
                f"needs features (B, D) of {self.layer!r}, logits (B, C) and class indices (B,), "
                f"got {tuple(features.shape)} and {tuple(logits.shape)}",
                cure='UDIM(0.05, layer="<the layer in front of the linear head>")',
            )
        return features, logits


__all__ = ["UDIM", "domain_inconsistency"]
