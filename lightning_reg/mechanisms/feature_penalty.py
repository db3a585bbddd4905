"""Penalties on the representation of a whole batch: spectra, correlations, distances.

A technique supplies :meth:`FeaturePenalty.value`: a scalar of the rows (N, d) of all ranks. The
mechanism takes care of

- capturing the output of ``layer``, in float32 at least, and nothing else of the network;
- making rows of feature maps and token sequences (``pooling``);
- gathering the rows of all ranks *with gradients* before the technique computes anything of
  them, since a spectrum of a shard is not a share of the joint spectrum. Ranks may hold
  different numbers of rows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_reg.engine import RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError, owner_name
from lightning_reg.engine.technique import Semantics

Pooling = Literal["mean", "flatten", "positions", "first"]
_POOLING = ("mean", "flatten", "positions", "first")


class FeatureRows(Regularizer):
    """Base of techniques that read the output of one layer as rows (N, d).

    Args:
        strength: the multiplier.
        layer: the submodule whose output is meant (``"encoder"``, ``"net.3"``), or
            ``"outputs.<key>"`` of the dict that ``training_step`` returns. ``None`` under manual
            optimization, where ``self.regularize(loss, features=...)`` hands them over.
        pooling: how outputs with positions become rows. ``"mean"``: the average over positions;
            ``"flatten"``: all positions one behind the other; ``"positions"``: each position is
            a row; ``"first"``: the first position (a class token).
        feature_dim: where the features lie in outputs of more than two dimensions; by default
            last in three dimensions (B, T, d) and second in more (B, d, H, W).
        signals: where other tensors are that the technique reads.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("features",)
    reads: ClassVar[frozenset[str]] = frozenset({"features"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        layer: str | None = None,
        pooling: Pooling = "mean",
        feature_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        owner = type(self).__name__
        if layer is not None and (not isinstance(layer, str) or not layer):
            problem = f"`layer` must be the name of a submodule, got {layer!r}"
            raise ArgumentError(self, problem, cure=f'{owner}(layer="encoder")')
        if pooling not in _POOLING:
            problem = f"`pooling` must be one of {', '.join(_POOLING)}, got {pooling!r}"
            raise ArgumentError(self, problem, cure=f'{owner}(layer="encoder", pooling="mean")')
        whole = isinstance(feature_dim, int) and not isinstance(feature_dim, bool)
        if feature_dim is not None and not (whole and feature_dim != 0):
            problem = f"`feature_dim` must be a dimension other than 0, got {feature_dim!r}"
            raise ArgumentError(self, problem, cure=f'{owner}(layer="encoder", feature_dim=1)')
        self.layer = layer
        self.pooling = pooling
        self.feature_dim = feature_dim

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodules to capture."""
        return () if self.layer is None else (self.layer,)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer that is not there, and no layer where none is handed over."""
        if self.layer is None:
            if pl_module.automatic_optimization:
                check_layer(self, self.layer, pl_module)
        elif not self.layer.startswith("outputs."):
            check_layer(self, self.layer, pl_module)

    def feature_rows(self, step: Step) -> Tensor:
        """The rows (N, d) of this rank, with a graph."""
        return self._rows(step.feature(self.layer or "features"))

    def _rows(self, features: Tensor) -> Tensor:
        if features.ndim == 2:
            return features
        if self.pooling == "flatten" and features.ndim > 2:
            return features.flatten(1)
        tokens = positions(self, features, self.feature_dim)
        if self.pooling == "mean":
            return tokens.mean(1)
        return tokens[:, 0] if self.pooling == "first" else tokens.flatten(0, 1)


def positions(owner: object, features: Tensor, feature_dim: int | None = None) -> Tensor:
    """Features as (B, P, d): one vector for each position of each sample.

    Args:
        owner: the technique.
        features: (B, d), which has one position, (B, T, d) or (B, d, H, W).
        feature_dim: where the features lie; by default last in three dimensions and second in
            more.
    """
    if features.ndim == 2:
        return features.unsqueeze(1)
    name = owner_name(owner)
    if features.ndim < 2:
        raise RegularizationError(
            owner,
            f"needs features (B, d) or with more dimensions, got {tuple(features.shape)}",
            cure=f'{name}(layer="<a layer that returns a vector per sample>")',
        )
    default = -1 if features.ndim == 3 else 1
    dim = default if feature_dim is None else feature_dim
    if not -features.ndim <= dim < features.ndim:
        layer = getattr(owner, "layer", "encoder")
        raise ArgumentError(
            owner,
            f"`feature_dim` is {dim}, but the features are {tuple(features.shape)}",
            cure=f'{name}(layer="{layer}", feature_dim=1)',
        )
    return features.movedim(dim, -1).flatten(1, -2)


class FeaturePenalty(FeatureRows):
    """Base of penalties on the features of all samples of all ranks; see :class:`FeatureRows`."""

    @abstractmethod
    def value(self, features: Tensor) -> Tensor:
        """The penalty, a scalar, of the rows (N, d) of all ranks."""

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        return self.value(step.comm.gather(self.feature_rows(step)))


def check_layer(owner: object, layer: str | None, module: nn.Module, also: str = "") -> None:
    """Raise :class:`ArgumentError` unless ``layer`` names a submodule.

    Args:
        owner: the technique.
        layer: its argument.
        module: which has to have the layer.
        also: further arguments for the line that cures.
    """
    known = [name for name, _ in module.named_modules() if name]
    if layer in known:
        return
    problem = (
        f"`layer` must name the submodule whose output is meant; this module has {_few(known)}"
        if layer is None
        else f"`layer` is {layer!r}, which this module does not have; it has {_few(known)}"
    )
    cure = f'{owner_name(owner)}({also}layer="{known[0] if known else "encoder"}")'
    raise ArgumentError(owner, problem, cure=cure)


def _few(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit]) or "no submodules"
    return shown + (", ..." if len(names) > limit else "")


__all__ = ["FeaturePenalty", "FeatureRows", "Pooling", "check_layer", "positions"]
