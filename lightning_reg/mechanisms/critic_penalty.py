"""Penalties on the gradient of a critic that the user hands over under manual optimization.

A technique supplies :meth:`CriticPenalty.values`: one number per sample, from the critic and the
samples. The mechanism takes care of

- calling the critic without a trace: logs, metrics, BatchNorm statistics and the user's random
  numbers are as if the call had not been made;
- full precision, and kernels that have a second derivative;
- acting in every k-th batch only, with k times the gradient (lazy regularization);
- the mean over all ranks, each sample counting once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import RegularizationError, Regularizer, Schedule, Step
from lightning_reg.engine.errors import ArgumentError, UnsupportedError
from lightning_reg.engine.random import rng_state, stream, stream_seed
from lightning_reg.engine.rerun import replayed_rng, without_trace
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.engine.update import ParameterUpdate
from lightning_reg.mechanisms.gradient_penalty import (
    check_not_compiled,
    input_gradient,
    twice_differentiable,
)

Critic = Callable[[Tensor], Tensor]


class CriticPenalty(Regularizer):
    """Base of penalties on the gradient of a critic under manual optimization.

    The critic and its points come from ``self.regularize(loss, critic=..., real=...)``, whose
    other calls in the same step (the generator's) the technique does not touch.

    Args:
        strength: the multiplier.
        interval: act in every ``interval``-th training batch only, with ``interval`` times the
            gradient, which leaves its mean over batches as it is. The log shows the plain value.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("critic", "real")

    def __init__(
        self, strength: float | Schedule, *, interval: int = 1, name: str | None = None
    ) -> None:
        super().__init__(strength, name=name)
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ArgumentError(
                self,
                f"`interval` must be a whole number from 1, got {interval!r}",
                cure=f"{type(self).__name__}(interval=16)",
            )
        self.interval = interval
        self._checked = False

    @abstractmethod
    def values(
        self, critic: Critic, real: Tensor, fake: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """The penalty (B,) of each sample, with a graph to the critic's weights.

        Args:
            critic: what the user handed over; takes points (B, ...), gives scores (B, ...).
            real: (B, ...) real samples.
            fake: (B, ...) generated samples, detached, where ``needs`` names them.
            generator: for random points; one stream a rank and call.
        """

    def active(self, context: Step | ParameterUpdate) -> bool:
        """In every ``interval``-th batch; counted in batches of the run, which resume keeps."""
        batch = int(context.trainer.fit_loop.total_batch_idx)
        return batch % self.interval == 0 and super().active(context)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse automatic optimization, where no call says what the critic is."""
        self._checked = False
        if pl_module.automatic_optimization:
            raise UnsupportedError(
                self,
                "acts on a critic that your step hands over under manual optimization",
                cure="self.automatic_optimization = False, and self.manual_backward("
                "self.regularize(loss, critic=self.critic, "
                f"{', '.join(f'{n}={n}' for n in self.needs[1:])}))",
            )

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        critic = step.given_signal("critic")
        real = self._samples(step, "real")
        fake = self._samples(step, "fake") if "fake" in self.needs else None
        # A step may call the critic's loss several times a batch, and a window may hold several
        # batches: only both counts together are a new stream for every call.
        seed = step.rng(self).initial_seed()
        devices = [step.device] if step.device.type == "cuda" else []
        with (
            without_trace(step.module),
            twice_differentiable(_has_recurrent(critic)),
            replayed_rng(rng_state(devices), devices),
        ):
            # Dropout inside the critic: its own draws, and none taken from the user's.
            torch.manual_seed(stream_seed(seed, "critic", step.global_step))
            points = stream(step.device, seed, "points", step.global_step)
            values = self.values(self._watched(critic), real, fake, points)
        # The backward of a gradient starts with weights that the gradient itself has put away.
        assert self.pipeline is not None
        self.pipeline.hold_weights()
        value = step.comm.mean(values)
        return value + (self.interval - 1) * (value - value.detach())

    def _samples(self, step: Step, signal: str) -> Tensor:
        value = step.given_signal(signal)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise RegularizationError(
                self,
                f"needs `{signal}` as one tensor of floats, got {kind}",
                cure=f"self.regularize(loss, critic=self.critic, {signal}={signal})",
            )
        # Under mixed precision the weights are float32, and so is this call outside autocast.
        half_weights = step.module.dtype in (torch.float16, torch.bfloat16)
        return value.detach() if half_weights else full_precision(value.detach())

    def _watched(self, critic: Critic) -> Critic:
        """The critic, checked on its first call."""
        if self._checked:
            return critic

        def checked(points: Tensor) -> Tensor:
            scores = critic(points)
            if not isinstance(scores, Tensor) or len(scores) != len(points):
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise RegularizationError(
                    self,
                    f"needs a critic that gives one score per sample as a tensor, got {got} for "
                    f"points {tuple(points.shape)}",
                    cure="self.regularize(loss, critic=lambda x: self.critic(x)[0], ...)",
                )
            check_not_compiled(self, scores)
            self._checked = True
            return scores

        return checked


def critic_gradient(critic: Critic, points: Tensor) -> Tensor:
    """The gradient (B, D) of each sample's score by its point, with a graph to the weights.

    Args:
        critic: takes (B, ...) and gives scores (B, ...); a map of scores (a patch critic) is
            summed.
        points: (B, ...); nothing flows back to them.
    """
    leaf = points.detach().requires_grad_()
    return input_gradient(critic(leaf), leaf).flatten(1)


def length_penalty(gradient: Tensor, center: float = 1.0, one_sided: bool = False) -> Tensor:
    """``(||g|| - c)^2``, or ``max(||g|| - c, 0)^2``, of each row of ``g`` (B, D).

    A gradient of exactly 0 passes none on.
    """
    lengths: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    excess = lengths - center
    return (excess.clamp_min(0) if one_sided else excess).square()


def _has_recurrent(critic: object) -> bool:
    return isinstance(critic, nn.Module) and any(
        isinstance(module, nn.RNNBase) for module in critic.modules()
    )


__all__ = ["Critic", "CriticPenalty", "critic_gradient", "length_penalty"]
