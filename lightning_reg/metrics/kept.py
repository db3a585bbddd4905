"""States that keep samples, for metrics with an exact mode that needs them all."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_reg.metrics.additive import AdditiveMetric
from lightning_reg.metrics.exact import ExactMetric
from lightning_reg.metrics.inputs import high_precision


class KeepsSamples(AdditiveMetric):
    """Base of metrics that can keep samples: float vectors that grow, gathered from all ranks.

    Uneven and empty ranks are joined as one process would have it. A subclass adds states with
    :meth:`add_kept`, adds to them with :meth:`keep` and reads them with :meth:`kept`.
    """

    def add_kept(self, name: str) -> None:
        """A state that keeps the elements of vectors."""
        self.add_state(name, [], dist_reduce_fx="cat")

    def keep(self, name: str, values: Tensor) -> None:
        """Add (n,) values of a batch, which the caller may overwrite."""
        cast(list[Tensor], getattr(self, name)).append(high_precision(values).clone())

    def kept(self, name: str) -> Tensor:
        """All values: of this process, or of all ranks within ``sync_context()``."""
        state: list[Tensor] | Tensor = getattr(self, name)
        if isinstance(state, Tensor):
            return state
        return torch.cat(state or [high_precision(torch.zeros(0, device=self.device))])

    def update_settings(self) -> tuple[Any, ...]:
        """What decides how a batch is counted; a list that is still empty is no setting."""
        name, *own = super().update_settings()
        return (name, *(pair for pair in own if pair[0] not in self._defaults))

    def _gather_others(self, *args: Any) -> None:
        # torchmetrics stands in for a rank that kept nothing with a tensor of another dtype.
        for name, reduction in self._reductions.items():
            if reduction is dim_zero_cat:
                setattr(self, name, [self.kept(name)])
        super()._gather_others(*args)


class KeepingMetric(KeepsSamples, ExactMetric):
    """Base of metrics over the rows of predictions that can keep them."""
