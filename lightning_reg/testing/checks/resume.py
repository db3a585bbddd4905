"""Does a run that was stopped inside an epoch go on as if it had not been?"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from lightning_reg.engine.errors import RegularizationError
from lightning_reg.engine.exact_resume import ExactResume
from lightning_reg.testing.hosts import BATCH
from lightning_reg.testing.runs import Outcome, Setting
from lightning_reg.testing.snapshot import equal, first_difference, same_bits
from lightning_reg.testing.subject import Subject

_STOP = 2


def resume(subject: Subject) -> None:
    """A run resumed inside an epoch trains the same bits; a state that is missing is refused."""
    windows = [1] if subject.manual else [1, 2]
    for accumulate in windows:
        batch = BATCH // accumulate
        setting = Setting(batch=batch, epochs=2, accumulate=accumulate, shuffle=True)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "stopped.ckpt")
            whole = _train(subject, setting, SaveAt(_STOP, path))
            again = _train(subject, setting, ckpt_path=path)
        _compare(subject, whole, again, f"of {accumulate} micro-batches")
    if whole.state:
        _check_on_ranks(subject)
    if subject.kind == "callback" and whole.state:
        _check_missing_state(subject)


class SaveAt(Checkpoint):
    """Writes one checkpoint, behind all other callbacks.

    Args:
        step: after which optimizer step.
        path: where.
    """

    def __init__(self, step: int, path: str) -> None:
        super().__init__()
        self.step, self.path = step, path
        self._done = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Write when the time has come."""
        if trainer.global_step >= self.step and not self._done:
            self._done = True
            trainer.save_checkpoint(self.path)


def _train(
    subject: Subject,
    setting: Setting,
    *after: Any,
    distributed: bool = False,
    ckpt_path: str | None = None,
) -> Outcome:
    callbacks = [ExactResume(), *after]
    run = subject.run(setting, after=callbacks, loader=_loader(), distributed=distributed)
    return run.go(ckpt_path=ckpt_path)


def _check_on_ranks(subject: Subject) -> None:
    """A state that lives on two ranks comes back whole on both."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stopped.ckpt")
        for rank, (whole, again) in enumerate(subject.on_ranks(_resume_on_rank, path)):
            _compare(subject, whole, again, f"on rank {rank} of two")


def _resume_on_rank(subject: Subject, path: str) -> tuple[Outcome, Outcome]:
    setting = Setting(batch=BATCH // 2, epochs=2)
    whole = _train(subject, setting, SaveAt(_STOP, path), distributed=True)
    return whole, _train(subject, setting, distributed=True, ckpt_path=path)


def _compare(subject: Subject, whole: Outcome, again: Outcome, how: str) -> None:
    where = f"stopped after {_STOP} optimizer steps {how} and resumed"
    for what in ("weights", "buffers"):
        difference = first_difference(getattr(whole, what), getattr(again, what))
        if difference is not None:
            raise subject.fail(
                f"{where}, it trains other {what}: {difference}. What a technique remembers "
                "belongs into `state_dict`, and references are not taken again on a resume"
            )
    optimizers = whole.optimizer, again.optimizer
    if len(optimizers[0]) != len(optimizers[1]) or not all(map(same_bits, *optimizers)):
        raise subject.fail(f"{where}, the optimizer's momentum is not that of an unbroken run")
    if not equal(whole.state, again.state):
        raise subject.fail(f"{where}, the technique's state is not that of an unbroken run")
    values = [{k: v for k, v in o.metrics.items() if k.startswith("reg/")} for o in (whole, again)]
    if not equal(*values):
        raise subject.fail(f"{where}, it logs {values[1]} where an unbroken run logs {values[0]}")


def _check_missing_state(subject: Subject) -> None:
    setting = Setting(epochs=2)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bare.ckpt")
        subject.bare(setting, after=[SaveAt(_STOP, path)]).go()
        try:
            subject.run(setting).go(ckpt_path=path)
        except RegularizationError as error:
            if subject.name in str(error) and "state" in str(error):
                return
            raise
        except (ValueError, RuntimeError):
            # Where the technique adds parameters, the optimizer's state does not fit either.
            pass
    raise subject.fail(
        "it has a state, and resuming from a checkpoint without that state was not refused. A "
        "`state_dict` that is empty before the fit begins hides that it has one"
    )


def _loader() -> Any:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise ImportError(
            "the check 'resume' stops inside an epoch, for which the loader has to know its "
            "position. Try: pip install torchdata"
        ) from error
    return StatefulDataLoader
