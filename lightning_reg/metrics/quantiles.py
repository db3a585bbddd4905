"""Whether predicted quantiles hold the share of targets that they promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import AdditiveMetric, evaluate
from lightning_reg.metrics.blocks import split_alike
from lightning_reg.metrics.inputs import high_precision

Norm = Literal["l1", "l2", "max"]
NORMS = ("l1", "l2", "max")

__all__ = ["QuantileCalibrationError", "quantile_calibration_error"]


def quantile_calibration_error(
    quantiles: Tensor,
    target: Tensor,
    *,
    levels: Sequence[float],
    norm: Norm = "l1",
    validate_args: bool = True,
) -> Tensor:
    r"""How far observed shares are from the levels of predicted quantiles.

    With ``c_j`` the share of targets at or below their predicted quantile of level ``q_j``:
    ``mean_j |c_j - q_j|`` (``"l1"``), ``sqrt(mean_j (c_j - q_j)^2)`` (``"l2"``) or
    ``max_j |c_j - q_j|`` (``"max"``). Kuleshov et al., Accurate Uncertainties for Deep Learning
    Using Calibrated Regression, 2018, sum the squares, with weights.

    Quantiles are judged one by one, as ``uncertainty_toolbox`` does with
    ``prop_type="quantile"``. ``torch_uncertainty`` judges central intervals: quantiles that are
    all too low by the same share then pass as calibrated, and are not.

    Args:
        quantiles: (N, ..., Q), one for each level; see
            :func:`~lightning_reg.functional.gaussian_quantiles`.
        target: (N, ...) what was observed.
        levels: Q numbers inside (0, 1).
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument or a shape is not one of these.

    Example:
        >>> import torch
        >>> quantiles = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> target = torch.tensor([-1.0, 0.5])  # shares 0.5 and 1
        >>> quantile_calibration_error(quantiles, target, levels=[0.5, 0.9])
        tensor(0.0500, dtype=torch.float64)
    """
    metric = QuantileCalibrationError(levels=levels, norm=norm, validate_args=validate_args)
    value: Tensor = evaluate(metric, quantiles, target)
    return value


class QuantileCalibrationError(AdditiveMetric):
    """How far the shares of targets below predicted quantiles are from the quantiles' levels.

    See :func:`quantile_calibration_error`. The state is Q + 1 int64 counts.

    Args:
        levels: Q numbers inside (0, 1).
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import QuantileCalibrationError
        >>> metric = QuantileCalibrationError(levels=[0.5, 0.9])
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([-1.0, 0.5]))
        >>> metric.compute()
        tensor(0.0500, dtype=torch.float64)
    """

    function = staticmethod(quantile_calibration_error)
    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    below: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        levels: Sequence[float],
        norm: Norm = "l1",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.levels = tuple(float(q) for q in levels)
        if not self.levels or not all(0 < q < 1 for q in self.levels):
            raise ArgumentError(
                self,
                f"`levels` must be numbers inside (0, 1), got {list(levels)}",
                cure="levels=[0.05, 0.5, 0.95]",
            )
        if norm not in NORMS:
            raise ArgumentError(
                self, f"`norm` must be one of {', '.join(NORMS)}, got {norm!r}", cure='norm="l1"'
            )
        self.norm: Norm = norm
        self.validate_args = validate_args
        self.add_count("below", len(self.levels))
        self.add_count("count")

    def update(self, quantiles: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            quantiles: (N, ..., Q), in the order of ``levels``.
            target: (N, ...) what was observed.

        Raises:
            ArgumentError: if shapes do not fit, or quantiles fall while levels rise.
        """
        wanted = (*target.shape, len(self.levels))
        if quantiles.shape != wanted or not quantiles.is_floating_point() or target.ndim < 1:
            raise ArgumentError(
                self,
                f"targets of shape {tuple(target.shape)} and {len(self.levels)} levels need float "
                f"quantiles {wanted}, got {quantiles.dtype} of shape {tuple(quantiles.shape)}",
                cure="metric.update(quantiles, target)",
            )
        for block in split_alike([quantiles.detach(), target.detach()], target.ndim):
            rows = high_precision(block[0]).reshape(-1, len(self.levels))
            y = high_precision(block[1]).reshape(-1, 1)
            finite = torch.isfinite(rows).all(1) & torch.isfinite(y).squeeze(1)
            rows, y = rows[finite], y[finite]
            if self.validate_args:
                self._refuse_crossing(rows)
            self.invalid = self.invalid + (~finite).sum()
            self.below = self.below + (y <= rows).sum(0)
            self.count = self.count + len(y)

    def _refuse_crossing(self, rows: Tensor) -> None:
        order = sorted(range(len(self.levels)), key=self.levels.__getitem__)
        crossing = (rows[:, order].diff(dim=1) < 0).any(1)
        if bool(crossing.any()):
            raise ArgumentError(
                self,
                f"the quantiles of {int(crossing.sum())} predictions fall while their levels rise",
                cure="metric.update(quantiles.sort(-1).values, target)  # with rising levels",
            )

    def shares(self) -> Tensor:
        """(Q,) the observed share at or below each quantile; NaN before anything was counted."""
        return high_precision(self.below) / self.count

    def value(self) -> Tensor:
        """The error over everything that was counted."""
        shares = self.shares()
        gaps = (shares - shares.new_tensor(self.levels)).abs()
        if self.norm == "l1":
            return gaps.mean()
        return gaps.square().mean().sqrt() if self.norm == "l2" else gaps.max()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Observed shares against levels, drawn from the state.

        Args:
            val: shares (Q,) to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.regression_figures import draw_quantiles

        return draw_quantiles(self.levels, self.shares() if val is None else val, ax=ax)
