"""Teaches how a teacher's tokens relate to each other, within an image and across the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.feature_distillation import FeatureDistillation
from lightning_reg.mechanisms.teacher import Source

__all__ = [
    "TokenRelationshipGraphDistillation",
    "token_context_distillation",
    "token_contrast_distillation",
    "token_graph_distillation",
]


def token_graph_distillation(
    student: Tensor, teacher: Tensor, neighbors: int = 8, temperature: float = 0.1
) -> Tensor:
    """``KL(p_i^T || p_i^S)`` over the teacher's nearest tokens of each token, in nats.

    ``p_i = softmax_j(cos(h_i, h_j) / tau)`` over the ``k`` tokens ``j`` that are most similar to
    ``i`` in the teacher.

    Args:
        student: (M, d) tokens.
        teacher: (M, d') the same tokens in the teacher; no gradient flows.
        neighbors: ``k``; with fewer other tokens, all of them.
        temperature: ``tau``, above 0.

    Returns:
        (M,), at least 0; 0 if the student is a rotation of the teacher.
    """
    theirs = _similarities(teacher.detach())
    hidden = theirs.masked_fill(torch.eye(len(theirs), dtype=torch.bool, device=theirs.device), -2)
    edges = hidden.topk(min(neighbors, max(len(theirs) - 1, 0)), dim=1).indices
    log_p = (theirs.gather(1, edges) / temperature).log_softmax(1)
    log_q = (_similarities(student).gather(1, edges) / temperature).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def token_contrast_distillation(
    student: Tensor, teacher: Tensor, temperature: float = 0.1
) -> Tensor:
    """``-log softmax_j(cos(s_i, t_j) / tau)_i``: each token finds its own among the teacher's.

    Args:
        student: (M, d) tokens.
        teacher: (M, d) the same tokens in the teacher; no gradient flows.
        temperature: ``tau``, above 0.

    Returns:
        (M,) in nats.
    """
    similarities = _units(student) @ _units(teacher.detach()).T
    return -(similarities / temperature).log_softmax(1).diagonal()


def token_context_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """``|A^S - A^T|^2 / P^2`` with ``A`` the cosines between the ``P`` tokens of one image.

    Args:
        student: (B, P, d) tokens.
        teacher: (B, P, d') the same tokens in the teacher; no gradient flows.

    Returns:
        (B,); 0 if the student is a rotation of the teacher.
    """
    gap = _similarities(student) - _similarities(teacher.detach())
    return gap.square().mean((-2, -1))


def _units(tokens: Tensor) -> Tensor:
    return F.normalize(tokens, dim=-1)


def _similarities(tokens: Tensor) -> Tensor:
    units = _units(tokens)
    return units @ units.mT


class TokenRelationshipGraphDistillation(FeatureDistillation):
    """Distills the relations of tokens: their graph, their identity, and their context (TRG).

    Zhang, Liu, He (2023), Knowledge Distillation via Token-level Relationship Graph,
    arXiv:2306.12442.

    Relations between whole images miss what their parts have in common (fur, wheels), above all
    for rare classes. Here the nodes of the graph are tokens: patches of a transformer, or positions
    of a feature map, sampled over the batch. The penalty is ``lambda (a L_local + b L_global + c
    L_context)``:

    - local: each token's relation to its ``k`` nearest in the teacher,
      ``KL(softmax(cos^T / tau) || softmax(cos^S / tau))`` over the edges of that graph;
    - global: InfoNCE, each of the student's tokens against all of the teacher's;
    - context: the squared difference of the token similarities inside each image.

    Formula from memory of the paper; not checked against code, of which none was found. Cosines,
    the means over entries and all defaults are ours.

    Args:
        strength: ``lambda``, at least 0.
        layer: the student's submodule that returns tokens (B, T, d) or maps (B, d, H, W).
        teacher: a trained network.
        teacher_layer: its submodule; by default ``layer``. Maps of unequal size are averaged to
            the smaller grid; token sequences have to be of one length.
        source: a copy of the module in its place.
        local_weight: ``a``, at least 0.
        global_weight: ``b``, at least 0; needs both of one width.
        context_weight: ``c``, at least 0.
        neighbors: ``k``.
        temperature: ``tau``, above 0.
        tokens: how many tokens of a rank's micro-batch are drawn for the graph; ``None`` takes
            all.
        gather: one graph over the tokens of all ranks, or one for each rank.
        decay: of the average of ``source="ema"``.
        signals: where ``inputs`` are.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: without a teacher, with two, or if a number is outside its range.
        RegularizationError: if positions or, for the global term, widths differ.

    Note:
        Over ranks: global; tokens are gathered with their gradients, one collective of tokens x
        (d + d') numbers and one in backward. Each rank draws its own tokens, so that with
        ``tokens`` set N ranks equal one process in distribution, and exactly with ``None``.
        ``gather=False`` compares within a rank: less to send, and other neighbors.
        Cost: a forward pass of the teacher without gradients, and two matrices of tokens x tokens.

        It hurts where the teacher's positions do not mean what the student's do (other crops or
        strides), and with few tokens, whose nearest are far away.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import TokenRelationshipGraphDistillation as TRG
        >>> trainer = L.Trainer(callbacks=[TRG(1.0, layer="stem", source="ema")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Knowledge Distillation via Token-level Relationship Graph",
            "Zhang et al.",
            2023,
            "2306.12442",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch has a graph of its own tokens"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(token_graph_distillation)
    explanation: ClassVar[str] = "teaches the relations between a teacher's tokens"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        layer: str,
        teacher: nn.Module | None = None,
        teacher_layer: str | None = None,
        source: Source | None = None,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        context_weight: float = 1.0,
        neighbors: int = 8,
        temperature: float = 0.1,
        tokens: int | None = 512,
        gather: bool = True,
        decay: float = 0.999,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            layer=layer,
            teacher=teacher,
            teacher_layer=teacher_layer,
            source=source,
            decay=decay,
            signals=signals,
            name=name,
        )
        cure = 'TokenRelationshipGraphDistillation(layer="encoder", source="ema", neighbors=8)'
        weights = {
            "local_weight": local_weight,
            "global_weight": global_weight,
            "context_weight": context_weight,
        }
        for argument, value in weights.items():
            check_range(self, argument, value, 0, cure=cure)
        if not any(weights.values()):
            raise ArgumentError(self, f"all of {', '.join(weights)} are 0", cure=cure)
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        for argument, number in (("neighbors", neighbors), ("tokens", tokens)):
            if argument == "tokens" and number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ArgumentError(
                    self, f"`{argument}` must be a whole number from 1, got {number!r}", cure=cure
                )
        self.local_weight = local_weight
        self.global_weight = global_weight
        self.context_weight = context_weight
        self.neighbors = neighbors
        self.temperature = temperature
        self.tokens = tokens
        self.gather = gather

    def value(self, step: Step, student: Tensor, teacher: Tensor) -> Tensor:
        """The three terms, of the tokens of all ranks."""
        terms: list[tuple[float, JointMean]] = []
        if self.context_weight > 0:
            context = token_context_distillation(student, teacher)
            terms.append((self.context_weight, JointMean.of(context)))
        if self.local_weight > 0 or self.global_weight > 0:
            own, theirs = self._nodes(step, student, teacher)
        if self.local_weight > 0:
            graph = token_graph_distillation(own, theirs, self.neighbors, self.temperature)
            terms.append((self.local_weight, JointMean.of(graph)))
        if self.global_weight > 0:
            self.one_width(student, teacher)
            contrast = token_contrast_distillation(own, theirs, self.temperature)
            terms.append((self.global_weight, JointMean.of(contrast)))
        # Of gathered tokens every rank has all values, and their mean is the joint one.
        means = step.comm.means([term for _, term in terms])
        return torch.stack([w * m for (w, _), m in zip(terms, means, strict=True)]).sum()

    def _nodes(self, step: Step, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (M, d) and (M, d') that are the nodes of the graph."""
        rows = torch.cat([student, teacher], -1).flatten(0, 1)
        if self.tokens is not None and self.tokens < len(rows):
            draws = step.rng(self)
            order = torch.randperm(len(rows), generator=draws, device=draws.device)
            rows = rows[order[: self.tokens].to(rows.device)]
        rows = step.comm.gather(rows) if self.gather else rows
        own, theirs = rows.split([student.shape[-1], teacher.shape[-1]], -1)
        return own, theirs
