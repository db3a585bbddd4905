"""Trains freely at first, then holds the norm of every layer where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    ParameterSelection,
    ParameterUpdate,
    Schedule,
)
from lightning_reg.engine.sharding import whole
from lightning_reg.engine.step import RunContext, full_precision
from lightning_reg.mechanisms.gradient_transform import GradientTransform, radial_parts
from lightning_reg.mechanisms.projection import Projection

__all__ = ["LogitAttenuatingWeightNorm", "logit_attenuating_weight_norm"]


def logit_attenuating_weight_norm(
    weight: Tensor, gradient: Tensor, radius: Tensor | float
) -> tuple[Tensor, Tensor]:
    """A weight brought to the sphere of a radius, and its gradient to that sphere's tangent.

    ``w <- c w / ||w||`` and ``g <- g - (<g, w> / ||w||^2) w``, with the Frobenius norm. A weight
    of zeros has no direction and stays, and so does its gradient.

    Args:
        weight: ``w``, any shape.
        gradient: ``g``, of the same shape.
        radius: ``c``, a scalar.

    Returns:
        The new weight and the new gradient.
    """
    norm = torch.linalg.vector_norm(weight)
    radius = torch.as_tensor(radius).to(weight)
    (projected,) = _on_sphere([weight], norm.reshape(1), radius.reshape(1))
    (tangent,) = _tangent([weight], [gradient])
    return projected, tangent


class LogitAttenuatingWeightNorm(Projection, GradientTransform):
    """Trains freely at first, then holds the norm of every layer where it is (LAWN).

    Gupta, Ramanath, Shi, Ramachandran, Zhou, Zhou, Keerthi (2021), Logit Attenuating Weight
    Normalization, arXiv:2108.05839.

    For the first ``E_free`` epochs training is left alone. Then ``c_l = ||w_l||`` is recorded for
    every layer, and from there on each optimizer step uses ``g <- g - (<g, w> / ||w||^2) w`` and
    is followed by ``w_l <- c_l w_l / ||w_l||``. Weights can no longer grow, so neither can logits
    nor the confidence that stops a network from moving: in a network without biases logits stay
    within ``prod_l c_l ||x||``.

    The method is from memory of the paper and its abstract; no official code was found, so
    nothing here is checked against any. The paper's optimizers also start their learning rate
    anew at the switch (warm-up, then decay), which is your scheduler's task. A momentum that
    points along the weight changes the length of a step, not the constraint.

    Args:
        strength: the share of both changes, in [0, 1]; the method is 1. Less lets norms move.
        free_epochs: ``E_free``, epochs of free training; the default is ours. 0 holds the norms
            of the weights that training starts with.
        parameters: the layers of the final homogeneous part of the network: a regular expression
            on parameter names, or a ParameterSelection; ``None`` takes the weights of all linear
            and convolutional layers.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], ``free_epochs`` is not a whole number
            from 0, or no parameter is chosen.

    Note:
        Over ranks: replica; weights and reduced gradients are the same everywhere, and nothing is
        communicated. Under accumulation it acts once per optimizer step. The radii are saved in
        checkpoints and not taken again on a resume. Cost per optimizer step: a norm, a dot
        product and two passes over the weights. The log shows the mean of ``||w_l|| / c_l``
        after the optimizer's step and before the projection.

        Set ``weight_decay`` to 0: it only shortens the step. A layer of zeros stays free. It
        hurts where the free phase is too short and logits are held before the classes are
        separated, and it does nothing to layers in front of a BatchNorm but fix their effective
        learning rate.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LogitAttenuatingWeightNorm
        >>> lawn = LogitAttenuatingWeightNorm(free_epochs=5, parameters="head")
        >>> trainer = L.Trainer(callbacks=[lawn], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Logit Attenuating Weight Normalization", "Gupta et al.", 2021, "2108.05839"),
    )
    reads: ClassVar[frozenset[str]] = frozenset({"gradients", "weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients", "weights"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(logit_attenuating_weight_norm)
    explanation: ClassVar[str] = "holds the norm of each layer after a free phase"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        free_epochs: int = 1,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        if not isinstance(free_epochs, int) or isinstance(free_epochs, bool) or free_epochs < 0:
            raise ArgumentError(
                self,
                f"`free_epochs` must be a whole number from 0, got {free_epochs!r}",
                cure="LogitAttenuatingWeightNorm(free_epochs=1)",
            )
        self.free_epochs = free_epochs
        self._radii: dict[str, Tensor] = {}

    def active(self, context: RunContext) -> bool:
        """Only after the free phase."""
        return context.epoch >= self.free_epochs and super().active(context)  # type: ignore[arg-type]

    def on_model_ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new fit has a free phase of its own; a resume brings its radii afterwards."""
        self._radii = {}

    def edit_gradients(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 7; the first one after the free phase records the radii."""
        weights = update.trainable(self.selected(update))
        new = {name: w for name, w in weights.items() if name not in self._radii}
        if new:
            norms = torch._foreach_norm([full_precision(whole(w.detach())) for w in new.values()])
            self._radii.update(zip(new, norms, strict=True))
        return super().edit_gradients(update)

    def transform(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gradients without their part along the weight."""
        return _tangent(weights, gradients), None

    def project_weights(
        self, update: ParameterUpdate, weights: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Weights on their spheres, and how far they had left them."""
        held = list(weights.values())
        norms = torch.stack(torch._foreach_norm(held))
        # A weight whose optimizer has not stepped since the switch has no radius yet.
        radii = [
            self._radii[name].to(norm) if name in self._radii else norm
            for name, norm in zip(weights, norms, strict=True)
        ]
        radius = torch.stack(radii)
        drift = torch.where(radius > 0, norms / radius, 1.0).mean()
        return _on_sphere(held, norms, radius), drift

    def state_dict(self) -> dict[str, Any]:
        """The radius of each layer."""
        return {"radii": dict(self._radii)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the radii of a checkpoint."""
        self._radii = dict(state_dict["radii"])


def _on_sphere(weights: Sequence[Tensor], norms: Tensor, radii: Tensor) -> list[Tensor]:
    factors = torch.where((norms > 0) & (radii > 0), radii / norms, 1.0)
    return list(torch._foreach_mul(list(weights), list(factors.unbind())))


def _tangent(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    return list(torch._foreach_sub(list(gradients), radial_parts(weights, gradients)))
