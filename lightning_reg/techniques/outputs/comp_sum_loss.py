"""Replaces the cross-entropy by a member of the family that it belongs to, plain or adversarial."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import as_distribution, flatten
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import RunContext
from lightning_reg.mechanisms.adversarial_inputs import AdversarialInputs, Norm
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces, check_replaces

__all__ = [
    "CompSumLoss",
    "SmoothAdversarialCompSum",
    "comp_sum_loss",
    "smooth_adversarial_comp_sum",
]

_PAPER = Paper(
    "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    "Mao et al.",
    2023,
    "2304.07288",
)


def comp_sum_loss(logits: Tensor, targets: Tensor, tau: float = 1.7) -> Tensor:
    """``Phi_tau(sum_{j != y} exp(z_j - z_y))`` of each row.

    ``Phi_tau(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau)``, and ``log(1 + u)`` at ``tau = 1``. In
    terms of ``p = softmax(z)`` it is ``(p_y^(tau - 1) - 1) / (1 - tau)``. Soft labels weight the
    terms of their classes.

    Args:
        logits: (N, C).
        targets: (N,) class indices, or (N, C) distributions.
        tau: at least 0: 0 is the sum of exponentials, 1 the cross-entropy in nats, between 1 and
            2 the generalized cross-entropy with ``q = tau - 1``, 2 the absolute error ``1 - p_y``.

    Returns:
        (N,), at least 0. The gradient is ``p_y^(tau - 1)`` times that of the cross-entropy.
    """
    nll = -F.log_softmax(logits, dim=-1)
    share = as_distribution(targets, logits)
    # A class without a share costs nothing, whatever its probability.
    nll = nll.masked_fill(share == 0, 0.0)
    if tau != 1:
        # From the logarithm, by expm1: exact on both sides of tau = 1.
        nll = torch.expm1((1 - tau) * nll) / (1 - tau)
    return (share * nll).sum(-1)


def smooth_adversarial_comp_sum(
    logits: Tensor,
    adversarial: Tensor,
    targets: Tensor,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 0.5,
) -> Tensor:
    """``Phi_tau(sum_{j != y} exp(-D_j(x) / rho)) + nu ||D(x') - D(x)||_2`` of each row.

    ``D_j(x) = z_y(x) - z_j(x)``, for all ``j`` but the label ``y``, are the margins.

    Args:
        logits: (N, C) at ``x``.
        adversarial: (N, C) at ``x'``.
        targets: (N,) class indices, or (N, C) distributions, which weight terms.
        tau: of :func:`comp_sum_loss`.
        rho: above 0, the margin that is asked for.
        nu: at least 0.

    Returns:
        (N,).
    """
    shift = margin_shift(adversarial, logits, targets)
    return comp_sum_loss(logits / rho, targets, tau) + nu * shift


def margin_shift(adversarial: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """``||D(x') - D(x)||_2`` of each row; its gradient is 0 where nothing moved."""
    moved = adversarial - logits
    moved = moved - moved.mean(-1, keepdim=True)
    # sum_j (d_y - d_j)^2 = C d_y^2 + sum_j d_j^2 for each label y, since sum_j d_j = 0.
    squares = moved.shape[-1] * moved.square() + moved.square().sum(-1, keepdim=True)
    positive = squares > 0
    roots = torch.where(positive, squares.where(positive, 1.0).sqrt(), 0.0 * squares)
    return (as_distribution(targets, logits) * roots).sum(-1)


class CompSumLoss(LossReplacement):
    """Replaces the cross-entropy by another comp-sum loss, more or less strict with outliers.

    Mao, Mohri, Zhong (2023), Cross-Entropy Loss Functions: Theoretical Analysis and Applications,
    arXiv:2304.07288.

    ``L = ((1 + u)^(1 - tau) - 1) / (1 - tau)`` with ``u = sum_{j != y} exp(z_j - z_y)``, that is
    ``(p_y^(tau - 1) - 1) / (1 - tau)``: ``tau = 0`` is the sum-exponential loss, 1 the
    cross-entropy, ``1 < tau < 2`` the generalized cross-entropy with ``q = tau - 1``, and 2 the
    absolute error. A sample's gradient is that of the cross-entropy times ``p_y^(tau - 1)``: above
    1 samples that are predicted badly (wrong labels) weigh less, below 1 they weigh more. Formula
    from memory of the paper, no official code was found; its special cases were checked against
    torch's cross-entropy and :class:`GeneralizedCrossEntropy`. The default 1.7 is
    the usual ``q = 0.7`` of the latter.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy.
        tau: at least 0.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are, if not in the usual places.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.

    Note:
        Over ranks: global; a mean over samples, for which nothing is communicated. Cost: a
        log-softmax and an exponential over the logits (B, C).

        Below 1 the loss grows as ``p_y^-(1 - tau)``: at ``tau = 0`` a logit gap of 89 overflows
        float32, so clip gradients. Above 1.5 many classes are learned slowly: gradients start at
        ``C^-(tau - 1)``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import CompSumLoss
        >>> trainer = L.Trainer(callbacks=[CompSumLoss(tau=1.7)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (_PAPER,)
    function: ClassVar[Callable[..., Any] | None] = staticmethod(comp_sum_loss)
    explanation: ClassVar[str] = "replaces the cross-entropy by (p^(tau - 1) - 1) / (1 - tau)"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        tau: float = 1.7,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        _check(self, tau=tau)
        self.tau = tau

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        return comp_sum_loss(logits, distribution, self.tau)


class SmoothAdversarialCompSum(AdversarialInputs, LossReplacement):
    """Trains a comp-sum loss on clean inputs and keeps margins where an attack would move them.

    Mao, Mohri, Zhong (2023), Cross-Entropy Loss Functions: Theoretical Analysis and Applications,
    arXiv:2304.07288.

    ``L = Phi_tau(sum_{j != y} exp(-D_j(x) / rho)) + nu sup_{||x' - x|| <= epsilon}
    ||D(x') - D(x)||_2``, with the margins ``D_j = z_y - z_j`` and ``Phi_tau`` of
    :class:`CompSumLoss`. The first part is the loss of the clean input at logits divided by
    ``rho``; the second, smooth in place of the worst case of the loss itself, bounds what an
    attack can do to any margin. The supremum is approached by projected ascent on the norm
    itself; gradients flow through the logits at both inputs, none through ``x'``.

    Formula from memory of the paper, whose bounds hold for ``nu`` large enough; no official code
    was found. ``tau`` and ``rho`` 1 and ``nu`` 0.5 are ours; radius and steps are those of
    :class:`AdversarialTraining` (10 steps of 2/255 in a ball of 8/255), with a start drawn from
    the whole ball, since the norm has no direction at ``x`` itself. With ``random_start=0`` the
    first step follows the clean loss.

    Args:
        strength: the share of the whole new loss, in [0, 1]; the rest stays the cross-entropy.
        tau: at least 0.
        rho: above 0.
        nu: at least 0.
        epsilon: the radius, in the inputs' own unit, above 0.
        step_size: of the ascent; ``None`` takes ``2.5 epsilon / steps``.
        steps: of the ascent.
        norm: ``"linf"`` or ``"l2"``.
        random_start: the radius of the uniform random start, in units of ``epsilon``.
        bounds: the least and the largest valid input.
        replaces: what of the user's loss goes: ``"cross_entropy"``, ``"term"`` or ``"loss"``.
        signals: where ``inputs``, ``logits`` and ``targets`` are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: if inputs are integers, under manual optimization, and where weights are
            sharded over ranks.

    Note:
        The log shows the comp-sum loss at clean inputs, and ``_shift``, the mean norm. Over
        ranks: global; each sample is attacked by itself, nothing is communicated; each rank and
        micro-batch draws its own starts. The user's own logs, metrics and BatchNorm's running
        statistics are those of the clean pass; penalties of other techniques act there alone.
        Cost: ``steps + 2`` forward and backward passes with a random start.

        It excludes the SAM family, whose second pass would lack the norm. A large ``nu`` makes
        the network constant, where the norm is least: on digits with ``epsilon=0.1`` that happened
        at ``nu=1, tau=1``, and not at ``nu=1, tau=0.5``, whose loss is stricter.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SmoothAdversarialCompSum
        >>> trainer = L.Trainer(callbacks=[SmoothAdversarialCompSum(nu=0.5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (_PAPER,)
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "targets")
    reads: ClassVar[frozenset[str]] = AdversarialInputs.reads | LossReplacement.reads
    exclusive: ClassVar[frozenset[str]] = (
        AdversarialInputs.exclusive | LossReplacement.exclusive | {"weight_perturbation"}
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(smooth_adversarial_comp_sum)
    explanation: ClassVar[str] = "adds how far an attack moves the margins to a comp-sum loss"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 0.5,
        epsilon: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        norm: Norm = "linf",
        random_start: float = 1.0,
        bounds: Sequence[float] | None = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            norm=norm,
            random_start=random_start,
            bounds=bounds,
            signals=signals,
            name=name,
        )
        check_replaces(self, replaces)
        _check(self, tau=tau, nu=nu)
        for argument, value in (("rho", rho), ("epsilon", epsilon)):
            cure = f"SmoothAdversarialCompSum({argument}={0.1 if argument == 'epsilon' else 1.0})"
            check_range(
                self, argument, value, 0, math.inf, low_open=True, high_open=True, cure=cure
            )
        self.replaces = replaces
        self.tau = tau
        self.rho = rho
        self.nu = nu

    def active(self, context: RunContext) -> bool:
        """Off at a share of 0."""
        return context.strength(self) != 0

    def keeps_clean(self, step: Step) -> bool:
        """The comp-sum loss is that of the clean inputs."""
        return True

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The first part, of each row; what the second needs of the clean pass is kept."""
        if not step.is_rerun:
            step.kept[self._rows_key] = logits, distribution
        return comp_sum_loss(logits / self.rho, distribution, self.tau)

    def objective(self, step: Step) -> Tensor:
        """The norm, which the ascent raises."""
        logits, distribution = step.kept[self._rows_key]
        return step.rerun(lambda: self._shift(step, logits.detach(), distribution))

    def evaluate(self, step: Step) -> Tensor:
        """The norm at the end of the ascent."""
        return step.rerun(lambda: self._shift(step, *step.kept[self._rows_key]))

    def combine(self, step: Step, clean: Tensor | None, adversarial: Tensor) -> Tensor:
        """Both parts."""
        assert clean is not None
        step.log(self, adversarial.detach(), "shift")
        return clean + step.strength(self) * self.nu * adversarial

    def _shift(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The mean norm over this rank's samples."""
        targets = torch.as_tensor(step.asked_by(self).targets)
        moved, _ = flatten(step.logits, targets)
        shifts = margin_shift(moved, logits, distribution)
        return shifts.mean() if len(shifts) else shifts.sum()

    @property
    def _rows_key(self) -> str:
        return f"{self.name} clean"


def _check(owner: object, **settings: float) -> None:
    for argument, value in settings.items():
        cure = f"{type(owner).__name__}({argument}=1.0)"
        check_range(owner, argument, value, 0, math.inf, high_open=True, cure=cure)
