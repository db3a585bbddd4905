"""The divergence that techniques which learn from other predictions share."""

from __future__ import annotations

import torch
from torch import Tensor


def tempered_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))`` of each row of logits, in nats.

    Args:
        student: (B, C) logits ``s``; gradients flow through them alone.
        teacher: (B, C) logits ``t``.
        temperature: ``T``, above 0.
    """
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    # 0 log 0 = 0, where a class is masked with -inf in both.
    gap = torch.where(log_p.isneginf(), torch.zeros_like(log_p), log_p - log_q)
    return temperature**2 * (log_p.exp() * gap).sum(-1)


__all__ = ["tempered_divergence"]
