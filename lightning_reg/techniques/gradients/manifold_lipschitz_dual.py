"""Smooths a function along the data, the more the steeper it is there, by primal and dual steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.joint_rows import joint_rows
from lightning_reg.mechanisms.sample_memory import SampleMemoryRegularizer

__all__ = ["ManifoldLipschitzDual", "manifold_laplacian"]


def manifold_laplacian(
    points: Tensor,
    outputs: Tensor,
    weights: Tensor,
    bandwidth: float,
    rows: Tensor | None = None,
) -> Tensor:
    r"""How much the outputs of each point differ from those of its neighbours.

    .. math:: \frac 1 N \sum_j e^{-\lVert x_i - x_j \rVert^2 / 4t}\,
        \frac{\lambda_i + \lambda_j}{2}\, \lVert f_i - f_j \rVert^2

    With all :math:`\lambda = 1` the mean over i is :math:`2 / N^2` times the quadratic form
    :math:`\mathrm{tr}(f^T L f)` of the graph's Laplacian: manifold regularization.

    Args:
        points: :math:`x`, (N, ...), which take no gradient.
        outputs: :math:`f`, (N, ...).
        weights: :math:`\lambda`, (N,), at least 0.
        bandwidth: :math:`t`, above 0, in squared units of the points.
        rows: (A,) the points that are asked about; all of them by default.

    Returns:
        (A,), at least 0.
    """
    x, f = points.detach().flatten(1), outputs.flatten(1)
    near = (-_squared_distances(x, rows) / (4 * bandwidth)).exp()
    own = weights if rows is None else weights[rows]
    pair = (own[:, None] + weights) / 2
    return (near * pair * _squared_distances(f, rows)).mean(1)


def _squared_distances(values: Tensor, rows: Tensor | None) -> Tensor:
    """(A, N), by differences of rows: no rounding makes two equal points differ."""
    own = values if rows is None else values[rows]
    return (own[:, None] - values).square().sum(2)


def _steepest(points: Tensor, outputs: Tensor, rows: Tensor) -> Tensor:
    """``max_j ||f_i - f_j|| / ||x_i - x_j||`` (A,) over the other points."""
    apart = _squared_distances(points.flatten(1), rows)
    rise = _squared_distances(outputs.flatten(1), rows)
    # A point has no slope to itself, nor to its double.
    slopes = (rise / apart.where(apart > 0, 1.0)).where(apart > 0, 0.0)
    return slopes.amax(1).sqrt()


class ManifoldLipschitzDual(SampleMemoryRegularizer):
    """Learns functions with a small Lipschitz constant on the data, by dual weights on samples.

    Cervino, Chamon, Haeffele, Vidal, Ribeiro (2022), Learning Globally Smooth Functions on
    Manifolds, arXiv:2210.00301.

    To minimize the largest slope subject to a loss of at most ``epsilon`` is, by duality, manifold
    regularization with weights: ``mu L + strength * mean_i p_i`` with the penalty ``p`` of
    :func:`manifold_laplacian`. The duals follow the constraints:

    - ``lambda_i <- [lambda_i + eta s_i]_+`` with the steepest slope ``s_i`` of sample i to another
      one of its batch, brought back to a mean of one over the training set: what is steep is
      smoothed most;
    - ``mu <- [mu + eta_mu (L - epsilon)]``, within [0, ``loss_limit``]: the loss counts as much
      as it needs to for reaching ``epsilon``, and no more.

    The largest slope is the estimate of the Lipschitz constant: ``..._slope`` in the log.

    As in JuanCervino/smoothbench@574c735 (``smooth/laplacian.py``,
    ``smooth/scripts/navigation_manifold.py``): heat kernel, slopes, normalization, clamp, and
    defaults (strength 0.1, steps 0.1 and 0.01, limit 2); the value with equal weights is that of
    its Laplacian. It differs in three points: its Laplacian takes ``lambda_i`` of one side alone,
    ``tr(f^T diag(lambda) L f)``, which can be negative; its slopes are sums of absolute
    differences; and its sums over pairs are means here, so that ``strength`` does not depend on
    the batch. Its weights sum to one, ours have a mean of one.

    Args:
        strength: the multiplier of the penalty, at least 0.
        bandwidth: ``t`` of the heat kernel, above 0: about the squared distance of neighbours.
        dual_step: ``eta``, at least 0; 0 is plain manifold regularization.
        loss_level: ``epsilon``; ``None`` keeps ``mu = 1``.
        loss_step: ``eta_mu``, at least 0.
        loss_limit: the largest ``mu``, at least 1.
        probabilities: take the softmax of the logits for ``f``; ``False`` takes them as they are.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        signals: where ``inputs``, ``logits`` (the outputs) and ``sample_index`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        MissingSignalError: in the first step, if the dataset is no ``IndexedDataset``.
        RegularizationError: in the first step, if inputs are no floats, one row a sample.

    Note:
        Needs ``IndexedDataset(train_dataset)``; samples without a label take part in the penalty
        as well, if your loss leaves them out. Over ranks: global; points and outputs of all ranks
        are gathered, outputs with gradients, and every rank holds all weights. Under accumulation
        neighbours come from the micro-batch. Cost: the distances of B points to N points and of
        their outputs, which are held for the backward, one gather, one more for the duals, and a
        number for each training sample.

        The penalty reaches as far as the kernel: with a ``bandwidth`` far below the distances of
        neighbours it is 0, far above it smooths across the manifold. It hurts where the function
        has a jump: all weight goes there.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ManifoldLipschitzDual
        >>> trainer = L.Trainer(callbacks=[ManifoldLipschitzDual(0.1, bandwidth=1)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Learning Globally Smooth Functions on Manifolds", "Cervino et al.", 2022, "2210.00301"
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "sample_index")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "neighbours, and with them the dual steps, are those of a micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(manifold_laplacian)
    explanation: ClassVar[str] = "smooths outputs between neighbours, steep places the most"

    def __init__(
        self,
        strength: float | Schedule = 0.1,
        *,
        bandwidth: float,
        dual_step: float = 0.1,
        loss_level: float | None = None,
        loss_step: float = 0.01,
        loss_limit: float = 2.0,
        probabilities: bool = True,
        num_samples: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, num_samples=num_samples, width=1, fill=1.0, signals=signals, name=name
        )
        cure = "ManifoldLipschitzDual(0.1, bandwidth=1.0, dual_step=0.1)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "bandwidth", bandwidth, 0, low_open=True, cure=cure)
        check_range(self, "dual_step", dual_step, 0, cure=cure)
        check_range(self, "loss_step", loss_step, 0, cure=cure)
        check_range(self, "loss_limit", loss_limit, 1, cure=cure)
        if loss_level is not None:
            check_range(self, "loss_level", loss_level, cure=cure)
        self.bandwidth, self.dual_step = bandwidth, dual_step
        self.loss_level, self.loss_step, self.loss_limit = loss_level, loss_step, loss_limit
        self.probabilities = probabilities
        self._loss_weight = torch.ones(())

    def acts_in(self, phase: str) -> bool:
        """Without a level the loss counts as it is."""
        return phase != "scale_loss" or self.loss_level is not None

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that starts from step 0 forgets."""
        super().on_reference(trainer, pl_module)
        if int(trainer.global_step) == 0:
            self._loss_weight = torch.ones(())

    def scale_loss(self, step: Step) -> Tensor:
        """Phase 3: the dual of the loss; a second pass has that of the first."""
        weight: Tensor = step.kept.setdefault(self.name, self._loss_weight.to(step.device))
        return weight

    def penalty(self, step: Step) -> JointMean:
        """Phase 4: the weighted Laplacian; then the dual steps."""
        points, outputs = self._points(step), step.logits.flatten(1)
        outputs = outputs.softmax(1) if self.probabilities else outputs
        own: Tensor = step.kept.setdefault(f"{self.name}.weights", self._weights(step, outputs))
        rows, (points, outputs, weights) = joint_rows(step.comm, points, outputs, own)
        if not step.is_rerun:
            self._ascend(step, own, _steepest(points.detach(), outputs.detach(), rows))
        return JointMean.of(
            manifold_laplacian(points, outputs, weights[:, 0], self.bandwidth, rows)
        )

    def _weights(self, step: Step, outputs: Tensor) -> Tensor:
        """The duals (B, 1) of this rank's samples; their mean over the training set is 1."""
        rows = self.recall(step, 1)
        return (rows / self.memory.of(1).table.mean()).to(outputs)

    def _ascend(self, step: Step, own: Tensor, slopes: Tensor) -> None:
        """One step of all duals."""
        table = self.memory.of(1).table
        mean = table.mean()
        moved = mean * (own.to(table) + self.dual_step * slopes[:, None].to(table)).clamp_min(0)
        self.remember(step, moved)
        # Only ratios count. A table of its own scale is left alone, to the bit.
        table = self.memory.of(1).table
        mean = table.mean()
        table *= torch.where((mean < 0.5) | (mean > 2), 1 / mean, torch.ones_like(mean))
        if step.logging:
            largest = torch.cat([slopes, slopes.new_zeros(1)]).max()
            step.log(self, step.comm.reduce(largest, "max"), "slope", joint=True)
        if self.loss_level is None:
            return
        assert step.loss is not None
        before = self._loss_weight.to(step.device)
        excess = step.comm.reduce(step.loss.detach().to(before), "mean") - self.loss_level
        after = (before + self.loss_step * excess).clamp(0, self.loss_limit)
        self._loss_weight = after.where(after.isfinite(), before)

    def _points(self, step: Step) -> Tensor:
        inputs = step.inputs
        if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1:
            return full_precision(inputs.detach())
        found = type(inputs).__name__
        if isinstance(inputs, Tensor):
            found = f"{inputs.dtype} {tuple(inputs.shape)}"
        raise RegularizationError(
            self,
            f"measures distances of `inputs`, which must be floats (B, ...), got {found}",
            cure='signals=Signals(inputs="batch.<key of a float tensor>")',
        )

    def state_dict(self) -> dict[str, Any]:
        """The duals."""
        return {**super().state_dict(), "loss_weight": self._loss_weight.cpu().clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved duals."""
        super().load_state_dict(state_dict)
        self._loss_weight = state_dict["loss_weight"]
