"""Several linear classifiers in the place of one layer, of which each sample is given its own.

A technique fills it (:meth:`HeadChoice.hold`), attaches it to the layer while it is to answer, and
says before each batch which classifier each sample takes (:meth:`HeadChoice.choose`). The object
takes care of the hook on the layer, of layers with and without a bias and with positions, of the
types of mixed precision, and of the state; a copy of it is attached to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.errors import RegularizationError, owner_name
from lightning_reg.mechanisms.head_refit import Head


class HeadChoice:
    """Classifiers (A, C, d), with biases (A, C) if they have any.

    Args:
        owner: the technique, for messages.
        cure: what to do where a batch has another number of samples than the layer.
    """

    def __init__(self, owner: object, cure: str) -> None:
        self.owner = owner_name(owner)
        self.cure = cure
        self.weights = torch.zeros(0)
        self.biases = torch.zeros(0)
        self._hook: Any = None
        self._chosen: Tensor | None = None

    def __len__(self) -> int:
        """The number of classifiers."""
        return len(self.weights)

    def hold(self, heads: Sequence[Head], like: Tensor) -> Head:
        """Take classifiers, in the type and on the device of ``like``; returns their average."""
        self.weights = torch.stack([head.weight for head in heads]).to(like)
        biases = [head.bias for head in heads if head.bias is not None]
        self.biases = torch.stack(biases).to(like) if biases else torch.zeros(0)
        return Head(self.weights.mean(0), self.biases.mean(0) if biases else None)

    def attach(self, layer: nn.Module) -> None:
        """Answer in the place of ``layer`` from now on."""
        if self._hook is None and len(self):
            self._hook = layer.register_forward_hook(self._classify)

    def choose(self, chosen: Tensor) -> None:
        """The classifier (B,) of each sample of the batch that comes."""
        self._chosen = chosen

    def detach(self) -> None:
        """Leave the layer to itself."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._chosen = None, None

    @property
    def attached(self) -> bool:
        """Whether it answers."""
        return self._hook is not None

    def state_dict(self) -> dict[str, Tensor]:
        """The classifiers."""
        return {"weights": self.weights.cpu(), "biases": self.biases.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take saved classifiers."""
        self.weights, self.biases = state["weights"].clone(), state["biases"].clone()

    def _classify(self, part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The logits (B, ..., C) of each sample's own classifier."""
        features, chosen = args[0], self._chosen
        if chosen is None or len(chosen) != len(features):
            size = "none" if chosen is None else len(chosen)
            raise RegularizationError(
                self.owner,
                f"chooses a classifier for each sample; the head is given {len(features)} samples, "
                f"and the batch says it of {size}",
                cure=self.cure,
            )
        chosen = chosen.to(self.weights.device)
        weights = self.weights[chosen].to(features)
        logits = torch.einsum("b...d,bcd->b...c", features, weights)
        if len(self.biases):
            biases = self.biases[chosen].to(features)
            logits = logits + biases.view(len(biases), *[1] * (logits.ndim - 2), -1)
        return logits.to(output.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # The hook belongs to one module.
        return {**self.__dict__, "_hook": None, "_chosen": None}


__all__ = ["HeadChoice"]
