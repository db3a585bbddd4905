"""Is it the same technique on two ranks, over micro-batches and in half precision?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_reg.testing.hosts import BATCH, SAMPLES, HostOptions
from lightning_reg.testing.runs import Outcome, Setting
from lightning_reg.testing.snapshot import (
    first_difference,
    largest_gap,
    numbers_of,
    tensors_of,
)
from lightning_reg.testing.subject import PLAIN, Subject

_DOUBLE = Setting(precision="64-true", epochs=2)
# Rounding grows over steps through the technique itself, so that its share of the update may be
# off by a tenth, and by a few times what the same rounding does to a run without it. A forgotten
# loss scale would be off by a factor of a thousand, a technique that is lost by all of it.
_PRECISION_SHARE = 0.1
_PRECISION_NOISE = 4.0


def replicas(subject: Subject) -> None:
    """After training on two ranks all weights and all states are bit-equal."""
    accumulate = 1 if subject.manual else 2
    setting = Setting(batch=BATCH // 2, accumulate=accumulate, epochs=2, shuffle=True)
    difference = rank_difference(subject, *subject.rank_outcomes(setting))
    if difference is not None:
        raise subject.fail(
            f"after training on two ranks they disagree in {difference}. Draw noise on weights "
            "from a shared stream, and bring statistics together with `step.comm`"
        )


def semantics(subject: Subject) -> None:
    """Two ranks with batch B train the weights of one process with the joint batch."""
    # 30 samples leave a shorter last batch on both ranks; a table needs all of them.
    samples = SAMPLES if subject.indexed else SAMPLES - 2
    setting = replace(_DOUBLE, samples=samples)
    changes = subject.case.joint if subject.cls.semantics == "local" else None
    ranks = subject.rank_outcomes(setting, changes)[0]
    joint = subject.outcome(replace(setting, batch=2 * BATCH), changes)
    declared = f"declared {subject.cls.semantics!r}" if changes is None else f"with {changes}"
    _compare(
        subject,
        ranks,
        joint,
        f"{declared}, but two ranks with batches of {BATCH} do not train what one process with "
        f"batches of {2 * BATCH} trains",
        "bring batch statistics together with `step.comm` before anything that is not linear, "
        "or declare 'local' where the method is defined per rank",
    )
    for key, value in joint.metrics.items():
        logged = ranks.metrics.get(key, float("nan"))
        # Log values are kept in float32.
        if key.startswith("reg/") and not abs(logged - value) <= 1e-4 * max(1.0, abs(value)):
            raise subject.fail(
                f"{declared}, but two ranks log `{key}` = {logged:.6g} where one process with "
                f"the joint batch logs {value:.6g}"
            )


def accumulation(subject: Subject) -> None:
    """N accumulated micro-batches train the weights of one batch that is N times as large."""
    micro = subject.outcome(replace(_DOUBLE, accumulate=2))
    whole = subject.outcome(replace(_DOUBLE, batch=2 * BATCH))
    _compare(
        subject,
        micro,
        whole,
        f"two accumulated micro-batches of {BATCH} do not train what one batch of {2 * BATCH} "
        "trains",
        "act once per optimizer step, or declare the exemption 'accumulation' with the reason "
        "why the method is defined per micro-batch",
    )


def precision(subject: Subject) -> None:
    """bf16 and fp16 with a scaled loss change what is trained by rounding only."""
    full = _effect(subject, PLAIN)
    size = float(full.norm())
    for kind in ("bf16-mixed", "16-mixed"):
        setting = Setting(precision=kind)
        noise = float((_trace(subject, subject.baseline(setting)) - _base(subject, PLAIN)).norm())
        half = _effect(subject, setting)
        off = float((half - full).norm())
        allowed = _PRECISION_SHARE * size + _PRECISION_NOISE * noise
        if not off <= allowed:
            raise subject.fail(
                f"under {kind} the technique moves the weights by {float(half.norm()):.3g}, in "
                f"float32 by {size:.3g}, and the two moves are {off:.3g} apart; rounding explains "
                f"{allowed:.3g}. The effective strength must not depend on the precision: compute "
                "in float32, and never from scaled losses or gradients"
            )


def rank_difference(subject: Subject, one: Outcome, other: Outcome) -> str | None:
    """A sentence about the first thing that should be equal on both ranks and is not."""
    local = _statistics(subject)
    pairs: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = {
        "a parameter": (one.weights, other.weights),
        "a buffer": (_without(one.buffers, local), _without(other.buffers, local)),
        "the technique's state": (tensors_of(one.state), tensors_of(other.state)),
        "a number of the technique's state": (numbers_of(one.state), numbers_of(other.state)),
    }
    for what, (first, second) in pairs.items():
        difference = first_difference(first, second)
        if difference is not None:
            return f"{what}: {difference}"
    return None


def _compare(subject: Subject, one: Outcome, other: Outcome, problem: str, cure: str) -> None:
    tolerance = subject.case.tolerance
    worst, where = largest_gap(other.weights, one.weights)
    if not worst <= tolerance:
        raise subject.fail(
            f"{problem}: {where} is off by {worst:.3g} of the largest weight; {cure}"
        )
    states = numbers_of(other.state), numbers_of(one.state)
    if states[0].keys() != states[1].keys():
        raise subject.fail(f"{problem}: the technique's states hold different entries; {cure}")
    for name in states[0]:
        worst, _ = largest_gap({name: states[0][name]}, {name: states[1][name]})
        # Tables and counters are kept in float32, whatever the precision of the run.
        if not worst <= max(tolerance, 1e-5):
            raise subject.fail(f"{problem}: state {name} is off by {worst:.3g}; {cure}")


def _effect(subject: Subject, setting: Setting) -> Tensor:
    """What the technique changes in a run of this precision."""
    return _trace(subject, subject.outcome(setting)) - _base(subject, setting)


def _base(subject: Subject, setting: Setting) -> Tensor:
    return _trace(subject, subject.baseline(setting))


def _trace(subject: Subject, outcome: Outcome) -> Tensor:
    """All weights that a run without the technique has as well, or what a test answered."""
    if subject.kind == "test":
        return torch.cat([logits.double().flatten() for _, logits in outcome.seen])
    names = sorted(subject.baseline().weights)
    return torch.cat([outcome.weights[name].double().flatten() for name in names])


def _statistics(subject: Subject) -> set[str]:
    """BatchNorm's buffers, which DDP makes equal only in front of the next forward."""
    module = subject.module(HostOptions())
    found = set()
    for path, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            found |= {f"{path}.{name}" for name, _ in part.named_buffers()}
    return found


def _without(buffers: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: value for name, value in buffers.items() if name not in names}
