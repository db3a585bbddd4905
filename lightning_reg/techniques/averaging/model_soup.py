"""Averages the weights of several finished models, or of a run's best checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, RegularizationError
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.batch_norm import batch_norms, fresh_statistics

State = Mapping[str, Tensor]
Score = Callable[[pl.LightningModule], float]
_RECIPES = ("uniform", "greedy")


def model_soup(states: Sequence[State], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    r"""The average of several models' weights, :math:`\sum_k s_k w_k`.

    Args:
        states: ``state_dict`` of each model, with the same names and shapes.
        shares: one a model, which are normalized to sum to 1; default: equal ones.

    Returns:
        A ``state_dict``: floating-point entries are averaged in float64 and come in their own
        types, others are those of the first model.

    Raises:
        ArgumentError: without a model, if names or shapes differ, or shares do not fit.
    """
    cure = "model_soup([first.state_dict(), second.state_dict()])"
    if not states:
        raise ArgumentError("model_soup", "needs one model at least", cure=cure)
    weights = [1.0] * len(states) if shares is None else [float(s) for s in shares]
    if len(weights) != len(states) or min(weights) < 0 or not sum(weights) > 0:
        raise ArgumentError(
            "model_soup",
            f"needs a share from 0 for each of {len(states)} models, got {shares}",
            cure="model_soup(states, shares=[0.5, 0.5])",
        )
    first = states[0]
    for state in states[1:]:
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in first.items()}:
            raise ArgumentError(
                "model_soup", "the models have different entries or shapes", cure=cure
            )
    return {name: _mixed([s[name] for s in states], weights) for name in first}


def greedy_soup(
    states: Sequence[State], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """The soup of those models that do not make it worse, tried from the best one down.

    Args:
        states: ``state_dict`` of each model, with the same names and shapes.
        score: of a ``state_dict``, higher is better: accuracy on held-out data.

    Returns:
        The soup, and the positions of the models that are in it, in the order of their scores.
    """
    scores = [score(dict(state)) for state in states]
    order = sorted(range(len(states)), key=lambda i: (-scores[i], i))
    chosen = order[:1]
    best, soup = scores[chosen[0]], model_soup([states[chosen[0]]])
    for candidate in order[1:]:
        tried = model_soup([states[i] for i in (*chosen, candidate)])
        value = score(tried)
        if value >= best:
            chosen, best, soup = [*chosen, candidate], value, tried
    return soup, chosen


class ModelSoup(Regularizer):
    r"""Model soup (Wortsman et al. 2022) of a run's checkpoints, taken when training ends.

    ``"uniform"`` averages the weights of all of them. ``"greedy"`` starts with the best one and
    tries the others from the next best down; one stays in if the soup with it scores at least
    as well as without. The module ends with the soup's weights, and BatchNorm with statistics of
    a pass over the training data of all ranks.

    Checkpoints are those that the Trainer's ``ModelCheckpoint`` kept (``save_top_k``), or files
    of other runs, fine-tuned from the same start with other settings, as the paper has them; it is
    what KaLM-Embedding-V2 (Zhao et al. 2025) does with its last checkpoints. The recipe is the
    paper's from memory, not checked against code: there a candidate has to score at least as well.

    Args:
        recipe: ``"uniform"`` or ``"greedy"``.
        checkpoints: paths; ``None`` takes those that the Trainer's ``ModelCheckpoint`` kept.
        score: for ``"greedy"``: ``score(module)``, higher is better. It has to give the same on
            all ranks.
        name: the name in messages.

    Attributes:
        chosen: positions, in the list of checkpoints, of those in the soup.

    Raises:
        ArgumentError: if ``recipe`` is unknown, or is greedy and has no ``score``.
        RegularizationError: at the end of training, without a checkpoint.
        UnsupportedError: where weights are sharded over ranks.

    Note:
        Over ranks: replica; every rank reads the same files, so they have to lie on a shared
        disk. Cost: reading the checkpoints, one evaluation a checkpoint and more for
        ``"greedy"``, and with BatchNorm a pass over the training data (and one for each
        evaluation). Training itself does not change. It hurts to mix models that do not lie in
        one valley, such as those of different initializations: the greedy recipe leaves them out.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_reg import ModelSoup
        >>> kept = ModelCheckpoint(monitor="val/accuracy", mode="max", save_top_k=5)
        >>> trainer = L.Trainer(callbacks=[kept, ModelSoup()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Model soups: averaging weights of multiple fine-tuned models improves accuracy "
            "without increasing inference time",
            "Wortsman et al.",
            2022,
            "2203.05482",
        ),
        Paper(
            "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile "
            "Embedding Model",
            "Zhao et al.",
            2025,
            None,
        ),
    )
    semantics: ClassVar[Semantics] = "replica"
    sharded: ClassVar[bool | None] = False
    exclusive: ClassVar[frozenset[str]] = frozenset({"weight_averaging"})
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "neutral": "a soup has no strength; without one there is no reason to add it"
    }
    function = staticmethod(model_soup)
    explanation: ClassVar[str] = "ends with the average of the best checkpoints"

    def __init__(
        self,
        recipe: Literal["uniform", "greedy"] = "uniform",
        *,
        checkpoints: Sequence[str | Path] | None = None,
        score: Score | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, name=name)
        if recipe not in _RECIPES:
            raise ArgumentError(
                self,
                f"`recipe` must be one of {', '.join(_RECIPES)}, got {recipe!r}",
                cure='ModelSoup("uniform")',
            )
        if recipe == "greedy" and not callable(score):
            raise ArgumentError(
                self,
                "chooses greedily by a score, and has none",
                cure='ModelSoup("greedy", score=lambda module: accuracy(module))',
            )
        self.recipe = recipe
        self.checkpoints = checkpoints
        self.score = score
        self.chosen: list[int] = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the soup."""
        super().on_train_end(trainer, pl_module)
        states = [_read(path) for path in self._paths(trainer)]
        if self.recipe == "uniform":
            soup, self.chosen = model_soup(states), list(range(len(states)))
        else:
            soup, self.chosen = greedy_soup(states, lambda s: self._rated(trainer, pl_module, s))
        self._serve(trainer, pl_module, soup)

    def _rated(self, trainer: pl.Trainer, module: pl.LightningModule, state: State) -> float:
        assert self.score is not None
        self._serve(trainer, module, state)
        training = module.training
        module.eval()
        try:
            with torch.no_grad():
                return float(self.score(module))
        finally:
            module.train(training)

    def _serve(self, trainer: pl.Trainer, module: pl.LightningModule, state: State) -> None:
        module.load_state_dict(dict(state))
        if batch_norms(module):
            fresh_statistics(self, trainer, module, Communicator.of(trainer))

    def _paths(self, trainer: pl.Trainer) -> list[str]:
        if self.checkpoints is not None:
            found = [str(path) for path in self.checkpoints]
        else:
            kept = [getattr(c, "best_k_models", {}) for c in trainer.checkpoint_callbacks]
            found = sorted({path for models in kept for path in models})
        if not found:
            raise RegularizationError(
                self,
                "found no checkpoint to average",
                cure='ModelCheckpoint(monitor="val/accuracy", mode="max", save_top_k=5)',
            )
        return found


def _mixed(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0].clone()
    total = sum(shares)
    mixed = sum(v.double() * (s / total) for v, s in zip(values, shares, strict=True))
    assert isinstance(mixed, Tensor)
    return mixed.to(values[0].dtype)


def _read(path: str) -> State:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state: State = loaded.get("state_dict", loaded)
    return state


__all__ = ["ModelSoup", "greedy_soup", "model_soup"]
