"""Adapts a trained model to the batches that it is tested on.

A technique supplies :meth:`TestTimeAdaptation.sample_losses`: a loss for each sample, from logits
alone, and which samples count; and may add a gradient of the weights by
:meth:`TestTimeAdaptation.pull`. The mechanism takes care of

- where: the user's ``test_step`` (``validation_step``, ``predict_step``), in gradient mode,
  although the Trainer runs it without; it is called once a batch, so metrics count once;
- what is adapted: scale and shift of every normalization layer, by an optimizer of its own;
  BatchNorm normalizes by the statistics of the batch, all else stays in evaluation mode;
- the mean over the samples that count on all ranks, so that replicas stay equal and ranks may
  keep different numbers; without any such sample, or with a gradient that is not finite, there is
  no step at all, no momentum included;
- putting back weights, running statistics and flags after the run, after an exception too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_reg.engine import Plan, Regularizer, Signals, Step, UnsupportedError
from lightning_reg.engine.checks import check_strategy
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.observe import Observer, sparing_collections
from lightning_reg.engine.patch import MethodPatch
from lightning_reg.engine.rerun import without_trace
from lightning_reg.engine.technique import Semantics

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
STEPS = {"test": "test_step", "validate": "validation_step", "predict": "predict_step"}
# Half-precision gradients of an entropy underflow without it.
_HALF_SCALE = 2.0**10


class TestTimeAdaptation(Regularizer):
    """Base of techniques that change the model while it is evaluated. They do nothing in a fit.

    Args:
        strength: the multiplier of the loss; 0 turns the technique off, batch statistics included.
        lr: the learning rate of SGD with momentum 0.9, unless ``optimizer`` is given.
        optimizer: makes an optimizer of the parameters that are adapted.
        steps: updates a batch. The predictions are those of the last pass before its update.
        episodic: start every batch from the trained weights.
        keep: leave the adapted weights in the module after the run.
        stages: of ``"test"``, ``"validate"`` and ``"predict"``, those in which to adapt.
        signals: where ``logits`` are.
        name: the name in logs and checkpoints.
    """

    __test__ = False  # a class for pytest to leave alone

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    reads: ClassVar[frozenset[str]] = frozenset({"logits"})
    writes: ClassVar[frozenset[str]] = frozenset({"weights"})
    sharded: ClassVar[bool | None] = False
    exclusive: ClassVar[frozenset[str]] = frozenset({"adaptation_in_a_test"})

    def __init__(
        self,
        strength: float = 1.0,
        *,
        lr: float = 0.00025,
        optimizer: OptimizerFactory | None = None,
        steps: int = 1,
        episodic: bool = False,
        keep: bool = False,
        stages: Sequence[str] = ("test",),
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        owner = type(self).__name__
        check_range(self, "strength", strength, 0, cure=f"{owner}(strength=1.0)")
        check_range(self, "lr", lr, 0, cure=f"{owner}(lr=0.00025)")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            problem = f"`steps` must be a whole number from 1, got {steps!r}"
            raise ArgumentError(self, problem, cure=f"{owner}(steps=1)")
        if isinstance(stages, str) or not stages or not set(stages) <= STEPS.keys():
            raise ArgumentError(
                self,
                f"`stages` must be a list of {', '.join(STEPS)}, got {stages!r}",
                cure=f'{owner}(stages=["test"])',
            )
        if optimizer is not None and not callable(optimizer):
            problem = f"`optimizer` must make an optimizer of parameters, got {optimizer!r}"
            cure = f"{owner}(optimizer=lambda p: torch.optim.Adam(p, 1e-3))"
            raise ArgumentError(self, problem, cure=cure)
        self.lr = lr
        self.optimizer = optimizer
        self.steps = steps
        self.episodic = episodic
        self.keep = keep
        self.stages = tuple(stages)
        self._run: Adaptation | None = None

    # ------------------------------------------------------------------ what a technique supplies

    @abstractmethod
    def sample_losses(self, step: Step) -> tuple[Tensor, Tensor]:
        """The loss of each sample (B,), and True (B,) for those that count.

        Args:
            step: what the user's step saw and returned: ``step.logits``; ``step.comm`` for
                quantities over the samples of all ranks.
        """

    def pull(self, weights: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """A gradient by each weight that is added to that of the losses, equal on all ranks."""
        return None

    def before_adaptation(self, adaptation: Adaptation) -> None:
        """Before the first batch, with the trained weights in place."""

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Get between the Trainer and the user's step."""
        super().setup(trainer, pl_module, stage)
        if stage in self.stages and self.strength != 0:
            check_strategy(trainer, [self])
            Plan.of(trainer.callbacks)  # type: ignore[attr-defined]
            # Lightning hands over an enum, whose text is another than its value.
            name = next(known for known in STEPS if known == stage)
            self._run = Adaptation(self, trainer, pl_module, name)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready."""
        self._start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready, unless it is the validation of a fit."""
        self._start()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready."""
        self._start()

    def _start(self) -> None:
        if self._run is not None:
            self._run.start()

    def _close(self) -> None:
        super()._close()
        if self._run is not None:
            self._run.close()
            self._run = None

    def __getstate__(self) -> dict[str, Any]:
        # A run that is under way is not part of a copy.
        return {**super().__getstate__(), "_run": None}


class Adaptation:
    """One evaluation run of one module."""

    def __init__(
        self,
        technique: TestTimeAdaptation,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: str,
    ) -> None:
        self.technique, self.trainer, self.module = technique, trainer, module
        self.weights = _affine(technique, module)
        self._stage = stage
        self._frozen = [w for w in self.weights if not w.requires_grad]
        self._saved: list[Tensor] = []
        self._norms: list[tuple[nn.Module, dict[str, Any]]] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._observer: Observer | None = None
        self._patch = MethodPatch(module, STEPS[stage], self._step)
        self._loop = getattr(trainer, f"{stage}_loop", None)
        self._inference = getattr(self._loop, "inference_mode", None)
        if self._inference is not None:
            # A metric whose state was made in inference mode could not be updated outside of it.
            self._loop.inference_mode = False  # type: ignore[union-attr]

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """With the module on its device: remember it, and switch its normalization."""
        self._observer = Observer(self.technique, self.trainer, self.module, STEPS[self._stage])
        self._saved = [w.detach().clone() for w in self.weights]
        for weight in self._frozen:
            weight.requires_grad_(True)
        _leave_inference_mode(self.module)
        self._use_batch_statistics()
        self.technique.before_adaptation(self)
        self._optimizer = self._make_optimizer()

    def close(self) -> None:
        """Undo everything; safe at any point."""
        self._patch.undo()
        if self._inference is not None:
            self._loop.inference_mode = self._inference  # type: ignore[union-attr]
        if self._observer is not None:
            self._observer.close()
        for norm, buffers in self._norms:
            norm._buffers.update(buffers)
        for weight in self._frozen:
            weight.requires_grad_(False)
        if self._saved and not self.technique.keep:
            self._reset()

    @property
    def comm(self) -> Communicator:
        """Collectives over all ranks."""
        assert self._observer is not None
        return self._observer.comm

    def observe(self, batch: Any) -> Step:
        """The signals of a batch that is not tested on; leaves no trace. Gradients flow."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.trainer.strategy.batch_to_device(batch)
        hook = self._patch.original
        args = [0 for name in ("batch_idx",) if is_param_in_hook_signature(hook, name, min_args=2)]
        with self._silently(), self._precision():
            assert self._observer is not None
            return self._observer.observe(lambda b: hook(b, *args), batch)

    def _reset(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.weights), self._saved)

    def _use_batch_statistics(self) -> None:
        names = ("running_mean", "running_var", "num_batches_tracked")
        for part in self.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                buffers = {name: part._buffers[name] for name in names}
                self._norms.append((part, buffers))
                part._buffers.update(dict.fromkeys(names))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        if self.technique.optimizer is not None:
            return self.technique.optimizer(self.weights)
        return torch.optim.SGD(self.weights, self.technique.lr, momentum=0.9)

    @contextmanager
    def _silently(self) -> Iterator[None]:
        with without_trace(self.module), sparing_collections(self.module):
            yield

    def _precision(self) -> AbstractContextManager[Any]:
        context = getattr(self.trainer.precision_plugin, "forward_context", nullcontext)
        found: AbstractContextManager[Any] = context()
        return found

    # ------------------------------------------------------------------ a batch

    def _step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What the Trainer calls in place of the user's step."""
        with torch.inference_mode(False), torch.enable_grad():
            args, kwargs = apply_to_collection((args, kwargs), Tensor, _normal)
            batch, rest = (args[0], args[1:]) if args else (kwargs.pop("batch"), ())
            index = next((a for a in rest if isinstance(a, int)), kwargs.get("batch_idx", 0))
            if self.technique.episodic:
                self._reset()
                self._optimizer = self._make_optimizer()
            for left in reversed(range(self.technique.steps)):
                with self._silently() if left else nullcontext():
                    assert self._observer is not None
                    step = self._observer.observe(
                        lambda b: original(b, *rest, **kwargs), batch, index
                    )
                self._update(step, log=left == 0)
            return apply_to_collection(step.outputs, Tensor, torch.Tensor.detach)

    def _update(self, step: Step, log: bool) -> None:
        """One step on the mean over the samples of all ranks that count."""
        with torch.autocast(self.module.device.type, enabled=False):
            losses, counted = self.technique.sample_losses(step)
            kept = losses[counted]
            gradients = self._gradients(kept)
        ends = [g.reshape(-1) for g in gradients]
        numbers = torch.stack([kept.detach().sum(), counted.sum().to(losses)])
        total = step.comm.reduce(torch.cat([*ends, numbers.to(ends[0])]))
        value, count = total[-2:]
        if log and self._stage != "predict":
            self._log(value, count, len(losses) * step.comm.world_size)
        # One host sync; NaN on one rank is NaN in the sum of all.
        if not bool((count > 0) & total.isfinite().all()):
            return
        joint = (total[:-2] * (self.technique.strength / count)).split([e.numel() for e in ends])
        with torch.no_grad():
            self._apply([g.view_as(w) for g, w in zip(joint, self.weights, strict=True)])

    def _gradients(self, kept: Tensor) -> list[Tensor]:
        if len(kept) == 0:
            return [torch.zeros_like(w, requires_grad=False) for w in self.weights]
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        scale = _HALF_SCALE if scaled else 1.0
        # Kept gradients only reach the weights that are adapted, none of the user's `.grad`.
        found = torch.autograd.grad(kept.sum() * scale, self.weights, materialize_grads=True)
        return list(found) if scale == 1.0 else list(torch._foreach_div(list(found), scale))

    def _apply(self, gradients: list[Tensor]) -> None:
        pull = self.technique.pull(self.weights)
        if pull is not None:
            torch._foreach_add_(gradients, pull)
        kept = [w.grad for w in self.weights]
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient.to(weight.dtype)
        assert self._optimizer is not None
        self._optimizer.step()
        for weight, old in zip(self.weights, kept, strict=True):
            weight.grad = old

    def _log(self, value: Tensor, count: Tensor, size: int) -> None:
        name = f"reg/{self.technique.name}"
        logged = {name: value / count.clamp_min(1), f"{name}_kept": count / size}
        for key, number in logged.items():
            self.module.log(key, number.float(), on_step=False, on_epoch=True, batch_size=size)


def _affine(technique: Regularizer, module: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of all normalization layers, tied ones once."""
    found = {
        id(weight): weight
        # By name, since most networks bring norms of their own.
        for part in module.modules()
        if "norm" in type(part).__name__.lower()
        for name, weight in part.named_parameters(recurse=False)
        if name in ("weight", "bias")
    }
    if not found:
        raise UnsupportedError(
            technique,
            f"adapts scale and shift of normalization layers, and {type(module).__name__} has none",
            cure="nn.BatchNorm1d(16) behind a layer of the network, before training",
        )
    return list(found.values())


def _leave_inference_mode(module: nn.Module) -> None:
    """An earlier test may have reset metrics in inference mode; such states cannot be updated."""
    with torch.inference_mode(False):
        for part in module.modules():
            for name in part.__dict__.get("_defaults", ()):
                state = part.__dict__[name]
                part.__dict__[name] = apply_to_collection(state, Tensor, _normal)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else _normal(buffer)


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


__all__ = ["Adaptation", "OptimizerFactory", "TestTimeAdaptation"]
