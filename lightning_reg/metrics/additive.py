"""Metrics whose state has a fixed size and adds up over batches and ranks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_reg.engine.errors import ArgumentError

_PLAIN = (bool, int, float, str, type(None))


class AdditiveMetric(Metric):
    """Base of all metrics here: counts and sums that batches and ranks add to.

    A subclass adds states with :meth:`add_count` and :meth:`add_total`, adds a batch to them in
    ``update``, in place if it likes, and reads them in :meth:`value`. The base takes care of

    - exactness: counts are int64 (float32 counts stop at 2^24) and sums float64, whatever
      ``half()`` or ``set_dtype`` ask for. MPS has no float64: moved there, sums go on in float32.
    - ranks: one all-reduce for all states together, in float64 (counts are exact up to 2^53),
      on a device that the process group can reach, whatever the number of samples.
    - autograd: ``update`` runs without it, in ``forward`` too.
    - mistakes: a batch that is refused leaves the state as it was; a state of another shape, or
      of other settings, is neither loaded nor merged.
    - ``MetricCollection``: metrics share an ``update`` only where they count the same
      (:meth:`update_settings`), and not because both are still at zero.
    - what cannot be counted: rows with NaN or infinity go into ``invalid``, and ``compute`` says
      how many there were.

    Args:
        kwargs: those of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    function: Callable[..., Any] | None = None
    invalid: Tensor
    settings_key: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_count("invalid")
        self.add_state("settings_key", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="max")

    def add_count(self, name: str, *shape: int) -> None:
        """A state of int64 counts."""
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def add_total(self, name: str, *shape: int) -> None:
        """A state of float64 sums."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def value(self) -> Any:
        """The result from the states as they are: of all ranks only within ``sync_context()``."""
        raise NotImplementedError

    def update_settings(self) -> tuple[Any, ...]:
        """What decides how a batch is counted: class and settings.

        Metrics that read one state differently return the same here, and then share the update.
        """
        own = {k: v for k, v in vars(self).items() if not k.startswith("_") and _is_plain(v)}
        return (type(self).__qualname__, *sorted(own.items()))

    def compute(self) -> Any:
        """The result over everything that was counted, on all ranks."""
        self.warn_of_invalid()
        return self.value()

    def warn_of_invalid(self) -> None:
        """Say how many rows were left out because they held NaN or infinity."""
        if int(self.invalid):
            rank_zero_warn(
                f"{type(self).__name__}: {int(self.invalid)} predictions held NaN or infinity "
                "and were left out."
            )

    def set_dtype(self, dst_type: str | torch.dtype) -> AdditiveMetric:
        """Nothing: counts stay int64 and sums float64."""
        return self

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of the same settings has counted.

        Raises:
            ArgumentError: if its settings or the shapes of its states differ.
        """
        states: Mapping[str, Any] = (
            incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        )
        self._refuse_other_settings(states)
        self._computed = None
        super().merge_state(incoming_state)
        counted = isinstance(incoming_state, Metric)
        self._update_count += incoming_state.update_count if counted else 1  # type: ignore[union-attr]

    # ------------------------------------------------------------------ internals

    def _wrap_update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> None:
            before = self.metric_state
            try:
                with torch.no_grad():
                    self._own_states(before)
                    update(*args, **kwargs)
            except BaseException:
                for name, state in before.items():
                    setattr(self, name, state)
                self._update_count -= 1
                raise
            self.settings_key = self._own_key()

        counted.__doc__ = update.__doc__
        return super()._wrap_update(counted)

    def _own_states(self, states: Mapping[str, Any]) -> None:
        """Copies to write into: what was read before stays, as does a state of inference mode."""
        for name, state in states.items():
            setattr(self, name, state.clone() if isinstance(state, Tensor) else list(state))

    def _own_key(self) -> Tensor:
        # By bytes, since MetricCollection compares states by a relative tolerance.
        key = zlib.crc32(repr(self.update_settings()).encode()).to_bytes(4, "big")
        return torch.tensor(list(key), device=self.settings_key.device)

    def _forward_reduce_state_update(self, *args: Any, **kwargs: Any) -> Any:
        # torchmetrics empties the state first, and would leave it so after an error.
        states, count = self._copy_state_dict(), self._update_count
        try:
            return super()._forward_reduce_state_update(*args, **kwargs)
        except BaseException:
            for name, state in states.items():
                setattr(self, name, state)
            self._update_count = count
            self._to_sync, self._should_unsync = self.sync_on_compute, True
            self._enable_grad = False
            raise

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        group = process_group or self.process_group
        self._take_sums(_all_reduced(self._packed_sums(), dist_sync_fn, group))
        self._gather_others(dist_sync_fn, process_group)

    def _sums(self) -> list[str]:
        return [n for n, reduction in self._reductions.items() if reduction is dim_zero_sum]

    def _packed_sums(self) -> Tensor:
        return torch.cat([_in_float64(getattr(self, name)).reshape(-1) for name in self._sums()])

    def _take_sums(self, packed: Tensor) -> None:
        sums = self._sums()
        sizes = [getattr(self, name).numel() for name in sums]
        for name, part in zip(sums, packed.split(sizes), strict=True):
            own = getattr(self, name)
            part = part if own.is_floating_point() else part.round()
            setattr(self, name, part.to(own.dtype).to(own.device).view(own.shape))

    def _gather_others(self, dist_sync_fn: Callable[..., Any], process_group: Any) -> None:
        """States that do not add up, of an exact mode for example, are gathered whole."""
        every, sums = self._reductions, self._sums()
        others = {k: v for k, v in every.items() if k not in sums and k != "settings_key"}
        if not others:
            return
        self._reductions = others
        try:
            super()._sync_dist(dist_sync_fn, process_group)
        finally:
            self._reductions = every

    def _refuse_other_settings(self, states: Mapping[str, Any]) -> None:
        for name, default in self._defaults.items():
            if not isinstance(default, Tensor) or name not in states:
                continue
            if states[name].shape != default.shape:
                raise ArgumentError(
                    self,
                    f"the state `{name}` has shape {tuple(states[name].shape)} and not "
                    f"{tuple(default.shape)}",
                    cure="make both metrics with the same settings",
                )
        key = states.get("settings_key")
        if key is not None and key.any() and not torch.equal(key.cpu(), self._own_key().cpu()):
            raise ArgumentError(
                self,
                "the state was counted by another metric or with other settings",
                cure="make both metrics with the same settings",
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        found = {n: state_dict[prefix + n] for n in self._defaults if prefix + n in state_dict}
        self._refuse_other_settings(found)
        for name, state in found.items():
            own = getattr(self, name)
            if isinstance(own, Tensor):
                # A checkpoint may come from another device, or be written to once it is loaded.
                state_dict[prefix + name] = state.to(own.device, own.dtype, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if found:
            self._computed = None
            self._update_count = max(self._update_count, 1)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Any:
        try:
            return super()._apply(fn, exclude_state)
        except TypeError as error:
            if "float64" not in str(error):
                raise
            for name, default in self._defaults.items():
                if isinstance(default, Tensor) and default.dtype == torch.float64:
                    self._defaults[name] = default.float()
                    setattr(self, name, getattr(self, name).float())
            return super()._apply(fn, exclude_state)


def join_states(metrics: Iterable[AdditiveMetric]) -> None:
    """From now on, the metrics' states are those of all ranks: one all-reduce for all metrics.

    Joined ones stay as they are; one more update or join needs a ``reset()`` before.

    Args:
        metrics: counted to the end; the same on all ranks.
    """
    own = [m for m in dict.fromkeys(metrics) if not m._is_synced and _on_several_ranks(m)]
    if not own:
        return
    packed = [metric._packed_sums().to(_reachable(metric.process_group)) for metric in own]
    joint = _all_reduced(torch.cat(packed), gather_all_tensors, own[0].process_group)
    for metric, sums in zip(own, joint.split([len(p) for p in packed]), strict=True):
        metric._cache = metric._copy_state_dict()
        metric._take_sums(sums)
        metric._gather_others(gather_all_tensors, None)
        metric._is_synced = True


def evaluate(metric: AdditiveMetric, *batch: Any) -> Any:
    """The value of one batch, of this process alone: what the functional twins return."""
    metric = metric.to(next(p.device for p in tree_leaves(batch) if isinstance(p, Tensor)))
    metric.update(*batch)
    metric.warn_of_invalid()
    return metric.value()


def _on_several_ranks(metric: AdditiveMetric) -> bool:
    available = metric.distributed_available_fn
    return bool(available()) if callable(available) else False


def _all_reduced(packed: Tensor, dist_sync_fn: Callable[..., Any], group: Any) -> Tensor:
    """The sum over ranks."""
    if dist_sync_fn is not gather_all_tensors:
        gathered: Tensor = torch.stack(dist_sync_fn(packed, group=group)).sum(0)
        return gathered
    packed = packed.to(_reachable(group))
    dist.all_reduce(packed, group=group)
    return packed


def _reachable(group: Any) -> torch.device:
    """A device whose tensors the process group can send; float64 has to exist there."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _in_float64(state: Tensor) -> Tensor:
    return (state.cpu() if state.device.type == "mps" else state).double()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, _PLAIN)
