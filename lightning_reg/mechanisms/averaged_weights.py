"""Techniques that keep an average of the weights along training, to be used in their place.

A technique says how far the average moves after an optimizer step
(:meth:`AveragedWeights.share`). The mechanism takes care of

- the average, in float32 at least, outside of the module; a step whose weights are not finite
  is left out;
- validation, test and prediction with the average, and the weights of training afterwards, bit for
  bit, after an exception too;
- checkpoints: ``state_dict`` is the average, whoever writes it; the weights of training lie beside
  it and are what a resumed run goes on with;
- the end of training, which leaves the average in the module;
- BatchNorm statistics, which belong to weights: averaged along with them, or taken anew with a
  pass over the training data of all ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, UnsupportedError
from lightning_reg.engine.patch import MethodPatch
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.update import ParameterUpdate
from lightning_reg.mechanisms.batch_norm import batch_norms, fresh_statistics

Statistics = Literal["average", "recompute", "current"]
_STATISTICS = ("average", "recompute", "current")
_RAW = "lightning_reg.raw_weights"
_BUFFERS = ("running_mean", "running_var")


class AveragedWeights(Regularizer):
    """Base of techniques with an average of the weights.

    Args:
        evaluate: validate, test and predict with the average.
        final: leave the average in the module at the end of training.
        statistics: of BatchNorm under the average: ``"average"``: their average, as of weights;
            ``"recompute"``: of a pass over the training data before each validation and at the
            end; ``"current"``: those of training.
        name: the name in checkpoints.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"weight_averaging"})
    sharded: ClassVar[bool | None] = False

    def __init__(
        self,
        *,
        evaluate: bool = True,
        final: bool = True,
        statistics: Statistics = "average",
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, name=name)
        if statistics not in _STATISTICS:
            raise ArgumentError(
                self,
                f"`statistics` must be one of {', '.join(_STATISTICS)}, got {statistics!r}",
                cure=f'{type(self).__name__}(statistics="average")',
            )
        self.evaluate = evaluate
        self.final = final
        self.statistics: Statistics = statistics
        self.count = 0
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}
        self._ended = False
        self._patch: MethodPatch | None = None

    @abstractmethod
    def share(self, update: ParameterUpdate) -> float | None:
        """How far the average moves towards the weights now; ``None`` leaves it as it is.

        :attr:`count` is the number of times it has moved; the first time it takes the weights.
        """

    # ------------------------------------------------------------------ the average

    def project(self, update: ParameterUpdate) -> None:
        """Phase 8: move the average."""
        share = self.share(update)
        if share is None:
            return
        current = self._held(update.module)
        if not self._average or self.count == 0:
            self._average = {name: _precise(value).clone() for name, value in current.items()}
            # A start that is not finite is none.
            self.count = int(all(bool(torch.isfinite(v).all()) for v in self._average.values()))
            return
        mine = [self._average[name].to(value.device) for name, value in current.items()]
        theirs = [_precise(value) for value in current.values()]
        moved = theirs if share == 1 else torch._foreach_lerp(mine, theirs, share)
        good = torch.isfinite(torch.stack(torch._foreach_norm(theirs))).all()
        for name, own, new in zip(current, mine, moved, strict=True):
            self._average[name] = torch.where(good, new, own)
        self.count += 1

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start an average; from now on checkpoints hold it."""
        if int(trainer.global_step) == 0:
            self.count, self._average = 0, {}
        self._ended, self._raw = False, {}
        self._patch = MethodPatch(
            trainer.strategy, "lightning_module_state_dict", self._state_to_save, transparent=False
        )

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse statistics that cannot be taken anew."""
        super().validate(trainer, pl_module)
        if self.statistics != "recompute" or not batch_norms(pl_module):
            return
        if not pl_module.automatic_optimization:
            raise UnsupportedError(
                self,
                "takes BatchNorm's statistics by running training_step, which optimizes by itself "
                "here",
                cure=f'{type(self).__name__}(statistics="average")',
            )

    # ------------------------------------------------------------------ in the module

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate with the average."""
        if not trainer.sanity_checking:
            self._put_in(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train on with the weights of training."""
        self._take_out(pl_module)
        super().on_validation_end(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test with the average."""
        self._put_in(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights of training back."""
        self._take_out(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Predict with the average."""
        self._put_in(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights of training back."""
        self._take_out(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the module."""
        super().on_train_end(trainer, pl_module)
        if self.final and self.count:
            self._write_average(trainer, pl_module)
            self._ended = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Put the weights of training back."""
        if not self._ended:
            self._take_out(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights of training back after an exception; let checkpoints be as they were."""
        if not self._ended:
            self._take_out(pl_module)
        self._raw = {}
        if self._patch is not None:
            self._patch.undo()
            self._patch = None

    def _put_in(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.evaluate and self.count and not self._ended and not self._raw:
            self._write_average(trainer, module)

    def _write_average(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Evaluation is in inference mode, whose tensors training could not use.
        with torch.inference_mode(False), torch.no_grad():
            held = self._held(module)
            if held.keys() != self._average.keys():
                raise UnsupportedError(
                    self,
                    "holds the average of another module",
                    cure=f"Trainer(callbacks=[{type(self).__name__}()])  # one for each module",
                )
            self._raw = {name: value.detach().clone() for name, value in held.items()}
            torch._foreach_copy_(list(held.values()), self._in_place_of(held))
            torch.clear_autocast_cache()
        if self.statistics == "recompute" and trainer.state.fn == "fit" and batch_norms(module):
            with torch.inference_mode(False):
                fresh_statistics(self, trainer, module, Communicator.of(trainer))

    def _take_out(self, module: pl.LightningModule) -> None:
        if self._raw:
            with torch.inference_mode(False), torch.no_grad():
                held = self._held(module)
                torch._foreach_copy_(list(held.values()), [self._raw[name] for name in held])
                torch.clear_autocast_cache()
            self._raw = {}

    def _held(self, module: nn.Module) -> dict[str, Tensor]:
        """Parameters, and BatchNorm's statistics, by name."""
        found: dict[str, Tensor] = {n: p.detach() for n, p in module.named_parameters()}
        if self.statistics != "current":
            for path, norm in batch_norms(module).items():
                found |= {f"{path}.{name}": getattr(norm, name) for name in _BUFFERS}
        return found

    def _in_place_of(self, held: dict[str, Tensor]) -> list[Tensor]:
        return [self._average[name].to(value) for name, value in held.items()]

    # ------------------------------------------------------------------ checkpoints

    def _state_to_save(self, original: Any) -> dict[str, Any]:
        """The module's state with the average in the place of the weights."""
        state = dict(original())
        # While the average is in the module, its statistics are the right ones.
        if not self.count or self._raw or self._ended:
            return state
        averaged = {n: v.to(state[n]) for n, v in self._average.items() if n in state}
        return {**state, **averaged}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the weights of training beside the average."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._patch is not None and self.count:
            raw = self._raw or self._held(pl_module)
            checkpoint[_RAW] = {name: value.detach().clone() for name, value in raw.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Train on with the weights of training; whoever evaluates, does so with the average."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        raw = checkpoint.get(_RAW)
        if raw is not None and trainer.state.fn == "fit":
            with torch.no_grad():
                held = self._held(pl_module)
                for name, value in held.items():
                    value.copy_(raw[name])

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        average = {name: value.detach().cpu().clone() for name, value in self._average.items()}
        return {**super().state_dict(), "average": average, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved average."""
        super().load_state_dict(state_dict)
        self._average = dict(state_dict["average"])
        self.count = int(state_dict["count"])

    def __getstate__(self) -> dict[str, Any]:
        # The strategy and the swapped weights belong to a run.
        return {**super().__getstate__(), "_patch": None, "_raw": {}}


def _precise(value: Tensor) -> Tensor:
    """Half precision has no room for a small share."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


__all__ = ["AveragedWeights", "Statistics"]
