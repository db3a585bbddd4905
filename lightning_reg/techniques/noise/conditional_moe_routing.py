"""Lets each token choose between a shared network and a mixture of experts, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, Regularizer, Schedule, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics

__all__ = ["ConditionalMoE", "ConditionalMoERouting", "conditional_moe", "routing_budget"]


def conditional_moe(shared: Tensor, routed: Tensor, gates: Tensor) -> Tensor:
    """``y = (1 - G(x)) FFN_shared(x) + G(x) MoE(x)``.

    Args:
        shared: ``FFN_shared(x)``, (..., d).
        routed: ``MoE(x)``, (..., d).
        gates: ``G(x)``, (...).

    Returns:
        (..., d); the shared output where a gate is 0.
    """
    weight = gates.unsqueeze(-1).to(shared.dtype)
    return (1 - weight) * shared + weight * routed


def routing_budget(share: Tensor, budget: float) -> Tensor:
    """``|mean_t G(x_t) - b|``, the distance from the share of tokens that experts may have.

    Args:
        share: the mean gate over tokens and layers, a scalar.
        budget: ``b``, in [0, 1].

    Returns:
        A scalar, at least 0.
    """
    return (share - budget).abs()


class _Gate(nn.Module):
    """``G(x) = dropout(sigmoid(w x + c))`` in float32, and which tokens count."""

    def __init__(self, features: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(features, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates (...) and the tokens that count (...) as 0 and 1, of x (..., features)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.projection.weight.to(wide), self.projection.bias.to(wide)
            gates = F.linear(x.to(wide), weight, bias).squeeze(-1).sigmoid()
            counted = torch.ones_like(gates) if padding is None else (~padding).to(gates)
            gates = self.dropout(gates) * counted
        return gates, counted.detach()


class ConditionalMoE(nn.Module):
    """A mixture-of-experts layer with a shared network beside it: ``(1 - G) shared + G moe``.

    Part of a model; :class:`ConditionalMoERouting` finds it there and holds its gate to a budget.

    Args:
        moe: the mixture layer, from (..., d) to (..., d), or to a tuple of which that is the first.
        shared: a network from (..., d) to (..., d), usually of the size of one expert.
        features: ``d`` of the input.
        gate_dropout: the probability with which the gate of a token is 0 in training, so that it
            goes by the shared network alone; other gates are divided by one minus it, as in the
            official code, which keeps the mean of the output (and lets a gate exceed 1).

    Raises:
        ArgumentError: if ``gate_dropout`` is outside [0, 1).

    Example:
        >>> import torch
        >>> from lightning_reg.techniques.noise.conditional_moe_routing import ConditionalMoE
        >>> layer = ConditionalMoE(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), features=8)
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self, moe: nn.Module, shared: nn.Module, features: int, gate_dropout: float = 0.2
    ) -> None:
        super().__init__()
        cure = "ConditionalMoE(moe, shared, features=512, gate_dropout=0.2)"
        check_range(self, "gate_dropout", gate_dropout, 0, 1, high_open=True, cure=cure)
        self.moe, self.shared = moe, shared
        self.gate = _Gate(features, gate_dropout)

    def forward(self, x: Tensor, *args: Any, padding: Tensor | None = None, **kwargs: Any) -> Any:
        """What ``moe`` would return, with the shared network's part in it.

        Args:
            x: (..., d).
            args: further arguments of ``moe``.
            padding: (...) bool, True for tokens that do not count: they take the shared network
                and no part in the budget.
            kwargs: further arguments of ``moe``.
        """
        gates, _ = self.gate(x, padding)
        shared, routed = self.shared(x), self.moe(x, *args, **kwargs)
        if isinstance(routed, tuple):
            return (conditional_moe(shared, routed[0], gates), *routed[1:])
        return conditional_moe(shared, routed, gates)


class ConditionalMoERouting(Regularizer):
    """Holds the tokens that go to experts to a budget (conditional MoE routing).

    Elbayad, Sun, Bhosale (2022), Fixing MoE Over-Fitting on Low-Resource Languages in Multilingual
    Machine Translation, arXiv:2212.07571.

    The model has :class:`ConditionalMoE` layers, ``y = (1 - G(x)) FFN_shared(x) + G(x) MoE(x)``
    with ``G(x) = sigmoid(w x + c)``; this adds ``strength * |mean G - b|`` to the loss, the mean
    over the tokens of all such layers. Tokens that do not need an expert leave it to those that
    do, and the gate's own dropout lets every token learn to do without. Confirmed with the official
    code (fairseq, ``nllb`` branch: ``cmr_layer.py`` and the criterion
    ``moe_label_smoothed_cross_entropy``): the gate, its dropout, padding left out, and the
    distance of the *mean* of all layers together, not the mean of distances. There the mean is
    that of a rank unless ``moe_cmr_xgpu`` is set; here it is that of all ranks. Its own defaults,
    ``b = 1`` with strength 0, switch the loss off; ours are ``b = 0.8``, strength 0.1.

    Args:
        strength: the multiplier, at least 0, or a Schedule.
        budget: ``b``, in [0, 1].
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range; before training, if the module has no
            :class:`ConditionalMoE`.

    Note:
        The logged value is the distance. Over ranks: global, in value and gradient. Under
        accumulation each micro-batch has its own distance, which is that of the joint batch only
        where all are on one side of the budget. Cost: a mean over gates and, on several ranks, one
        small collective of its own.

        The shared network and the experts both run for all tokens: the saving is for a
        deployment that skips experts where a gate is small, not for training.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ConditionalMoERouting
        >>> trainer = L.Trainer(callbacks=[ConditionalMoERouting(0.1, budget=0.8)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Fixing MoE Over-Fitting on Low-Resource Languages in Multilingual Machine Translation",
            "Elbayad et al.",
            2022,
            "2212.07571",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    reads: ClassVar[frozenset[str]] = frozenset({"features"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch has its own distance from the budget",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(routing_budget)
    explanation: ClassVar[str] = "holds the mean gate of ConditionalMoE layers to a budget"

    def __init__(
        self, strength: float | Schedule = 0.1, *, budget: float = 0.8, name: str | None = None
    ) -> None:
        super().__init__(strength, name=name)
        cure = "ConditionalMoERouting(0.1, budget=0.8)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "budget", budget, 0, 1, cure=cure)
        self.budget = budget
        self.layers: list[str] = []

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the gates."""
        found = [n for n, m in pl_module.named_modules() if isinstance(m, ConditionalMoE)]
        if not found:
            raise ArgumentError(
                self,
                f"finds no ConditionalMoE layer in {type(pl_module).__name__}",
                cure="self.ffn = ConditionalMoE(moe, shared, features=512)",
            )
        self.layers = [f"{name}.gate" for name in found]

    def penalty(self, step: Step) -> Tensor | None:
        """Phase 4."""
        calls = [call for layer in self.layers for call in step.records.get(layer, [])]
        if not calls:
            # All ranks make the same collectives; a rank whose step passed by takes part with none.
            none = torch.zeros(0, device=step.device)
            return routing_budget(step.comm.mean(none, none), self.budget).detach()
        gates = torch.cat([gates.reshape(-1) for gates, _ in calls])
        counted = torch.cat([counted.reshape(-1) for _, counted in calls])
        return routing_budget(step.comm.mean(gates, counted), self.budget)

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the module."""
        self.layers = []
