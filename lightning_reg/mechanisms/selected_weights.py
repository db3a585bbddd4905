"""What all mechanisms on weights share: which weights they act on, and that each counts once."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_reg.engine import ParameterSelection, Regularizer, Schedule
from lightning_reg.engine.errors import ArgumentError, RegularizationError, check_range
from lightning_reg.engine.sharding import put_weights_away
from lightning_reg.engine.step import RunContext

LAYERS = ParameterSelection(types=("Linear", "_ConvNd"))
EVERYTHING = ParameterSelection(types=("Module",), min_ndim=0, parameter=None)


class SelectedWeights(Regularizer):
    """Base of techniques that act on a choice of the module's weights.

    The choice is refused before training if it is empty, and looked up once an epoch, so that
    layers which a callback unfreezes are taken in. Tied weights count once, frozen ones never.

    Args:
        strength: the multiplier.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` is :attr:`default_selection`.
        name: the name in logs and checkpoints.
    """

    default_selection = LAYERS

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, name=name)
        try:
            self.selection = ParameterSelection.of(parameters, self.default_selection)
        except ArgumentError as error:
            raise ArgumentError(self, error.problem, cure=error.cure) from None
        self._selected: dict[str, nn.Parameter] = {}
        self._selected_in = -1

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a choice that is empty."""
        self._selected_in = -1
        self.selection.select(pl_module, self)

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the module's weights."""
        self._selected, self._selected_in = {}, -1

    def selected(self, context: RunContext) -> dict[str, nn.Parameter]:
        """The chosen weights by name."""
        if self._selected_in != context.epoch:
            # In the place of sharded weights a module may hold those that it gathered.
            put_weights_away(context.module)
            self._selected = self.selection.select(context.module, self)
            self._selected_in = context.epoch
        return self._selected

    def __getstate__(self) -> dict[str, object]:
        # A copy is for another module, whose weights it will look up itself.
        return {**super().__getstate__(), "_selected": {}, "_selected_in": -1}


def check_share(owner: object, strength: float | Schedule) -> None:
    """A strength that says how much of a change is made has to lie in [0, 1]."""
    if not isinstance(strength, Schedule):
        cure = f"{type(owner).__name__}(strength=1.0)"
        check_range(owner, "strength", strength, 0, 1, cure=cure)


def dense_gradients(
    owner: object, weights: dict[str, nn.Parameter]
) -> tuple[dict[str, nn.Parameter], list[Tensor]]:
    """The weights that have a gradient now, and their gradients.

    Raises:
        RegularizationError: if a gradient is sparse.
    """
    reached = {name: w for name, w in weights.items() if w.grad is not None}
    gradients = [w.grad for w in reached.values() if w.grad is not None]
    sparse = [n for n, g in zip(reached, gradients, strict=True) if g.is_sparse]
    if sparse:
        raise RegularizationError(
            owner,
            f"edits whole gradients, and the gradient of {sparse[0]} is sparse",
            cure='nn.Embedding(..., sparse=False), or parameters=ParameterSelection(exclude="...")',
        )
    return reached, gradients


__all__ = ["EVERYTHING", "LAYERS", "SelectedWeights", "check_share", "dense_gradients"]
