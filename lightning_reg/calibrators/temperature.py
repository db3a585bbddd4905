"""Divides logits by the one temperature under which held-out labels are most likely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_reg.calibrators.calibrator import Calibrator, one_hot
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.inputs import Task

__all__ = ["TemperatureScaling", "fit_temperature"]

# In units of 1 / (the largest distance of a logit from its row's maximum).
_UNIFORM = 1e-4
# Where exp(-x) is exactly 0 in float64, and where it no longer changes 1.
_VANISHED, _NEGLIGIBLE = 800.0, 40.0
_STEPS = 400
_BITS = 40
_BLOCK = 2**20


def fit_temperature(
    logits: Tensor,
    targets: Tensor,
    *,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    class_dim: int = 1,
    comm: Communicator | None = None,
) -> float:
    """The temperature ``T`` that minimizes the mean of ``-log softmax(z / T)_y``.

    See :class:`TemperatureScaling` for what is found where no minimum exists.

    Args:
        logits: (N, C, ...), or (N, ...) for a binary task.
        targets: class indices (N, ...), or soft labels of the shape of ``logits``.
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: positions with this label are left out.
        class_dim: the dimension of the classes.
        comm: the ranks, each with its own share of the data.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[8.0, 0.0]] * 4)  # sure of class 0, which is right 3 times of 4
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 6)  # 8 / log 3
        7.281914
    """
    scaling = TemperatureScaling(task=task, ignore_index=ignore_index, class_dim=class_dim)
    scaling.fit(logits, targets, comm=comm)
    return scaling.temperature


class TemperatureScaling(Calibrator):
    """Divides logits by the one temperature under which held-out labels are most likely.

    Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, arXiv:1706.04599.

    ``softmax(z / T)`` with ``T`` at the minimum of the held-out negative log-likelihood. That is
    convex in ``1 / T``, with slope ``sum_i E_p[z] - z_y`` and curvature ``sum_i Var_p[z]``, so the
    root of the slope is found by Newton's method on ``log(1 / T)``, and by bisection where a step
    leaves the bracket or gains too little. Gradient recipes (LBFGS or Adam on ``T``) stop early or
    diverge for logits in the hundreds, where the curvature at ``T = 1`` vanishes; this does not,
    and is exact to a relative error far below 1e-6 for any scale of logits.

    The predicted class never changes. Soft labels are taken (the cross-entropy), and classes that
    are masked with ``-inf``.

    Where there is no minimum (``outcome`` says which it was, and a warning is given):

    - ``"separable"``: every label is its row's largest logit. The likelihood grows as
      ``T`` falls to 0; ``T`` is set to where it stops to change in float64.
    - ``"inverted"``: labels are not more probable than under the uniform distribution at any
      ``T > 0``. The minimum over ``1 / T >= 0`` is at the uniform prediction; ``T`` is set so large
      that probabilities are uniform to 1e-4, and still in the same order.
    - ``"flat"``: no row says anything (all logits are equal); ``T`` is 1.

    In every case the held-out likelihood is at least that of ``T = 1``.

    Args:
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: positions with this label are left out of the fit.
        class_dim: the dimension of the classes: -1 for token logits (B, T, C).

    Note:
        Over ranks: each keeps its own rows, and a step of Newton's method reduces four integers
        (about ten steps in all). Sums are exact, so that neither the order of samples nor their
        spread over ranks matters: ``T``, rounded to 40 bits, is the same bit for bit on any number
        of ranks. Cost: a softmax over the held-out logits in float64 per step; memory: twice the
        logits of one rank in float64.

        It hurts nowhere that it is fitted on the data it is used on; on shifted data the
        temperature is the old one.

    Example:
        >>> import torch
        >>> from lightning_reg import TemperatureScaling
        >>> logits, labels = torch.tensor([[8.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
        >>> TemperatureScaling().fit(logits, labels).probabilities(logits[0:1])
        tensor([[0.7500, 0.2500]])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("On Calibration of Modern Neural Networks", "Guo et al.", 2017, "1706.04599"),
    )
    inverse_temperature: Tensor

    def __init__(
        self, *, task: Task = "multiclass", ignore_index: int | None = None, class_dim: int = 1
    ) -> None:
        super().__init__(task=task, ignore_index=ignore_index, class_dim=class_dim)
        self.register_buffer("inverse_temperature", torch.ones((), dtype=torch.float64))
        self.outcome = "optimum"

    @property
    def temperature(self) -> float:
        """``T``."""
        return 1 / float(self.inverse_temperature)

    def fit_rows(self, scores: Tensor, targets: Tensor, comm: Communicator) -> None:
        """Newton's method on the logarithm of the inverse temperature."""
        inverse, self.outcome = solve_temperature(self, scores, targets, comm)
        self.inverse_temperature = self.inverse_temperature.new_tensor(inverse)
        if self.outcome != "optimum":
            rank_zero_warn(
                f"{type(self).__name__}: the held-out data have no best temperature "
                f'(outcome "{self.outcome}"); {1 / inverse:.4g} is used.'
            )

    def map_rows(self, scores: Tensor) -> Tensor:
        """``z / T``."""
        return scores * self.inverse_temperature.to(scores)

    def get_extra_state(self) -> dict[str, Any]:
        """Primitives of the state."""
        return {**super().get_extra_state(), "outcome": self.outcome}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load them."""
        super().set_extra_state(state)
        self.outcome = str(state["outcome"])


def solve_temperature(
    owner: object, scores: Tensor, targets: Tensor, comm: Communicator
) -> tuple[float, str]:
    """``1 / T`` and what kind of data it was found on.

    Args:
        owner: who is named in errors.
        scores: (N, C) or (N,) logits of this rank in float64.
        targets: (N,) class indices or floats of the shape of ``scores``.
        comm: all ranks.
    """
    data = _HeldOut(owner, scores, targets, comm)
    if data.spread == 0:
        return 1.0, "flat"
    if data.slope_at_infinity() == 0:
        return _NEGLIGIBLE / data.smallest_gap / data.spread, "separable"
    slope = data.slope_and_curvature(0.0)[0]
    if slope >= 0:
        return min(_UNIFORM, data.spread) / data.spread, "inverted"
    # The curvature is at most a quarter per sample, since distances lie in [-1, 0].
    low = math.log(-4 * slope / data.weight)
    high = math.log(_VANISHED / data.smallest_gap)
    return _rounded(math.exp(_root(data, low, high)) / data.spread), "optimum"


def _root(data: _HeldOut, low: float, high: float) -> float:
    """Where the slope changes its sign, between ``low`` and ``high`` in log(1 / T)."""
    x = min(max(math.log(data.spread), low), high)
    last = high - low
    for _ in range(_STEPS):
        slope, curvature = data.slope_and_curvature(math.exp(x))
        if slope == 0:
            return x
        low, high = (x, high) if slope < 0 else (low, x)
        rate = curvature * math.exp(x)
        step = -slope / rate if rate > 0 else math.inf
        if not low < x + step < high or abs(step) > last / 2:
            step = (low + high) / 2 - x
        x, last = x + step, abs(step)
        # The error after a Newton step is of the order of the square of the step.
        if last <= 1e-11:
            break
    return x


def _rounded(value: float) -> float:
    """To 40 bits: what rounding inside a row's exponentials may change is beyond them."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, _BITS)), exponent - _BITS)


class _HeldOut:
    """Distances to the largest logit, in units of the largest of all; sums over all ranks."""

    def __init__(self, owner: object, scores: Tensor, targets: Tensor, comm: Communicator) -> None:
        if scores.ndim == 1:
            scores = torch.stack([torch.zeros_like(scores), scores], 1)
            if targets.is_floating_point():
                targets = torch.stack([1 - targets, targets], 1)
        self.comm = comm
        self.distance = scores - scores.amax(1, keepdim=True)
        self.masked = bool(comm.reduce(self._any_masked(), "max"))
        if self.masked:
            self._check_labels(owner, targets)
        self.spread, gap = self._extremes()
        unit = self.spread or 1.0
        self.smallest_gap = gap / unit
        self.distance /= unit
        count = comm.reduce(torch.tensor(len(scores), device=scores.device))
        # Sums of so many numbers up to 2 stay within an int64.
        self.unit = 2.0 ** (60 - int(count).bit_length())
        self._read_labels(targets)

    def slope_and_curvature(self, inverse: float) -> tuple[float, float]:
        """Of the summed negative log-likelihood, by ``1 / T``; in scaled units."""
        words = torch.zeros(4, dtype=torch.int64, device=self.distance.device)
        for distance, mass, of_label in self._blocks(self.distance, self.mass, self.of_label):
            finite, p = self._probabilities(distance, inverse)
            mean = (p * finite).sum(1)
            spread = (p * (finite - mean.unsqueeze(1)).square()).sum(1)
            words += self._words(mass * mean - of_label, mass * spread)
        slope, curvature = self._joined(words)
        return slope, curvature

    def slope_at_infinity(self) -> float:
        """The limit of the slope: the labels' distances, which are 0 at a largest logit."""
        return self._joined(self._words(-self.of_label))[0]

    def _probabilities(self, distance: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
        """Distances with 0 in place of masked classes, and probabilities, 0 for these."""
        if not self.masked:
            return distance, (inverse * distance).softmax(1)
        masked = distance == -torch.inf
        finite = distance.masked_fill(masked, 0.0)
        return finite, (inverse * finite).masked_fill(masked, -torch.inf).softmax(1)

    def _extremes(self) -> tuple[float, float]:
        """The largest distance and the smallest above 0."""
        bounds = self.distance.new_tensor([0.0, -math.inf])
        for (distance,) in self._blocks(self.distance):
            largest = -distance.masked_fill(distance == -torch.inf, 0.0).amin()
            smallest = distance.masked_fill(distance == 0, -torch.inf).amax()
            bounds = torch.maximum(bounds, torch.stack([largest, smallest]))
        spread, gap = self.comm.reduce(bounds, "max").tolist()
        return spread, -gap

    def _read_labels(self, targets: Tensor) -> None:
        if targets.is_floating_point():
            self.of_label = (targets * self.distance).where(targets > 0, 0.0).sum(1)
            self.mass = targets.sum(1)
        else:
            self.of_label = self.distance.gather(1, targets.unsqueeze(1)).squeeze(1)
            self.mass = torch.ones_like(self.of_label)
        self.weight = self._joined(self._words(self.mass))[0]

    def _words(self, *values: Tensor) -> Tensor:
        """Sums that do not depend on the order: two words of fixed point for each."""
        words = []
        for value in values:
            scaled = value * self.unit
            high = scaled.round()
            low = ((scaled - high) * self.unit).round()
            words += [high.to(torch.int64).sum(), low.to(torch.int64).sum()]
        return torch.stack(words)

    def _joined(self, words: Tensor) -> list[float]:
        """The sums over all ranks."""
        whole = self.comm.reduce(words).tolist()
        unit = int(self.unit)
        pairs = zip(whole[::2], whole[1::2], strict=True)
        return [(high * unit + low) / unit**2 for high, low in pairs]

    def _blocks(self, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows in blocks that fit a cache, so that nothing of the whole size is made."""
        size = max(1, _BLOCK // columns[0].shape[1])
        return zip(*(column.split(size) for column in columns if len(column)), strict=True)

    def _any_masked(self) -> Tensor:
        return (self.distance == -torch.inf).any().to(torch.int32)

    def _check_labels(self, owner: object, targets: Tensor) -> None:
        masked = self.distance == -torch.inf
        if bool((one_hot(targets, self.distance)[masked] > 0).any()):
            raise ArgumentError(
                owner,
                "a label belongs to a class that is masked with -inf: it has no likelihood at any "
                "temperature",
                cure="ignore_index=-100 for such positions",
            )
