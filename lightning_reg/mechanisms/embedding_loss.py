"""Losses on two embeddings of each sample, over the samples of all ranks.

A technique supplies :meth:`EmbeddingLoss.value`: a scalar of two views (N, d); or, as a
:class:`TwoViews`, a penalty of its own from :meth:`TwoViews.joint_views` (the samples of all
ranks) or :meth:`TwoViews.two_views` (this rank's). The mechanism takes care of

- finding the two views: two keys of the returned dict, two layers, the two calls of one layer,
  the two halves of one batch, or ``self.regularize(loss, features={...})``;
- gathering both views of all ranks *with gradients* before anything is computed of them, since a
  covariance or a sum over negatives of a shard is not a share of the joint one. Row i of both
  views belongs to the same sample after the gather as before; ranks may hold different
  numbers, and a single sample over all ranks counts 0;
- adding the value to the user's loss, which may be a plain zero of the network where this is the
  only loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor

from lightning_reg.engine import MissingSignalError, RegularizationError, Regularizer, Step
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.joint_rows import joint_rows

DEFAULT_VIEWS = ("outputs.z1", "outputs.z2")


class TwoViews(Regularizer):
    """Base of techniques that take two embeddings of each sample.

    Args:
        strength: the multiplier.
        views: where the two views (B, d) are: two keys of the dict that ``training_step`` returns
            (``["outputs.z1", "outputs.z2"]``, the default), two submodules, or one submodule. One
            submodule that the step calls twice gives one view per call; one that it calls once,
            on a batch of both views one behind the other, gives (2B, d), which is halved. Under
            manual optimization the same names are looked for in
            ``self.regularize(loss, features={...})`` first.
        name: the name in logs and checkpoints.
        others: arguments of the next base, where a technique has several.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("features",)
    reads: ClassVar[frozenset[str]] = frozenset({"features"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        views: str | Sequence[str] = DEFAULT_VIEWS,
        name: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(strength, name=name, **others)
        names = [views] if isinstance(views, str) else list(views)
        good = all(isinstance(view, str) and view for view in names)
        if not good or len(names) not in (1, 2) or len(set(names)) < len(names):
            raise ArgumentError(
                self,
                f"`views` must be one submodule or two different places, got {views!r}",
                cure=f'{type(self).__name__}(views=["outputs.z1", "outputs.z2"])',
            )
        self.views = names

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodules to capture."""
        return tuple(view for view in self.views if not view.startswith("outputs."))

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer that is not there."""
        super().validate(trainer, pl_module)
        known = [name for name, _ in pl_module.named_modules() if name]
        for layer in self.layers:
            if pl_module.automatic_optimization and layer not in known:
                shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
                raise ArgumentError(
                    self,
                    f"takes embeddings from {layer!r}, which this module does not have; it has "
                    f"{shown or 'no submodules'}",
                    cure=f'{type(self).__name__}(views="{known[0] if known else "encoder"}")',
                )

    def two_views(self, step: Step) -> tuple[Tensor, Tensor]:
        """Both views (B, ...) of this rank's samples, of one shape and in float32 at least."""
        if len(self.views) == 2:
            z1, z2 = (step.feature(view) for view in self.views)
        else:
            z1, z2 = self._of_one_layer(step, self.views[0])
        if z1.shape != z2.shape:
            raise RegularizationError(
                self,
                "needs two views of the same samples and the same width, got "
                f"{tuple(z1.shape)} and {tuple(z2.shape)}",
                cure='return {"loss": loss, "z1": z1, "z2": z2} from training_step',
            )
        return z1, z2

    def joint_views(self, step: Step, *companions: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Both views (N, d), and what goes with them, of the samples of all ranks, in one gather.

        Args:
            step: the micro-batch.
            companions: (B, ...) further floats of each sample, with gradients.

        Returns:
            The positions (B,) of this rank's samples among all N, and the tensors (N, ...).
        """
        z1, z2 = self.two_views(step)
        if z1.ndim != 2:
            raise RegularizationError(
                self, f"needs embeddings (B, d), got {tuple(z1.shape)}", cure="z = z.flatten(1)"
            )
        return joint_rows(step.comm, z1, z2, *companions)

    def _of_one_layer(self, step: Step, layer: str) -> tuple[Tensor, Tensor]:
        calls: Sequence[Any] = step.records.get(layer, ())
        given = layer in self._given_features(step)
        if len(calls) == 2 and not given and all(isinstance(call, Tensor) for call in calls):
            return full_precision(calls[0]), full_precision(calls[1])
        if len(calls) > 2 and not given:
            raise MissingSignalError(
                self,
                f"takes two `features` from {layer!r}, which the first {step.hook} called "
                f"{len(calls)} times: once with both views, or once for each",
                cure='return {"loss": loss, "z1": z1, "z2": z2} from training_step',
            )
        both = step.feature(layer)
        if len(both) % 2:
            raise RegularizationError(
                self,
                f"halves the {len(both)} rows of {layer!r} into two views, which needs an even "
                "number",
                cure=f"z = self.{layer}(torch.cat([view1, view2]))",
            )
        z1, z2 = both.chunk(2)
        return z1, z2

    @staticmethod
    def _given_features(step: Step) -> Any:
        features = step.given.get("features")
        return features if isinstance(features, dict) else {}


class EmbeddingLoss(TwoViews):
    """Base of losses that are one number of both views of the joint batch; see `TwoViews`."""

    @abstractmethod
    def value(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss, a scalar, of both views (N, d) of the samples of all ranks."""

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        _, (z1, z2) = self.joint_views(step)
        if len(z1) < 2:
            # The rest of an epoch may be one sample, which has nothing to be compared with.
            return 0.0 * (z1.sum() + z2.sum())
        return self.value(z1, z2)


__all__ = ["DEFAULT_VIEWS", "EmbeddingLoss", "TwoViews"]
