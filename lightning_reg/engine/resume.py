"""Looks at a checkpoint before anything of it is loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import fsspec  # type: ignore[import-untyped]
import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_reg.engine.errors import ArgumentError, RegularizationError

if TYPE_CHECKING:
    from lightning_reg.engine.regularizer import Regularizer


class StartAfresh(Callback):
    """Lets techniques begin in a resumed run that the checkpoint's run did without.

    Resuming with a technique whose state the checkpoint lacks is an error, since it would go on
    as if it had seen nothing. With this callback it is what was meant: the named techniques start
    from nothing, everything else goes on.

    Args:
        techniques: their class names, or their ``name`` where a class is used twice.

    Raises:
        ArgumentError: on a resume, if the Trainer has no technique of that name.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EarlyLearning
        >>> from lightning_reg.engine.resume import StartAfresh
        >>> callbacks = [EarlyLearning(3.0), StartAfresh(["EarlyLearning"])]
        >>> trainer = L.Trainer(callbacks=callbacks, logger=False)
    """

    def __init__(self, techniques: Sequence[str]) -> None:
        super().__init__()
        if isinstance(techniques, str):
            raise ArgumentError(
                self,
                f"`techniques` must be a list of names, got {techniques!r}",
                cure=f"StartAfresh([{techniques!r}])",
            )
        self.techniques = list(techniques)


def checked_load(
    trainer: pl.Trainer,
    techniques: Sequence[Regularizer],
    original: Callable[..., Any],
    checkpoint_path: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Read a checkpoint for ``trainer.fit``; refuse it as a whole, while nothing is loaded yet.

    Args:
        trainer: that resumes.
        techniques: that have to find their states.
        original: the strategy's ``load_checkpoint``.
        checkpoint_path: for ``original``.
        args: for ``original``.
        kwargs: for ``original``.

    Raises:
        RegularizationError: if the file is cut off, or lacks the state of a technique that has
            one and is not listed in a :class:`StartAfresh`.
    """
    try:
        checkpoint = original(checkpoint_path, *args, **kwargs)
    except Exception as error:
        if _whole(checkpoint_path):
            raise
        raise RegularizationError(
            "lightning_reg",
            f"the checkpoint {checkpoint_path} cannot be read: it is cut off, or no checkpoint. "
            "Nothing was loaded",
            cure="an older one: trainer.fit(model, ckpt_path=...)",
        ) from error
    _check_states(trainer, techniques, checkpoint, checkpoint_path)
    return checkpoint


def _check_states(
    trainer: pl.Trainer, techniques: Sequence[Regularizer], checkpoint: Any, path: Any
) -> None:
    excused = _excused(trainer, techniques)
    saved = checkpoint.get("callbacks", {})
    lacking = [t for t in techniques if t.state_key not in saved and t.state_dict()]
    missing = [t for t in lacking if t not in excused]
    if missing:
        names = ", ".join(t.state_key for t in missing)
        listed = ", ".join(repr(t.name) for t in missing)
        raise RegularizationError(
            names,
            f"the checkpoint {path} holds no state of this technique, so that it would go on as "
            "if it had seen nothing. Nothing was loaded. If the checkpoint was written with it, "
            "give it the same `name`. If it is to begin here, say so",
            cure=f"callbacks=[..., StartAfresh([{listed}])]",
        )
    for technique in lacking:
        rank_zero_warn(
            f"{technique.state_key}: the checkpoint holds no state of this technique, so it "
            "starts afresh, as StartAfresh says."
        )


def _excused(trainer: pl.Trainer, techniques: Sequence[Regularizer]) -> list[Regularizer]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    names = [n for c in callbacks if isinstance(c, StartAfresh) for n in c.techniques]
    for name in names:
        if not any(name in _names(technique) for technique in techniques):
            known = sorted(technique.name for technique in techniques)
            raise ArgumentError(
                "StartAfresh",
                f"the Trainer has no technique named {name!r}",
                cure=f"one of {', '.join(known)}",
            )
    return [t for t in techniques if any(name in _names(t) for name in names)]


def _names(technique: Regularizer) -> tuple[str, ...]:
    return (technique.name, type(technique).__name__, technique.state_key)


def _whole(path: Any) -> bool:
    """Whether the file is not to blame: checkpoints are zip archives, whose table comes last."""
    try:
        with fsspec.open(str(path), "rb") as file:
            return zipfile.is_zipfile(file)
    except Exception:  # a folder, a missing file, no access: the first error says more
        return True
