"""The loss of a step, computed again where techniques change targets, weights or the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.errors import ConflictError, RegularizationError
from lightning_reg.engine.regularizer import CRITERION_PHASES, Regularizer, overrides
from lightning_reg.engine.step import Step


def soft_cross_entropy(logits: Tensor, distribution: Tensor) -> Tensor:
    """Cross-entropy (N,) of logits (N, C) against target distributions (N, C), in nats."""
    log_p = F.log_softmax(logits, dim=-1)
    # 0 log 0 = 0: a class that is masked with -inf and has no share of the target costs nothing.
    return -(distribution * log_p.masked_fill(distribution == 0, 0.0)).sum(-1)


def flatten(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and targets (N,) or (N, C), without ignored positions.

    Takes (B, C, ...) with (B, ...), as torch's losses do, and (B, T, C) with (B, T), as language
    models do.
    """
    if logits.ndim > 2:
        class_last = targets.shape == logits.shape[:-1]
        logits = logits if class_last else logits.movedim(1, -1)
        if targets.is_floating_point() and not class_last:
            targets = targets.movedim(1, -1)
        logits = logits.reshape(-1, logits.shape[-1])
        targets = targets.reshape(logits.shape if targets.is_floating_point() else (-1,))
    if targets.is_floating_point():
        return logits, targets
    # A label that is no class can only be one that the user's loss ignores: it would have raised.
    kept = (targets >= 0) & (targets < logits.shape[-1])
    return logits[kept], targets[kept]


def labelled(values: Tensor, targets: Tensor, classes: int) -> Tensor:
    """The rows (N, ...) of values (B, ...) whose target is a class, as :func:`flatten` keeps them.

    Args:
        values: something of each sample.
        targets: (B,) class indices, or (B, C) soft targets, with which every row is kept.
        classes: the number of classes.
    """
    if targets.is_floating_point():
        return values
    return values[(targets >= 0) & (targets < classes)]


def belong(logits: Tensor, targets: Tensor) -> bool:
    """Whether shapes are those of one classification loss."""
    if targets.is_floating_point():
        return targets.shape == logits.shape
    return targets.shape in (logits.shape[:-1], logits.shape[:1] + logits.shape[2:])


def as_distribution(targets: Tensor, logits: Tensor) -> Tensor:
    """One-hot rows for class indices; soft targets as they are, in the logits' type."""
    if targets.is_floating_point():
        return targets.to(logits.dtype)
    return F.one_hot(targets.long(), logits.shape[-1]).to(logits.dtype)


def mixed(step: Step, distribution: Tensor) -> Tensor:
    """Target distributions (B, C) as techniques mixed them, each sample's with its partner's."""
    for permutation, lam in step.mixes:
        weight = lam.to(distribution).unsqueeze(-1)
        distribution = weight * distribution + (1 - weight) * distribution[permutation]
    return distribution


class Criterion:
    """Recomputes the loss from captured logits for the techniques that change it.

    The batch keeps the user's class indices, so that the user's metrics work as before; what
    changes is the loss: the mean over samples of ``w_i * l(logits_i, distribution_i)``. That is
    only right if the user's loss is the cross-entropy, which is checked on the first step.
    """

    def __init__(self) -> None:
        self._checked = False

    def concerns(self, step: Step, active: Sequence[Regularizer]) -> bool:
        """Whether this step's loss has to be computed again."""
        return bool(step.mixes) or any(
            overrides(technique, phase) for technique in active for phase in CRITERION_PHASES
        )

    def __call__(self, step: Step, active: Sequence[Regularizer]) -> Tensor:
        """The new loss; ``step.loss`` is the user's."""
        members = [t for t in active if any(overrides(t, phase) for phase in CRITERION_PHASES)]
        members += step.mixers
        asking = members[0]
        assert step.loss is not None
        step.asked_by(asking)
        logits, targets = self._signals(step, asking)
        mode = self._mode(members)
        # Without any label there is nothing to compare yet.
        if mode == "cross_entropy" and not self._checked and len(logits):
            plain = _plain(logits, targets)
            self._check(asking, step.loss, plain)
            self._check_gradient(step, asking, plain)
        new = self._loss(step, active, logits, targets)
        self._checked = self._checked or len(logits) > 0
        return step.loss + (new - _plain(logits, targets)) if mode == "term" else new

    def _signals(self, step: Step, asking: Regularizer) -> tuple[Tensor, Tensor]:
        logits, targets = step.logits, step.targets
        if not isinstance(targets, Tensor) or logits.ndim < 2:
            raise RegularizationError(
                asking,
                f"needs logits (B, C) and a tensor of targets, got logits {tuple(logits.shape)} "
                f"and targets of type {type(targets).__name__}",
                cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
            )
        if logits.shape[-1] == 1 and logits.ndim == 2:
            raise RegularizationError(
                asking,
                f"computes a cross-entropy over classes, and the logits {tuple(logits.shape)} have "
                "one column, as those of a binary loss; float targets are mixed without it",
                cure="return x, y.float() from the dataset, or give the network two outputs",
            )
        if not belong(logits, targets):
            raise RegularizationError(
                asking,
                f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not belong "
                "to one classification loss",
                cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
            )
        if not self._checked and not logits.requires_grad and torch.is_grad_enabled():
            raise RegularizationError(
                asking,
                "computes the loss from logits, and those that it found carry no gradient",
                cure=f'return {{"loss": loss, "logits": logits}} from {step.hook}, not detached',
            )
        return flatten(logits, targets)

    def _loss(
        self, step: Step, active: Sequence[Regularizer], logits: Tensor, targets: Tensor
    ) -> Tensor:
        distribution = as_distribution(targets, logits)
        for _, lam in step.mixes:
            self._check_mixable(step, lam, distribution)
        distribution = mixed(step, distribution)
        for technique in _members(active, "transform_targets"):
            distribution = technique.transform_targets(step.asked_by(technique), distribution)
        step.target_distribution = distribution
        losses = self._per_sample(step, active, logits, distribution)
        for technique in _members(active, "sample_weights"):
            weights = technique.sample_weights(step.asked_by(technique), losses.detach())
            losses = weights.detach() * losses
        return _mean(losses)

    def _per_sample(
        self, step: Step, active: Sequence[Regularizer], logits: Tensor, distribution: Tensor
    ) -> Tensor:
        for technique in _members(active, "per_sample_loss"):
            return technique.per_sample_loss(step.asked_by(technique), logits, distribution)
        return soft_cross_entropy(logits, distribution)

    @staticmethod
    def _check_mixable(step: Step, lam: Tensor, distribution: Tensor) -> None:
        if len(lam) != len(distribution):
            raise RegularizationError(
                step.mixers[0],
                f"mixes the labels of {len(lam)} samples, but the loss has {len(distribution)} "
                "terms: one label per sample is needed, not one per pixel or token",
                cure=f"remove {type(step.mixers[0]).__name__}",
            )

    def _mode(self, members: Sequence[Regularizer]) -> str:
        modes = {getattr(t, "replaces", "cross_entropy") for t in members} - {"cross_entropy"}
        if len(modes) > 1:
            names = ", ".join(type(t).__name__ for t in members)
            raise ConflictError(
                members[0],
                f'{names} disagree: one drops your loss (`replaces="loss"`), another keeps its '
                'other terms (`replaces="term"`)',
                cure='replaces="term" in all of them',
            )
        return modes.pop() if modes else "cross_entropy"

    def _check(self, asking: Regularizer, loss: Tensor, plain: Tensor) -> None:
        given, expected = float(loss.detach()), float(plain.detach())
        # Half-precision losses are rounded to three digits; a non-finite first loss says nothing.
        tolerance = 2e-2 if loss.dtype in (torch.float16, torch.bfloat16) else 2e-3
        if not abs(given - expected) <= tolerance * max(1.0, abs(expected)) and given == given:
            raise RegularizationError(
                asking,
                "computes the loss from logits and targets, which is right if your loss is their "
                f"cross-entropy; but training_step returned {given:.4f} and the cross-entropy is "
                f"{expected:.4f}. Other logits or targets can be named with `signals`; "
                '`replaces="loss"` drops your loss for the technique\'s; `replaces="term"` keeps '
                "the other terms of a loss that contains the cross-entropy",
                cure=f'{type(asking).__name__}(..., replaces="term")',
            )

    def _check_gradient(self, step: Step, asking: Regularizer, plain: Tensor) -> None:
        """Equal values may be chance: on a head of zeros every weighted loss is log C."""
        logits = step.find("logits")
        found = [_gradient(loss, logits) for loss in (step.loss, plain)]
        given, expected = (g if g is None else _through_softmax(g, logits, step) for g in found)
        if given is None or expected is None or not bool(torch.isfinite(given).all()):
            return
        half = step.loss is None or _is_half(step.loss) or _is_half(logits)
        share, rounding = (3e-2, 4e-3) if half else (2e-3, 1e-6)
        allowed = share * expected.norm() + rounding / given.shape[0] ** 0.5
        if float((given - expected).norm()) > float(allowed):
            raise RegularizationError(
                asking,
                "computes the loss from logits and targets, which is right if your loss is their "
                "cross-entropy; yours has the same value on the first batch, but another "
                "gradient: it has class weights, label smoothing or a temperature of its own, or "
                'further terms. `replaces="loss"` drops your loss for the technique\'s; '
                '`replaces="term"` keeps the other terms',
                cure=f'{type(asking).__name__}(..., replaces="term")',
            )


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy that the user's loss is, or contains."""
    return _mean(soft_cross_entropy(logits, as_distribution(targets, logits)))


def _mean(losses: Tensor) -> Tensor:
    """The mean over a rank's samples, as in the user's own loss; 0 where no label counts."""
    return losses.mean() if len(losses) else losses.sum()


def _gradient(loss: Tensor | None, logits: Tensor) -> Tensor | None:
    if loss is None or not loss.requires_grad or not logits.requires_grad:
        return None
    try:
        return torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0]
    except RuntimeError:
        # A compiled loss may have given its buffers away and cannot be differentiated twice.
        return None


def _through_softmax(gradient: Tensor, logits: Tensor, step: Step) -> Tensor:
    """What of a gradient changes probabilities: log-probabilities in place of logits agree."""
    gradient, logits = gradient.float(), logits.detach().float()
    class_dim = -1 if step.targets.shape == logits.shape[:-1] else 1
    share = logits.softmax(class_dim) * gradient.sum(class_dim, keepdim=True)
    return gradient - share


def _is_half(value: Tensor) -> bool:
    return value.dtype in (torch.float16, torch.bfloat16)


def _members(active: Sequence[Regularizer], phase: str) -> list[Regularizer]:
    return [technique for technique in active if overrides(technique, phase)]
