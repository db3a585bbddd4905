"""SAM in every k-th step; in between its direction towards flatness is used again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine.errors import check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.engine.update import ParameterUpdate
from lightning_reg.mechanisms.normalized_ascent import NormalizedAscent, joint_dot, joint_norm
from lightning_reg.mechanisms.weight_perturbation import Sharpness

_EPSILON = 1e-12


def look_sam_direction(
    clean: Sequence[Tensor], perturbed: Sequence[Tensor], *, per_tensor: bool = False
) -> list[Tensor]:
    r"""What of SAM's gradient is orthogonal to the plain one, and leads to flatter regions.

    .. math:: g_v = g_s - \frac{\langle g_s, g \rangle}{\lVert g \rVert^2} g

    Args:
        clean: the gradient :math:`g` at the weights, one tensor a weight.
        perturbed: SAM's gradient :math:`g_s`, in the same shapes.
        per_tensor: take norms and inner products of each tensor, or of all together.

    Returns:
        One tensor a weight.
    """
    pairs = [([g], [s]) for g, s in zip(clean, perturbed, strict=True)]
    directions: list[Tensor] = []
    for g, s in pairs if per_tensor else [(list(clean), list(perturbed))]:
        along = joint_dot(s, g) / (joint_norm(g).square() + _EPSILON)
        directions += torch._foreach_sub(s, torch._foreach_mul(g, [along] * len(g)))
    return directions


def look_sam_gradient(
    gradients: Sequence[Tensor],
    direction: Sequence[Tensor],
    alpha: float = 0.7,
    *,
    per_tensor: bool = False,
) -> list[Tensor]:
    r"""The gradient of a step without a second pass: :math:`g + \alpha \lVert g \rVert
    g_v / \lVert g_v \rVert`.

    Args:
        gradients: :math:`g`, one tensor a weight.
        direction: :math:`g_v` of the last step that had one, in the same shapes.
        alpha: the share.
        per_tensor: take norms of each tensor, or of all together.

    Returns:
        One tensor a weight.
    """
    units = _units(direction, alpha, per_tensor)
    return list(torch._foreach_add(list(gradients), _to_length(units, gradients, per_tensor)))


def _units(direction: Sequence[Tensor], alpha: float, per_tensor: bool) -> list[Tensor]:
    """The direction at length ``alpha``, of each tensor or of all together."""
    direction = list(direction)
    if per_tensor:
        sizes = torch._foreach_add(torch._foreach_norm(direction), _EPSILON)
        units = torch._foreach_div(direction, list(sizes))
    else:
        size = joint_norm(direction) + _EPSILON
        units = torch._foreach_div(direction, [size] * len(direction))
    return list(torch._foreach_mul(units, alpha))


def _to_length(
    units: Sequence[Tensor], gradients: Sequence[Tensor], per_tensor: bool
) -> list[Tensor]:
    """The units times the length of the gradient."""
    if per_tensor:
        return list(torch._foreach_mul(list(units), list(torch._foreach_norm(list(gradients)))))
    return list(torch._foreach_mul(list(units), [joint_norm(gradients)] * len(units)))


class LookSAM(NormalizedAscent):
    r"""LookSAM (Liu, Mai, Chen, Hsieh, You 2022): SAM at little more than the plain cost.

    Every ``k``-th step is SAM's, and keeps :math:`g_v`, what of :math:`g_s = \nabla L(w + e)` is
    orthogonal to :math:`g = \nabla L(w)`, which changes slowly. The others take one pass:

    .. math:: g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert} g_v

    with one norm over all parameters. No official code was found: the formula is from memory of
    the paper, and agrees, with ``per_tensor=True``, with two ports (rollovd/LookSAM,
    ``looksam.py``; pytorch_optimizer, ``LookSAM``), which take norms tensor by tensor and have
    the defaults ``alpha=0.7, k=10``; ``k=5`` is the paper's usual choice. The layer-wise radius
    of its Look-LayerSAM is not part of it. ``reg/look_sam`` is :math:`L(w + e) - L(w)` of the
    steps that have it, in the unit of the loss.

    Args:
        rho: the radius; a number or a :class:`Schedule`. 0 turns LookSAM off.
        k: SAM in every k-th optimizer step; 1 is SAM, bit for bit.
        alpha: the share of the direction that is used again, at least 0; 0 is SAM with
            ``interval=k``.
        per_tensor: take norms and inner products of each tensor by itself.
        adaptive: scale the neighbourhood by the weights (ASAM).
        eta: the floor of that scale.
        sharpness: whose gradient gives :math:`e`. ``"micro"``: each micro-batch's on its rank;
            ``"rank"``: that of a rank's whole accumulation window; ``"global"``: that of all
            ranks' windows.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``rho``, ``alpha`` or ``eta`` is negative, ``k`` is no whole number from
            1, or ``sharpness`` has no meaning.
        UnsupportedError: if a second run of ``training_step`` gives another loss than the first,
            under manual optimization, and where weights are sharded over ranks.

    Note:
        Ranks: :math:`g_v` is that of the gradients averaged over ranks and micro-batches, the same
        on all ranks; every k-th step takes one more reduction of the size of the weights. With
        ``"global"`` N ranks train what one process does on the joined batch. Accumulation: as SAM.
        Cost: one more forward and backward pass in every k-th step; :math:`g_v` is one more copy
        of the weights, in checkpoints, too. Gradients are compared before they are clipped; what
        other techniques add to them in closed form counts as SAM's part of the direction.
        It hurts with a large ``k`` early in training, where directions change fast.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LookSAM
        >>> trainer = L.Trainer(callbacks=[LookSAM(rho=0.05, k=5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Towards Efficient and Scalable Sharpness-Aware Minimization",
            "Liu et al.",
            2022,
            "2203.02714",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    sharded: ClassVar[bool | None] = False
    reads: ClassVar[frozenset[str]] = NormalizedAscent.reads | {"gradients"}
    writes: ClassVar[frozenset[str]] = NormalizedAscent.writes | {"gradients"}
    function = staticmethod(look_sam_gradient)
    explanation: ClassVar[str] = "SAM in every k-th step, its direction again in between"

    def __init__(
        self,
        rho: float | Schedule = 0.05,
        *,
        k: int = 5,
        alpha: float = 0.7,
        per_tensor: bool = False,
        adaptive: bool = False,
        eta: float = 0.01,
        sharpness: Sharpness = "micro",
        name: str | None = None,
    ) -> None:
        whole = isinstance(k, int) and not isinstance(k, bool)
        check_range(self, "k", k if whole else float("nan"), 1, cure="LookSAM(0.05, k=5)")
        super().__init__(
            rho, adaptive=adaptive, eta=eta, sharpness=sharpness, interval=k, name=name
        )
        check_range(
            self, "alpha", alpha, 0, float("inf"), high_open=True, cure="LookSAM(0.05, alpha=0.7)"
        )
        self.k = k
        self.alpha = alpha
        self.per_tensor = per_tensor
        self._direction: dict[str, Tensor] = {}
        self._units: dict[str, Tensor] | None = None  # of the direction, until it changes

    @property
    def keeps_clean(self) -> bool:
        """A direction is only kept to be used again."""
        return self.k > 1 and self.alpha != 0

    def edit_gradients(self, update: ParameterUpdate) -> None:
        """Keep the direction, or use it."""
        if not self.keeps_clean:
            return
        named = update.trainable(dict(update.module.named_parameters()))
        named = {name: p for name, p in named.items() if p.grad is not None}
        if self.is_due(update):
            self._look(update, named)
            return
        used = {name: p for name, p in named.items() if name in self._direction}
        gradients = [p.grad for p in used.values() if p.grad is not None]
        if gradients:
            units = list(self._units_of(used).values())
            torch._foreach_add_(gradients, _to_length(units, gradients, self.per_tensor))

    def _units_of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The direction at length ``alpha``, which stays the same until the next one is found."""
        if self._units is None or self._units.keys() != weights.keys():
            direction = [self._direction[n].to(w) for n, w in weights.items()]
            units = _units(direction, self.alpha, self.per_tensor)
            self._units = dict(zip(weights, units, strict=True))
        return self._units

    def _look(self, update: ParameterUpdate, named: dict[str, Any]) -> None:
        clean = self.take_kept(update)
        names = [name for name, p in named.items() if p in clean]
        if not names:
            return
        gradients = [named[name].grad for name in names]
        scale = update.gradient_scale()
        if scale is not None:
            gradients = list(torch._foreach_div(gradients, scale.to(gradients[0].device)))
        first = [clean[named[name]] for name in names]
        new = look_sam_direction(first, gradients, per_tensor=self.per_tensor)
        # Without a host sync: a step that is not finite keeps the direction from before.
        good = torch.isfinite(joint_norm(new))
        for name, tensor in zip(names, new, strict=True):
            old = self._direction.get(name)
            before = torch.zeros_like(tensor) if old is None else old.to(tensor)
            self._direction[name] = torch.where(good, tensor, before)
        self._units = None

    def state_dict(self) -> dict[str, Any]:
        """The direction."""
        return {"direction": {n: t.detach().cpu().clone() for n, t in self._direction.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved direction."""
        self._direction = dict(state_dict["direction"])
        self._units = None


__all__ = ["LookSAM", "look_sam_direction", "look_sam_gradient"]
