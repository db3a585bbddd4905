"""Drops outputs of experts, or of whole mixture layers, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.forward_noise import OWN_NOISE, ActivationNoise

__all__ = ["ExpertDropout", "mask_tokens"]

Kind = Literal["expert", "final"]
_KINDS = ("expert", "final")


def mask_tokens(output: Tensor, dropped: Tensor, p: float) -> Tensor:
    """``m_t y_t / (1 - p)``: tokens without the output of a layer, the others scaled up.

    Args:
        output: ``y``, (..., d), one vector a token.
        dropped: (...) bool, True for tokens with ``m_t = 0``.
        p: the probability of being dropped, in [0, 1).

    Returns:
        (..., d), equal to ``y`` in the mean over masks.
    """
    kept = (~dropped).to(output.dtype) / (1 - p)
    return output * kept.unsqueeze(-1)


class ExpertDropout(ActivationNoise):
    """Expert and final output masking (EOM, FOM): dropout on mixture-of-experts layers.

    Elbayad, Sun, Bhosale (2022), Fixing MoE Over-Fitting on Low-Resource Languages in Multilingual
    Machine Translation, arXiv:2212.07571.

    ``y_t = sum_e g_te E_e(x_t)``. With ``kind="expert"`` (EOM) each expert's output for a token is
    dropped with probability ``p``, ``y_t = sum_e m_te g_te E_e(x_t) / (1 - p)``, so that tokens
    learn to do with one of their experts; with ``kind="final"`` (FOM) it is the combined output,
    ``m_t y_t / (1 - p)``, and the token passes by the residual connection alone. Gate weights are
    not normalized again afterwards. EOM was confirmed with a fork of the official top-2 gate
    (fairseq's ``nllb`` branch), which puts inverted dropout on the gate weights of the two chosen
    experts, after their normalization: the same product. The official recipes have ``p = 0.2``.
    FOM is from memory of the paper; not checked against code.

    What counts as a token: one vector along the last dimension of what the layer returns, so that
    experts that get their tokens as (N, d), (capacity, d) or (E, capacity, d) all fit.

    Args:
        p: the probability of being dropped, in [0, 1), or a Schedule; 0 turns the technique off.
        layers: for ``"expert"``: names of the experts, or of the containers (``nn.ModuleList``,
            ``nn.ModuleDict``) that hold them, ``"blocks.3.moe.experts"``; for ``"final"``: names of
            the mixture layers. A layer may return a tuple whose first item is the output.
        kind: ``"expert"`` or ``"final"``.
        name: the name in logs, checkpoints and random streams; needed to use both kinds at once.

    Raises:
        ArgumentError: if an argument is outside its range, or a layer is not there.
        RegularizationError: in the first step, if an output is no tensor.

    Note:
        In training steps only; a second pass (SAM) sees the same masks. Losses that balance the
        load of experts are yours, and see the gate as it is. Over ranks: local, every rank draws
        for its own tokens. No collective. Cost: one draw a token and a product over the outputs.

        It hurts where experts have data enough: on high-resource tasks that underfit, any dropout
        costs accuracy.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ExpertDropout
        >>> masking = ExpertDropout(0.2, layers="moe.experts")
        >>> trainer = L.Trainer(callbacks=[masking], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Fixing MoE Over-Fitting on Low-Resource Languages in Multilingual Machine Translation",
            "Elbayad et al.",
            2022,
            "2212.07571",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = OWN_NOISE
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mask_tokens)
    takes_tuples: ClassVar[bool] = True
    explanation: ClassVar[str] = "drops outputs of experts, token by token"

    def __init__(
        self,
        p: float | Schedule = 0.2,
        *,
        layers: str | Sequence[str],
        kind: Kind = "expert",
        name: str | None = None,
    ) -> None:
        super().__init__(p, layers=layers, name=name)
        if not isinstance(p, Schedule):
            cure = 'ExpertDropout(0.2, layers="moe.experts")'
            check_range(self, "p", p, 0, 1, high_open=True, cure=cure)
        if kind not in _KINDS:
            raise ArgumentError(
                self,
                f"`kind` must be one of {', '.join(_KINDS)}, got {kind!r}",
                cure='ExpertDropout(0.2, layers="moe.experts", kind="expert")',
            )
        self.kind = kind

    def noised(self, module: nn.Module) -> list[str]:
        """The layers, with the members of containers in their place."""
        found: list[str] = []
        for layer in self.layers:
            part = module.get_submodule(layer)
            contains = isinstance(part, (nn.ModuleList, nn.ModuleDict))
            found += [f"{layer}.{n}" for n, _ in part.named_children()] if contains else [layer]
        return found

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The output without that of dropped tokens."""
        draws = torch.rand(output.shape[:-1], generator=generator, device=output.device)
        return mask_tokens(output, draws < strength, strength)
