"""How many keys each attention head looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import AdditiveMetric, evaluate
from lightning_reg.metrics.blocks import split_alike
from lightning_reg.metrics.entropy import entropy_of_logs
from lightning_reg.metrics.inputs import high_dtype
from lightning_reg.metrics.reliability import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AttentionEntropy", "attention_entropy", "draw_attention_entropy"]


def attention_entropy(
    attention: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    num_layers: int,
    num_heads: int,
    from_logits: bool,
    normalized: bool = False,
    validate_args: bool = True,
) -> Tensor:
    r"""The mean over queries of ``-sum_j A_ij log A_ij`` for each layer and head, in nats.

    0 says that a head looks at one key (entropy collapse), ``log S`` that it looks at all alike
    (entropic overload, in the words of the papers below). Keys that are masked contribute 0, and
    queries that may look at no key do not count.

    With ``normalized`` a query's entropy is divided by the logarithm of how many keys it may look
    at: i + 1 for row i under a causal mask. The entropy regularization of Jha & Reagen (2025)
    compares every row with ``log S``, which early causal rows cannot reach. A query that may look
    at one key only has no entropy to have and does not count then.

    Args:
        attention: (L, B, H, T, S), or a sequence of L tensors (B, H, T, S): probabilities over
            the last dimension, or their logits. A bag of S instances that one query attends to,
            as in multiple instance learning, has T = 1.
        mask: bool, broadcastable to (B, H, T, S), ``True`` where a query may look; as that of
            ``torch.nn.functional.scaled_dot_product_attention``. The same for all layers.
        num_layers: L.
        num_heads: H.
        from_logits: whether ``attention`` holds logits or probabilities; never guessed.
        normalized: 0 for one key, 1 for all alike.
        validate_args: check values, which costs a host sync.

    Returns:
        (L, H) float64 (float32 on MPS); NaN if no query counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> attention = torch.zeros(1, 2, 1, 4, 4)  # 1 layer, 2 samples, 1 head, 4 queries and keys
        >>> causal = torch.ones(4, 4, dtype=torch.bool).tril()
        >>> args = {"num_layers": 1, "num_heads": 1, "from_logits": True}
        >>> attention_entropy(attention, **args)
        tensor([[1.3863]], dtype=torch.float64)
        >>> attention_entropy(attention, causal, normalized=True, **args)
        tensor([[1.]], dtype=torch.float64)
    """
    metric = AttentionEntropy(
        num_layers=num_layers,
        num_heads=num_heads,
        from_logits=from_logits,
        normalized=normalized,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, attention, mask)
    return value


class AttentionEntropy(AdditiveMetric):
    """The mean entropy of attention for each layer and head, in nats.

    See :func:`attention_entropy`. The state is L x H float64 sums (float32 on MPS) and counts. A
    sample with NaN or infinity in a place that a query may look at is left out in all layers.
    Attention is read in blocks: beside a block only (B, H, T) numbers are made for each layer.

    Args:
        num_layers: L.
        num_heads: H.
        from_logits: whether ``update`` gets logits or probabilities; never guessed.
        normalized: divide by the logarithm of how many keys a query may look at.
        validate_args: check values, which costs a host sync a block.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        Attention has to be there: fused kernels do not give it. Hugging Face models return it with
        ``attn_implementation="eager"`` and ``output_attentions=True``, ``nn.MultiheadAttention``
        with ``average_attn_weights=False``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import AttentionEntropy
        >>> metric = AttentionEntropy(num_layers=1, num_heads=2, from_logits=True)
        >>> metric.update([torch.zeros(3, 2, 5, 4)])
        >>> metric.compute()
        tensor([[1.3863, 1.3863]], dtype=torch.float64)
    """

    papers = (
        Paper(
            "AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide "
            "Image Classification",
            "Zhang et al.",
            2024,
            "2406.15303",
        ),
        Paper("Entropy-Guided Attention for Private LLMs", "Jha & Reagen", 2025, "2501.03489"),
    )
    function = staticmethod(attention_entropy)
    plot_lower_bound = 0.0
    total: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        from_logits: bool,
        normalized: bool = False,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, size in (("num_layers", num_layers), ("num_heads", num_heads)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ArgumentError(
                    self, f"`{name}` must be a whole number from 1, got {size!r}", cure=f"{name}=8"
                )
        if not isinstance(from_logits, bool):
            raise ArgumentError(
                self,
                f"`from_logits` must be True or False, got {from_logits!r}: it is never guessed",
                cure="from_logits=False",
            )
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.from_logits = from_logits
        self.normalized = normalized
        self.validate_args = validate_args
        self.add_total("total", num_layers, num_heads)
        self.add_count("count", num_layers, num_heads)

    def update(self, attention: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            attention: (L, B, H, T, S), or a sequence of L tensors (B, H, T, S).
            mask: bool, broadcastable to (B, H, T, S), ``True`` where a query may look.

        Raises:
            ArgumentError: if shapes or values are not these.
        """
        self._check(attention, mask)
        layers = [self._rows(layer.detach(), mask) for layer in attention]
        valid = torch.stack([valid for _, _, valid in layers]).all(0)
        sums = torch.stack([e[valid].sum((0, 2)) for e, _, _ in layers])
        counts = torch.stack([c[valid].sum((0, 2)) for _, c, _ in layers])
        self.invalid = self.invalid + (~valid).sum()
        self.total = self.total + sums.to(self.total)
        self.count = self.count + counts

    def value(self) -> Tensor:
        """(L, H) the means over everything that was counted."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The mean entropies as a map of layers and heads, drawn from the state.

        Args:
            val: entropies (L, H) to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        return draw_attention_entropy(self.value() if val is None else val, ax=ax)

    def _rows(self, attention: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The entropy of each query (B, H, T), which count, and which samples are valid (B,)."""
        shape = attention.shape[:3]
        entropies = torch.zeros(shape, dtype=high_dtype(attention), device=attention.device)
        counted = torch.ones(shape, dtype=torch.bool, device=attention.device)
        finite = torch.ones_like(counted)
        views = [attention, entropies, counted, finite]
        if mask is not None:
            views.append(mask.expand(attention.shape))
        for block in split_alike(views, 3):
            self._fill(*block)
        return entropies, counted, finite.all(2).all(1)

    def _fill(
        self,
        attention: Tensor,
        entropies: Tensor,
        counted: Tensor,
        finite: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Write a block's results into the views of them."""
        scores = attention.to(high_dtype(attention))
        keys = torch.full(scores.shape[:3], scores.shape[3], device=scores.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf if self.from_logits else 0.0)
            keys = mask.sum(3)
        fine = torch.isfinite(scores.amax(3)) | (keys == 0)
        if self.validate_args and not self.from_logits:
            exact = attention.dtype in (torch.float32, torch.float64)
            self._check_rows(scores, fine & (keys > 0), 1e-3 if exact else 2e-2)
        entropy = entropy_of_logs(scores.log_softmax(3) if self.from_logits else scores.log())
        least = 2 if self.normalized else 1
        if self.normalized:
            entropy = entropy / keys.to(entropy.dtype).log()
        use = fine & (keys >= least)
        entropies.copy_(entropy.where(use, entropy.new_zeros(())))
        counted.copy_(keys >= least)
        finite.copy_(fine)

    def _check(self, attention: Tensor | Sequence[Tensor], mask: Tensor | None) -> None:
        shapes = {tuple(layer.shape) for layer in attention}
        good = (
            len(attention) == self.num_layers
            and all(layer.is_floating_point() for layer in attention)
            and len({(s[0], *s[1:2]) for s in shapes}) == 1
            and all(len(s) == 4 and s[1] == self.num_heads and s[3] > 0 for s in shapes)
        )
        if not good:
            raise ArgumentError(
                self,
                f"needs float attention (B, {self.num_heads}, T, S) of {self.num_layers} layers, "
                f"got {len(attention)} of shapes {sorted(shapes)}",
                cure="metric.update(torch.stack(model(x, output_attentions=True).attentions))",
            )
        if mask is None:
            return
        fits = mask.dtype == torch.bool and all(_broadcasts(mask.shape, s) for s in shapes)
        if not fits:
            raise ArgumentError(
                self,
                f"the mask must be bool and broadcast to {sorted(shapes)[0]}, got {mask.dtype} of "
                f"shape {tuple(mask.shape)}",
                cure="mask=(tokens != padding)[:, None, None, :]",
            )

    def _check_rows(self, scores: Tensor, use: Tensor, tolerance: float) -> None:
        rows = scores[use]
        if not len(rows):
            return
        worst = float((rows.sum(1) - 1).abs().max())
        if worst > tolerance or float(rows.min()) < -tolerance:
            raise ArgumentError(
                self,
                "with from_logits=False each query's probabilities sum to one over the keys that "
                f"it may look at, one is off by {worst:.4g}",
                cure="from_logits=True, or attention.softmax(-1) under the mask",
            )


def draw_attention_entropy(
    entropies: Tensor, *, title: str = "", ax: Any = None
) -> tuple[Figure, Axes]:
    """A map of the mean entropy of each layer and head.

    Args:
        entropies: (L, H).
        title: a line above it.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure = new_figure() if ax is None else ax.figure
    axes = figure.add_subplot() if ax is None else ax
    image = axes.imshow(entropies.detach().cpu().numpy(), aspect="auto", vmin=0, cmap="viridis")
    figure.colorbar(image, ax=axes, label="entropy")
    axes.set(xlabel="head", ylabel="layer", title=title)
    return figure, axes


def _broadcasts(mask: Sequence[int], shape: Sequence[int]) -> bool:
    if len(mask) > len(shape):
        return False
    tail = shape[len(shape) - len(mask) :]
    return all(m in (1, s) for m, s in zip(mask, tail, strict=True))
