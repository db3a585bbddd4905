"""Segments a query image from a few labeled ones, by a classifier that is fitted to both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Technique
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

__all__ = ["RePRIMixin", "repri", "repri_regularizer"]

_EPS = 1e-10


def repri_regularizer(
    logits: Tensor, valid: Tensor, proportion: Tensor, divergence_weight: float = 1.0
) -> Tensor:
    """``H(p) + rho KL(phat || pi)`` of the pixels of each query.

    With ``p`` the sigmoid of a foreground's logits, ``H`` the mean entropy of the pixels, and
    ``phat`` their mean probability. The estimate comes first in the divergence. 1e-10 stands
    inside the logarithms.

    Args:
        logits: (T, P), of the P pixels of each of T queries.
        valid: (T, P), 1 for the pixels that count.
        proportion: ``pi`` (T,), the share of foreground that is expected.
        divergence_weight: ``rho``.

    Returns:
        (T,), in nats.
    """
    return _entropy(logits, valid) + divergence_weight * _divergence(logits, valid, proportion)


def repri(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_valid: Tensor | None = None,
    *,
    proportion: Tensor | None = None,
    temperature: float = 20.0,
    lr: float = 0.025,
    iterations: int = 50,
    update_at: Sequence[int] = (10,),
    divergence_weight: float | None = None,
    entropy_weight: float | None = None,
) -> Tensor:
    """Logits of the foreground in each query, from a classifier fitted to support and query.

    ``s(x) = t cos(w, x) - b`` with a sigmoid; ``w`` starts at the mean feature of the support's
    foreground, ``b`` at the mean of ``t cos(w, x)`` over the query. Both follow the gradient of
    ``CE(support) + l2 KL(phat || pi) + l3 H(query)``, for each task by itself.

    Args:
        support: features (T, S, D, ...) of S images for each of T tasks.
        support_labels: (T, S, ...) with the images' layout: 1 is foreground, 0 background,
            anything else is ignored.
        query: features (T, Q, D, ...).
        query_valid: (T, Q, ...), which pixels count; all by default.
        proportion: ``pi`` (T,), the true share of foreground if it is known; estimated otherwise.
        temperature: ``t``.
        lr: of plain gradient descent.
        iterations: the classifiers on the way, the first among them: ``iterations - 1`` steps.
        update_at: the classifiers (from 1) whose own share of foreground becomes ``pi``; ``l2``
            grows by 1 each time. The first one's is the estimate before.
        divergence_weight: ``l2``; ``1 / S`` by default.
        entropy_weight: ``l3``; ``1 / S`` by default.

    Returns:
        (T, Q, ...), without a graph; above 0 is foreground.
    """
    weight = 1 / support.shape[1]
    first = weight if divergence_weight is None else divergence_weight
    third = weight if entropy_weight is None else entropy_weight
    with torch.inference_mode(False), torch.autocast(query.device.type, enabled=False):
        task = _Task.of(support, support_labels, query, query_valid, temperature)
        pi = task.share(*task.start()) if proportion is None else proportion.to(task.query)
        state = task.start()
        for iteration in range(2, iterations + 1):
            state = task.step(state, pi, lr, first, third)
            if iteration in update_at and proportion is None and first != 0:
                pi, first = task.share(*state), first + 1
        return task.scores(task.query, *state).view(query.shape[:2] + query.shape[3:])


@dataclass(frozen=True)
class _Task:
    """Pixels of T tasks: features of unit length (T, P, D), labels and which count (T, P)."""

    support: Tensor
    labels: Tensor
    labelled: Tensor
    query: Tensor
    valid: Tensor
    prototype: Tensor
    temperature: float

    @classmethod
    def of(
        cls,
        support: Tensor,
        labels: Tensor,
        query: Tensor,
        valid: Tensor | None,
        temperature: float,
    ) -> _Task:
        known, unknown = _pixels(support), _pixels(query)
        given = labels.flatten(1)
        foreground = (given == 1).to(known)
        counted = foreground + (given == 0)
        counts = foreground.sum(1, keepdim=True)
        # Of the features as they are, although only its direction classifies: gradients by a
        # longer prototype are shorter.
        prototype = torch.einsum("tp,tpd->td", foreground, known) / (counts + _EPS)
        ones = torch.ones_like(unknown[..., 0])
        usable = ones if valid is None else _normal(valid).flatten(1).to(ones)
        directions = (F.normalize(pixels, dim=2) for pixels in (known, unknown))
        known, unknown = directions
        return cls(known, foreground, counted, unknown, usable, prototype, temperature)

    def start(self) -> tuple[Tensor, Tensor]:
        """The prototype (T, D) and the bias (T,) before any step."""
        zero = torch.zeros_like(self.prototype[:, 0])
        return self.prototype, self.scores(self.query, self.prototype, zero).mean(1)

    def scores(self, pixels: Tensor, prototype: Tensor, bias: Tensor) -> Tensor:
        """Logits of the foreground (T, P)."""
        direction = F.normalize(prototype, dim=1)
        return self.temperature * torch.einsum("tpd,td->tp", pixels, direction) - bias[:, None]

    def share(self, prototype: Tensor, bias: Tensor) -> Tensor:
        """The share of foreground in each query (T,)."""
        return _mean(self.scores(self.query, prototype, bias).sigmoid(), self.valid)

    def step(
        self, state: tuple[Tensor, Tensor], pi: Tensor, lr: float, second: float, third: float
    ) -> tuple[Tensor, Tensor]:
        """The next prototype and bias; tasks do not see each other."""
        with torch.enable_grad():
            at = tuple(part.detach().requires_grad_() for part in state)
            p = self.scores(self.support, *at).sigmoid()
            right = self.labels * p + (1 - self.labels) * (1 - p)
            loss = -_mean((right + _EPS).log(), self.labelled)
            logits = self.scores(self.query, *at)
            loss = loss + second * _divergence(logits, self.valid, pi)
            loss = loss + third * _entropy(logits, self.valid)
            slopes = torch.autograd.grad(loss.sum(), at)
        prototype, bias = torch._foreach_sub(list(state), torch._foreach_mul(list(slopes), lr))
        return prototype, bias


def _pixels(features: Tensor) -> Tensor:
    """(T, S P, D) of (T, S, D, ...), without a graph."""
    normal = features.detach()
    wide = normal if normal.dtype == torch.float64 else normal.float()
    return wide.flatten(3).movedim(2, 3).flatten(1, 2) if wide.ndim > 3 else wide


def _normal(tensor: Tensor) -> Tensor:
    """One that can be saved for a backward, which those of inference mode cannot."""
    return tensor.clone() if tensor.is_inference() else tensor


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum(1) / counted.sum(1).clamp_min(1)


def _entropy(logits: Tensor, valid: Tensor) -> Tensor:
    p = logits.sigmoid()
    surprise = -(p * (p + _EPS).log() + (1 - p) * (1 - p + _EPS).log())
    return _mean(surprise, valid)


def _divergence(logits: Tensor, valid: Tensor, proportion: Tensor) -> Tensor:
    """Of the pair (background, foreground)."""
    share = _mean(logits.sigmoid(), valid)
    both = torch.stack([1 - share, share])
    expected = torch.stack([1 - proportion, proportion])
    # A query that is all background has a share of exactly 0, and 0 log 0 = 0.
    ratio = both.clamp_min(torch.finfo(both.dtype).tiny) / (expected + _EPS)
    return (both * ratio.log()).sum(0)


class RePRIMixin(Technique, _Base):
    """Segments a query image from a few labeled ones, by a classifier that is fitted to both.

    Boudiaf, Kervadec, Ziko, Piantanida, Ben Ayed, Dolz (2020), Few-Shot Segmentation Without
    Meta-Learning: A Good Transductive Inference Is All You Need?, arXiv:2012.06166.

    At test time a linear classifier of frozen features, ``s(x) = t cos(w, x) - b``, is fitted to
    each task by ``CE(support) + l2 KL(phat || pi) + l3 H(query)``: the cross-entropy on labeled
    support pixels, and on the query the entropy of its pixels and the divergence of its share
    of foreground from ``pi``, so that the entropy does not turn the query into one class. ``pi``
    is the share that the first classifier finds, and is taken once more on the way. Features come
    from any base training.

    Predictions after 1, 5 and 50 classifiers are those of mboudiaf/RePRI-for-Few-Shot-Segmentation@
    aa54b19 (src/classifier.py), whose settings are the defaults. It normalizes features first,
    with which the prototype is shorter and each step turns it further: do the same with
    ``F.normalize(features, dim=2)``, as its configuration does.

    Subclass it together with a LightningModule, and call :meth:`repri_logits` in ``test_step``,
    ``validation_step`` or ``predict_step``; it leaves inference mode by itself.

    Args (of :meth:`set_repri`, called in ``__init__``; without it the defaults):
        temperature: ``t``, above 0.
        lr: of gradient descent, at least 0.
        iterations: the classifiers on the way, from 1; 1 is the prototype without any step.
        update_at: the classifiers whose own share of foreground becomes ``pi``; ``l2`` grows by 1
            each time.
        divergence_weight: ``l2``, at least 0; one over the number of support images by default.
        entropy_weight: ``l3``, at least 0; the same.

    Raises:
        ArgumentError: if an argument is outside its range, or features and labels do not fit.

    Note:
        Over ranks and batches: local; each task is fitted by itself, without communication, and
        none of the module's weights changes. Cost: ``iterations`` products of features with one
        vector, forward and backward; the backbone runs once.

        It hurts where the query's share of foreground is far from what the prototype finds: pass
        the true one as ``proportion`` if you know it. One foreground class a task.

    Example:
        >>> import torch, lightning as L
        >>> from lightning_reg import RePRIMixin
        >>> class Net(RePRIMixin, L.LightningModule):
        ...     def test_step(self, batch, batch_idx):
        ...         s, q = self.features(batch["support"]), self.features(batch["query"])
        ...         logits = self.repri_logits(s, batch["support_mask"], q)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Few-Shot Segmentation Without Meta-Learning: A Good Transductive Inference Is All "
            "You Need?",
            "Boudiaf et al.",
            2020,
            "2012.06166",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    exemptions: ClassVar[Mapping[str, str]] = {
        "neutral": "it makes predictions where they are asked for: not calling it turns it off",
        "accumulation": "a task is fitted by itself, whatever batch it comes in",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(repri_regularizer)

    repri_settings: Mapping[str, Any] = {}

    def set_repri(
        self,
        temperature: float = 20.0,
        lr: float = 0.025,
        iterations: int = 50,
        update_at: Sequence[int] = (10,),
        divergence_weight: float | None = None,
        entropy_weight: float | None = None,
    ) -> None:
        """Choose how the classifier is fitted; see the class."""
        cure = "self.set_repri(temperature=20.0, lr=0.025, iterations=50, update_at=[10])"
        owner = "RePRIMixin"
        check_range(owner, "temperature", temperature, 0, low_open=True, cure=cure)
        check_range(owner, "lr", lr, 0, cure=cure)
        for name, number in (("iterations", iterations), *(("update_at", i) for i in update_at)):
            if type(number) is not int or number < 1:
                problem = f"`{name}` must be whole numbers from 1, got {number!r}"
                raise ArgumentError(owner, problem, cure=cure)
        weights = {"divergence_weight": divergence_weight, "entropy_weight": entropy_weight}
        for name, value in weights.items():
            if value is not None:
                check_range(owner, name, value, 0, cure=f"self.set_repri({name}=1.0)")
        self.repri_settings = {
            "temperature": temperature,
            "lr": lr,
            "iterations": iterations,
            "update_at": tuple(update_at),
            **weights,
        }

    def repri_logits(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        query_valid: Tensor | None = None,
        proportion: Tensor | None = None,
    ) -> Tensor:
        """Logits of the foreground in each query; see :func:`repri` for the shapes.

        Labels of another resolution than the features are brought to theirs (the nearest); bring
        the result to the image's with ``F.interpolate``.
        """
        labels = _at_resolution(support_labels, support)
        valid = None if query_valid is None else _at_resolution(query_valid, query)
        _check_fit(support, labels, query)
        return repri(support, labels, query, valid, proportion=proportion, **self.repri_settings)


def _at_resolution(labels: Tensor, features: Tensor) -> Tensor:
    """Labels (T, S, ...) in the layout of features (T, S, D, ...)."""
    size = features.shape[3:]
    if labels.shape[2:] == size or labels.ndim != features.ndim - 1 or not size:
        return labels
    return F.interpolate(labels.float(), size=size, mode="nearest").to(labels.dtype)


def _check_fit(support: Tensor, labels: Tensor, query: Tensor) -> None:
    fits = support.ndim >= 3 and query.ndim == support.ndim
    fits = fits and len(support) == len(query) and support.shape[2] == query.shape[2]
    if not fits or labels.shape != support.shape[:2] + support.shape[3:]:
        raise ArgumentError(
            "RePRIMixin",
            "needs features (T, S, D, ...) and (T, Q, D, ...) and labels (T, S, ...), got "
            f"{tuple(support.shape)}, {tuple(query.shape)} and {tuple(labels.shape)}",
            cure="self.repri_logits(support[None], support_mask[None], query[None])",
        )
