"""Trains two networks that pick clean samples for each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.criterion import flatten, soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.loss_replacement import Replaces, check_replaces
from lightning_reg.mechanisms.peer_network import PeerNetwork

__all__ = ["CoTeaching", "co_teaching", "forget_share", "small_loss_weights"]

Select = Literal["train", "eval"]
_SELECT = ("train", "eval")
# Binary fractions: 1 - 0.9 of ten samples is one sample.
_ROUNDING = 1e-9


def forget_share(epoch: int, num_gradual: int = 10, exponent: float = 1.0, start: int = 0) -> float:
    """``min(T^c / (T_k - 1), 1)`` with ``T = epoch - start``: how much of the rate is forgotten.

    Args:
        epoch: from 0.
        num_gradual: ``T_k``, the epochs in which it rises from 0 to 1; with 0 it is 1 at once.
        exponent: ``c``.
        start: the epoch in which it begins.

    Returns:
        In [0, 1]; 0 before ``start``.
    """
    if epoch < start:
        return 0.0
    if num_gradual == 0:
        return 1.0
    # An only epoch of rise is its first, at 0.
    return min(1.0, math.pow(epoch - start, exponent) / max(num_gradual - 1, _ROUNDING))


def small_loss_weights(losses: Tensor, forget_rate: float) -> Tensor:
    """``N / K`` for the ``K = int((1 - forget_rate) N)`` samples of the smallest losses, else 0.

    Args:
        losses: (N,), finite.
        forget_rate: in [0, 1]; at least one sample is kept.

    Returns:
        (N,), of mean 1: the mean of weighted losses is the mean over the samples that are kept.
    """
    kept = max(1, int((1 - forget_rate) * len(losses) + _ROUNDING))
    chosen = losses.argsort(stable=True)[:kept]
    return torch.zeros_like(losses).index_fill(0, chosen, len(losses) / kept)


def co_teaching(losses: Tensor, peer_losses: Tensor, forget_rate: float) -> tuple[Tensor, Tensor]:
    """The mean loss of each network over the samples on which the other one's is small.

    Args:
        losses: (N,) the first network's.
        peer_losses: (N,) the second network's.
        forget_rate: the share of the samples that each network leaves out.

    Returns:
        Two scalars; which samples are left out carries no gradient.
    """
    from_peer = small_loss_weights(peer_losses.detach(), forget_rate)
    to_peer = small_loss_weights(losses.detach(), forget_rate)
    return (from_peer * losses).mean(), (to_peer * peer_losses).mean()


class CoTeaching(PeerNetwork):
    """Trains a second network beside the module; each learns from what is easy for the other.

    Han, Yao, Yu, Niu, Xu, Hu, Tsang, Sugiyama (2018), Co-teaching: Robust Training of Deep Neural
    Networks with Extremely Noisy Labels, arXiv:1804.06872. With :class:`NestedDropout` beside it
    the second part of Chen, Hu, Shen, Ai, Suykens (2022), Compressing Features for Learning with
    Noisy Labels.

    Networks fit clean labels first, so that samples of small loss are probably clean. In each
    batch either network picks the share ``R = 1 - tau(t)`` of the samples on which its loss is
    smallest, and the other one learns from these alone: two networks that started elsewhere err on
    other samples, so that errors do not feed themselves. ``tau(t)`` rises over the first epochs,
    while wrong labels are not memorized yet.

    Confirmed with the official code (bhanML/Co-teaching, loss.py and main.py): the selection is by
    cross-entropy, ``int(R B)`` samples, exchanged; each network's loss is the mean over them, and
    the code divides that mean by their number once more, which Adam does not notice and we leave
    out; ``tau(t) = tau t / (T_k - 1)`` for the first ``T_k = 10`` epochs; ``tau`` is the rate of
    wrong labels. For ``exponent`` we follow the paper, ``T^c``; the code raises ``tau`` to it. The
    second network's optimizer has the settings of the first, as there.

    The second paper (yingyichen-cyy/Nested-Co-teaching, co_teaching_resnet/) first trains two
    networks with nested dropout and goes on with both at a constant rate (0.2, or 0.3 for
    Clothing1M): ``start=<epochs of the first stage>, num_gradual=0``. It picks in eval mode, at
    the best length (``select="eval"``), one half of the batch for each network
    (``disjoint=True``), and averages logits to predict (:meth:`predict`). It draws one length for
    both networks, here each has its own.

    Args:
        forget_rate: ``tau``, the share of wrong labels, in [0, 1), or a Schedule; 0 turns it off.
        num_gradual: ``T_k``, the epochs over which ``tau(t)`` rises; 0 is at once.
        exponent: ``c`` of its rise, above 0; 0.5, 1 or 2 in the paper.
        start: epochs in front of that, in which both networks learn from all samples.
        select: by losses of the ``"train"`` pass, or of two more passes in ``"eval"`` mode.
        disjoint: each network picks from one half of the rank's batch, the other half is for what
            it is taught: no sample teaches both. Halves the samples that a network sees.
        peer: a network of the module's class, whose weights the second network starts with;
            ``None`` initializes every part that has ``reset_parameters`` again.
        replaces: what of the user's loss goes: ``"cross_entropy"`` (checked), ``"term"`` or
            ``"loss"``.
        signals: where ``inputs``, ``logits`` and ``targets`` are.
        name: the name in logs, checkpoints and random streams.

    Attributes:
        peer: the second network, once a fit has begun.

    Raises:
        ArgumentError: if a number is outside its range.
        UnsupportedError: if the module has no ``forward``, or its optimizers do not get all of
            ``self.parameters()``.
        RegularizationError: in the first step, if the user's loss is no cross-entropy and
            ``replaces`` does not say what to do.

    Note:
        The module's own optimizers train both networks: hand them ``self.parameters()``. Gradient
        clipping by norm and SAM take the weights of both for one vector; penalties, and noise on
        weights, act on the module's alone; changes of inputs, labels and layers on both. Both
        networks answer through ``forward``: a parameter that only ``training_step`` uses is unused
        in the second one, which plain DDP refuses.

        Over ranks: global; losses are gathered, and the small ones of the joint batch are picked
        (with ``disjoint`` the halves are those of each rank). Under accumulation every micro-batch
        picks for itself. Cost: a second forward and backward pass and a second set of weights and
        of optimizer state; ``select="eval"`` two more forward passes; a gather of two numbers a
        sample. Logged are the mean losses over what each network is taught,
        ``reg/co_teaching`` and ``reg/co_teaching_peer``.

        It hurts where hard samples are clean, as those of rare classes, and with a ``forget_rate``
        far from the truth. The second network is saved with the technique, not with the module.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import CoTeaching, NestedDropout
        >>> both = [CoTeaching(0.4), NestedDropout(layer="encoder", sigma=100.0)]
        >>> trainer = L.Trainer(callbacks=both, logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels",
            "Han et al.",
            2018,
            "1804.06872",
        ),
        Paper("Compressing Features for Learning with Noisy Labels", "Chen et al.", 2022, None),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "targets")
    # Of features: what changes them shall be at work when the second network answers.
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "features", "logits", "targets"})
    writes: ClassVar[frozenset[str]] = frozenset({"losses"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"criterion"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch picks its own samples of small loss",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(co_teaching)
    explanation: ClassVar[str] = "trains a second network; each picks clean samples for the other"

    def __init__(
        self,
        forget_rate: float | Schedule,
        *,
        num_gradual: int = 10,
        exponent: float = 1.0,
        start: int = 0,
        select: Select = "train",
        disjoint: bool = False,
        peer: nn.Module | None = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(forget_rate, peer=peer, looks=select == "eval", signals=signals, name=name)
        cure = "CoTeaching(0.4, num_gradual=10, exponent=1.0, start=0)"
        if not isinstance(forget_rate, Schedule):
            check_range(self, "forget_rate", forget_rate, 0, 1, high_open=True, cure=cure)
        check_range(self, "num_gradual", num_gradual, 0, cure=cure)
        check_range(self, "exponent", exponent, 0, low_open=True, cure=cure)
        check_range(self, "start", start, 0, cure=cure)
        if select not in _SELECT:
            problem = f"`select` must be one of {', '.join(_SELECT)}, got {select!r}"
            raise ArgumentError(self, problem, cure='CoTeaching(0.4, select="train")')
        check_replaces(self, replaces)
        self.num_gradual = num_gradual
        self.exponent = exponent
        self.start = start
        self.disjoint = disjoint
        self.replaces = replaces

    def per_sample_loss(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """Phase 3: what each row adds to the losses of both networks."""
        said = self.answers(step)
        losses = soft_cross_entropy(logits, distribution)
        peer_losses = soft_cross_entropy(self._rows(step, said.peer), distribution)
        seen, peer_seen = losses, peer_losses
        if said.own_look is not None and said.peer_look is not None:
            seen = soft_cross_entropy(self._rows(step, said.own_look), distribution)
            peer_seen = soft_cross_entropy(self._rows(step, said.peer_look), distribution)
        from_peer, to_peer = self._weights(step, seen.detach(), peer_seen.detach())
        own, peer = from_peer * losses, to_peer * peer_losses
        if not step.is_rerun:
            step.log(self, own.detach().mean())
            step.log(self, peer.detach().mean(), "peer")
        return own + peer

    def _rows(self, step: Step, answer: Tensor) -> Tensor:
        """One row of logits for each row of the module's own."""
        if answer.shape != step.logits.shape:
            raise RegularizationError(
                self,
                f"`forward` of the second network gives {tuple(answer.shape)}, and the logits of "
                f"{step.hook} are {tuple(step.logits.shape)}",
                cure="def forward(self, x): ...  # returns the logits",
            )
        return flatten(answer, torch.as_tensor(step.targets))[0]

    def _weights(self, step: Step, losses: Tensor, peer_losses: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each row in the first and in the second network's loss."""
        kept = f"{self.name}.weights"
        # A second pass goes by what was picked in the first one.
        if not step.is_rerun or kept not in step.kept:
            step.kept[kept] = self._picked(step, losses, peer_losses)
        found: tuple[Tensor, Tensor] = step.kept[kept]
        return found

    def _picked(self, step: Step, losses: Tensor, peer_losses: Tensor) -> tuple[Tensor, Tensor]:
        second_half = torch.arange(len(losses), device=losses.device) >= len(losses) // 2
        rank = torch.full_like(losses, step.comm.rank)
        joint = step.comm.gather(torch.stack([losses, peer_losses, rank, second_half.to(rank)], 1))
        rate = step.strength(self) * forget_share(
            step.epoch, self.num_gradual, self.exponent, self.start
        )
        picks = [
            self._small(joint[:, 1 - side], rate, (joint[:, 3] != side) if self.disjoint else None)
            for side in (0, 1)
        ]
        # Without finite losses on all ranks no sample is better than another.
        good = torch.isfinite(joint[:, :2]).all()
        mine = joint[:, 2] == step.comm.rank
        own, peer = (torch.where(good, w, torch.ones_like(w))[mine] for w in picks)
        return own, peer

    @staticmethod
    def _small(losses: Tensor, rate: float, among: Tensor | None) -> Tensor:
        if among is None:
            return small_loss_weights(losses, rate)
        places = among.nonzero().squeeze(1)
        weights = small_loss_weights(losses[places], rate) * (len(losses) / max(1, len(places)))
        return torch.zeros_like(losses).index_copy(0, places, weights)
