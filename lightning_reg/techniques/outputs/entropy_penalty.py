"""Adds the entropy of the predictions to the loss, to lower it or to raise it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.output_penalty import OutputPenalty, softmax_entropy

__all__ = ["EntropyPenalty", "entropy_penalty"]

Direction = Literal["minimize", "maximize"]
_SIGN = {"minimize": 1.0, "maximize": -1.0}


def entropy_penalty(logits: Tensor, direction: Direction = "minimize") -> Tensor:
    """``H(p)`` of each row to minimize the entropy, ``-H(p)`` to maximize it.

    Args:
        logits: (..., C); the classes are on the last dimension.
        direction: what happens to the entropy when the result is minimized.

    Returns:
        (...), in nats, of a size up to ``log C``.
    """
    return _SIGN[direction] * softmax_entropy(logits)


class EntropyPenalty(OutputPenalty):
    """Makes predictions surer (``direction="minimize"``) or less sure (``"maximize"``).

    Cubuk, Zoph, Schoenholz, Le (2017), Intriguing Properties of Adversarial Examples,
    arXiv:1711.02846: adversarial error follows from small differences between logits, and
    lowering the entropy of the predictions widens them.

    The loss becomes ``CE + lambda H(p)`` with ``H(p) = -sum_c p_c log p_c`` in nats, averaged
    over samples (pixels, tokens); with ``direction="maximize"`` it is ``CE - lambda H(p)``, the
    classic entropy regularization of Williams and Peng (1991) and of the confidence penalty. The
    paper's abstract says what is done, not with which ``lambda``; no official code was found. The
    default 0.1 is ours.

    Args:
        strength: ``lambda``; at least 0, the direction has an argument of its own.
        direction: ``"minimize"`` or ``"maximize"`` the entropy.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are; targets are optional.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``direction`` is neither, or ``strength`` is below 0.
        RegularizationError: in the first step, if there are fewer than two classes.

    Note:
        Over ranks: global; the mean runs over the positions of all ranks, each counting once, for
        one all-reduce of two numbers a step. Under accumulation each micro-batch takes its own
        mean, which equals the joint one if they keep equally many positions. Cost: a
        log-softmax and one product over the logits.

        Minimizing makes probabilities overconfident: expect a larger calibration error, and do
        not take a smaller error under one-step attacks alone for robustness, since saturated
        softmax outputs also hide gradients from the attack: test with an iterated attack on the
        logit margin. On unlabeled data alone it collapses to one class. Maximizing is
        :class:`ConfidencePenalty` without its threshold.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EntropyPenalty
        >>> trainer = L.Trainer(callbacks=[EntropyPenalty(0.1, direction="minimize")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Intriguing Properties of Adversarial Examples", "Cubuk et al.", 2017, "1711.02846"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(entropy_penalty)
    explanation: ClassVar[str] = "lowers or raises the entropy of the predictions"

    def __init__(
        self,
        strength: float | Schedule = 0.1,
        *,
        direction: Direction = "minimize",
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        if direction not in _SIGN:
            raise ArgumentError(
                self,
                f"`direction` must be one of {', '.join(_SIGN)}, got {direction!r}",
                cure='EntropyPenalty(0.1, direction="minimize")',
            )
        if not isinstance(strength, Schedule):
            cure = 'EntropyPenalty(0.1, direction="maximize")'
            check_range(self, "strength", strength, 0, cure=cure)
        self.direction = direction

    def values(self, logits: Tensor) -> Tensor:
        """The penalty of each row."""
        return entropy_penalty(logits, self.direction)
