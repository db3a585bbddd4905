"""Adds Gaussian noise to the inputs of training steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.batch_transform import BatchTransform, Transformed

__all__ = ["InstanceNoise", "instance_noise"]


def instance_noise(inputs: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """``x + sigma eps``.

    Args:
        inputs: ``x``, of any shape.
        noise: ``eps`` of mean 0 and variance 1, of the same shape.
        sigma: the standard deviation.

    Returns:
        Of the shape of ``inputs``.
    """
    return inputs + sigma * noise


class InstanceNoise(BatchTransform):
    """Trains on ``x + sigma eps``: on data that lie on a surface, so that likelihoods exist.

    Chae, Kim, Kim, Lin (2021), A likelihood approach to nonparametric estimation of a singular
    distribution using deep generative models, arXiv:2105.04046.

    Data near a surface of lower dimension have no density: a likelihood grows without bound as the
    model's variance goes to 0 there. Perturbed by a known noise they have one, and the model
    without its noise is the estimate. The paper's theory says how ``sigma`` falls with the number
    of samples; its scale is yours to choose: give a Schedule to anneal it. For classifiers it is
    the usual Gaussian input noise, a penalty of ``sigma^2 / 2`` times the trace of the loss's
    Hessian by the input. The idea is in the abstract; not checked against code. Defaults are ours.

    Args:
        sigma: the standard deviation in the unit of the inputs, at least 0, or a Schedule; 0
            turns the technique off.
        signals: where ``inputs`` are.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if ``sigma`` is below 0.
        RegularizationError: in the first step, if inputs are no tensor of floats.

    Note:
        In training steps only, on inputs as the step gets them: after normalization. The logged
        value is ``sigma``. Over ranks: local, every rank draws for its own samples. Cost: one draw
        and one sum over the inputs.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import InstanceNoise
        >>> trainer = L.Trainer(callbacks=[InstanceNoise(0.1)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "A likelihood approach to nonparametric estimation of a singular distribution using "
            "deep generative models",
            "Chae et al.",
            2021,
            "2105.04046",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    reads: ClassVar[frozenset[str]] = frozenset({"inputs"})
    writes: ClassVar[frozenset[str]] = frozenset({"inputs"})
    exclusive: ClassVar[frozenset[str]] = frozenset()
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch draws its own noise",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(instance_noise)
    explanation: ClassVar[str] = "adds Gaussian noise to the inputs"

    def __init__(
        self,
        sigma: float | Schedule = 0.1,
        *,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, signals=signals, name=name)
        # The strength is how much noise, not with which probability.
        self.strength = sigma
        if not isinstance(sigma, Schedule):
            check_range(self, "sigma", sigma, 0, cure="InstanceNoise(sigma=0.1)")

    def draw(self, inputs: Tensor, generator: torch.Generator, step: Step) -> Transformed:
        """Every batch is noised."""
        self._check_inputs(inputs)
        return self.transform(inputs, torch.ones(len(inputs)).bool(), generator, step)

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """The noised inputs."""
        noise = torch.randn(inputs.shape, generator=generator).to(inputs)
        sigma = step.strength(self)
        return Transformed(instance_noise(inputs, noise, sigma), sigma)
