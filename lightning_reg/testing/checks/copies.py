"""Can the technique, and a module under its hands, be copied, pickled and written to YAML?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.utils import parametrize

from lightning_reg.engine.memory import take_index
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.testing.hosts import ClassifierHost
from lightning_reg.testing.runs import quiet
from lightning_reg.testing.snapshot import effective_weights, equal, first_difference
from lightning_reg.testing.subject import Subject


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


_WAYS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": _pickled}


def copies(subject: Subject) -> None:
    """Deep copies and pickles of it and of the module, before and during a run, are good."""
    if subject.kind != "mixin":
        for how, duplicate in _WAYS.items():
            _check_fresh(subject, how, duplicate)
    copying = _Copying(subject)
    subject.run(after=[copying]).go()
    if copying.problem is not None:
        raise subject.fail(copying.problem)
    if not copying.done:
        raise subject.fail("the run ended before its second batch, where copies are made")


def yaml(subject: Subject) -> None:
    """It loads from a LightningCLI config with its arguments, and is written back the same."""
    arguments = subject.case.args if subject.case.yaml is None else subject.case.yaml
    path = f"{subject.cls.__module__}.{subject.cls.__qualname__}"
    entry = {"class_path": path, "init_args": dict(arguments)}
    try:
        first, text = _from_config({"trainer": {"logger": False, "callbacks": [entry]}})
        second, _ = _from_config(_loaded(text))
    except (SystemExit, Exception) as error:
        if isinstance(error, ImportError) and "jsonargparse" in str(error):
            raise
        raise subject.fail(
            f"a LightningCLI config with the callback {entry} fails: {error}. Annotate the "
            "constructor's arguments with types that YAML can say, or give the case `yaml`"
        ) from error
    # `yaml` says in YAML's words what `args` says in Python's.
    wanted = subject.cls(**subject.case.args)
    for callbacks in (first, second):
        found = next((c for c in callbacks if type(c) is subject.cls), None)
        for name, value in vars(wanted).items():
            loaded = vars(found).get(name)
            if not equal(value, loaded):
                raise subject.fail(
                    f"`{name}` is {value!r} when made in Python and {loaded!r} when made from "
                    "the same arguments in YAML"
                )


# ---------------------------------------------------------------------- copies


def _check_fresh(subject: Subject, how: str, duplicate: Callable[[Any], Any]) -> None:
    technique = subject.technique()
    try:
        twin = duplicate(technique)
    except Exception as error:
        raise subject.fail(f"{how} of it fails with {type(error).__name__}: {error}") from error
    outcome = subject.run(technique=twin).go()
    expected = subject.outcome()
    difference = first_difference(expected.weights, outcome.weights)
    if difference is not None or not equal(expected.state, outcome.state):
        raise subject.fail(
            f"a copy of it by {how} trains something else than itself: "
            f"{difference or 'its state differs'}"
        )


class _Copying(Callback):
    """Copies everything in front of the second batch.

    Args:
        subject: whose run this is.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.done = False
        self.problem: str | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In a fit."""
        self._copy(trainer, pl_module, batch, batch_idx)

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """In a test."""
        self._copy(trainer, pl_module, batch, batch_idx)

    def _copy(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != 1:
            return
        self.done = True
        # Torch itself refuses to pickle a parametrized module.
        bound = any(parametrize.is_parametrized(part) for part in module.modules())
        for how, duplicate in _WAYS.items():
            try:
                found = [self._of_technique(c, duplicate) for c in self._techniques(trainer)]
                if how == "deepcopy" or not bound:
                    found.append(_of_module(module, duplicate(module), batch))
            except Exception as error:
                found = [f"fails with {type(error).__name__}: {error}"]
            for problem in filter(None, found):
                self.problem = self.problem or f"{how} during a run: {problem}"

    def _techniques(self, trainer: pl.Trainer) -> list[Regularizer]:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if type(c) is self.subject.cls and isinstance(c, Regularizer)]

    @staticmethod
    def _of_technique(technique: Regularizer, duplicate: Callable[[Any], Any]) -> str | None:
        twin = duplicate(technique)
        if getattr(twin, "_pipeline", None) is not None:
            return "the copy of the technique still belongs to the run"
        if not equal(dict(technique.state_dict()), dict(twin.state_dict())):
            return "the copy of the technique has another state"
        return None


def _of_module(module: Any, twin: Any, batch: Any) -> str | None:
    names = [name for name, _ in module.named_parameters()]
    weights = effective_weights(module, names), effective_weights(twin, names)
    difference = first_difference(*weights)
    if difference is not None:
        return f"the copy of the module has other weights: {difference}"
    losses = [_loss(m, batch) for m in (module, twin)]
    if not equal(*losses):
        return f"the copy of the module computes the loss {losses[1]} and the module {losses[0]}"
    return None


def _loss(module: Any, batch: Any) -> Any:
    if not hasattr(module, "compute"):
        return None
    # On a copy of the buffers' values: BatchNorm counts what it sees.
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        loss = module.compute(take_index(batch)[0])[0].detach().clone()
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])
    return loss


# ---------------------------------------------------------------------- YAML


def _from_config(config: Mapping[str, Any]) -> tuple[list[Any], str]:
    """The callbacks that LightningCLI makes of a config, and the config as it writes it."""
    try:
        from lightning.pytorch.cli import LightningCLI
    except ImportError as error:
        raise ImportError(_NEEDS_CLI) from error
    try:
        with quiet():
            cli = LightningCLI(
                ClassifierHost,
                run=False,
                save_config_callback=None,  # type: ignore[arg-type]
                seed_everything_default=False,
                auto_configure_optimizers=False,
                parser_kwargs={"exit_on_error": False},
                args=dict(config),
            )
    except ModuleNotFoundError as error:
        raise ImportError(_NEEDS_CLI) from error
    return list(cli.trainer.callbacks), str(cli.parser.dump(cli.config))  # type: ignore[attr-defined]


_NEEDS_CLI = (
    "the check 'yaml' goes through LightningCLI, which needs jsonargparse. "
    'Try: pip install "jsonargparse[signatures]"'
)


def _loaded(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = import_module("yaml").safe_load(text)
    return loaded
