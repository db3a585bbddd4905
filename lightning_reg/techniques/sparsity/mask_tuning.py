"""Trains which weights of a network take part, and none of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, ParameterSelection, Schedule, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.reparameterization import Reparameterization

__all__ = ["MaskTuning", "masked_weight"]


def masked_weight(weight: Tensor, mask: Tensor, threshold: float = 5e-3) -> Tensor:
    """``w 1[m > t]``, whose gradient by ``m`` is that of ``w m`` (straight through).

    Args:
        weight: ``w``, any shape.
        mask: ``m``, of the same shape, real numbers.
        threshold: ``t``.

    Returns:
        Of the same shape: ``w`` where the mask lies above the threshold, 0 elsewhere.
    """
    hard = (mask > threshold).to(mask.dtype)
    # The value of the first, the gradient of the second.
    return weight * (hard + (mask - mask.detach()))


class MaskTuning(Reparameterization):
    """Fine-tunes a pre-trained network by switching weights off, with all weights frozen.

    Zheng, Wu, Feng, Zhu, Liu, Zhao, Zha, Chen, Shen (2023), Regularized Mask Tuning: Uncovering
    Hidden Knowledge in Pre-trained Vision-Language Models (ICCV).

    What a task needs is taken to be in the weights already. Each chosen layer computes with
    ``w 1[m > t]``; the real mask ``m`` learns by the straight-through gradient ``dL/dm = dL/dw_eff
    w`` and the weights do not; see :func:`masked_weight`. The penalty is the sum over layers of
    ``||m||_2``, which draws masks to the threshold. Its regularization, the dropout of gradients,
    is :class:`AgreementGradientDropout`, which takes what learns, so masks here: add both.

    As in wuw2019/R-AMT@07f8d2c (``code/modules/masklayers.py``, ``code/loss/reg_loss.py``; read,
    not run, since it needs CLIP), with its defaults: masks start at 0.01, ``t = 0.005``, penalty
    1e-4, Adam with a learning rate of 8e-5, and everything but the masks frozen.

    Args:
        strength: the multiplier of the penalty, at least 0. Masks are trained with 0 too.
        threshold: ``t``.
        start: where masks start, above ``threshold``, so that the network starts as it was.
        train: a regular expression on names of other parameters that go on learning (a new head);
            ``None`` freezes all of them.
        parameters: a regular expression on names of the weights to mask, or a ParameterSelection;
            ``None`` takes the weights of all linear and convolutional layers. Do not freeze them
            yourself: what is frozen is not chosen.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or no weight is chosen.
        UnsupportedError: if a layer is parametrized already.

    Note:
        Over ranks: replica; masks are ordinary parameters, and equal as weights would be. Cost: a
        comparison and a product over the weights each time a layer uses them, and masks as large
        as the weights, with the optimizer's state for them.

        Masks are named ``...parametrizations.weight.0.mask`` while training runs. Build the
        optimizer in ``configure_optimizers`` from ``self.parameters()``, and with a learning rate
        for numbers of 0.01. After the fit weights that were switched off are 0, parameters learn
        again that did before, and the masks are gone. Running statistics of BatchNorm move.
        Logged are the penalty and the share of weights that take part (``..._kept``).

        It hurts where the task needs what the weights do not hold: a mask cannot turn a sign.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MaskTuning
        >>> trainer = L.Trainer(callbacks=[MaskTuning(1e-4, train="head")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language "
            "Models",
            "Zheng et al.",
            2023,
            None,
        ),
    )
    semantics: ClassVar[Semantics] = "replica"
    exemptions: ClassVar[Mapping[str, str]] = {
        "neutral": "weights that are frozen under masks have no setting that trains them; leave "
        "the callback out",
        "gradient": "the gradient by a mask is that of another function, straight through a step",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(masked_weight)
    explanation: ClassVar[str] = "freezes weights and trains which of them take part"

    def __init__(
        self,
        strength: float | Schedule = 1e-4,
        *,
        threshold: float = 5e-3,
        start: float = 1e-2,
        train: str | None = None,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(parameters=parameters, name=name)
        cure = "MaskTuning(1e-4, threshold=5e-3, start=1e-2)"
        self._check_strength(strength)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "threshold", threshold, cure=cure)
        check_range(self, "start", start, threshold, low_open=True, cure=cure)
        self.strength = strength
        self.threshold, self.start = threshold, start
        self.train = self._expression(train)
        self._masks: list[nn.Parameter] = []
        self._frozen: list[nn.Parameter] = []

    def parametrization(self, name: str, weight: Tensor) -> nn.Module:
        """The mask of one layer."""
        function = _Mask(weight, self.start, self.threshold)
        self._masks.append(function.mask)
        return function

    def on_model_ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put masks in place, and freeze what is not to learn."""
        self._masks = []
        super().on_model_ready(trainer, pl_module)
        own = {id(mask) for mask in self._masks}
        for name, parameter in pl_module.named_parameters():
            covered = name.endswith(".original")
            asked = self.train is not None and re.search(self.train, name) is not None
            if parameter.requires_grad and id(parameter) not in own and (covered or not asked):
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plain weights, which learn again."""
        super().on_fit_close(trainer, pl_module)
        while self._frozen:
            self._frozen.pop().requires_grad_(True)
        self._masks = []

    def penalty(self, step: Step) -> Tensor:
        """Phase 4: the size of the masks."""
        if step.logging and not step.is_rerun:
            kept = [(mask.detach() > self.threshold).sum() for mask in self._masks]
            total = sum(mask.numel() for mask in self._masks)
            step.log(self, torch.stack(kept).sum() / total, "kept", joint=True)
        return torch.stack([torch.linalg.vector_norm(mask) for mask in self._masks]).sum()

    def _expression(self, train: str | None) -> str | None:
        try:
            re.compile(train or "")
        except (re.error, TypeError) as error:
            problem = f"`train` must be a regular expression on names, got {train!r} ({error})"
            raise ArgumentError(self, problem, cure='MaskTuning(train="head")') from error
        return train

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_masks": [], "_frozen": []}


class _Mask(nn.Module):
    """Switches weights of one layer off."""

    def __init__(self, weight: Tensor, start: float, threshold: float) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.full_like(weight, start))
        self.threshold = threshold

    def forward(self, weight: Tensor) -> Tensor:
        """The weights that take part."""
        return masked_weight(weight, self.mask, self.threshold)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a mask of ones leaves as it is."""
        return weight
