"""A pull towards reference weights that were taken at some point of a run.

A technique says when a reference is taken, by calling :meth:`WeightAnchor.take_reference`, and
with which importance for each weight. The mechanism takes care of

- the weights that are meant, tied ones once, frozen ones never;
- the closed-form gradient, once per optimizer step, and the value for the log;
- the state: references and importances are part of ``state_dict`` and come back on a resume, so
  they are never taken again there;
- weights that FSDP2 shards: references are sharded as they are, and whole in a checkpoint;
- weights that are new since (a grown head): without a reference they are left free; a weight
  whose shape changed is an error;
- a reference that is not finite: it is not taken, the one before stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_reg.engine import ParameterUpdate, RegularizationError
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.selection import ParameterSelection
from lightning_reg.engine.sharding import put_weights_away, shard_like, whole
from lightning_reg.mechanisms.selected_weights import SelectedWeights


class WeightAnchor(SelectedWeights):
    """Base of techniques that add ``strength * sum_i O_i (w_i - r_i)^2``.

    Args:
        strength: the multiplier.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`.
        name: the name in logs and checkpoints.
    """

    sharded: ClassVar[bool | None] = True
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        self.references_taken = 0
        self._reference: dict[str, Tensor] = {}
        self._importance: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ references

    @property
    def reference(self) -> Mapping[str, Tensor]:
        """The weights that the module is pulled to, by name; empty before the first is taken."""
        return self._reference

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """The factor of each weight, by name; empty if all count alike."""
        return self._importance

    def take_reference(
        self, module: nn.Module, importance: Mapping[str, Tensor] | None = None
    ) -> None:
        """Pull to the weights that ``module`` has now.

        Args:
            module: whose chosen weights are copied.
            importance: by name, non-negative, of the shape of the weight; what is missing counts
                one.
        """
        put_weights_away(module)
        chosen = self.selection.select(module, self)
        reference = {name: weight.detach().clone() for name, weight in chosen.items()}
        if importance is not None:
            one = {name: torch.ones_like(t) for name, t in reference.items()}
            importance = {n: importance.get(n, one[n]).detach().clone() for n in reference}
        importance = importance or {}
        if not all_finite([*reference.values(), *importance.values()]):
            rank_zero_warn(
                f"{type(self).__name__}: weights or importances are not finite, so no reference "
                "is taken from them; the one before stays."
            )
            return
        self._reference, self._importance = reference, importance
        self.references_taken += 1

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring what a checkpoint held to the module's device."""
        weights = dict(pl_module.named_parameters())
        for table in (self._reference, self._importance):
            for name in table.keys() & weights.keys():
                self._check_shape(name, weights[name], table[name])
                weight = weights[name]
                held = whole(table[name]).to(weight.device, weight.dtype)
                table[name] = shard_like(held, weight)

    # ------------------------------------------------------------------ the pull

    def parameter_gradient(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 6."""
        chosen = update.trainable(self.selected(update))
        names = [name for name in chosen if name in self._reference]
        if not names:
            return None
        weights = [chosen[name] for name in names]
        references = [self._reference[name] for name in names]
        importances = [self._importance[n] for n in names] if self._importance else None
        value, gradients = anchor_pull(weights, references, importances)
        update.add_gradients(self, weights, gradients)
        return value

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """References and importances, whole, and how often one was taken; call it on all ranks."""
        return {
            "references_taken": self.references_taken,
            "reference": {name: whole(t) for name, t in self._reference.items()},
            "importance": {name: whole(t) for name, t in self._importance.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the references of a checkpoint, or of another technique of this class."""
        self.references_taken = int(state_dict["references_taken"])
        self._reference = {k: t.clone() for k, t in state_dict["reference"].items()}
        self._importance = {k: t.clone() for k, t in state_dict["importance"].items()}

    def _check_shape(self, name: str, weight: Tensor, reference: Tensor) -> None:
        if weight.shape != reference.shape:
            raise RegularizationError(
                self,
                f"pulls {name} to a reference of shape {tuple(reference.shape)}, but it is now "
                f"{tuple(weight.shape)}: a part that grows between tasks has to be left out",
                cure=f"{type(self).__name__}(parameters=ParameterSelection(types=['Module'], "
                f"min_ndim=0, parameter=None, exclude='{name.rpartition('.')[0] or name}'))",
            )


def anchor_pull(
    weights: Sequence[Tensor],
    references: Sequence[Tensor],
    importances: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """``sum_i O_i (w_i - r_i)^2`` over all tensors, and its gradient ``2 O (w - r)`` by each.

    Args:
        weights: the weights ``w``.
        references: ``r``, one a weight, of its shape.
        importances: ``O``, of the same shapes; ``None`` counts all alike.
    """
    with torch.no_grad():
        distance = torch._foreach_sub(list(weights), list(references))
        pull = (
            torch._foreach_mul(distance, list(importances))  # type: ignore[arg-type]
            if importances is not None
            else distance
        )
        products = torch._foreach_mul(distance, pull)  # type: ignore[arg-type]
        value = torch.stack([p.sum() for p in products]).sum()
        return whole(value), list(torch._foreach_mul(pull, 2.0))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every entry of every tensor is finite; a host sync."""
    if not tensors:
        return True
    # A norm is finite only if every entry is; large finite weights do not reach its limit.
    return bool(
        whole(torch.stack([n.double() for n in torch._foreach_norm(list(tensors))]))
        .isfinite()
        .all()
    )


__all__ = ["WeightAnchor", "all_finite", "anchor_pull"]
