"""Brings domains into the loss later, those first that need the longest training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.schedule import By
from lightning_reg.mechanisms.loss_replacement import Replaces
from lightning_reg.mechanisms.sample_reweighting import GroupReweighting

__all__ = ["PhasedCurriculum", "curriculum_starts", "curriculum_weights"]

_BY = ("step", "epoch", "progress")


def curriculum_starts(
    overfits_after: Sequence[float], total: float, phases: int | None = None
) -> list[float]:
    """When to introduce each domain so that it is trained no longer than it can bear.

    ``T - s`` for a domain that overfits after ``s`` of ``T`` updates, and 0 if it does not. With
    ``phases`` the starts are those of ``n`` phases of equal length, ``k T / n``, rounded down, so
    that a domain shares its start with others of its kind.

    Args:
        overfits_after: ``s`` of each domain, from a run without a curriculum: where its validation
            loss is lowest.
        total: ``T``, the length of the run, in the same unit.
        phases: ``n``; ``None`` gives each domain its own start.

    Returns:
        One number a domain, in the unit of ``total``, in [0, total].
    """
    exact = [min(total, max(0.0, total - s)) for s in overfits_after]
    if phases is None:
        return exact
    length = total / phases
    return [min(phases - 1, int(start / length)) * length for start in exact]


def curriculum_weights(counts: Tensor, starts: Tensor, position: float) -> Tensor:
    """``n_d 1[start_d <= t] / sum_e n_e 1[start_e <= t]``, the share of each domain in the loss.

    Args:
        counts: ``n``, (D,) the samples of each domain in the joint batch.
        starts: (D,) the position at which each domain is introduced.
        position: ``t``.

    Returns:
        (D,): the domains' mean losses, weighted with it, are the mean over all samples that take
        part; zeros if none does.
    """
    part = counts * (starts <= position)
    return part / part.sum().clamp_min(1)


class PhasedCurriculum(GroupReweighting):
    """Introduces domains that overfit early into the loss late.

    Elbayad, Sun, Bhosale (2022), Fixing MoE Over-Fitting on Low-Resource Languages in Multilingual
    Machine Translation, arXiv:2212.07571.

    Low-resource language pairs overfit a large model long before high-resource ones have
    converged. A pair that overfits after ``s`` updates of ``T`` is introduced at ``T - s``
    (:func:`curriculum_starts`): all pairs stop together, each at its best. Here the samples of a
    domain that has not started have weight 0, and the loss is the mean over the others. The rule is
    from memory of the paper; not checked against code. The official recipes cut the list of
    language pairs in phases (``examples/nllb``), which saves the forward pass of samples that do
    not count; so does a sampler of yours, if that matters.

    Args:
        strength: the share of the weighted loss in [0, 1]; the rest is the plain mean.
        starts: one number a domain, 0 to ``len(starts) - 1``: the position at which it is
            introduced; at least one of them 0.
        by: the unit: ``"progress"`` (the share of the run), ``"step"`` (optimizer steps) or
            ``"epoch"``.
        replaces: what of the user's loss the weighted cross-entropy replaces:
            ``"cross_entropy"`` (checked to be it), ``"term"`` or ``"loss"``.
        signals: where ``domain`` (the language pair of a sample), ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``starts`` is empty, negative, or introduces no domain at the beginning.
        RegularizationError: in the first step, if a domain has no start, or the user's loss is no
            cross-entropy and ``replaces`` does not say what to do.

    Note:
        The logged value is the share of samples that take part, over all ranks. Over ranks: global;
        losses of all ranks are gathered in each step. A batch without any sample that takes part
        has a loss of 0. Under accumulation each micro-batch is the mean over its own samples that
        take part. No state: the position says who has started. Cost: a gather of three numbers a
        sample; samples that do not count still run.

        It hurts domains that would learn from a longer training: ``s`` has to be measured.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PhasedCurriculum
        >>> from lightning_reg.functional import curriculum_starts
        >>> starts = curriculum_starts([100_000, 40_000], total=100_000, phases=5)
        >>> starts
        [0.0, 60000.0]
        >>> curriculum = PhasedCurriculum(starts=starts, by="step")
        >>> trainer = L.Trainer(callbacks=[curriculum], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Fixing MoE Over-Fitting on Low-Resource Languages in Multilingual Machine Translation",
            "Elbayad et al.",
            2022,
            "2212.07571",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch is the mean over its own samples that take part",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(curriculum_weights)
    explanation: ClassVar[str] = "leaves domains out of the loss until they are introduced"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        starts: Sequence[float],
        by: By = "progress",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        cure = 'PhasedCurriculum(starts=[0.0, 0.6], by="progress")'
        for start in starts:
            check_range(self, "starts", start, 0, cure=cure)
        if not starts or min(starts) > 0:
            problem = f"`starts` must introduce a domain at 0, got {list(starts)}"
            raise ArgumentError(self, problem, cure=cure)
        if by not in _BY:
            raise ArgumentError(
                self, f"`by` must be one of {', '.join(_BY)}, got {by!r}", cure=cure
            )
        super().__init__(
            strength, num_groups=len(starts), replaces=replaces, signals=signals, name=name
        )
        self.starts = [float(start) for start in starts]
        self.by = by

    def group_weights(self, step: Step, losses: Tensor, counts: Tensor) -> Tensor:
        """The share of each domain."""
        positions = {"step": step.global_step, "epoch": step.epoch, "progress": step.progress}
        return curriculum_weights(counts, counts.new_tensor(self.starts), positions[self.by])
