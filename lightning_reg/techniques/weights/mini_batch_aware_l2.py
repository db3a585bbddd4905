"""Decays only the embeddings that occur in a batch, each by how rare it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import Paper, ParameterSelection, ParameterUpdate, Schedule, Step
from lightning_reg.engine.errors import ArgumentError, UnsupportedError, check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import SelectedWeights

__all__ = ["MiniBatchAwareL2", "mini_batch_aware_l2"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def mini_batch_aware_l2(weight: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """``1/2 sum_j alpha_j / n_j ||w_j||^2`` over rows ``j``; its gradient is ``alpha_j w_j / n_j``.

    Args:
        weight: ``w`` (V, d), the embeddings.
        ids: the rows that occur in the batch, any shape; ``alpha_j`` is 1 for these, however often
            they occur, and 0 for all others.
        counts: ``n_j`` (V,), how often each row occurs in the whole training set. Below 1 counts 1.

    Returns:
        A scalar, at least 0.
    """
    present = torch.zeros_like(counts, dtype=weight.dtype)
    present[ids.flatten()] = 1
    scale = present / counts.to(weight.dtype).clamp_min(1)
    return (scale * weight.square().sum(1)).sum() / 2


class MiniBatchAwareL2(SelectedWeights):
    """Decays only the embeddings that occur in a batch, each by how rare it is.

    Zhou, Song, Zhu, Ma, Yan, Dai, Zhu, Jin, Li, Gai (2017), Deep Interest Network for Click-Through
    Rate Prediction, arXiv:1706.06978 (mini-batch aware regularization; the paper's activation is
    :class:`~lightning_reg.techniques.weights.dice.Dice`).

    In every batch ``m``: ``w_j <- w_j - lr (dL/dw_j + lambda alpha_mj / n_j w_j)``, where
    ``alpha_mj`` is 1 if row ``j`` of the embedding occurs in it, and ``n_j`` is how often it occurs
    in the training set. Over an epoch the pull on a row sums to at most ``lambda w_j``; rows that a
    batch does not hold cost nothing and do not move, where weight decay would shrink a rare row
    thousands of times between two occurrences.

    The formula is from memory of the paper, not checked against code: the authors' repository
    (zhougr1993/DeepInterestNetwork) has the activation only. The default strength is ours.

    Args:
        strength: ``lambda``, at least 0.
        counts: ``n_j`` by parameter name, as lists; ``None`` counts during the first epoch, in
            which rows are pulled by the counts so far (so more), and keeps those of that epoch.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all ``nn.Embedding`` and ``nn.EmbeddingBag``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or no parameter is chosen; before training, if
            counts are not one a row.
        UnsupportedError: if a chosen parameter is not an embedding's, and where FSDP2 shards
            weights.

    Note:
        Over ranks: global. Ids of all ranks and of all micro-batches of an optimizer step are
        gathered: N ranks equal one process with the joint batch. Acts on the reduced gradients,
        dense and sparse ones. Cost per optimizer step: one gather of the ids for each embedding,
        work in proportion to their number, and two vectors as long as the vocabulary. Rows at
        ``padding_idx`` are left alone. Set the optimizer's ``weight_decay`` to 0 on these weights.
        Momentum, and Adam's averages, go on moving rows that are absent: use SGD, or
        ``SparseAdam`` with ``sparse=True``. Only calls inside ``training_step`` are seen; a row
        that is read without calling the layer (tied output weights) is not.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MiniBatchAwareL2
        >>> trainer = L.Trainer(callbacks=[MiniBatchAwareL2(0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Deep Interest Network for Click-Through Rate Prediction",
            "Zhou et al.",
            2017,
            "1706.06978",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = False
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mini_batch_aware_l2)
    explanation: ClassVar[str] = "decays the embeddings of a batch, rare ones more"
    default_selection = ParameterSelection(types=("Embedding", "EmbeddingBag"))

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        counts: dict[str, list[int]] | None = None,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="MiniBatchAwareL2(0.01)")
        self.counts = counts
        self._counts: dict[str, Tensor] = {}
        self._ids: dict[str, list[Tensor]] = {}

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what is no embedding, and counts that do not fit."""
        super().validate(trainer, pl_module)
        for name, weight in self.selection.select(pl_module, self).items():
            if not isinstance(_layer(pl_module, name), _EMBEDDINGS):
                raise UnsupportedError(
                    self,
                    f"{name} is not the weight of an nn.Embedding or nn.EmbeddingBag",
                    cure='MiniBatchAwareL2(parameters="embedding")',
                )
            if self.counts is not None and len(self.counts.get(name, ())) != len(weight):
                raise ArgumentError(
                    self,
                    f"`counts` must have {len(weight)} numbers for {name}",
                    cure=f'MiniBatchAwareL2(counts={{"{name}": [...]}})',
                )

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to count, or go on with the counts that were given or saved."""
        self._ids = {}
        for name, weight in self.selection.select(pl_module, self).items():
            if self.counts is not None:
                self._counts[name] = torch.tensor(self.counts[name], device=weight.device)
            known = self._counts.get(name)
            if known is None or len(known) != len(weight):
                known = torch.zeros(len(weight), dtype=torch.long)
            self._counts[name] = known.to(weight.device)

    def forward_context(self, step: Step) -> AbstractContextManager[Any]:
        """Phase 2: keep the ids that embeddings are asked for."""
        return self._watching(step)

    @contextmanager
    def _watching(self, step: Step) -> Iterator[None]:
        hooks = []
        if not step.is_rerun:
            for name in self.selected(step):
                ids = self._ids.setdefault(name, [])
                layer = _layer(step.module, name)
                hooks.append(layer.register_forward_pre_hook(partial(_keep, ids), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def parameter_gradient(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 6."""
        value = torch.zeros((), device=update.device)
        scale = update.strength(self)
        amp = update.gradient_scale()
        for name, weight in update.trainable(self.selected(update)).items():
            kept = self._ids.pop(name, [])
            empty = torch.zeros(0, dtype=torch.long, device=weight.device)
            ids = update.comm.gather(torch.cat([empty, *kept]))
            self._count(name, ids, update.epoch)
            layer: Any = _layer(update.module, name)
            rows, norms = _pulls(weight.detach(), ids, self._counts[name], layer.padding_idx)
            value = value + norms
            if weight.grad is not None:
                _add(weight, ids, rows * scale if amp is None else rows * scale * amp)
        return value

    def _count(self, name: str, ids: Tensor, epoch: int) -> None:
        if self.counts is None and epoch == 0:
            self._counts[name] += torch.bincount(ids, minlength=len(self._counts[name]))

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the ids."""
        super().on_fit_close(trainer, pl_module)
        self._ids = {}

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the counts of a checkpoint."""
        self._counts = {name: counts.clone() for name, counts in state_dict["counts"].items()}

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_ids": {}}


def _layer(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _keep(
    ids: list[Tensor], layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    asked = args[0] if args else kwargs["input"]
    ids.append(asked.detach().flatten().long())


def _pulls(
    weight: Tensor, ids: Tensor, counts: Tensor, padding: int | None
) -> tuple[Tensor, Tensor]:
    """``w_j / n_j`` at the first place of each id (B, d), zero at its others; and the penalty."""
    places = torch.arange(len(ids), device=ids.device)
    first = torch.full((len(weight),), len(ids), device=ids.device)
    first = first.scatter_reduce(0, ids, places, "amin")
    # One place of each id, so that adding rows in any order gives the same bits on all ranks.
    chosen = first[ids] == places
    if padding is not None:
        chosen = chosen & (ids != padding)
    rows = weight[ids].float() if weight.dtype in (torch.float16, torch.bfloat16) else weight[ids]
    share = (chosen / counts[ids].clamp_min(1)).to(rows.dtype)[:, None]
    pulls = rows * share
    return pulls, (pulls * rows).sum() / 2


def _add(weight: nn.Parameter, ids: Tensor, rows: Tensor) -> None:
    """Add rows to a dense or sparse gradient."""
    gradient = weight.grad
    assert gradient is not None
    rows = rows.to(gradient.dtype)
    if gradient.is_sparse:
        extra = torch.sparse_coo_tensor(ids[None], rows, gradient.shape)
        weight.grad = (gradient + extra).coalesce()
    else:
        gradient.index_add_(0, ids, rows)
