"""Sets random features of the inputs to zero, as imputing missing values by zero does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.random import base_seed, stream
from lightning_reg.mechanisms.batch_transform import BatchTransform, Transformed

__all__ = ["ZeroImputeMask", "zero_impute_mask"]


def zero_impute_mask(inputs: Tensor, observed: Tensor) -> Tensor:
    """``m x``: what is not observed is 0, and nothing is scaled.

    Args:
        inputs: ``x`` of any shape, centred.
        observed: ``m``, bool, of the same shape.

    Returns:
        Of the shape of ``inputs``.
    """
    return inputs * observed.to(inputs.dtype)


class ZeroImputeMask(BatchTransform):
    """Hides random input features behind zeros: a ridge penalty that adapts to their scale.

    Ayme, Boyer, Dieuleveut, Scornet (2023), Naive imputation implicitly regularizes
    high-dimensional linear models, arXiv:2301.13585.

    With each feature observed with probability ``rho`` a linear model has the risk
    ``E(y - rho theta x)^2 + rho (1 - rho) sum_j theta_j^2 E x_j^2``: in ``rho theta`` a ridge
    penalty of strength ``(1 - rho) / rho`` on features of unit scale. Unlike dropout nothing is
    divided by ``rho``: zeros are what the model meets where values are really missing. With
    ``fixed`` each sample misses the same features in every epoch, as real data do. The identity is
    in the paper; the technique as a regularizer is ours.

    Args:
        missing: ``1 - rho``, the probability that a feature is hidden, in [0, 1), or a Schedule;
            0 turns the technique off.
        fixed: hide the same features of a sample in every epoch; needs an ``IndexedDataset``.
        signals: where ``inputs`` (and ``sample_index``) are.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if ``missing`` is outside [0, 1).
        MissingSignalError: in the first step with ``fixed``, if the dataset has no index.
        RegularizationError: in the first step, if inputs are no tensor of floats.

    Note:
        In training steps only. Inputs have to be centred, or zero is no neutral value. The logged
        value is the share that was hidden. Over ranks: local, every rank draws for its own
        samples; with ``fixed`` the masks belong to the samples, whichever rank has them. Cost: one
        draw and one product over the inputs (with ``fixed`` one generator a sample).

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ZeroImputeMask
        >>> trainer = L.Trainer(callbacks=[ZeroImputeMask(0.2)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Naive imputation implicitly regularizes high-dimensional linear models",
            "Ayme et al.",
            2023,
            "2301.13585",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    reads: ClassVar[frozenset[str]] = frozenset({"inputs"})
    writes: ClassVar[frozenset[str]] = frozenset({"inputs"})
    exclusive: ClassVar[frozenset[str]] = frozenset()
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch draws its own masks",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(zero_impute_mask)
    explanation: ClassVar[str] = "hides random input features behind zeros"

    def __init__(
        self,
        missing: float | Schedule = 0.2,
        *,
        fixed: bool = False,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, signals=signals, name=name)
        # The strength is how much is hidden, not with which probability a batch is changed.
        self.strength = missing
        if not isinstance(missing, Schedule):
            check_range(self, "missing", missing, 0, 1, high_open=True, cure="ZeroImputeMask(0.2)")
        self.fixed = fixed
        if fixed:
            self.needs = ("inputs", "sample_index")  # type: ignore[misc]

    def draw(self, inputs: Tensor, generator: torch.Generator, step: Step) -> Transformed:
        """Every batch is masked."""
        self._check_inputs(inputs)
        return self.transform(inputs, torch.ones(len(inputs)).bool(), generator, step)

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """The masked inputs."""
        observed = self._uniform(inputs, generator, step) >= step.strength(self)
        hidden = 1 - observed.float().mean()
        return Transformed(zero_impute_mask(inputs, observed.to(inputs.device)), hidden)

    def _uniform(self, inputs: Tensor, generator: torch.Generator, step: Step) -> Tensor:
        if not self.fixed:
            return torch.rand(inputs.shape, generator=generator)
        index = step.sample_index
        index = index if index is not None else step.given_signal("sample_index")
        rows = [stream("cpu", base_seed(), self.name, i) for i in index.tolist()]
        return torch.stack([torch.rand(inputs.shape[1:], generator=row) for row in rows])
