"""Every technique of the catalogue on two ranks, under each kind of DDP that a CPU can run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from lightning_reg.mechanisms.gradient_aggregation import GradientAggregation
from lightning_reg.strategies.ddp_reg import RegularizedDDPStrategy
from lightning_reg.testing.contract import not_run
from lightning_reg.testing.hosts import SAMPLES
from lightning_reg.testing.runs import Setting
from lightning_reg.testing.subject import Subject
from tests.strategies.drift import subjects

STRATEGIES: dict[str, Callable[[], Any]] = {
    "find_unused_parameters": lambda: "ddp_reg_find_unused_parameters_true",
    "static_graph": lambda: "ddp_reg_static_graph",
    "gradient_as_bucket_view": lambda: RegularizedDDPStrategy(gradient_as_bucket_view=True),
    "fp16_hook": lambda: RegularizedDDPStrategy(),
}
# What the hook rounds is no longer what one process trains.
EXACT = tuple(name for name in STRATEGIES if name != "fp16_hook")


class Compress(Callback):
    """Halves the bytes of DDP's messages; Lightning registers hooks on GPUs only."""

    def on_fit_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, default_hooks.fp16_compress_hook)


def setting(subject: Subject) -> Setting:
    """Double precision; 30 samples, which leave a shorter last batch on both ranks."""
    samples = SAMPLES if subject.indexed else SAMPLES - 2
    return Setting(precision="64-true", epochs=2, samples=samples)


def changes(subject: Subject) -> Any:
    """The arguments under which ranks equal one process."""
    return subject.case.joint


def is_joint(subject: Subject) -> bool:
    """Whether the technique claims to train on N ranks what one process trains."""
    return not_run(subject, "semantics") is None


def trained(variant: str) -> bytes:
    """On a rank: the outcome of each technique, or how it failed."""
    found: dict[str, Any] = {}
    for name, subject in subjects().items():
        if variant == "fp16_hook" and issubclass(subject.cls, GradientAggregation):
            # A hook of its own; the test of the mechanism sees it refuse a second one.
            continue
        strategy = STRATEGIES[variant]()
        before = [Compress()] if variant == "fp16_hook" else []
        run = subject.run(
            setting(subject),
            changes=changes(subject),
            distributed=True,
            before=before,
            trainer={"strategy": strategy},
        )
        found[name] = run.go()
    return pickle.dumps(found)


def joint(subject: Subject) -> Any:
    """The outcome of one process with the joint batch."""
    whole = setting(subject)
    return subject.outcome(replace(whole, batch=2 * whole.batch), changes(subject))
