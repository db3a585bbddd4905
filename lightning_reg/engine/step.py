"""What a technique sees of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.capture import FORWARD
from lightning_reg.engine.errors import MissingSignalError, RegularizationError
from lightning_reg.engine.memory import take_index
from lightning_reg.engine.run_context import RunContext
from lightning_reg.engine.seen import Features, kind_of
from lightning_reg.engine.signals import (
    SignalReader,
    Source,
    default_path,
    logits_of,
    missing,
    read_path,
    write_path,
)
from lightning_reg.engine.split_work import Cost, Share

if TYPE_CHECKING:
    from lightning_reg.engine.pipeline import TrainingStepPipeline
    from lightning_reg.engine.regularizer import Regularizer


class Step(RunContext):
    """One micro-batch on its way through the training step.

    Signals are looked up when a technique asks for them, for that technique; see
    :class:`Signals` for the order. Logits and features come in float32 at least, so that the
    mathematics of a technique is the same under mixed precision.
    """

    hook = "training_step"

    def __init__(self, pipeline: TrainingStepPipeline, batch: Any, batch_idx: int) -> None:
        super().__init__(pipeline)
        self.batch, self._index = take_index(batch)
        self.batch_idx = batch_idx
        self.outputs: Any = None
        self.loss: Tensor | None = None
        self.is_rerun = False
        self.evaluating = False  # a technique asks networks in eval mode: noise stays away
        self.target_distribution: Tensor | None = None
        self.mixes: list[tuple[Tensor, Tensor]] = []
        self.mixers: list[Regularizer] = []
        self.is_mixed = False  # whether samples are mixed, whatever their labels are
        self.records: Mapping[str, list[Any]] = {}
        self.given: Mapping[str, Any] = {}
        self.replaces: set[str] = set()
        self.kept: dict[str, Any] = {}  # by technique, until the last pass
        self.joint_counts: dict[str, Tensor] = {}  # of the first pass's means, by technique
        self.replay: tuple[Any, Any, tuple[Any, ...], dict[str, Any]] | None = None
        self._asking: Regularizer | None = None
        # Which samples of the micro-batch these are, of how many: see `part`.
        self.rows: Tensor | None = None
        self.whole_size = 0

    # ------------------------------------------------------------------ signals

    def asked_by(self, technique: Regularizer) -> Step:
        """Look signals up for ``technique`` from now on."""
        self._asking = technique
        return self

    @property
    def inputs(self) -> Any:
        """The model's input; assign to replace it in the batch the user's step gets."""
        return self._signal("inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._write("inputs", value)

    @property
    def targets(self) -> Any:
        """The labels as the user's step gets them; assign to replace them."""
        return self._signal("targets")

    @targets.setter
    def targets(self, value: Any) -> None:
        self._write("targets", value)

    @property
    def sample_index(self) -> Tensor | None:
        """The dataset index of each sample, or ``None`` without an ``IndexedDataset``."""
        if self._index is not None:
            return self._index
        found = self._find("sample_index")
        return None if found is None else torch.as_tensor(found)

    @property
    def domain(self) -> Tensor:
        """The group of each sample."""
        value: Tensor = self._signal("domain")
        return value

    @property
    def logits(self) -> Tensor:
        """The captured scores, in float32 or float64."""
        return full_precision(self._signal("logits"))

    @property
    def features(self) -> Features:
        """The captured output of a layer: ``step.features["encoder"]``."""
        return Features(self)

    def find(self, signal: str) -> Any:
        """A signal that may be absent: its value, or ``None`` if no usual place holds it."""
        return self._find(signal)

    def given_signal(self, name: str) -> Any:
        """A signal that the user handed to ``self.regularize(loss, name=...)``."""
        if name in self.given:
            return self.given[name]
        raise missing(self._owner(), name, self, self._seen())

    def feature(self, layer: str, *, as_captured: bool = False) -> Tensor:
        """What ``layer`` returned in this step, in float32 at least.

        Args:
            layer: the name of a submodule, ``"outputs.<key>"``, or a name in ``features=``.
            as_captured: in the type in which it was captured; a copy in float32 is no ancestor of
                the loss, so only the tensor itself can be differentiated by.
        """
        value = self._feature(layer)
        if not isinstance(value, Tensor):
            raise MissingSignalError(
                self._owner(),
                f"needs the output of layer {layer!r} as one tensor and saw {kind_of(value)} "
                f"in the first {self.hook}. "
                f"Seen: {'; '.join(self._seen()) or 'no call of a submodule'}",
                cure=f'layer="<the name of a submodule that {self.hook} calls once>"',
            )
        return value if as_captured else full_precision(value)

    @property
    def padding(self) -> Tensor | None:
        """True for samples that a DistributedSampler repeated to fill up the last batch."""
        index = self.sample_index
        if index is None:
            return None
        size = len(index) if self.rows is None else self.whole_size
        repeated = self._pipeline.padding(self.batch_idx, size)
        return repeated if repeated is None or self.rows is None else repeated[self.rows]

    # ------------------------------------------------------------------ acting

    def mix_targets(self, permutation: Tensor, lam: Tensor) -> None:
        """Sample i keeps the share ``lam[i]`` of its label and takes the rest of its partner's.

        Class indices stay in the batch, so that the user's metrics go on counting them; the loss
        is computed from the mixed distribution. Float targets are mixed in the batch.
        """
        targets = self.targets
        self.is_mixed = True
        if isinstance(targets, Tensor) and targets.is_floating_point():
            weight = lam.to(targets).view(-1, *[1] * (targets.ndim - 1))
            self.targets = weight * targets + (1 - weight) * targets[permutation]
        else:
            self.mixes.append((permutation, lam))
            assert self._asking is not None
            self.mixers.append(self._asking)

    def rng(
        self, technique: Regularizer, shared: bool = False, per: str = "micro_batch"
    ) -> torch.Generator:
        """A fresh generator on the module's device for one draw of ``technique``.

        Args:
            technique: whose stream.
            shared: the same on all ranks (noise on parameters), or one stream a rank.
            per: ``"micro_batch"``, or ``"step"`` for the same draw in every micro-batch of one
                optimizer step.
        """
        if per not in ("micro_batch", "step"):
            raise ValueError(f'`per` must be "micro_batch" or "step", got {per!r}')
        count = (self.global_step,) if per == "step" else (self.epoch, self.batch_idx)
        return self._pipeline.generator(technique.name, shared, per, *count)

    def rerun(
        self,
        read: Callable[[], Tensor] | None = None,
        look: Callable[[], object] | None = None,
        fresh: torch.Generator | None = None,
    ) -> Tensor:
        """Phases 2 to 4 once more with weights and batch as they are now; returns the new loss.

        Same random numbers; logs are silent; metrics and buffers (BatchNorm) do not count it.

        Args:
            read: phase 2 alone: what this makes of the new outputs is returned.
            look: called at the end, while signals are those of this run.
            fresh: other random numbers for torch's global generators (dropout), of this stream.
        """
        return self._pipeline.rerun(self, read, look, fresh)

    def part(self, rows: Tensor) -> Step:
        """The samples ``rows`` of this micro-batch as a step of their own, to be re-run.

        Of everything in the batch that has one entry a sample, it holds those of ``rows``. Call
        :meth:`forget` on it.
        """
        return self._pipeline.part(self, rows)

    def forget(self) -> None:
        """Drop what :meth:`rerun` needs, once no more re-run comes."""
        self.replay = None

    def drop_outputs(self) -> None:
        """Keep no more than :meth:`rerun` needs, of a step that outlives its micro-batch."""
        self.outputs, self.loss, self.records, self.target_distribution = None, None, {}, None

    def share(self, weights: Mapping[str, torch.nn.Parameter], cost: Cost) -> Share:
        """This rank's part of a term of the loss, where only the mean over ranks matters."""
        return Share(weights, self.comm if self._pipeline.splits_loss() else None, cost)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the Trainer's optimizers update."""
        return self._pipeline.trainable_parameters()

    # ------------------------------------------------------------------ look-up

    def _owner(self) -> Any:
        return self._asking if self._asking is not None else "lightning_reg"

    def _reader(self) -> SignalReader | None:
        return None if self._asking is None else self._pipeline.reader(self._asking)

    def _source(self, signal: str) -> Source | None:
        reader = self._reader()
        return None if reader is None else reader.source(signal)

    def _signal(self, signal: str) -> Any:
        value = self._find(signal)
        if value is None:
            raise missing(self._owner(), signal, self, self._seen())
        return value

    def _find(self, signal: str) -> Any:
        if self.given.get(signal) is not None:
            return self.given[signal]
        source = self._source(signal)
        if source is not None:
            return self._from_source(signal, source)
        if isinstance(self.outputs, Mapping) and signal in self.outputs:
            return self.outputs[signal]
        if signal == "logits":
            return self._default_logits()
        path = default_path(self.batch, signal)
        if path is not None:
            return read_path(self.batch, path)
        return self.batch if signal == "inputs" and isinstance(self.batch, Tensor) else None

    def _from_source(self, signal: str, source: Source) -> Any:
        if callable(source):
            return source(self)
        if source == "forward":
            return self._single_call(FORWARD, signal)
        place, _, path = source.partition(".")
        if place == "module":
            return self._single_call(path, signal)
        container = {"batch": self.batch, "outputs": self.outputs}.get(place)
        try:
            return read_path(container, path)
        except KeyError as error:
            raise MissingSignalError(
                self._owner(),
                f"`{signal}` was to be found at {source!r}, but there is no {error.args[0]!r}. "
                f"The batch is {kind_of(self.batch)}, {self.hook} returned {kind_of(self.outputs)}",
                cure=f'signals=Signals({signal}="batch.<key>")',
            ) from error

    def _single_call(self, name: str, signal: str) -> Any:
        calls = self.records.get(name, [])
        if len(calls) == 1:
            return logits_of(calls[0]) if signal == "logits" else calls[0]
        where = f"submodule {name!r}" if name else "the module's forward"
        raise MissingSignalError(
            self._owner(),
            f"takes `{signal}` from {where}, which the first {self.hook} called "
            f"{len(calls)} times instead of once. Seen: {'; '.join(self._seen())}",
            cure=f'return {{"loss": loss, "logits": logits}} from {self.hook}',
        )

    def _default_logits(self) -> Tensor | None:
        if self.records.get(FORWARD):
            return self._single_call(FORWARD, "logits")  # type: ignore[no-any-return]
        called = [name for name in self.records if "." not in name and name]
        found = [name for name in called if len(self.records[name]) == 1]
        # Without a call of forward, a single network that was called once is not ambiguous.
        if len(called) == 1 and found and self._is_scores(logits_of(self.records[found[0]][0])):
            return logits_of(self.records[found[0]][0])
        return None

    @staticmethod
    def _is_scores(value: Tensor | None) -> bool:
        return value is not None and value.ndim >= 2

    def _feature(self, layer: str) -> Any:
        if isinstance(self.given.get("features"), Mapping) and layer in self.given["features"]:
            return self.given["features"][layer]
        if isinstance(self.given.get("features"), Tensor):
            return self.given["features"]
        if layer.startswith("outputs."):
            return self._from_source("features", layer)
        calls = self.records.get(layer, [])
        return calls[0] if len(calls) == 1 else calls

    def _write(self, signal: str, value: Any) -> None:
        source = self._source(signal)
        if isinstance(source, str) and source.startswith("batch."):
            self.batch = write_path(self.batch, source[len("batch.") :], value)
            return
        path = default_path(self.batch, signal)
        if path is not None:
            self.batch = write_path(self.batch, path, value)
        elif signal == "inputs" and isinstance(self.batch, Tensor):
            self.batch = value
        else:
            raise RegularizationError(
                self._owner(),
                f"changes `{signal}`, which must then lie in the batch; it comes from {source!r}",
                cure=f'signals=Signals({signal}="batch.<key>")',
            )

    def _seen(self) -> list[str]:
        lines = []
        for name, calls in self.records.items():
            label = f"module.{name}" if name else "forward"
            shapes = ", ".join(kind_of(call) for call in calls[:3])
            lines.append(f'"{label}" -> {shapes}' + (" ..." if len(calls) > 3 else ""))
        return lines


def full_precision(value: Tensor) -> Tensor:
    """``value`` in float32 where it is a half-precision float; gradients pass."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


__all__ = ["RunContext", "Step", "full_precision"]
