"""What goes into a user's training step, and what comes out of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def split_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any], Any]:
    """The batch, and the other arguments of a training step."""
    if args:
        return args[1:], kwargs, args[0]
    rest = dict(kwargs)
    return (), rest, rest.pop("batch")


def loss_of(outputs: Any) -> Tensor | None:
    """The loss in what the user's step returned, or ``None`` if it skips the batch."""
    if isinstance(outputs, Tensor):
        return outputs
    if hasattr(outputs, "get") and isinstance(outputs.get("loss"), Tensor):
        loss: Tensor = outputs["loss"]
        return loss
    return None


def with_loss(outputs: Any, loss: Tensor) -> Any:
    """What the user's step returned, with another loss; the user's own object is not touched."""
    if isinstance(outputs, Tensor):
        return loss
    replaced = outputs.copy() if hasattr(outputs, "copy") else dict(outputs)
    replaced["loss"] = loss
    return replaced
