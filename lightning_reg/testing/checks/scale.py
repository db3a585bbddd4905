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

_STRATEGIES = ("ddp", "ddp_reg")
_DOUBLE = Setting(precision="64-true", epochs=2)
# What a technique changes is the difference of two runs, each with the rounding errors that the
# run without it shows too: twice that noise, doubled again for those that the technique makes
# larger, and two hundredths for the effect's own rounding. (Seen: 1 to 2 times the noise.) A
# forgotten loss scale is off by a factor of a thousand, a technique that is lost by all of it.
_PRECISION_SHARE = 0.02
_PRECISION_NOISE = 4.0


def replicas(subject: Subject) -> None:
    """After training on two ranks all weights and all states are bit-equal."""
    accumulate = 1 if subject.manual or subject.kind == "test" else 2
    setting = Setting(batch=BATCH // 2, accumulate=accumulate, epochs=2, shuffle=True)
    for strategy in _STRATEGIES:
        outcomes = subject.rank_outcomes(replace(setting, strategy=strategy))
        difference = rank_difference(subject, *outcomes)
        if difference is None:
            continue
        raise subject.fail(
            f"after training on two ranks under {strategy} they disagree in {difference}. Draw "
            "noise on weights from a shared stream, and bring statistics together with `step.comm`"
        )


def semantics(subject: Subject) -> None:
    """Two ranks with batch B train the weights of one process with the joint batch."""
    # 30 samples leave a shorter last batch on both ranks; a table needs all of them.
    samples = SAMPLES if subject.indexed else SAMPLES - 2
    setting = replace(_DOUBLE, samples=samples)
    changes = subject.case.joint
    joint = subject.outcome(replace(setting, batch=2 * BATCH), changes)
    for strategy in _STRATEGIES:
        ranks = subject.rank_outcomes(replace(setting, strategy=strategy), changes)[0]
        claim = f"with {changes}" if changes else f"declared {subject.cls.semantics!r}"
        _compare(
            subject,
            ranks,
            joint,
            f"{claim}, but two ranks under {strategy} with batches of {BATCH} do not train what "
            f"one process with batches of {2 * BATCH} trains",
            "bring batch statistics together with `step.comm` before anything that is not "
            "linear, or declare 'local' where the method is defined per rank",
        )
        _compare_logs(subject, ranks, joint, f"{claim}, but two ranks under {strategy}")


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
    for kind, fused in (("bf16-mixed", False), ("16-mixed", False), ("16-mixed", True)):
        setting = Setting(options=HostOptions(fused=fused), precision=kind)
        noise = float((_trace(subject, subject.baseline(setting)) - _base(subject, PLAIN)).norm())
        half = _effect(subject, setting)
        off = float((half - full).norm())
        allowed = _PRECISION_SHARE * size + _PRECISION_NOISE * noise
        if not off <= allowed:
            raise subject.fail(
                f"under {kind}{' with a fused optimizer' * fused} the technique moves the weights "
                f"by {float(half.norm()):.3g}, in float32 by {size:.3g}, and the two moves are "
                f"{off:.3g} apart; rounding explains {allowed:.3g}. The effective strength must "
                "not depend on the precision: compute in float32, and never from scaled losses or "
                "gradients"
            )
        if kind == "16-mixed" and not allowed < size:
            raise subject.fail(
                f"it moves the weights by {size:.3g} only, which rounding alone can do "
                f"({allowed:.3g}): give the case stronger `args`"
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


def _compare_logs(subject: Subject, ranks: Outcome, joint: Outcome, claim: str) -> None:
    for key, value in joint.metrics.items():
        logged = ranks.metrics.get(key, float("nan"))
        # Log values are kept in float32.
        if key.startswith("reg/") and not abs(logged - value) <= 1e-4 * max(1.0, abs(value)):
            raise subject.fail(
                f"{claim} log `{key}` = {logged:.6g} where one process with the joint batch logs "
                f"{value:.6g}"
            )


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
