"""Where the tensors that a technique needs are found in a user's training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import MissingSignalError, RegularizationError

if TYPE_CHECKING:
    from lightning_reg.engine.regularizer import Regularizer
    from lightning_reg.engine.step import Step

Source = str | Callable[["Step"], Tensor]

_INPUT_KEYS = (
    "inputs",
    "input",
    "x",
    "image",
    "images",
    "pixel_values",
    "input_values",
    "features",
)
_TARGET_KEYS = ("targets", "target", "labels", "label", "y")
_LOGIT_KEYS = ("logits", "preds", "predictions", "y_hat")


@dataclass(frozen=True)
class Signals:
    """Where a technique finds what it needs; a field that is ``None`` is looked for by default.

    A source is a dotted path or a callable that gets the :class:`Step`:

    - ``"batch.0"``, ``"batch.image"``: an item, key or attribute of the batch;
    - ``"outputs.logits"``: a key of the dict that ``training_step`` returns;
    - ``"module.head"``: the output of a submodule during the step;
    - ``"forward"``: the output of the LightningModule's own ``forward``.

    Looked up in this order: the technique's ``signals`` argument, the module's
    ``regularization_signals`` attribute, the keys of the returned dict, and the usual places.

    Args:
        inputs: the model's input.
        targets: the labels (integers), soft labels or regression targets.
        logits: the scores before the softmax, classes on dimension 1 or last.
        sample_index: the position of each sample in the dataset.
        domain: an integer per sample that names its group or domain.

    Example:
        >>> from lightning_reg.engine import Signals
        >>> Signals(logits="module.head", targets="batch.label").logits
        'module.head'
    """

    inputs: Source | None = None
    targets: Source | None = None
    logits: Source | None = None
    sample_index: Source | None = None
    domain: Source | None = None

    def layers(self) -> set[str]:
        """Names of the submodules whose outputs these signals need."""
        sources = (self.inputs, self.targets, self.logits, self.sample_index, self.domain)
        return {s[len("module.") :] for s in sources if isinstance(s, str) and s[:7] == "module."}


def read_path(container: Any, path: str) -> Any:
    """Follow a dotted path through mappings, sequences and attributes.

    Raises:
        KeyError: if a part of the path does not exist.
    """
    for part in path.split("."):
        container = _read_part(container, part)
    return container


def write_path(container: Any, path: str, value: Any) -> Any:
    """A shallow copy of ``container`` with ``value`` at ``path``; the original stays as it was."""
    first, _, rest = path.partition(".")
    if rest:
        value = write_path(_read_part(container, first), rest, value)
    return _write_part(container, first, value)


def default_path(batch: Any, signal: str) -> str | None:
    """The usual place of ``inputs`` or ``targets`` in a batch, or ``None``."""
    if isinstance(batch, Tensor):
        return None
    if _is_plain_sequence(batch):
        position = {"inputs": 0, "targets": 1}.get(signal)
        return str(position) if position is not None and len(batch) > position else None
    keys = {"inputs": _INPUT_KEYS, "targets": _TARGET_KEYS}.get(signal, (signal,))
    return next((key for key in keys if _has(batch, key)), None)


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a module returned: a tensor, or a field that is named like them."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    for key in _LOGIT_KEYS:
        if _has(output, key):
            value = _read_part(output, key)
            return value if isinstance(value, Tensor) else None
    return None


def replace_logits(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A shallow copy of what a module returned, with its logits changed; ``None`` without any."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else None
    for key in _LOGIT_KEYS:
        if _has(output, key):
            return write_path(output, key, change(_read_part(output, key)))
    return None


class SignalReader:
    """Finds the signals of one step for one technique."""

    def __init__(self, technique: Regularizer, module: torch.nn.Module) -> None:
        self.technique = technique
        own = technique.signals
        declared = getattr(module, "regularization_signals", None)
        self._declared = [s for s in (own, _as_signals(declared, technique)) if s is not None]

    def source(self, signal: str) -> Source | None:
        """The first declared source of ``signal``."""
        found = (getattr(signals, signal) for signals in self._declared)
        return next((source for source in found if source is not None), None)

    def layers(self) -> set[str]:
        """Names of all submodules that declared sources refer to."""
        return set().union(*(signals.layers() for signals in self._declared))


def missing(owner: object, signal: str, step: Step, seen: Sequence[str]) -> MissingSignalError:
    """The error for a signal that was looked for and not found."""
    cures = {
        "sample_index": "wrap the training dataset: IndexedDataset(dataset)",
        "logits": f'return {{"loss": loss, "logits": logits}} from {step.hook}, '
        'or pass signals=Signals(logits="module.<name>")',
        "targets": 'pass signals=Signals(targets="batch.<key>")',
        "inputs": 'pass signals=Signals(inputs="batch.<key>")',
        "domain": 'pass signals=Signals(domain="batch.<key>")',
    }
    where = "; ".join(seen) if seen else "nothing that fits"
    return MissingSignalError(
        owner,
        f"needs `{signal}` and did not find it in the first {step.hook}. Looked at the "
        f"technique's `signals`, the module's `regularization_signals`, what `{step.hook}` "
        f"returned, and the batch ({describe(step.batch)}). Seen: {where}",
        cure=cures.get(signal, f"self.regularize(loss, {signal}=...)"),
    )


def describe(batch: Any) -> str:
    """A short description of a batch for error messages."""
    if isinstance(batch, Tensor):
        return f"Tensor{tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(describe(value) for value in batch) + ")"
    return type(batch).__name__


def _as_signals(declared: Any, technique: Regularizer) -> Signals | None:
    if declared is None or isinstance(declared, Signals):
        return declared
    if isinstance(declared, Mapping):
        return Signals(**declared)
    raise RegularizationError(
        technique,
        f"`regularization_signals` of the module must be Signals or a dict, got {declared!r}",
        cure='regularization_signals = {"logits": "module.head"}',
    )


def _is_plain_sequence(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")


def _has(container: Any, key: str) -> bool:
    if isinstance(container, Mapping):
        return key in container
    return (not isinstance(container, (Tensor, tuple, list)) and hasattr(container, key)) or (
        hasattr(container, "_fields") and key in container._fields
    )


def _read_part(container: Any, part: str) -> Any:
    if isinstance(container, Mapping):
        if part not in container:
            raise KeyError(part)
        return container[part]
    if isinstance(container, (tuple, list)) and part.lstrip("-").isdigit():
        try:
            return container[int(part)]
        except IndexError as error:
            raise KeyError(part) from error
    if not hasattr(container, part):
        raise KeyError(part)
    return getattr(container, part)


def _write_part(container: Any, part: str, value: Any) -> Any:
    if isinstance(container, (tuple, list)) and part.lstrip("-").isdigit():
        items = list(container)
        items[int(part)] = value
        if hasattr(container, "_fields"):
            return type(container)(*items)
        return type(container)(items)
    if hasattr(container, "_replace") and hasattr(container, "_fields"):
        return container._replace(**{part: value})
    duplicate = copy.copy(container)
    if isinstance(container, Mapping):
        duplicate[part] = value
    else:
        setattr(duplicate, part, value)
    return duplicate
