"""The cross-entropy of a large vocabulary without the logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, Technique, UnsupportedError
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.sharding import is_sharded
from lightning_reg.engine.technique import Semantics

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

__all__ = ["CutCrossEntropyMixin", "cut_cross_entropy"]

# Logits that are held at a time: 16 MiB in float32.
_BLOCK = 2**22


def cut_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    filter_eps: float = 0.0,
    block: int | None = None,
) -> Tensor:
    """``mean_n (log sum_v exp(w_v h_n + b_v) - w_y h_n - b_y)``, in nats.

    Rows are taken some at a time: their logits, the softmax and their part of the gradients are
    computed in one go and forgotten, so that no tensor of tokens x vocabulary exists, in the
    backward neither.

    Args:
        features: (..., D) ``h``.
        weight: (V, D) ``w`` of the output layer.
        targets: (...) the next tokens.
        bias: (V,) ``b``.
        ignore_index: positions with this target do not count.
        filter_eps: leave vocabulary entries out of the gradient whose probability is below this in
            a whole block of rows (gradient filtering); 0 leaves none out.
        block: how many rows at a time; by default 16 MiB of logits.

    Returns:
        A scalar, in float32 at least; 0 if nothing counts.
    """
    rows = features.reshape(-1, features.shape[-1])
    labels = targets.reshape(-1)
    kept = labels != ignore_index
    size = block if block is not None else max(1, _BLOCK // len(weight))
    loss: Tensor = _CutCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows[kept], weight, bias, labels[kept], filter_eps, size
    )
    return loss


class _CutCrossEntropy(torch.autograd.Function):
    """The loss, with gradients that are computed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        filter_eps: float,
        block: int,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, labels)
        ctx.filter_eps, ctx.block = filter_eps, block
        needed = any(ctx.needs_input_grad[:3])
        loss, ctx.gradients = _sweep(rows, weight, bias, labels, filter_eps, block, needed)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A second backward: the first one gave its buffers away.
            rows, weight, bias, labels = ctx.saved_tensors
            _, gradients = _sweep(rows, weight, bias, labels, ctx.filter_eps, ctx.block, True)
            assert gradients is not None
        # In place: these buffers are as large as the output layer, and nobody else holds them.
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in gradients]
        return (*scaled, None, None, None)


def _sweep(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    filter_eps: float,
    block: int,
    needed: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None] | None]:
    """The mean loss, and its gradients by rows, weight and bias."""
    kind = torch.get_autocast_dtype(rows.device.type) if _autocast(rows) else rows.dtype
    with torch.autocast(rows.device.type, enabled=False):
        h, w = rows.to(kind), weight.to(kind)
        wide = torch.promote_types(kind, torch.float32)
        total = rows.new_zeros((), dtype=wide)
        gradients = _Gradients(rows, weight, bias, wide) if needed else None
        for part in _blocks(len(rows), block):
            logits = (h[part] @ w.T).to(wide)
            if bias is not None:
                logits += bias
            normalizer = logits.logsumexp(1, keepdim=True)
            chosen = logits.gather(1, labels[part].unsqueeze(1))
            total += (normalizer - chosen).sum()
            if gradients is not None:
                p = logits.sub_(normalizer).exp_()
                gradients.add(part, p, h[part], w, labels[part], filter_eps)
    count = max(len(rows), 1)
    found = None if gradients is None else gradients.divided(count)
    return total / count, found


class _Gradients:
    """Sums of the gradients of blocks of rows."""

    def __init__(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype
    ) -> None:
        self.rows = torch.zeros_like(rows)
        self.weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, wide))
        self.bias = None if bias is None else torch.zeros_like(bias)
        self._kind = weight.dtype

    def add(
        self, part: slice, p: Tensor, h: Tensor, w: Tensor, labels: Tensor, filter_eps: float
    ) -> None:
        """Add a block with probabilities ``p`` (R, V), which are overwritten."""
        columns = _columns(p, labels, filter_eps) if filter_eps else None
        p.scatter_add_(1, labels.unsqueeze(1), -torch.ones_like(p[:, :1]))
        if self.bias is not None:
            self.bias += p.sum(0)
        if columns is None:
            slope = p.to(h.dtype)
            self.rows[part] = slope @ w
            self._add_weight(self.weight, slope, h)
            return
        slope = p[:, columns].to(h.dtype)
        self.rows[part] = slope @ w[columns]
        self.weight.index_add_(0, columns, (slope.T @ h).to(self.weight.dtype))

    def divided(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of the mean."""
        bias = None if self.bias is None else self.bias.div_(count)
        return self.rows.div_(count), self.weight.div_(count).to(self._kind), bias

    @staticmethod
    def _add_weight(total: Tensor, slope: Tensor, h: Tensor) -> None:
        if total.dtype == h.dtype:
            total.addmm_(slope.T, h)
        else:
            total += slope.T @ h


def _columns(p: Tensor, labels: Tensor, filter_eps: float) -> Tensor | None:
    """The vocabulary entries that matter to a block; ``None`` where most do."""
    matter = p.amax(0) >= filter_eps
    matter[labels] = True
    columns = matter.nonzero().squeeze(1)
    return columns if 2 * len(columns) < p.shape[1] else None


def _blocks(rows: int, size: int) -> Iterator[slice]:
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _autocast(rows: Tensor) -> bool:
    return torch.is_autocast_enabled(rows.device.type)


class CutCrossEntropyMixin(Technique, _Base):
    """Computes the loss of a language model's head without materializing its logits (CCE).

    Wijmans, Huval, Hertzberg, Koltun, Krähenbühl (2024), Cut Your Losses in Large-Vocabulary
    Language Models, arXiv:2411.09009.

    At a vocabulary of 128,000 the logits of a batch take more memory than the rest of a small
    model. ``CE = log sum_v exp(w_v h) - w_y h`` needs them a few rows at a time. The paper's
    kernels hold blocks of logits in a GPU's on-chip memory and compute them again in the
    backward; here, in plain torch, a block of rows meets the whole vocabulary, and its gradients
    are summed while its softmax is at hand: the same three matrix products as the plain loss, no
    recomputation, nothing of the size tokens x vocabulary. Gradient filtering is the paper's: an
    entry whose probability is below ``filter_eps`` (2^-12 there, for bfloat16) in a whole block
    is left out of the matrix products of the backward.

    Args (of :meth:`cut_cross_entropy`):
        features: (..., D), what the head reads.
        targets: (...) the next tokens, shifted by the caller.
        head: the output layer, an ``nn.Linear``.
        ignore_index: positions with this target do not count.
        filter_eps: in [0, 1); 0 (the default) filters nothing, and values and gradients are those
            of the plain loss to rounding.

    Raises:
        ArgumentError: if ``head`` is no linear layer, shapes do not fit, or ``filter_eps`` is
            outside its range.

    Note:
        A mean over the rank's tokens, as the plain loss; nothing is communicated. Cost: three
        matrix products, a softmax, and one block of logits (16 MiB in float32) beside the
        gradients themselves. Under autocast products run in its type, sums in float32. A second
        backward through the same loss computes everything again.

        Techniques that look at logits have nothing to look at here.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import CutCrossEntropyMixin
        >>> class Model(CutCrossEntropyMixin, L.LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         hidden = self.decoder(batch["tokens"][:, :-1])
        ...         return self.cut_cross_entropy(hidden, batch["tokens"][:, 1:], self.head)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Cut Your Losses in Large-Vocabulary Language Models",
            "Wijmans et al.",
            2024,
            "2411.09009",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = False
    exemptions: ClassVar[Mapping[str, str]] = {
        "neutral": "has no strength: it is the same loss, computed in another way",
        "acts": "is the same loss as without it, to rounding",
        "precision": "the check measures what a technique moves, and this one moves nothing",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(cut_cross_entropy)

    def cut_cross_entropy(
        self,
        features: Tensor,
        targets: Tensor,
        head: nn.Linear,
        *,
        ignore_index: int = -100,
        filter_eps: float = 0.0,
    ) -> Tensor:
        """The mean cross-entropy of ``head(features)``, a scalar; see the class."""
        owner, cure = "CutCrossEntropyMixin", "self.cut_cross_entropy(hidden, targets, self.head)"
        if not isinstance(head, nn.Linear):
            raise ArgumentError(
                owner, f"`head` must be an nn.Linear, got {type(head).__name__}", cure=cure
            )
        check_range(owner, "filter_eps", filter_eps, 0, 1, high_open=True, cure=cure)
        if is_sharded(head.weight):
            raise UnsupportedError(
                owner,
                "reads the weights of the head outside of its forward, where ModelParallelStrategy "
                "holds a rank's part of them",
                cure='Trainer(strategy="ddp_reg")',
            )
        if features.shape[:-1] != targets.shape or features.shape[-1] != head.in_features:
            raise ArgumentError(
                owner,
                f"features {tuple(features.shape)} need targets of shape "
                f"{tuple(features.shape[:-1])} and a head that reads {features.shape[-1]} "
                f"numbers, got targets {tuple(targets.shape)} and a head of {head.in_features}",
                cure=cure,
            )
        return cut_cross_entropy(
            features,
            head.weight,
            targets,
            head.bias,
            ignore_index=ignore_index,
            filter_eps=filter_eps,
        )
