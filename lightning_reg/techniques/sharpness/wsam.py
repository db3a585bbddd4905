"""Weights sharpness against the loss, as a regularization term of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine.errors import check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.engine.update import ParameterUpdate
from lightning_reg.mechanisms.normalized_ascent import NormalizedAscent
from lightning_reg.mechanisms.weight_perturbation import Sharpness


def wsam_gradient(
    clean: Sequence[Tensor], perturbed: Sequence[Tensor], gamma: float = 0.9
) -> list[Tensor]:
    r"""The gradient of the loss plus weighted sharpness.

    .. math:: \nabla\Bigl(L + \frac{\gamma}{1 - \gamma} (L_p - L)\Bigr)
        = \frac{1 - 2\gamma}{1 - \gamma} g + \frac{\gamma}{1 - \gamma} g_p

    Args:
        clean: the gradient :math:`g` at the weights, one tensor a weight.
        perturbed: the gradient :math:`g_p` at the perturbed weights, in the same shapes.
        gamma: the weight, in [0, 1): 0 is the plain gradient, 1/2 SAM's.

    Returns:
        One tensor a weight.
    """
    share = gamma / (1 - gamma)
    # The two shares, rather than g + share * (g_p - g), so that 1/2 leaves g_p as it is.
    weighted = torch._foreach_mul(list(perturbed), share)
    return list(torch._foreach_add(weighted, list(clean), alpha=1 - share))


class WSAM(NormalizedAscent):
    r"""WSAM, weighted sharpness as a regularization term (Yue et al. 2023).

    .. math:: L + \frac{\gamma}{1 - \gamma} \bigl( L(w + e) - L(w) \bigr), \qquad
        e = \rho \frac{g}{\lVert g \rVert_2}

    With :math:`\gamma = 1/2` this is SAM's loss; more weights flatness, less the loss in place.
    By default the two parts are decoupled: the optimizer gets :math:`g` alone, so that its
    momentum and its second moments are those of the loss, and after its step the weights move by
    :math:`-\eta_{lr} \frac{\gamma}{1 - \gamma} (g_p - g)`, :math:`\eta_{lr}` being the learning
    rate of that step.

    Formula and defaults (``gamma=0.9``, decoupled) are those of pytorch_optimizer (``WSAM``),
    which is the authors' (intelligent-machine-learning, atorch) in another package; the official
    repository was not read. There gradients are clipped before the parts are separated; here the
    Trainer clips what the optimizer gets, and the decoupled part is not clipped. ``reg/wsam`` is
    :math:`L(w + e) - L(w)`, in the unit of the loss.

    Args:
        rho: the radius; a number or a :class:`Schedule`. 0 turns WSAM off.
        gamma: the weight, in [0, 1).
        decouple: let the optimizer see the loss only, and sharpness act beside it.
        adaptive: scale the neighbourhood by the weights (ASAM).
        eta: the floor of that scale.
        sharpness: whose gradient gives :math:`e`. ``"micro"``: each micro-batch's on its rank;
            ``"rank"``: that of a rank's whole accumulation window; ``"global"``: that of all
            ranks' windows.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``rho`` or ``eta`` is negative, ``gamma`` outside [0, 1), or
            ``sharpness`` has no meaning.
        UnsupportedError: if a second run of ``training_step`` gives another loss than the first,
            under manual optimization, and where weights are sharded over ranks.

    Note:
        Ranks: gradients are averaged; the decoupled part takes one more reduction of the size of
        the weights per optimizer step, ``"global"`` two. With ``"global"`` N ranks train what one
        process does on the joined batch. Accumulation: ``"micro"`` perturbs each micro-batch by
        itself; the others keep the batches of the window in memory until its end.
        Cost: one more forward and backward pass, as SAM; two copies of the gradients, one more
        if decoupled. DDP's reduction runs after the second backward and not along with it.
        It hurts with ``gamma`` near 1: the weight grows without a bound (9 at 0.9, 99 at 0.99).
        Decoupled sharpness takes no notice of an adaptive optimizer's scales.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import WSAM
        >>> trainer = L.Trainer(callbacks=[WSAM(rho=0.05, gamma=0.8)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
            "Yue et al.",
            2023,
            "2305.15817",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    sharded: ClassVar[bool | None] = False
    function = staticmethod(wsam_gradient)
    explanation: ClassVar[str] = "loss plus gamma / (1 - gamma) times sharpness"

    def __init__(
        self,
        rho: float | Schedule = 0.05,
        *,
        gamma: float = 0.9,
        decouple: bool = True,
        adaptive: bool = False,
        eta: float = 0.01,
        sharpness: Sharpness = "micro",
        name: str | None = None,
    ) -> None:
        super().__init__(rho, adaptive=adaptive, eta=eta, sharpness=sharpness, name=name)
        cure = "WSAM(0.05, gamma=0.9)"
        check_range(self, "gamma", gamma, 0, 1, high_open=True, cure=cure)
        self.gamma = gamma
        self.decouple = decouple
        self._rates: list[tuple[float | Tensor, list[nn.Parameter]]] = []

    @property
    def combines(self) -> bool:
        """The perturbed gradient alone is SAM's."""
        return self.decouple or self.gamma != 0.5

    def combine(
        self, weights: list[nn.Parameter], clean: list[Tensor], perturbed: list[Tensor]
    ) -> list[Tensor]:
        """The loss and its sharpness, together or apart."""
        if not self.decouple:
            return wsam_gradient(clean, perturbed, self.gamma)
        self.keep(weights, torch._foreach_sub(perturbed, clean))
        return clean

    def edit_gradients(self, update: ParameterUpdate) -> None:
        """Note the learning rates of the step: a scheduler moves them before :meth:`project`."""
        groups = update.optimizer.param_groups if update.optimizer is not None else []
        self._rates = [(group["lr"], list(group["params"])) for group in groups]

    def project(self, update: ParameterUpdate) -> None:
        """The decoupled part, after the optimizer's step."""
        moves = self.take_kept(update)
        # An overflow under fp16 has skipped the optimizer's step, too.
        if not moves or not self._finite(update, list(moves.values())):
            return
        share = self.gamma / (1 - self.gamma)
        for rate, parameters in self._rates:
            moved = [p for p in parameters if p in moves]
            if moved:
                scaled = torch._foreach_mul([moves[p] for p in moved], -rate * share)
                torch._foreach_add_(moved, list(scaled))  # type: ignore[arg-type]
        self._rates = []

    def __getstate__(self) -> dict[str, Any]:
        # The optimizer's parameters belong to a run.
        return {**super().__getstate__(), "_rates": []}


__all__ = ["WSAM", "wsam_gradient"]
