"""Trains on those source tasks that the target task's classifier is a sparse mixture of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import Replaces
from lightning_reg.mechanisms.sample_reweighting import GroupReweighting

__all__ = ["LassoTaskWeights", "lasso_task_weights", "task_sample_counts", "task_shares"]


def lasso_task_weights(
    sources: Tensor, target: Tensor, lam: float = 0.1, max_iter: int = 10_000
) -> Tensor:
    """``argmin_nu |w - W nu|^2 / 2 + lambda |nu|_1`` by accelerated proximal gradient steps.

    Args:
        sources: (d, T) ``W``, the parameters of each source task as a column.
        target: (d,) ``w``.
        lam: ``lambda``, at least 0; from the largest ``|W' w|`` on all of ``nu`` is 0.
        max_iter: the most steps; they end when none of ``nu`` moves by more than 1e-10 of it.

    Returns:
        (T,) ``nu``. For orthonormal columns it is ``W' w``, shrunk towards 0 by ``lambda``.
    """
    gram, right = sources.t() @ sources, sources.t() @ target
    largest = torch.linalg.eigvalsh(gram.detach())[-1].clamp_min(torch.finfo(gram.dtype).tiny)
    nu = ahead = torch.zeros_like(right)
    momentum = 1.0
    for _ in range(max_iter):
        reached = ahead - (gram @ ahead - right) / largest
        new = reached.sign() * (reached.abs() - lam / largest).clamp_min(0)
        moved = float((new - nu).detach().abs().max())
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * (new - nu)
        nu, momentum = new, following
        if moved <= 1e-10 * float(nu.detach().abs().max()):
            break
    return nu


def task_shares(nu: Tensor, floor: float = 0.0) -> Tensor:
    """``(1 - floor) |nu_t| / sum |nu| + floor / T``: how much of the samples each task gets.

    Args:
        nu: (T,); all tasks get the same where all of it is 0.
        floor: the part that is dealt evenly, in [0, 1].

    Returns:
        (T,), of sum 1.
    """
    size = nu.abs()
    even = torch.full_like(size, 1 / len(size))
    total = size.sum()
    return torch.where(total > 0, (1 - floor) * size / total + floor * even, even)


def task_sample_counts(nu: Tensor, total: int, floor: float = 0.0) -> Tensor:
    """``n_t`` in proportion to ``|nu_t|``: whole numbers of sum ``total``, for a sampler.

    Args:
        nu: (T,).
        total: how many samples are drawn from all source tasks.
        floor: see :func:`task_shares`.

    Returns:
        (T,) int64; what rounding leaves over goes to the largest remainders.
    """
    wanted = task_shares(nu.detach(), floor) * total
    counts = wanted.floor()
    left = total - int(counts.sum())
    counts[(wanted - counts).argsort(descending=True, stable=True)[:left]] += 1
    return counts.long()


class LassoTaskWeights(GroupReweighting):
    """Weights source tasks by a lasso regression of the target task's classifier on theirs.

    Wang, Chen, Jamieson, Du (2023), Improved Active Multi-Task Representation Learning via Lasso,
    arXiv:2306.02556.

    Tasks share a representation and have a linear classifier each, ``w_t``. The target's is a
    mixture of those of the sources, ``w = W nu``; sources that are not in it teach a representation
    that the target has no use for. At the start of each epoch ``nu = argmin |w - W nu|^2 / 2 +
    lambda |nu|_1`` is found from the classifiers as they are, and a source counts in proportion
    to ``|nu_t|`` from then on. That strategy (the paper's ``nu^1``) needs fewer samples of the
    sources than one in proportion to ``nu_t^2``, and leaves most of them alone.

    The paper draws ``n_t`` samples in proportion to ``|nu_t|``, and some of each task in any case.
    Here samples come as your loader draws them, and the loss is ``sum_t s_t L_t`` over the tasks in
    the batch, with ``L_t`` the mean loss of a task's samples: the same mean. To draw fewer, give
    :func:`task_sample_counts` of ``nu`` to a sampler. Classifiers are scaled to norm 1 before they
    are regressed. The strategy and the lasso are those of the abstract; scaling, the floor and all
    defaults are ours, not checked against code.

    Args:
        strength: the share of the weighted loss in [0, 1]; the rest is the plain mean.
        heads: the name of the classifiers: a container (``nn.ModuleList``) with a module for each
            task, or one linear layer whose rows are the tasks.
        num_tasks: how many tasks there are, the target included; ids are 0 to ``num_tasks - 1``.
        target: the id of the target task; negative ones count from the end.
        lam: ``lambda``, at least 0.
        floor: the part of the sources' loss that is dealt evenly, in [0, 1]: a task without any
            could not be found again.
        target_share: the target's part of the loss, in [0, 1].
        start: the first epoch with ``nu``; all sources count alike before.
        replaces: what of the user's loss the weighted cross-entropy replaces:
            ``"cross_entropy"`` (checked to be it), ``"term"`` or ``"loss"``.
        signals: where ``domain`` (the task of each sample), ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Attributes:
        nu: (T,) of the source tasks, in the order of their ids without the target's.

    Raises:
        ArgumentError: if a number is outside its range, or ``heads`` do not fit ``num_tasks``.
        MissingSignalError: in the first step, without tasks.

    Note:
        The logged value is the effective sample size, a share of the batch. Over ranks: global;
        losses and tasks of all ranks are gathered in each step, and ``nu`` comes from weights that
        are the same on every rank. Under accumulation each micro-batch has its own tasks. ``nu`` is
        saved with the checkpoint. Cost: a gather of three numbers a sample, and a lasso over T
        tasks an epoch.

        It hurts while classifiers are not trained yet: give ``start`` an epoch or more, and the
        target enough samples for a classifier that can be told from others.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LassoTaskWeights
        >>> tasks = LassoTaskWeights(heads="heads", num_tasks=10)
        >>> trainer = L.Trainer(callbacks=[tasks], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Improved Active Multi-Task Representation Learning via Lasso",
            "Wang et al.",
            2023,
            None,
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "each micro-batch has its own tasks and their mean losses",
    }
    sharded: ClassVar[bool | None] = False
    function: ClassVar[Callable[..., Any] | None] = staticmethod(lasso_task_weights)
    explanation: ClassVar[str] = "weights tasks by a lasso regression of the target's classifier"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        heads: str,
        num_tasks: int,
        target: int = -1,
        lam: float = 0.1,
        floor: float = 0.1,
        target_share: float = 0.2,
        start: int = 1,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, num_groups=num_tasks, replaces=replaces, signals=signals, name=name
        )
        cure = 'LassoTaskWeights(heads="heads", num_tasks=10, target=-1)'
        if not isinstance(heads, str) or not heads:
            raise ArgumentError(
                self, f"`heads` must be the name of the classifiers, got {heads!r}", cure=cure
            )
        check_range(self, "num_tasks", num_tasks, 2, cure=cure)
        check_range(self, "target", target, -num_tasks, num_tasks - 1, cure=cure)
        check_range(self, "lam", lam, 0, cure=cure)
        check_range(self, "floor", floor, 0, 1, cure=cure)
        check_range(self, "target_share", target_share, 0, 1, cure=cure)
        check_range(self, "start", start, 0, cure=cure)
        self.heads = heads
        self.target = target % num_tasks
        self.lam = lam
        self.floor = floor
        self.target_share = target_share
        self.start = start
        self.nu = torch.zeros(num_tasks - 1, dtype=torch.float64)
        self._epoch = -1

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse classifiers that are not there, or of another number."""
        super().validate(trainer, pl_module)
        self._classifiers(pl_module)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run from step 0 knows nothing of its tasks."""
        if int(trainer.global_step) == 0:
            self.nu, self._epoch = torch.zeros_like(self.nu), -1

    def prepare(self, step: Step) -> None:
        """At the start of an epoch: find ``nu``."""
        if step.epoch == self._epoch or step.epoch < self.start:
            return
        self._epoch = step.epoch
        weights = self._classifiers(step.module).detach()
        weights = nn.functional.normalize(weights.double(), dim=1)
        # Classifiers that are not finite say nothing.
        if bool(torch.isfinite(weights).all()):
            sources = torch.cat([weights[: self.target], weights[self.target + 1 :]])
            self.nu = lasso_task_weights(sources.t(), weights[self.target], self.lam)

    def group_weights(self, step: Step, losses: Tensor, counts: Tensor) -> Tensor:
        """The shares of the tasks that are in the batch, of sum 1."""
        shares = (1 - self.target_share) * task_shares(self.nu.to(losses), self.floor)
        own = shares.new_full((1,), self.target_share)
        dealt = torch.cat([shares[: self.target], own, shares[self.target :]])
        present = torch.where(counts > 0, dealt, 0.0)
        return present / present.sum().clamp_min(torch.finfo(present.dtype).tiny)

    def state_dict(self) -> dict[str, Any]:
        """``nu``, and the epoch that it is of."""
        return {**super().state_dict(), "nu": self.nu.cpu(), "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved weights."""
        super().load_state_dict(state_dict)
        self.nu = state_dict["nu"].clone()
        self._epoch = int(state_dict["epoch"])

    def _classifiers(self, module: nn.Module) -> Tensor:
        """(num_tasks, d) the parameters of each task's classifier."""
        parts = dict(module.named_modules())
        found = parts.get(self.heads)
        weight = getattr(found, "weight", None)
        if isinstance(weight, Tensor):
            rows = [weight.flatten(1)]
        else:
            children = [] if found is None else list(found.children())
            weights = [getattr(child, "weight", None) for child in children]
            rows = [w.reshape(1, -1) for w in weights if isinstance(w, Tensor)]
        if sum(map(len, rows)) != self.num_groups or len({row.shape[1] for row in rows}) != 1:
            known = ", ".join(name for name in parts if name) or "no submodules"
            raise ArgumentError(
                self,
                f"needs {self.num_groups} classifiers of one shape at {self.heads!r}, found "
                f"{sum(map(len, rows))}; the module has {known}",
                cure='LassoTaskWeights(heads="<a ModuleList>", num_tasks=<its length>)',
            )
        return torch.cat(rows)
