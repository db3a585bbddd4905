"""A technique class and its case, as the checks use them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lightning_reg.engine.regularizer import Regularizer, snake_case
from lightning_reg.engine.technique import Technique
from lightning_reg.testing.case import ContractCase
from lightning_reg.testing.errors import ContractError
from lightning_reg.testing.hosts import SAMPLES, HostOptions, indexed
from lightning_reg.testing.ranks import RankPair
from lightning_reg.testing.runs import Outcome, Run, Setting

Kind = Literal["callback", "test", "mixin"]
PLAIN = Setting()
# Phases whose value the engine logs.
_VALUE_PHASES = ("penalty", "perturb", "parameter_gradient")


class Subject:
    """A technique class under test, with its case; remembers the runs that checks share.

    Args:
        cls: the class.
        case: how to build it.
        ranks: the processes for two-rank checks; none is started before it is needed.
    """

    _baselines: dict[Any, Outcome] = {}

    def __init__(
        self, cls: type[Technique], case: ContractCase, ranks: RankPair | None = None
    ) -> None:
        self.cls, self.case = cls, case
        self.ranks = ranks if ranks is not None else RankPair()
        self._outcomes: dict[Any, Any] = {}

    # ------------------------------------------------------------------ what it is

    @property
    def name(self) -> str:
        """The class as messages call it."""
        return self.cls.__name__

    @property
    def kind(self) -> Kind:
        """How the technique gets into a run."""
        if self.case.mixin is not None:
            return "mixin"
        return "test" if self.case.stage == "test" else "callback"

    @property
    def manual(self) -> bool:
        """Whether the host optimizes manually, whatever the options."""
        return not self.case.host(HostOptions()).automatic_optimization

    @property
    def indexed(self) -> bool:
        """Whether batches carry the positions of their samples."""
        return "sample_index" in self.cls.needs

    def overrides(self, *phases: str) -> bool:
        """Whether the technique acts in one of ``phases``."""
        if not issubclass(self.cls, Regularizer):
            return False
        return any(getattr(self.cls, p) is not getattr(Regularizer, p) for p in phases)

    @property
    def changes_forward(self) -> bool:
        """Whether the user's own loss is computed on other inputs, weights or layers."""
        written = {"inputs", "features", "logits"} & set(getattr(self.cls, "writes", ()))
        phases = ("transform_batch", "forward_context", "on_model_ready", "project")
        return bool(written) or self.overrides(*phases)

    def log_keys(self, value: bool = False) -> list[str]:
        """The log keys that a run must show.

        Args:
            value: the key of the technique's own value, whether or not it must be there.
        """
        if self.case.logs is not None and not (value and not self.case.logs):
            return list(self.case.logs)
        name = snake_case(self.name.removesuffix("Mixin"))
        if self.kind != "mixin":
            name = getattr(self.technique(), "name", name)
        return [f"reg/{name}"] if value or self.overrides(*_VALUE_PHASES) else []

    def fail(self, problem: str) -> ContractError:
        """The error of a check; ``problem`` says what was measured and what that means."""
        return ContractError(self.name, problem)

    # ------------------------------------------------------------------ parts of a run

    def technique(self, **changes: Any) -> Regularizer | None:
        """A fresh technique; ``None`` for a mixin, which lives in the module."""
        if self.kind == "mixin":
            return None
        return self.cls(**{**self.case.args, **changes})  # type: ignore[return-value]

    def module(self, options: HostOptions, **changes: Any) -> pl.LightningModule:
        """A fresh module, with the mixin if the technique is one."""
        if self.case.mixin is not None:
            return self.case.mixin(options, {**self.case.args, **changes})
        return self.case.host(options)

    def dataset(self, setting: Setting) -> Dataset[Any]:
        """The training set of a run."""
        data: Dataset[Any] = self.case.host(setting.options).dataset(setting.options)
        if setting.samples < SAMPLES:
            data = Subset(data, range(setting.samples))
        return data if self.case.dataset is None else self.case.dataset(data)

    def run(
        self,
        setting: Setting = PLAIN,
        *,
        changes: Mapping[str, Any] | None = None,
        technique: Regularizer | None = None,
        module: pl.LightningModule | None = None,
        before: Sequence[Callback] = (),
        after: Sequence[Callback] = (),
        loader: Callable[..., Any] = DataLoader,
        **settings: Any,
    ) -> Run:
        """A run with the technique, not yet started.

        Args:
            setting: how to train.
            changes: to the case's arguments.
            technique: one that exists already.
            module: one that exists already.
            before: callbacks in front of the technique.
            after: callbacks behind it.
            loader: the class of the loader.
            settings: passed on to :class:`Run`.
        """
        changes = dict(changes or {})
        module = self.module(setting.options, **changes) if module is None else module
        technique = self.technique(**changes) if technique is None else technique
        own = [] if technique is None else [technique]
        callbacks = [*before, *own, *self.case.companions(), *after]
        data = self.dataset(setting)
        # Without a technique nobody takes the positions off again.
        data = indexed(data, setting.options) if self.indexed else data
        data = _loaded(data, setting, loader, settings.get("distributed", False))
        return Run(module, data, setting, technique, callbacks, stage=self.case.stage, **settings)

    def bare(
        self,
        setting: Setting = PLAIN,
        *,
        after: Sequence[Callback] = (),
        loader: Callable[..., Any] = DataLoader,
        **settings: Any,
    ) -> Run:
        """The same run without the technique, not yet started."""
        module = self.case.host(setting.options)
        callbacks = [*self.case.companions(), *after]
        data = _loaded(self.dataset(setting), setting, loader, False)
        return Run(module, data, setting, None, callbacks, stage=self.case.stage, **settings)

    # ------------------------------------------------------------------ results

    def outcome(
        self, setting: Setting = PLAIN, changes: Mapping[str, Any] | None = None
    ) -> Outcome:
        """The outcome with the technique; each setting is trained once."""
        key = (setting, repr(changes))
        if key not in self._outcomes:
            self._outcomes[key] = self.run(setting, changes=changes).go()
        outcome: Outcome = self._outcomes[key]
        return outcome

    def baseline(self, setting: Setting = PLAIN) -> Outcome:
        """The outcome without the technique; each host's is trained once for all subjects."""
        case = self.case
        key = (case.host, case.dataset, case.companions, case.stage, setting)
        if key not in self._baselines:
            self._baselines[key] = self.bare(setting).go()
        return self._baselines[key]

    def rank_outcomes(
        self, setting: Setting, changes: Mapping[str, Any] | None = None
    ) -> list[Outcome]:
        """The outcomes of two ranks with the technique."""
        key = ("ranks", setting, repr(changes))
        if key not in self._outcomes:
            self._outcomes[key] = self.on_ranks(_train_on_rank, setting, changes)
        outcomes: list[Outcome] = self._outcomes[key]
        return outcomes

    def on_ranks(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the module-level ``function(subject, *args)`` returns on each of two ranks."""
        # Only what a run needs: `expected` and `gradcheck` may be lambdas.
        case = replace(self.case, expected=None, gradcheck=None, bad=(), bad_late=())
        try:
            job = pickle.dumps((self.cls, case, function, args))
        except Exception as error:
            raise self.fail(
                f"the case cannot be sent to the rank processes ({error}): `host`, `dataset`, "
                "`companions`, `mixin` and the values of `args` have to be module-level functions "
                "and picklable objects"
            ) from error
        return [pickle.loads(answer) for answer in self.ranks.run(_call_on_rank, job)]


def _call_on_rank(job: bytes) -> bytes:
    """Call the function that :meth:`Subject.on_ranks` sent."""
    cls, case, function, args = pickle.loads(job)
    # By value: tensors that are sent through shared memory keep a file open each.
    return pickle.dumps(function(Subject(cls, case), *args))


def _train_on_rank(
    subject: Subject, setting: Setting, changes: Mapping[str, Any] | None
) -> Outcome:
    return subject.run(setting, changes=changes, distributed=True).go()


def _loaded(
    data: Dataset[Any], setting: Setting, loader: Callable[..., Any], distributed: bool
) -> Any:
    if distributed and not setting.shuffle:
        # The Trainer's own sampler shuffles, whatever the loader does.
        sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=False)
        return loader(data, batch_size=setting.batch, sampler=sampler)
    return loader(data, batch_size=setting.batch, shuffle=setting.shuffle)
