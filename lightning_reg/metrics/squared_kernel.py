"""Calibration of whole predicted distributions, by a kernel over pairs of predictions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.inputs import Rows, Task, high_precision, log_probabilities, read_rows
from lightning_reg.metrics.kept import KeepingMetric

__all__ = ["SquaredKernelCalibrationError", "squared_kernel_calibration_error"]

Estimator = Literal["block", "unbiased", "biased"]
Kernel = Literal["exponential", "gaussian", "total_variation"]
_ESTIMATORS = ("block", "unbiased", "biased")
_KERNELS = ("exponential", "gaussian", "total_variation")
_ROWS = 2**22


def squared_kernel_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    estimator: Estimator = "unbiased",
    kernel: Kernel = "exponential",
    bandwidth: float = 1.0,
    block_size: int = 64,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The squared kernel calibration error, SKCE, of whole distributions.

    With predicted distributions ``p_i``, targets ``y_i`` as one-hot vectors and residuals
    ``r_i = y_i - p_i``, ``h_ij = k(p_i, p_j) <r_i, r_j>``:

    - ``"biased"``: the mean of ``h_ij`` over all i and j, never negative
    - ``"unbiased"``: the mean over all ``i != j``
    - ``"block"``: the mean over ``i != j`` within blocks of consecutive samples

    The kernel is ``exp(-||p - q||_2 / b)`` (``"exponential"``), ``exp(-||p - q||_2^2 / (2 b^2))``
    (``"gaussian"``) or ``exp(-||p - q||_1 / (2 b))`` (``"total_variation"``), b the bandwidth.

    Args:
        preds: (N, C, ...) for ``"multiclass"``; (N, ...) of the positive class for ``"binary"``,
            which counts as a distribution over two classes.
        target: class indices (N, ...), or soft targets of the shape of ``preds``, except for the
            biased estimator: what a label adds to its own pair is lost in them.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        estimator: ``"block"``, ``"unbiased"`` or ``"biased"``.
        kernel: ``"exponential"``, ``"gaussian"`` or ``"total_variation"``.
        bandwidth: b.
        block_size: the most samples in a block.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS), below 0 at times unless biased; NaN without a pair.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> probabilities, target = torch.eye(2), torch.tensor([1, 1])
        >>> squared_kernel_calibration_error(
        ...     probabilities, target, from_logits=False, kernel="gaussian", estimator="biased"
        ... )
        tensor(0.5000, dtype=torch.float64)
    """
    metric = SquaredKernelCalibrationError(
        from_logits=from_logits,
        task=task,
        estimator=estimator,
        kernel=kernel,
        bandwidth=bandwidth,
        block_size=block_size,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class SquaredKernelCalibrationError(KeepingMetric):
    """The squared kernel calibration error (SKCE) of whole predicted distributions.

    Widmann, Lindsten & Zachariah (2019), Calibration Tests in Multi-Class Classification: A
    Unifying Framework, arXiv:1910.11385. See :func:`squared_kernel_calibration_error` for the
    formula: the paper's matrix kernel is ``k`` times the identity. 0 in expectation if and only if
    the predictions are calibrated as distributions, not only at the top label.

    As ``SKCE`` of CalibrationErrors.jl with a kernel for predictions times the white kernel for
    targets.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        estimator: ``"block"`` keeps a sum and a count. ``"unbiased"`` and ``"biased"`` keep every
            distribution (16 C bytes a sample, gathered from all ranks by ``compute``, whose time
            is quadratic).
        kernel: ``"exponential"``, ``"gaussian"`` or ``"total_variation"``.
        bandwidth: the width of the kernel; 1 is ours. The paper takes the median distance.
        block_size: the most samples in a block; 2 is the paper's linear estimator, 64 is ours.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        Blocks are cut from the samples of each ``update`` in their order; the last one may be
        smaller, and a sample that is alone in it has no pair. All pairs weigh the same. The
        estimate is unbiased however the samples fall into batches, but its value depends on that,
        unlike all others here. It costs ``block_size / 2`` kernel values a sample.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import SquaredKernelCalibrationError
        >>> metric = SquaredKernelCalibrationError(from_logits=False, kernel="gaussian")
        >>> metric.update(torch.eye(2), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(-0.7358, dtype=torch.float64)
    """

    function = staticmethod(squared_kernel_calibration_error)
    papers = (
        Paper(
            "Calibration Tests in Multi-Class Classification: A Unifying Framework",
            "Widmann et al.",
            2019,
            "1910.11385",
        ),
    )
    higher_is_better = False
    pair_sum: Tensor
    pair_count: Tensor
    sample_count: Tensor

    def __init__(
        self,
        *,
        from_logits: bool,
        estimator: Estimator = "block",
        kernel: Kernel = "exponential",
        bandwidth: float = 1.0,
        block_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        _check(self, estimator, kernel, bandwidth, block_size)
        self.estimator: Estimator = estimator
        self.kernel: Kernel = kernel
        self.bandwidth = bandwidth
        self.block_size = block_size
        if estimator == "block":
            self.add_total("pair_sum")
            self.add_count("pair_count")
            return
        self.add_count("sample_count")
        self.add_kept("distributions")
        self.add_kept("residuals")

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Count one batch, whole: blocks of pairs do not end where those of the cache do.

        Args:
            preds: predictions, as ``task`` and ``from_logits`` say.
            target: class indices, or soft targets of the shape of ``preds``.

        Raises:
            ArgumentError: if shapes or values are not those of the task.
        """
        rows = read_rows(
            self,
            preds,
            target,
            task=self.task,
            from_logits=self.from_logits,
            ignore_index=self.ignore_index,
            validate=self.validate_args,
        )
        self.invalid += rows.invalid
        self.accumulate(rows)

    def accumulate(self, rows: Rows) -> None:
        """Add the pairs of the batch's blocks, or keep its distributions."""
        distributions, residuals = self._residuals(rows)
        if self.estimator == "block":
            self._add_blocks(distributions, residuals)
            return
        self.sample_count = self.sample_count + len(distributions)
        self.keep("distributions", distributions.flatten())
        self.keep("residuals", residuals.flatten())

    def value(self) -> Tensor:
        """The estimate over everything that was counted."""
        if self.estimator == "block":
            return self.pair_sum / self.pair_count
        count = int(self.sample_count)
        distributions, residuals = self.kept("distributions"), self.kept("residuals")
        if not count:
            return distributions.new_full((), float("nan"))
        distributions, residuals = distributions.view(count, -1), residuals.view(count, -1)
        total = torch.zeros_like(distributions[0, 0])
        for some in torch.arange(count, device=total.device).split(max(1, _ROWS // count)):
            total = total + self._pairs(
                distributions[some], residuals[some], distributions, residuals
            )
        if self.estimator == "biased":
            return total / count**2
        own = residuals.square().sum()
        return (total - own) / (count * (count - 1)) if count > 1 else total * float("nan")

    def _residuals(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if rows.targets is None:
            raise ArgumentError(self, "needs targets", cure="metric.update(logits, target)")
        distributions = log_probabilities(rows.scores, self.from_logits).exp()
        if rows.targets.is_floating_point():
            targets = high_precision(rows.targets)
            targets = targets if targets.ndim == 2 else torch.stack([1 - targets, targets], 1)
            if self.estimator == "biased" and bool(((targets > 0) & (targets < 1)).any()):
                raise ArgumentError(
                    self, "needs class indices to be biased", cure='estimator="unbiased"'
                )
        else:
            index = rows.targets.long().unsqueeze(1)
            targets = torch.zeros_like(distributions).scatter(1, index, 1.0)
        return distributions, targets - distributions

    def _add_blocks(self, distributions: Tensor, residuals: Tensor) -> None:
        whole = len(distributions) // self.block_size * self.block_size
        rest = len(distributions) - whole
        for part, size in ((slice(whole), self.block_size), (slice(whole, None), rest)):
            if size < 2 or not len(distributions[part]):
                continue
            p = distributions[part].unflatten(0, (-1, size))
            r = residuals[part].unflatten(0, (-1, size))
            pairs = (self._pairs(p, r, p, r) - r.square().sum()) / 2
            self.pair_sum = self.pair_sum + pairs.to(self.pair_sum)
            self.pair_count = self.pair_count + len(p) * (size * (size - 1) // 2)

    def _pairs(self, p: Tensor, r: Tensor, q: Tensor, s: Tensor) -> Tensor:
        """The sum of ``k(p_i, q_j) <r_i, s_j>`` over i and j (and blocks)."""
        if self.kernel == "total_variation":
            exponent = torch.cdist(p, q, p=1.0) / (2 * self.bandwidth)
        else:
            distance = torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist")
            exponent = distance / self.bandwidth
            if self.kernel == "gaussian":
                exponent = exponent.square() / 2
        return ((-exponent).exp() * (r @ s.mT)).sum()


def _check(owner: object, estimator: str, kernel: str, bandwidth: float, block_size: int) -> None:
    for name, value, allowed in (
        ("estimator", estimator, _ESTIMATORS),
        ("kernel", kernel, _KERNELS),
    ):
        if value not in allowed:
            raise ArgumentError(
                owner,
                f"`{name}` must be one of {', '.join(allowed)}, got {value!r}",
                cure=f'{name}="{allowed[0]}"',
            )
    check_range(owner, "bandwidth", bandwidth, 0, low_open=True, cure="bandwidth=1.0")
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 2:
        raise ArgumentError(
            owner,
            f"`block_size` must be a whole number from 2, got {block_size!r}",
            cure="block_size=64",
        )
