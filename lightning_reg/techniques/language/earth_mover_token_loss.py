"""Adds to the cross-entropy of a token how far the predicted mass lies from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.criterion import as_distribution, labelled, soft_cross_entropy
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["EarthMoverTokenLoss", "earth_mover_token_loss"]

Cost = Literal["frozen", "live"]
_COSTS = ("frozen", "live")
_TINY = 1e-10


def earth_mover_token_loss(
    logits: Tensor, targets: Tensor, embeddings: Tensor, remove_gold: bool = False
) -> Tensor:
    """``(CE + sg(CE / D) D) / 2`` of each row, ``D`` of :func:`expected_distance`.

    ``sg`` takes no gradient, so the value is that of the cross-entropy to rounding, and the
    gradient the mean of its and that of ``D`` at the same scale.

    Args:
        logits: (N, V).
        targets: (N,) tokens, or (N, V) distributions.
        embeddings: (V, d), one per token, without a gradient.
        remove_gold: see :func:`expected_distance`.

    Returns:
        (N,), in nats.
    """
    unit = F.normalize(embeddings.detach(), dim=-1)
    return _balanced(
        soft_cross_entropy(logits, as_distribution(targets, logits)),
        expected_distance(logits, targets, unit, remove_gold),
    )


def expected_distance(
    logits: Tensor, targets: Tensor, unit: Tensor, remove_gold: bool = False
) -> Tensor:
    """``D = 1 - <sum_v q_v e_v, e_y>``: the mean cosine distance of a drawn token from the label.

    An upper bound of the earth mover's distance between the prediction ``q`` and the label, and
    equal to it where the label is one token.

    Args:
        logits: (N, V), ``q`` their softmax.
        targets: (N,) tokens, or (N, V) distributions, for which ``e_y`` is the mean embedding.
        unit: (V, d), embeddings of length 1.
        remove_gold: leave the label's own mass out of the sum, without a change of the gradient;
            ``D`` is then near 1 for a sure prediction.

    Returns:
        (N,).
    """
    q = logits.softmax(-1)
    unit = unit.to(q)
    if targets.is_floating_point():
        mass = q - (q * targets).detach() if remove_gold else q
        return 1 - ((mass @ unit) * (targets.to(q) @ unit)).sum(-1)
    label = unit[targets]
    # One product with the vocabulary: the label's embedding is a look-up.
    near = ((q @ unit) * label).sum(-1)
    if remove_gold:
        own = q.gather(-1, targets.unsqueeze(-1)).squeeze(-1).detach()
        near = near - own * label.square().sum(-1)
    return 1 - near


def _balanced(cross_entropy: Tensor, distance: Tensor) -> Tensor:
    ratio = (cross_entropy / (distance + _TINY)).detach()
    return 0.5 * (cross_entropy + ratio * distance)


class EarthMoverTokenLoss(LossReplacement):
    """Trains a language model's mass to lie near the next token, not only on it (EMO).

    Ren, Wu, Zhu (2023), EMO: Earth Mover Distance Optimization for Auto-Regressive Language
    Modeling, arXiv:2310.04691.

    ``L = (CE + sg(CE / D) D) / 2`` with ``D = 1 - <sum_v q_v e_v, e_y>``, where ``e_v`` are the
    rows of the output layer at length 1: the distance from the label's embedding to that of a
    token drawn from the prediction, in the mean. The cross-entropy punishes all wrong tokens by
    their probability alone; ``D`` spares those that mean nearly the same. The detached ratio
    brings both to one size per token, so the value *is* the cross-entropy (to rounding), and
    ``reg/earth_mover_token_loss_distance``, the mean ``D``, shows what changes.

    Confirmed against DRSY/EMO: ``cost="frozen"`` is ``mode="emo"`` of language_modeling/gpt2.py,
    embeddings copied from the pretrained head before training; ``cost="live"`` is
    ``emo1_adaptive`` of emo_patch.py, the head as it is in each step, without a gradient, and with
    the label's own mass removed from the value of ``D``, which keeps the ratio from growing as
    the prediction gets sure. A live head can lower ``D`` by moving embeddings together; the
    frozen one cannot. It works for any classifier whose head has a row per class.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy.
        head: the name of the output layer, whose ``weight`` is (V, d), or the end of its dotted
            name.
        cost: ``"frozen"`` or ``"live"``.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are, if not in the usual places. Logits and
            tokens have to be shifted against each other already.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or the module has no such layer.
        RegularizationError: in the first step, if logits have another number of classes than the
            layer has rows.

    Note:
        Over ranks: global; a mean over tokens, for which nothing is communicated. Cost: a product
        of (tokens, V) with (V, d), forward and backward, which is the head's forward and half of
        its backward once more; a second such product where labels are soft. The frozen copy is
        as large as the head, on every device and in checkpoints.

        It wants pretrained embeddings: between random ones distances mean nothing.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EarthMoverTokenLoss
        >>> trainer = L.Trainer(callbacks=[EarthMoverTokenLoss(head="lm_head")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling",
            "Ren et al.",
            2023,
            "2310.04691",
        ),
    )
    sharded: ClassVar[bool | None] = False
    function: ClassVar[Callable[..., Any] | None] = staticmethod(earth_mover_token_loss)
    explanation: ClassVar[str] = "adds the distance of the predicted mass from the label's token"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        head: str = "lm_head",
        cost: Cost = "frozen",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        if not isinstance(head, str) or not head:
            raise ArgumentError(
                self,
                f"`head` must be the name of a submodule, got {head!r}",
                cure='EarthMoverTokenLoss(head="lm_head")',
            )
        if cost not in _COSTS:
            raise ArgumentError(
                self,
                f"`cost` must be one of {', '.join(_COSTS)}, got {cost!r}",
                cure='EarthMoverTokenLoss(cost="frozen")',
            )
        self.head = head
        self.cost = cost
        self._unit: Tensor | None = None
        self._resumed = False

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The layer has to be there."""
        self._weight(pl_module)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the embeddings that training starts with."""
        if self.cost == "live":
            return
        weight = self._weight(pl_module)
        if self._unit is None or (int(trainer.global_step) == 0 and not self._resumed):
            self._unit = _unit(weight)
        self._unit = self._unit.to(weight.device)
        self._resumed = False

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        unit = self._unit if self.cost == "frozen" else _unit(self._weight(step.module))
        assert unit is not None
        if len(unit) != logits.shape[-1]:
            raise RegularizationError(
                self,
                f"has an embedding for each of {len(unit)} rows of {self.head!r}, and the logits "
                f"have {logits.shape[-1]} classes",
                cure='EarthMoverTokenLoss(head="<the layer that gives the logits>")',
            )
        labels = self._labels(step, distribution)
        distance = expected_distance(logits, labels, unit, remove_gold=self.cost == "live")
        if not step.is_rerun:
            step.log(self, distance.detach().mean(), "distance")
        return _balanced(soft_cross_entropy(logits, distribution), distance)

    def state_dict(self) -> dict[str, Any]:
        """The frozen embeddings."""
        if self.cost == "live":
            return {}
        return {"unit": torch.empty(0) if self._unit is None else self._unit.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the embeddings of a checkpoint."""
        saved: Tensor = state_dict.get("unit", torch.empty(0))
        self._resumed = saved.numel() > 0
        self._unit = saved.clone() if self._resumed else None

    def _labels(self, step: Step, distribution: Tensor) -> Tensor:
        """Tokens (N,) where labels are that, which saves a product with the vocabulary."""
        targets = torch.as_tensor(step.targets)
        softened = self.pipeline is None or self.pipeline.plan.phases["transform_targets"]
        if softened or step.mixes or targets.is_floating_point():
            return distribution
        return labelled(targets, targets, distribution.shape[-1])

    def _weight(self, module: nn.Module) -> Tensor:
        tables = {name: _table(part) for name, part in module.named_modules()}
        tables = {name: table for name, table in tables.items() if table is not None}
        found = [n for n in tables if n == self.head or n.endswith(f".{self.head}")]
        table = tables.get(self.head, tables[found[0]] if len(found) == 1 else None)
        if table is None:
            raise ArgumentError(
                self,
                f"takes embeddings from {self.head!r}, which fits {len(found)} layers of this "
                f"module with a weight (V, d); it has {', '.join(tables) or 'none'}",
                cure=f'EarthMoverTokenLoss(head="{next(reversed(tables), "lm_head")}")',
            )
        return table


def _table(part: nn.Module) -> Tensor | None:
    weight = getattr(part, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _unit(weight: Tensor) -> Tensor:
    full = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    return F.normalize(full, dim=-1)
