"""Distills a teacher's logits through a second head, so that the first one stays undisturbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Communicator, Paper, Technique
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.sharding import gradients_of, shards_weights, whole
from lightning_reg.engine.signals import logits_of
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.teacher import FrozenNetwork

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

__all__ = ["DualHeadDistillationMixin", "alignment_factor", "dual_head_distillation"]

_NAME = "DualHeadDistillationMixin"
_HIDDEN, _DROPOUT = 200, 0.1


def dual_head_distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """``T^2 sum_k KL(1/2 || sigmoid((s_k - t_k) / T))`` of each row (BinaryKL-Norm).

    Equal to ``T^2 sum_k log cosh((s_k - t_k) / (2 T))``: near ``|s - t|^2 / 8`` for small
    differences, growing linearly for large ones.

    Args:
        student: (B, C) logits ``s`` of the second head.
        teacher: (B, C) logits ``t``; no gradient flows.
        temperature: ``T``, above 0.

    Returns:
        (B,) in nats, at least 0; 0 where the logits are equal.
    """
    x = (student - teacher.detach()) / temperature
    # log cosh(x / 2), without the overflow of cosh or the clamp of a sigmoid.
    divergence = F.softplus(x) - x / 2 - math.log(2)
    return temperature**2 * divergence.sum(-1)


def alignment_factor(task: Tensor, distillation: Tensor) -> Tensor:
    """``1 + max(0, -<g_d, g_t> / |g_t|^2)``: what the task loss is multiplied with.

    Where the two gradients conflict, the part of ``g_d`` against ``g_t`` is projected away:
    ``g_t + g_d - (<g_d, g_t> / |g_t|^2) g_t``. That is the gradient of the task loss times this
    factor, plus that of the distillation loss.

    Args:
        task: (P,) ``g_t``, the gradient of the task loss.
        distillation: (P,) ``g_d``.

    Returns:
        A scalar, at least 1; 1 if a gradient is not finite, or ``g_t`` is 0.
    """
    # No matrix products, which autocast would round to half precision.
    overlap, size = (distillation * task).sum(), task.square().sum()
    factor = 1 + (-overlap / size).clamp_min(0)
    return torch.where(torch.isfinite(factor), factor, torch.ones_like(factor))


class DualHeadDistillationMixin(Technique, _Base):
    """Distills a teacher's logits through an auxiliary head (dual-head knowledge distillation).

    Yang, Zong, Huang, Feng, An (2024), Dual-Head Knowledge Distillation: Enhancing Logits
    Utilization with an Auxiliary Head, arXiv:2411.08937.

    A loss on logits and one on probabilities disturb each other in one linear classifier, not in
    the backbone. So the student's features feed two heads: the usual one takes the task loss,
    the auxiliary one takes ``alpha T^2 sum_k KL(1/2 || sigmoid((s_k - t_k) / T))``. Only the
    usual head is used at inference. With alignment, what of the distillation gradient points
    against the task gradient is projected away (one-sided: the task gradient is never changed
    by the projection).

    Confirmed with the official code (penghui-yang/DHKD, distiller_zoo/BinaryKLNorm.py and
    helper/optimizer.py): the divergence is that of the logits' difference from an even coin,
    summed over classes and averaged over samples; ``temperature`` 2; the nonlinear head has 200
    hidden units, dropout 0.1, BatchNorm and ReLU; the projection takes the gradient of all
    parameters as one vector, both heads included, with zeros where a loss does not reach. We
    clamp nothing: in float32 the official clamp of 1e-8 does not hold above 1/2. Its ``alpha``
    is 1 in the example for CIFAR-100, with alignment and the nonlinear head, and 0.1 in that for
    ImageNet, without; the task loss keeps the factor 1 (its ``gamma``).

    Args (of :meth:`add_dual_head`, called at the end of ``__init__``):
        teacher: a trained network from inputs to logits (or a dict with ``logits``). It is put
            into eval mode, frozen, and is no part of the module, its checkpoint or its optimizer.
        in_features: the width of the features.
        num_classes: the classes of the teacher.
        strength: ``alpha``, at least 0; 0 turns it off.
        temperature: ``T``, above 0.
        nonlinear: use the two-layer head of the official code, not a linear one.
        align: project conflicting gradients away.

    Raises:
        ArgumentError: if an argument is outside its range, or the teacher's logits do not fit.

    Note:
        Over ranks: global; a mean over samples, and the alignment uses gradients of the joint
        batch. Under accumulation each micro-batch is aligned by itself. Cost: the teacher's
        forward pass and one head; alignment adds two backward passes through the student, the
        memory of two gradients and, on several ranks, an all-reduce of both. Logged are the
        divergence, ``reg/dual_head_distillation``, and the factor of the alignment.

        It hurts with a teacher of other classes or of poor logits; alignment costs far more
        time than it is worth where the gradients seldom conflict: look at
        ``reg/dual_head_distillation_factor``, which is 1 then.

    Example:
        >>> import torch, lightning as L
        >>> from lightning_reg import DualHeadDistillationMixin
        >>> class Student(DualHeadDistillationMixin, L.LightningModule):
        ...     def __init__(self, teacher):
        ...         super().__init__()
        ...         self.backbone, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        ...         self.add_dual_head(teacher, in_features=16, num_classes=4)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         h = self.backbone(batch[0])
        ...         loss = torch.nn.functional.cross_entropy(self.head(h), batch[1])
        ...         return self.distill(loss, features=h, inputs=batch[0])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
            "Yang et al.",
            2024,
            "2411.08937",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = True
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "with `align` the gradients of each micro-batch are aligned by themselves",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(dual_head_distillation)

    dual_head: nn.Module

    def add_dual_head(
        self,
        teacher: nn.Module,
        in_features: int,
        num_classes: int,
        *,
        strength: float = 1.0,
        temperature: float = 2.0,
        nonlinear: bool = False,
        align: bool = True,
    ) -> None:
        """Make the auxiliary head and take the teacher; see the class."""
        cure = "self.add_dual_head(teacher, in_features=64, num_classes=10, strength=1.0)"
        check_range(_NAME, "strength", strength, 0, math.inf, high_open=True, cure=cure)
        check_range(_NAME, "temperature", temperature, 0, low_open=True, cure=cure)
        if not isinstance(teacher, nn.Module):
            raise ArgumentError(
                _NAME, f"`teacher` must be a torch.nn.Module, got {teacher!r}", cure=cure
            )
        self.dual_head = _head(in_features, num_classes, nonlinear)
        # A head that takes no part would be an unused parameter to DDP.
        self.dual_head.requires_grad_(strength != 0)
        self._dual_head_teacher = FrozenNetwork(teacher)
        self._dual_head_settings = (strength, temperature, align)

    def distill(self, loss: Tensor, features: Tensor, inputs: Any) -> Tensor:
        """The task loss with the distillation loss of this batch.

        Args:
            loss: the task loss, a scalar with its graph.
            features: (B, in_features), what the usual head takes.
            inputs: what the teacher takes.

        Returns:
            The loss to return from ``training_step``, or to ``manual_backward``.
        """
        strength, temperature, align = self._settings()
        if strength == 0:
            return loss
        taught = logits_of(self._dual_head_teacher(inputs, self))
        logits = self.dual_head(features)
        if taught is None or taught.shape != logits.shape:
            shape = "no logits" if taught is None else f"logits {tuple(taught.shape)}"
            raise ArgumentError(
                _NAME,
                f"the teacher answers {shape}; the dual head has {tuple(logits.shape)}",
                cure="self.add_dual_head(teacher, num_classes=<those of the teacher>, ...)",
            )
        with torch.autocast(features.device.type, enabled=False):
            value = dual_head_distillation(_full(logits), _full(taught), temperature).mean()
        factor = self._factor(loss, strength * value) if align else torch.ones_like(value)
        self._log_dual_head(value, factor)
        return factor.to(loss.dtype) * loss + strength * value

    def _settings(self) -> tuple[float, float, bool]:
        settings = self.__dict__.get("_dual_head_settings")
        if settings is None:
            raise ArgumentError(
                _NAME,
                "`distill` was called on a module without a dual head",
                cure="self.add_dual_head(teacher, in_features=64, num_classes=10)",
            )
        found: tuple[float, float, bool] = settings
        return found

    def _factor(self, loss: Tensor, distillation: Tensor) -> Tensor:
        """How much more the task loss has to count for the projection; 1 where nothing learns."""
        if not (self.training and torch.is_grad_enabled() and loss.requires_grad):
            return torch.ones((), device=loss.device)
        trainer = self.__dict__.get("_trainer")
        scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
        comm = Communicator() if trainer is None else Communicator.of(trainer)
        weights = self._differentiated()
        gradients = torch.stack(
            [
                # Through the AMP scale, which the factor does not depend on: none underflows.
                _flat_gradient(part if scaler is None else scaler.scale(part), weights)
                for part in (loss, distillation)
            ]
        )
        # One collective for both: the conflict is that of the joint batch.
        task, other = comm.reduce(gradients, "mean").unbind()
        return alignment_factor(task, other)

    def _differentiated(self) -> list[nn.Parameter]:
        trainer = self.__dict__.get("_trainer")
        if trainer is not None and shards_weights(trainer):
            # In the middle of a step the module may hold gathered weights in their place.
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            return [p for group in groups for p in group["params"]]
        return [p for p in self.parameters() if p.requires_grad]

    def _log_dual_head(self, value: Tensor, factor: Tensor) -> None:
        trainer = self.__dict__.get("_trainer")
        if not self.training or trainer is None:
            return
        if not trainer._logger_connector.should_update_logs:
            return
        pair = torch.stack([value.detach(), factor.to(value)])
        pair = Communicator.of(trainer).reduce(pair, "mean")
        self.log("reg/dual_head_distillation", pair[0])
        self.log("reg/dual_head_distillation_factor", pair[1])


def _head(in_features: int, num_classes: int, nonlinear: bool) -> nn.Module:
    if not nonlinear:
        return nn.Linear(in_features, num_classes)
    return nn.Sequential(
        nn.Linear(in_features, _HIDDEN),
        nn.Dropout(_DROPOUT),
        nn.BatchNorm1d(_HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, num_classes),
    )


def _flat_gradient(loss: Tensor, weights: list[nn.Parameter]) -> Tensor:
    found = gradients_of(loss, weights, retain_graph=True)
    parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
    return torch.cat([_full(whole(part.detach())).reshape(-1) for part in parts])


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
