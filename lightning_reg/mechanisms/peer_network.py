"""Techniques that train a second network beside the module, on the same batches.

A technique asks :meth:`PeerNetwork.answers` what the second network says of the inputs of the
step, with a graph to its weights, and puts a loss on it. The mechanism takes care of

- the network: a copy of the module with weights that are initialized again, or those of a network
  that is given;
- its training: its weights are further parameters of the module while a fit runs, so that the
  module's own optimizers, DDP, clipping and gradient scaling take them along; a module that does
  not hand all of its parameters to its optimizers is refused;
- its passes: the module itself runs with the other weights and buffers, under the precision of
  the run, so that what hooks do to its layers (:class:`NestedDropout`) is done to both networks;
  random numbers are its own, and those of the module stay what they are without it;
- second passes (SAM), in which its buffers do not move again;
- a look at both networks in eval mode, in which techniques that add noise to layers stay away;
- the checkpoint: the second network is part of the technique's state, not of the module's;
- the end of the fit, when the module is what it was and the second network stays here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_reg.engine import (
    ArgumentError,
    RegularizationError,
    Regularizer,
    Schedule,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.random import base_seed, stream_seed
from lightning_reg.engine.signals import logits_of
from lightning_reg.engine.step import full_precision
from lightning_reg.mechanisms.teacher import initialize_again


class Answers(NamedTuple):
    """What the two networks say of one batch.

    Attributes:
        peer: the second network's logits, with a graph to its weights.
        own_look: the module's logits in eval mode, without a graph; ``None`` if nobody looked.
        peer_look: the second network's.
    """

    peer: Tensor
    own_look: Tensor | None = None
    peer_look: Tensor | None = None


class PeerNetwork(Regularizer):
    """Base of techniques with a second network that learns as the module does.

    Args:
        strength: the technique's number; a constant 0 makes no second network.
        peer: a network with the module's parameter names, whose weights the second network starts
            with; ``None`` initializes them again.
        looks: whether both networks are asked in eval mode as well.
        signals: where ``inputs`` and ``logits`` are.
        name: the name in logs and checkpoints.

    Attributes:
        peer: the second network, a copy of the module; ``None`` before the first fit.
    """

    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits")
    sharded: ClassVar[bool | None] = False

    def __init__(
        self,
        strength: float | Schedule,
        *,
        peer: nn.Module | None = None,
        looks: bool = False,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        if peer is not None and not isinstance(peer, nn.Module):
            raise ArgumentError(
                self,
                f"`peer` must be a torch module, got {type(peer).__name__}",
                cure=f"{type(self).__name__}(peer=network)",
            )
        self.given = peer
        self.looks = looks
        self.peer: nn.Module | None = None
        self._loaded_peer: dict[str, Tensor] | None = None

    def answers(self, step: Step) -> Answers:
        """What the networks said in this pass of the step."""
        found: Answers = step.kept[self.name]
        return found

    @torch.no_grad()
    def predict(self, pl_module: pl.LightningModule, inputs: Any) -> Tensor:
        """The mean of both networks' logits, from the module's ``forward``.

        Args:
            pl_module: the module, during a fit or after it.
            inputs: what its ``forward`` takes.
        """
        own, peer = logits_of(pl_module(inputs)), self._logits(pl_module, self._tensors(), inputs)
        assert own is not None
        return (full_precision(own) + peer) / 2

    # ------------------------------------------------------------------ the run

    def active(self, context: Any) -> bool:
        """A constant of 0 turns it off; a Schedule that passes 0 does not."""
        return self._has_peer()

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The second network answers through ``forward``."""
        super().validate(trainer, pl_module)
        inherited = type(pl_module).forward in (pl.LightningModule.forward, nn.Module.forward)
        if self._has_peer() and inherited and "forward" not in vars(pl_module):
            raise UnsupportedError(
                self,
                "runs the module with other weights for its logits, and it has no `forward`",
                cure="def forward(self, x): return self.net(x)",
            )

    def on_model_ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the second network, and hand its weights to the module for the time of the fit."""
        super().on_model_ready(trainer, pl_module)
        if not self._has_peer():
            return
        if self.peer is None or int(trainer.global_step) == 0:
            self.peer = self._copy(pl_module)
        pl_module.add_module(self._place, _Weights(self.peer))

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up what was loaded; refuse weights that nobody updates."""
        super().on_reference(trainer, pl_module)
        if self.peer is None or not self._has_peer():
            return
        # Moved to a device, the module has new buffers; its parameters are the same objects.
        _take_buffers(self.peer, pl_module.get_submodule(self._place))
        if self._loaded_peer is not None:
            self._load(self._loaded_peer)
            self._loaded_peer = None
        self._check_names(pl_module)
        self._check_updated(trainer)

    @contextmanager
    def forward_context(self, step: Step) -> Iterator[None]:
        """Phase 2: the second network's pass comes in front of the module's own."""
        step.kept[self.name] = self._ask(step)
        yield

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the second network's weights out of the module."""
        super().on_fit_close(trainer, pl_module)
        if self._place in pl_module._modules:
            delattr(pl_module, self._place)

    def state_dict(self) -> dict[str, Any]:
        """The second network's weights and buffers."""
        if not self._has_peer():
            return {}
        held = self._loaded_peer or (self._tensors() if self.peer is not None else {})
        return {"peer": {name: t.detach().cpu().clone() for name, t in held.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep saved weights until training starts."""
        self._loaded_peer = dict(state_dict.get("peer", {})) or None

    # ------------------------------------------------------------------ passes

    def _ask(self, step: Step) -> Answers:
        inputs, module, tensors = step.inputs, step.module, self._tensors()
        looks: list[Tensor] = []
        with step.trainer.precision_plugin.forward_context():
            if self.looks:
                with _evaluating(step, module), torch.no_grad():
                    own: dict[str, Tensor] = {
                        name: p for name, p in module.named_parameters() if name in tensors
                    }
                    looks = [self._logits(module, t, inputs) for t in (own, tensors)]
                # In older torch it holds half-precision copies that were made without a graph.
                torch.clear_autocast_cache()
            if step.is_rerun:
                for name, buffer in self._peer_buffers().items():
                    tensors[name] = buffer.clone()
            with _own_random_numbers(step.rng(self)):
                return Answers(self._logits(module, tensors, inputs), *looks)

    def _logits(self, module: nn.Module, tensors: dict[str, Tensor], inputs: Any) -> Tensor:
        buffers = {name: t for name, t in tensors.items() if not isinstance(t, nn.Parameter)}
        found = logits_of(functional_call(module, tensors, (inputs,)))
        for name, buffer in buffers.items():
            # A module that puts another tensor in a buffer's place, and does not write into it.
            if tensors[name] is not buffer:
                buffer.copy_(tensors[name])
        if found is None:
            raise UnsupportedError(
                self,
                "takes the second network's logits from `forward`, which returned none",
                cure='def forward(self, x): return {"logits": ...}',
            )
        return full_precision(found)

    # ------------------------------------------------------------------ the network

    @property
    def _place(self) -> str:
        return f"{self.name}_peer"

    def _has_peer(self) -> bool:
        return isinstance(self.strength, Schedule) or self.strength != 0

    def _tensors(self) -> dict[str, Tensor]:
        assert self.peer is not None
        return {**dict(self.peer.named_parameters()), **self._peer_buffers()}

    def _peer_buffers(self) -> dict[str, Tensor]:
        assert self.peer is not None
        return dict(self.peer.named_buffers())

    def _copy(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            network: nn.Module = copy.deepcopy(pl_module)
        except Exception as error:
            raise UnsupportedError(
                self,
                f"copies the module for a second network, which fails with {error!r}",
                cure="keep no tensor with a graph, and nothing that cannot be copied, in `self`",
            ) from error
        if self.given is None:
            initialize_again(network, stream_seed(base_seed(), self.name, "peer"))
            self._check_differs(network, pl_module)
        else:
            self._start_with(network, self.given)
        return network

    def _start_with(self, network: nn.Module, given: nn.Module) -> None:
        try:
            network.load_state_dict(given.state_dict())
        except RuntimeError as error:
            raise ArgumentError(
                self,
                f"`peer` has other weights than the module: {error}",
                cure=f"{type(self).__name__}(peer=Module())  # of the same class",
            ) from error

    def _check_differs(self, network: nn.Module, pl_module: nn.Module) -> None:
        pairs = zip(network.parameters(), pl_module.parameters(), strict=True)
        if all(torch.equal(one, other) for one, other in pairs):
            raise UnsupportedError(
                self,
                "needs a second network that starts elsewhere, and no part of the module has a "
                "`reset_parameters` to initialize it again",
                cure=f"{type(self).__name__}(peer=Module())  # made with another seed",
            )

    def _load(self, saved: dict[str, Tensor]) -> None:
        tensors = self._tensors()
        if saved.keys() != tensors.keys():
            differing = sorted(saved.keys() ^ tensors.keys())
            raise RegularizationError(
                self,
                f"the second network of the checkpoint is another one: {', '.join(differing[:3])} "
                "is in one of the two only",
                cure="the module that the checkpoint was written with",
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])

    def _check_names(self, pl_module: pl.LightningModule) -> None:
        known = {name for name, _ in pl_module.named_parameters()}
        lost = [name for name in self._tensors() if name not in known | _names(pl_module)]
        if lost:
            raise UnsupportedError(
                self,
                f"runs the module with other weights, and its {lost[0]} is gone: another "
                "technique has put something in its place",
                cure=f"remove {type(self).__name__}, or the technique that replaces weights",
            )

    def _check_updated(self, trainer: pl.Trainer) -> None:
        assert self.peer is not None
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        updated = {id(p) for group in groups for p in group["params"]}
        for name, parameter in self.peer.named_parameters():
            mine = parameter.requires_grad and id(parameter) not in updated
            if mine and self._is_updated(name, trainer, updated):
                raise UnsupportedError(
                    self,
                    f"trains a second network, and the module's optimizers update its {name} but "
                    "not that of the second network, which is part of `self.parameters()`",
                    cure="torch.optim.SGD(self.parameters(), lr=0.1)  # in configure_optimizers",
                )

    @staticmethod
    def _is_updated(name: str, trainer: pl.Trainer, updated: set[int]) -> bool:
        return id(trainer.lightning_module.get_parameter(name)) in updated


class _Weights(nn.Module):
    """The weights of a network as those of a part of another, without a place in its checkpoint.

    Args:
        network: whose parameters and buffers these are: the same objects.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, parameter in network.named_parameters():
            self.register_parameter(_flat(name), parameter)
        for name, buffer in network.named_buffers():
            self.register_buffer(_flat(name), buffer)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Expect nothing."""


def _flat(name: str) -> str:
    return name.replace(".", "/")


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_buffers()}


def _take_buffers(network: nn.Module, weights: nn.Module) -> None:
    """Make the buffers of ``weights`` those of ``network``."""
    for name, _ in list(network.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        network.get_submodule(owner)._buffers[attribute] = weights._buffers[_flat(name)]


@contextmanager
def _own_random_numbers(generator: torch.Generator) -> Iterator[None]:
    """Draw from the stream of ``generator``; the global generators go on as if unused."""
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator.initial_seed())
        yield


@contextmanager
def _evaluating(step: Step, module: nn.Module) -> Iterator[None]:
    """Eval mode, without noise from techniques; everything is put back."""
    training = [part for part in module.modules() if part.training]
    with ExitStack() as stack:
        stack.callback(setattr, step, "evaluating", step.evaluating)
        step.evaluating = True
        stack.callback(_train, training)
        module.eval()
        yield


def _train(parts: list[nn.Module]) -> None:
    for part in parts:
        part.training = True


__all__ = ["Answers", "PeerNetwork"]
