"""Techniques that learn from a second network: an average, an earlier self, a reference.

A technique chooses the ``source`` of its teacher and asks :meth:`Teacher.predict` for the
teacher's logits on the inputs of the step. The mechanism takes care of

- the copy: of the user's module as it is without the pipeline, in eval mode, without gradients;
  no part of the module, its parameters, its checkpoint or DDP; on the module's device;
- the update: an average after each optimizer step, a copy at the start of each epoch, or none;
- buffers: copied with the weights, those of rank 0 as DDP does, so that replicas agree;
- weights that are not finite, which are not taken over;
- the checkpoint; a reference is not taken again on a resume.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_reg.engine import (
    ArgumentError,
    Communicator,
    ParameterUpdate,
    RegularizationError,
    Regularizer,
    Schedule,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.capture import Capture
from lightning_reg.engine.checks import check_sharded
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.random import base_seed, stream_seed
from lightning_reg.engine.signals import logits_of
from lightning_reg.engine.step import full_precision
from lightning_reg.mechanisms.anchor import all_finite

Source = Literal["ema", "past", "reference", "random"]
_SOURCES = ("ema", "past", "reference", "random")


class FrozenNetwork:
    """A network that answers and does not learn, held outside of any module.

    Args:
        network: put into eval mode here, its parameters frozen. Not copied.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, inputs: Any, student: nn.Module) -> Any:
        """What the network returns for ``inputs``, on the student's device and in its type."""
        # Whoever calls train() on what holds the network does not mean it.
        self.network.eval()
        mine, wanted = _first_weight(self.network), _first_weight(student)
        if mine is None or wanted is None:
            return self.network(inputs)
        if (mine.device, mine.dtype) != (wanted.device, wanted.dtype):
            self.network.to(wanted.device, wanted.dtype)
        return self.network(inputs)

    def outputs_of(self, layer: str, inputs: Any, student: nn.Module) -> list[Any]:
        """What the submodule ``layer`` returns for ``inputs``, in one call after the other."""
        # Watched for one call only: a copy of the technique would lose the hooks.
        capture = Capture()
        capture.attach(self.network, (layer,))
        try:
            with capture.recording() as records:
                self(inputs, student)
        finally:
            capture.detach()
        return records.get(layer, [])

    def follow(self, module: nn.Module, share: float, comm: Communicator) -> None:
        """Move weights by ``share`` of the way to those of ``module``, and take its buffers.

        A weight that is not finite there stays as it is here.
        """
        with torch.no_grad():
            mine: list[Tensor] = list(self.network.parameters())
            theirs: list[Tensor] = list(module.parameters())
            moved = theirs if share == 1 else torch._foreach_lerp(mine, theirs, share)
            _take(mine, moved)
            _take(list(self.network.buffers()), _of_first_rank(list(module.buffers()), comm))

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers, as copies on the CPU."""
        state = self.network.state_dict()
        return {k: v.detach().cpu().clone() for k, v in state.items() if isinstance(v, Tensor)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take weights and buffers, and their shapes: a head may have grown since."""
        for name, own in (*self.network.named_parameters(), *self.network.named_buffers()):
            if name in state and state[name].shape != own.shape:
                own.data = torch.empty_like(state[name], dtype=own.dtype, device=own.device)
        self.network.load_state_dict(state, strict=False)


class Teacher(Regularizer):
    """Base of techniques with a teacher that comes out of the module itself.

    Args:
        strength: the multiplier.
        source: ``"ema"``: an exponential moving average of the weights; ``"past"``: the module at
            the start of the epoch, from the second epoch on; ``"reference"``: the weights that
            training started with; ``"random"``: weights as if newly initialized; ``None``: no
            teacher.
        decay: of the average, in [0, 1].
        signals: where ``inputs`` and ``logits`` are.
        name: the name in logs and checkpoints.
        others: arguments of the next base, where a technique has several.

    Attributes:
        teacher: the network; ``None`` before training starts, and in the first epoch of
            ``"past"``.
    """

    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits")
    # A subclass that can do without a teacher says yes.
    sharded: ClassVar[bool | None] = False

    def __init__(
        self,
        strength: float | Schedule,
        *,
        source: Source | None = "ema",
        decay: float = 0.999,
        signals: Signals | None = None,
        name: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(strength, signals=signals, name=name, **others)
        if source is not None and source not in _SOURCES:
            raise ArgumentError(
                self,
                f"`source` must be one of {', '.join(_SOURCES)}, got {source!r}",
                cure=f'{type(self).__name__}(source="ema")',
            )
        check_range(self, "decay", decay, 0, 1, cure=f"{type(self).__name__}(decay=0.999)")
        self.source = source
        self.decay = decay
        self.teacher: FrozenNetwork | None = None
        self._loaded_teacher: dict[str, Tensor] | None = None
        self._taken_at = 0

    def predict(self, step: Step) -> Tensor:
        """The teacher's logits (B, C) on the inputs of the step, without a gradient."""
        assert self.teacher is not None
        logits = step.logits
        found = self._answer(self.teacher, step.inputs, step.module)
        if found.shape != logits.shape:
            raise RegularizationError(
                self,
                f"the copy of the module answers {tuple(found.shape)}, and the logits of "
                f"{step.hook} are {tuple(logits.shape)}",
                cure="def forward(self, x): ...  # returns the logits",
            )
        return found

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A teacher answers through ``forward``."""
        super().validate(trainer, pl_module)
        check_sharded(trainer, self, self.source is not None, "copies the module for a teacher")
        inherited = type(pl_module).forward in (pl.LightningModule.forward, nn.Module.forward)
        if self.source is not None and inherited and "forward" not in vars(pl_module):
            raise UnsupportedError(
                self,
                "asks a copy of the module for its logits, and the module has no `forward`",
                cure="def forward(self, x): return self.net(x)",
            )

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the teacher, or take up the one that was loaded or that an earlier fit left."""
        super().on_reference(trainer, pl_module)
        loaded = self._loaded_teacher
        fresh = loaded is None and int(trainer.global_step) == 0
        if self.source is None or (loaded is None and self.source == "past"):
            if fresh:
                self.teacher, self._taken_at = None, 0
            return
        if loaded is not None or fresh or self.teacher is None:
            self.teacher = self._copy(pl_module)
            self._start(pl_module, Communicator.of(trainer))
        if loaded is not None:
            self.teacher.load_state_dict(loaded)
            self._loaded_teacher = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the module as it is now for the self of the past."""
        super().on_train_epoch_start(trainer, pl_module)
        epoch = int(trainer.current_epoch)
        # Resumed inside an epoch, the copy from its start is the one that was saved.
        if self.source != "past" or epoch == 0 or epoch == self._taken_at:
            return
        if self.teacher is None:
            self.teacher = self._copy(pl_module)
        self.teacher.follow(pl_module, 1.0, Communicator.of(trainer))
        self._taken_at = epoch

    def project(self, update: ParameterUpdate) -> None:
        """Move the average, after an optimizer step."""
        if self.source == "ema" and self.teacher is not None:
            self.teacher.follow(update.module, 1 - self.decay, update.comm)

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights and buffers."""
        held = {} if self.teacher is None else self.teacher.state_dict()
        taken = {"taken_at": self._taken_at}
        return {**super().state_dict(), "teacher": self._loaded_teacher or held, **taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep saved weights until there is a network to hold them."""
        super().load_state_dict(state_dict)
        self._loaded_teacher = dict(state_dict["teacher"]) or None
        self._taken_at = int(state_dict["taken_at"])

    def copy_now(self, module: pl.LightningModule) -> FrozenNetwork | None:
        """A frozen copy of the module as it is; ``None`` if its weights are not finite.

        Inside a distributed run every rank has to call it.
        """
        taken = self._copy(module)
        trainer = module.__dict__.get("_trainer")
        # Buffers may differ between ranks; those of the first count, as in DDP.
        taken.follow(module, 1.0, Communicator() if trainer is None else Communicator.of(trainer))
        numbers = [t for t in taken.network.state_dict().values() if isinstance(t, Tensor)]
        if all_finite([t for t in numbers if t.is_floating_point()]):
            return taken
        rank_zero_warn(
            f"{type(self).__name__}: weights are not finite, so no reference is taken from them; "
            "the one before stays."
        )
        return None

    def _answer(self, teacher: FrozenNetwork, inputs: Any, student: nn.Module) -> Tensor:
        found = logits_of(teacher(inputs, student))
        if found is None:
            raise UnsupportedError(
                self,
                "takes the teacher's logits from `forward`, which returned none",
                cure='def forward(self, x): return {"logits": ...}',
            )
        return full_precision(found)

    def _copy(self, pl_module: pl.LightningModule) -> FrozenNetwork:
        try:
            return FrozenNetwork(copy.deepcopy(pl_module))
        except Exception as error:
            raise UnsupportedError(
                self,
                f"copies the module for a teacher, which fails with {error!r}",
                cure="keep no tensor with a graph, and nothing that cannot be copied, in `self`",
            ) from error

    def _start(self, pl_module: pl.LightningModule, comm: Communicator) -> None:
        assert self.teacher is not None
        self.teacher.follow(pl_module, 1.0, comm)
        if self.source == "random":
            initialize_again(self.teacher.network, stream_seed(base_seed(), self.name, "teacher"))


def _first_weight(network: nn.Module) -> Tensor | None:
    return next((p for p in network.parameters() if p.is_floating_point()), None)


def _take(mine: Sequence[Tensor], theirs: Iterable[Tensor]) -> None:
    for own, other in zip(mine, theirs, strict=True):
        good = torch.isfinite(other).all() if other.is_floating_point() else None
        own.copy_(other if good is None else torch.where(good, other, own))


def _of_first_rank(buffers: list[Tensor], comm: Communicator) -> list[Tensor]:
    """Rank 0's buffers, one broadcast for each type and device."""
    if comm.world_size == 1:
        return buffers
    taken = list(buffers)
    for kind in sorted({str(b.dtype) for b in buffers}):
        at = [i for i, b in enumerate(buffers) if str(b.dtype) == kind]
        flat = comm.broadcast(torch.cat([buffers[i].reshape(-1) for i in at]))
        for i, part in zip(at, flat.split([buffers[i].numel() for i in at]), strict=True):
            taken[i] = part.view_as(buffers[i])
    return taken


def initialize_again(network: nn.Module, seed: int) -> None:
    """New weights from a stream of their own; the global generator goes on as if unused."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    network.cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in network.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
    network.to(device)


__all__ = ["FrozenNetwork", "Source", "Teacher", "initialize_again"]
