"""Weights of which some stay exactly zero.

A technique supplies :meth:`MaskedWeights.masks`, which of the chosen weights are kept. The
mechanism takes care of

- the moment: once, from the weights that training starts with; a resume takes the masks from the
  checkpoint;
- a shared random stream, so that masks are equal on all ranks without communication;
- gradients, masked before the optimizer sees them, so that clipping does not count them and no
  momentum gathers for a weight that is not there;
- weights, masked again after each optimizer step: neither momentum, nor weight decay, nor another
  technique's gradient moves them away from zero;
- tied weights, which share one mask;
- weights that FSDP2 shards: every rank keeps whole masks and applies its part;
- checkpoints: weights hold their zeros, and the masks are the technique's state;
- the log, which shows the share of chosen weights that is kept.

After the fit the zeros stay, and nothing holds them any more.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ParameterSelection, ParameterUpdate
from lightning_reg.engine.sharding import own_parts, parts
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import SelectedWeights, dense_gradients


class MaskedWeights(SelectedWeights):
    """Base of techniques that hold a part of the weights at zero.

    Args:
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes the weights of all linear and convolutional layers.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "replica"
    sharded: ClassVar[bool | None] = True
    # Masks come before what reads gradients or weights: norms are those of what is kept.
    writes: ClassVar[frozenset[str]] = frozenset({"gradients", "weights"})

    def __init__(
        self,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, parameters=parameters, name=name)
        self._masks: dict[str, Tensor] = {}
        self._kept: Tensor | None = None
        self._masked: weakref.ref[nn.Module] | None = None

    @abstractmethod
    def masks(
        self, weights: Mapping[str, nn.Parameter], module: nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """True where a weight is kept, for each weight.

        Args:
            weights: the weights by name, before any is masked.
            module: where they are, for what the shapes do not say.
            generator: the same on all ranks.
        """

    def on_new_masks(
        self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]
    ) -> None:
        """Change the weights that are kept, once, when masks are new; under ``no_grad``."""

    def on_model_ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Another module gets masks of its own; a second fit of the same one goes on."""
        if self._masked is None or self._masked() is not pl_module:
            self._masks = {}
        self._masked = weakref.ref(pl_module)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the masks unless they exist, and set the rest to zero."""
        weights = self.selection.select(pl_module, self)
        new = {name: w for name, w in weights.items() if name not in self._masks}
        with torch.no_grad():
            if new:
                assert self.pipeline is not None
                generator = self.pipeline.generator(self.name, True, "masks")
                self._masks.update(self.masks(new, pl_module, generator))
                self.on_new_masks(new, self._masks)
            self._masks = {name: self._masks[name].to(w.device) for name, w in weights.items()}
            self._mask(list(weights.values()), weights)
        total = sum(mask.numel() for mask in self._masks.values())
        counts = [mask.count_nonzero() for mask in self._masks.values()]
        self._kept = torch.stack(counts).sum() / total

    def edit_gradients(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 7."""
        weights, gradients = dense_gradients(self, update.trainable(self._held(update)))
        if gradients:
            self._mask(gradients, weights)
        return self._kept

    def project(self, update: ParameterUpdate) -> None:
        """Phase 8."""
        weights = update.trainable(self._held(update))
        if weights:
            self._mask(list(weights.values()), weights)

    def state_dict(self) -> dict[str, Any]:
        """The masks by name."""
        return {"masks": dict(self._masks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the masks of a checkpoint."""
        self._masks = dict(state_dict["masks"])

    def _mask(self, tensors: Sequence[Tensor], names: Iterable[str]) -> None:
        torch._foreach_mul_(parts(tensors), own_parts([self._masks[n] for n in names], tensors))

    def _held(self, update: ParameterUpdate) -> dict[str, nn.Parameter]:
        # A layer that was frozen at the start, and is unfrozen later, has no mask.
        return {n: w for n, w in self.selected(update).items() if n in self._masks}

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_masked": None}


__all__ = ["MaskedWeights"]
