"""How well a language model predicts text: perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.dense import DenseMean
from lightning_reg.metrics.inputs import log_probabilities
from lightning_reg.metrics.sequences import SequenceMetric

__all__ = ["BitsPerByte", "Perplexity", "bits_per_byte", "perplexity"]


def perplexity(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    class_dim: int = -1,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""``exp(1/N sum_t -log p(token_t))`` over all tokens that count.

    The exponential of the mean over tokens, not a mean of batches' or sequences' perplexities.
    Equal to ``torchmetrics.text.Perplexity``, which sums in the precision of the logits (float32
    sums of 1e7 tokens are off in the fourth digit) and takes logits only.

    Args:
        preds: (N, T, V) predictions of each token.
        target: (N, T) token indices, already shifted.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        class_dim: the dimension of the vocabulary.
        ignore_index: tokens with this index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts, infinite where a token has
        probability 0.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> logits, tokens = torch.zeros(1, 3, 8), torch.tensor([[0, 5, 7]])
        >>> perplexity(logits, tokens, from_logits=True)
        tensor(8.0000, dtype=torch.float64)
    """
    metric = Perplexity(
        from_logits=from_logits,
        class_dim=class_dim,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def bits_per_byte(
    preds: Tensor,
    target: Tensor,
    byte_counts: Tensor | None = None,
    *,
    from_logits: bool,
    decode: Callable[[list[int]], str] | None = None,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""``sum_t -log2 p(token_t) / bytes``: how many bits the model needs for a byte of text.

    Comparable over tokenizers, as losses per token are not: a tokenizer with longer tokens has
    fewer of them and a higher loss each. Used to compare byte and compressed models by Lester et
    al., Training LLMs over Neurally Compressed Text, 2024 (2404.03626); the formula is the field's
    own, not checked against their code.

    Args:
        preds: (N, T, V) predictions of each token.
        target: (N, T) token indices, already shifted.
        byte_counts: (N,) how many UTF-8 bytes the tokens that count have in each sequence. The
            bytes of a first token that nothing predicts do not belong to them.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        decode: instead of ``byte_counts``: makes text of a list of token indices, such as
            ``tokenizer.decode``; called for each sequence, on the host.
        ignore_index: tokens with this index do not count, and are not decoded.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> logits, tokens = torch.zeros(1, 3, 256), torch.tensor([[72, 105, 33]])
        >>> bits_per_byte(logits, tokens, torch.tensor([3]), from_logits=True)
        tensor(8., dtype=torch.float64)
    """
    metric = BitsPerByte(
        from_logits=from_logits,
        decode=decode,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target, byte_counts)
    return value


class Perplexity(DenseMean):
    """The perplexity of tokens, exact over batches and ranks.

    See :func:`perplexity`. The state is a float64 sum (float32 on MPS) and an int64 count; logits
    are read in blocks of rows.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        class_dim: the dimension of the vocabulary: -1 for (N, T, V).
        ignore_index: tokens with this index do not count.
        kwargs: ``validate_args``, and those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import Perplexity
        >>> metric = Perplexity(from_logits=True, ignore_index=-100)
        >>> metric.update(torch.zeros(1, 3, 8), torch.tensor([[0, 5, -100]]))
        >>> metric.compute()
        tensor(8.0000, dtype=torch.float64)
    """

    function = staticmethod(perplexity)
    higher_is_better = False
    plot_lower_bound = 1.0

    def __init__(self, *, from_logits: bool, class_dim: int = -1, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, class_dim=class_dim, **kwargs)
        if self.task != "multiclass":
            raise ArgumentError(self, "is for tokens of a vocabulary", cure='task="multiclass"')

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """The negative log-likelihood of each token."""
        if targets is None or targets.is_floating_point():
            raise ArgumentError(
                self, "needs token indices as targets", cure="metric.update(logits, tokens)"
            )
        return token_nll(scores, targets, self.from_logits)

    def value(self) -> Tensor:
        """The perplexity over everything that was counted."""
        return super().value().exp()


class BitsPerByte(SequenceMetric):
    """The bits that a language model needs for each byte of text, whatever its tokenizer.

    See :func:`bits_per_byte`. The state is a float64 sum (float32 on MPS) and two int64 counts.
    A sequence with NaN or infinity is left out with its bytes.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        decode: makes text of a list of token indices; ``update`` then needs no byte counts.
        ignore_index: tokens with this index do not count, and are not decoded.
        validate_args: check values, which costs a host sync a block of a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import BitsPerByte
        >>> metric = BitsPerByte(from_logits=True)
        >>> metric.update(torch.zeros(1, 3, 256), torch.tensor([[72, 105, 33]]), torch.tensor([3]))
        >>> metric.compute()
        tensor(8., dtype=torch.float64)
    """

    papers = (
        Paper("Training LLMs over Neurally Compressed Text", "Lester et al.", 2024, "2404.03626"),
    )
    function = staticmethod(bits_per_byte)
    higher_is_better = False
    plot_lower_bound = 0.0
    nats: Tensor
    bytes: Tensor
    tokens: Tensor

    def __init__(
        self,
        *,
        from_logits: bool,
        decode: Callable[[list[int]], str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        if decode is not None and not callable(decode):
            raise ArgumentError(
                self, f"`decode` must be callable, got {decode!r}", cure="decode=tokenizer.decode"
            )
        self.decode = decode
        self.add_total("nats")
        self.add_count("bytes")
        self.add_count("tokens")

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """The negative log-likelihood of each token."""
        assert targets is not None
        return token_nll(scores, targets, self.from_logits)

    def update(self, preds: Tensor, target: Tensor, byte_counts: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            preds: (N, T, V) predictions of each token.
            target: (N, T) token indices, already shifted.
            byte_counts: (N,) UTF-8 bytes of each sequence's tokens that count; left out with
                ``decode``.

        Raises:
            ArgumentError: if shapes or values are not these.
        """
        nats, counted, valid = self.per_token(preds, target)
        byte_counts = self._byte_counts(target, counted, byte_counts)
        self.invalid = self.invalid + (~valid).sum()
        self.nats = self.nats + nats[valid].sum().to(self.nats)
        self.bytes = self.bytes + byte_counts[valid].sum().to(self.bytes)
        self.tokens = self.tokens + counted[valid].sum()

    def value(self) -> Tensor:
        """The bits over everything that was counted."""
        # In this order: a whole number times a Python float would be float32.
        return self.nats / self.bytes / math.log(2)

    def _byte_counts(self, target: Tensor, counted: Tensor, given: Tensor | None) -> Tensor:
        if (given is None) == (self.decode is None):
            raise ArgumentError(
                self,
                "needs either byte counts or a function that makes text of tokens",
                cure="metric.update(logits, tokens, byte_counts)",
            )
        if given is None:
            texts = zip(target, counted, strict=True)
            sizes = [self._bytes_of(tokens[use]) for tokens, use in texts]
            return torch.tensor(sizes, dtype=torch.int64, device=target.device)
        whole = not given.is_floating_point() and given.shape == target.shape[:1]
        if not whole or (self.validate_args and bool((given < 0).any())):
            raise ArgumentError(
                self,
                f"byte counts must be whole numbers ({len(target)},), got {given.dtype} of shape "
                f"{tuple(given.shape)}",
                cure="torch.tensor([len(text.encode()) for text in texts])",
            )
        return given.to(target.device)

    def _bytes_of(self, tokens: Tensor) -> int:
        assert self.decode is not None
        return len(self.decode(tokens.tolist()).encode())


def token_nll(scores: Tensor, targets: Tensor, from_logits: bool) -> Tensor:
    """(N,) ``-log p(target)`` of each row, in nats."""
    logs = log_probabilities(scores, from_logits)
    return -logs.gather(1, targets.long().unsqueeze(1)).squeeze(1)
