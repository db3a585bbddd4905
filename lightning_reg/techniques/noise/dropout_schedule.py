"""Switches dropout and drop path off after, or on before, a part of the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl

from lightning_reg.engine import Paper, Schedule
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.schedule import By, LinearSchedule, StepSchedule
from lightning_reg.mechanisms.attribute_schedule import AttributeSchedule, Target, dropout_rates

__all__ = ["DropoutSchedule", "dropout_factor"]

Mode = Literal["early", "late"]
Shape = Literal["constant", "linear"]
_MODES = ("early", "late")
_SHAPES = ("constant", "linear")


def dropout_factor(
    position: float,
    cutoff: float,
    mode: Mode = "early",
    shape: Shape = "linear",
    end: float = 1.0,
) -> float:
    """The share of the drop rate at a position ``t`` of the run, with ``T`` the cutoff.

    ============  ===========================================  ===============================
    mode          constant                                     linear
    ============  ===========================================  ===============================
    ``"early"``   1 for ``t < T``, then 0                      ``1 - t/T``, then 0
    ``"late"``    0 for ``t < T``, then 1                      0, then ``(t - T)/(end - T)``
    ============  ===========================================  ===============================

    Args:
        position: ``t``, in the units of ``cutoff``.
        cutoff: ``T``, at least 0.
        mode: when dropout is on.
        shape: at once, or in a straight line.
        end: where a linear rise is complete.

    Returns:
        In [0, 1].
    """
    schedule = _schedule(cutoff, mode, shape, end, "progress")
    return schedule.value(progress=position)


def _schedule(cutoff: float, mode: Mode, shape: Shape, end: float, by: By) -> Schedule:
    early = mode == "early"
    before, after = (1.0, 0.0) if early else (0.0, 1.0)
    if shape == "constant" or (cutoff == 0 and early):
        return StepSchedule([before, after], [cutoff], by=by)
    if early:
        return LinearSchedule(1.0, 0.0, start=0, end=cutoff, by=by)
    return LinearSchedule(0.0, 1.0, start=cutoff, end=end, by=by)


class DropoutSchedule(AttributeSchedule):
    """Early or late dropout: the drop rate of the model's own layers over the run.

    Liu, Xu, Jin, Shen, Darrell (2023), Dropout Reduces Underfitting, arXiv:2303.01500, for early
    dropout (an underfitting model: less variance between gradients of batches at the start) and
    late dropout (an overfitting one); Xue, Fu, Zhou, Zheng, You (2023), To Repeat or Not To
    Repeat: Insights from Scaling LLM under Token-Crisis, arXiv:2305.13230, for dropout that sets
    in late when the same tokens come again.

    With ``p_0`` the rate, ``t`` the position in the run and ``T`` the cutoff: early dropout is
    ``p_0 (1 - t/T)`` (linear) or ``p_0`` (constant) for ``t < T`` and 0 afterwards; late dropout
    is 0 for ``t < T`` and ``p_0`` afterwards, at once (constant) or in a straight line up to
    ``end``. Checked against the official code (facebookresearch/dropout,
    ``drop_scheduler.py``), which has 50 of 300 epochs as cutoff, a linear shape for early and a
    constant one for late dropout; there the last of ``n`` linear steps is 0 (``1 - t/(n - 1)``),
    here the first step after them is. The linear rise of late dropout is in neither code.

    What is set: ``p`` of every dropout layer of torch; ``dropout`` of ``nn.MultiheadAttention``
    and of recurrent layers; ``drop_prob`` of any module (drop path of timm and others). A rate
    that a module keeps elsewhere and gives to ``F.dropout`` is reached by its name in
    ``attributes``; one that is written into the code is not.

    Args:
        p: ``p_0`` for all layers, in [0, 1]; ``None`` takes each layer's own, so that drop path
            rates that grow with depth keep their proportions.
        mode: ``"early"`` or ``"late"``.
        cutoff: where dropout ends or begins, in units of ``by``. Default: a sixth of the run.
        by: ``"progress"`` (the share of the run, in [0, 1]), ``"step"`` (optimizer steps) or
            ``"epoch"``.
        shape: ``"constant"`` or ``"linear"``; default: linear for early, constant for late.
        end: where a linear rise of late dropout is complete; default: the end of the run, which
            has a position only with ``by="progress"``.
        pattern: a regular expression that has to occur in the layer's name; default: all layers.
        attributes: further attributes that are set in any module that has them.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range; before training, if no layer is found
            or, with ``p=None``, if all rates are 0 already.

    Note:
        Over ranks: replica; the rate follows from the position. Masks are the layers' own, and
        differ between ranks and micro-batches as ever. All micro-batches of an optimizer step
        have one rate. No state, no collective; cost: one comparison a step. The layers' own
        rates come back when the fit is over. ``reg/dropout_schedule`` logs the mean rate.

        Under ``torch.compile`` every new rate may be a recompilation: prefer
        ``shape="constant"``, or ``by="epoch"``.

        It hurts the other way round: early dropout does not regularize an overfitting model, and
        late dropout makes an underfitting one worse.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DropoutSchedule
        >>> early = DropoutSchedule(0.1, mode="early", cutoff=50, by="epoch")
        >>> trainer = L.Trainer(callbacks=[early], max_epochs=300, logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Dropout Reduces Underfitting", "Liu et al.", 2023, "2303.01500"),
        Paper(
            "To Repeat or Not To Repeat: Insights from Scaling LLM under Token-Crisis",
            "Xue et al.",
            2023,
            "2305.13230",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        "gradient": "a schedule of a rate has nothing to differentiate",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(dropout_factor)
    explanation: ClassVar[str] = "sets the drop rate of your layers; their own comes back later"

    def __init__(
        self,
        p: float | None = None,
        *,
        mode: Mode = "early",
        cutoff: float = 1 / 6,
        by: By = "progress",
        shape: Shape | None = None,
        end: float | None = None,
        pattern: str | None = None,
        attributes: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        self._check(p, mode, cutoff, by, shape, end, pattern, attributes)
        if shape is None:
            shape = "linear" if mode == "early" else "constant"
        schedule = _schedule(cutoff, mode, shape, 1.0 if end is None else end, by)
        super().__init__(schedule, relative=True, name=name)
        self.p = p
        self.pattern = pattern
        self.attributes = tuple(attributes)

    def value(self, own: float, scheduled: float) -> float:
        """The share of ``p``, or of the layer's own rate."""
        return (own if self.p is None else self.p) * scheduled

    def targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Target]:
        """Every rate of the module."""
        found = dropout_rates(pl_module, self.pattern, self.attributes)
        if not found:
            raise ArgumentError(
                self,
                f"finds no dropout layer in {type(pl_module).__name__}"
                + ("" if self.pattern is None else f" whose name has {self.pattern!r}"),
                cure='DropoutSchedule(0.1, attributes=["<attribute that holds the rate>"])',
            )
        if self.p is None and not any(getattr(*target) for target in found.values()):
            raise ArgumentError(
                self,
                f"scales the layers' own rates, and all {len(found)} of them are 0",
                cure="DropoutSchedule(p=0.1)",
            )
        return found

    @classmethod
    def _check(
        cls,
        p: float | None,
        mode: str,
        cutoff: float,
        by: str,
        shape: str | None,
        end: float | None,
        pattern: str | None,
        attributes: Sequence[str],
    ) -> None:
        cure = 'DropoutSchedule(0.1, mode="early", cutoff=50, by="epoch")'
        for argument, value, choices in (
            ("mode", mode, _MODES),
            ("by", by, ("progress", "step", "epoch")),
            ("shape", shape or "linear", _SHAPES),
        ):
            if value not in choices:
                problem = f"`{argument}` must be one of {', '.join(choices)}, got {value!r}"
                raise ArgumentError(cls, problem, cure=cure)
        if p is not None:
            check_range(cls, "p", p, 0, 1, cure=cure)
        check_range(cls, "cutoff", cutoff, 0, 1 if by == "progress" else None, cure=cure)
        cls._check_end(mode, shape, cutoff, by, end)
        try:
            re.compile(pattern or "")
        except re.error as error:
            problem = f"`pattern` must be a regular expression, got {pattern!r} ({error})"
            raise ArgumentError(cls, problem, cure='DropoutSchedule(pattern="encoder")') from error
        if isinstance(attributes, str):
            problem = f"`attributes` must be a list of names, got {attributes!r}"
            raise ArgumentError(cls, problem, cure=f'DropoutSchedule(attributes=["{attributes}"])')

    @classmethod
    def _check_end(
        cls, mode: str, shape: str | None, cutoff: float, by: str, end: float | None
    ) -> None:
        cure = 'DropoutSchedule(0.1, mode="late", shape="linear", cutoff=0.5, end=1.0)'
        rises = mode == "late" and shape == "linear"
        if not rises:
            if end is not None:
                problem = '`end` has a meaning for mode="late" with shape="linear" only'
                raise ArgumentError(cls, problem, cure=cure)
            return
        if end is None and by != "progress":
            problem = f"`end` must be given with by={by!r}: the {by} at which the rise is complete"
            raise ArgumentError(cls, problem, cure=cure)
        high = 1 if by == "progress" else None
        check_range(cls, "end", 1.0 if end is None else end, cutoff, high, low_open=True, cure=cure)
