"""Techniques that fit the classifier anew, on the features of the trained network.

A technique supplies :meth:`HeadRefit.new_head`: the classifier, from the features and labels of a
data set, with :meth:`HeadRefit.fitted` for the fit itself. The mechanism takes care of

- the second stage, which begins when training has ended (behind averages of weights, which are
  written into the module before): one pass of ``self(inputs)`` over the data, in evaluation mode
  and without gradients, that keeps what the head is given;
- which data: the training set in order and without repetition, held-out data, or a dataloader;
- positions: a head on (B, T, d) gives a row for each, those whose label is no class are left out;
- the rows of all ranks, together on every rank and in high precision; what a DistributedSampler
  repeats is left out, and so are rows that are not finite;
- weighted logistic regression with weight decay, from the head as it is, by L-BFGS to its optimum;
- the new head: the one of rank 0 on all ranks, in the place of the old one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_reg.engine import (
    ArgumentError,
    Communicator,
    MissingSignalError,
    RegularizationError,
    Regularizer,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.observe import held_out_steps, validation_loaders
from lightning_reg.engine.technique import Semantics

Data = Literal["train", "validation"]
_DATA = ("train", "validation")


@dataclass(frozen=True)
class Head:
    """A linear classifier: weight (C, d), and bias (C,) if it has one."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class HeadRows:
    """What the head was given for a data set.

    Attributes:
        features: (N, d).
        labels: (N,) class indices.
        extras: (N, K) what the technique asked for beside them.
    """

    features: Tensor
    labels: Tensor
    extras: Tensor

    def of(self, rows: Tensor) -> HeadRows:
        """Some of the rows, by position or as a mask."""
        return HeadRows(self.features[rows], self.labels[rows], self.extras[rows])


def refit_head(
    head: Head,
    features: Tensor,
    labels: Tensor,
    *,
    weight_decay: float = 1e-4,
    max_iter: int = 100,
    sample_weights: Tensor | None = None,
) -> Head:
    """``argmin_{W, b} mean_i w_i CE(W h_i + b, y_i) + (decay / 2) |W|^2``, by L-BFGS.

    Args:
        head: where to start.
        features: (N, d) ``h``.
        labels: (N,) class indices.
        weight_decay: at least 0; above 0 the optimum is unique, but for a shift of all biases.
        max_iter: the most iterations.
        sample_weights: (N,) ``w``, at least 0; ``None`` for ones.

    Returns:
        The classifier, in the type of ``features``.
    """
    weight = head.weight.to(features).clone().requires_grad_()
    bias = None if head.bias is None else head.bias.to(features).clone().requires_grad_()
    weights = torch.ones_like(features[:, 0]) if sample_weights is None else sample_weights
    optimizer = torch.optim.LBFGS(
        [weight] if bias is None else [weight, bias],
        max_iter=max_iter,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(F.linear(features, weight, bias), labels, reduction="none")
        decay = weight_decay / 2 * weight.square().sum()
        loss = (weights * losses).mean() + decay
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Head(weight.detach(), None if bias is None else bias.detach())


class HeadRefit(Regularizer):
    """Base of techniques with a second stage that fits the classifier.

    Args:
        head: the name of the classifier, an ``nn.Linear`` whose input are the features.
        data: what it is fitted on: ``"train"`` or ``"validation"`` (the first dataloader).
        dataloader: data of its own in place of that.
        weight_decay: of the classifier in the fit.
        max_iter: the most iterations of the fit; 0 leaves the head as training left it.
        signals: where ``inputs``, ``logits`` and ``targets`` are, if not in the usual places.
        name: the name in messages and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    exemptions: ClassVar[dict[str, str]] = {
        "signals": "labels are looked for when training ends, in the data of the second stage",
    }
    needs: ClassVar[tuple[str, ...]] = ("targets",)
    exclusive: ClassVar[frozenset[str]] = frozenset({"head_refit"})
    sharded: ClassVar[bool | None] = False

    def __init__(
        self,
        *,
        head: str,
        data: Data,
        dataloader: Any = None,
        weight_decay: float = 1e-4,
        max_iter: int = 100,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, signals=signals, name=name)
        cure = f'{type(self).__name__}(head="head", data="validation", weight_decay=1e-4)'
        if not isinstance(head, str) or not head:
            raise ArgumentError(
                self, f"`head` must be the name of a submodule, got {head!r}", cure=cure
            )
        if data not in _DATA:
            raise ArgumentError(
                self, f"`data` must be one of {', '.join(_DATA)}, got {data!r}", cure=cure
            )
        check_range(self, "weight_decay", weight_decay, 0, cure=cure)
        check_range(self, "max_iter", max_iter, 0, cure=cure)
        self.head = head
        self.data: Data = data
        self.dataloader = dataloader
        self.weight_decay = weight_decay
        self.max_iter = int(max_iter)

    @abstractmethod
    def new_head(self, rows: HeadRows, head: Head) -> Head | None:
        """The classifier (C, d), from the rows of all ranks and the one of training.

        Every rank is given the same rows. ``None`` keeps the classifier of training.
        """

    def extras(self, step: Step) -> Tensor | None:
        """Further numbers (B, K) that rows bring along; a row of a position has its sample's."""
        return None

    def fitted(self, rows: HeadRows, head: Head, weights: Tensor | None = None) -> Head:
        """The classifier that fits rows best; see :func:`refit_head`."""
        return refit_head(
            head,
            rows.features,
            rows.labels,
            weight_decay=self.weight_decay,
            max_iter=self.max_iter,
            sample_weights=weights,
        )

    def generator(self) -> torch.Generator:
        """For the draws of the second stage; the same on all ranks."""
        assert self.pipeline is not None
        return self.pipeline.generator(self.name, True, "refit", 0)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a head that cannot be written."""
        self._check_head(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The second stage."""
        super().on_fit_end(trainer, pl_module)
        if self.max_iter == 0:
            return
        comm = Communicator.of(trainer)
        module = self._module_of(pl_module)
        with torch.inference_mode(False), torch.no_grad():
            rows = self._rows(trainer, pl_module, comm)
            bias = None if module.bias is None else module.bias.detach()
            old = Head(module.weight.detach(), bias)
            new = self.new_head(rows, old) if len(rows.labels) else None
            if new is not None:
                module.weight.copy_(comm.broadcast(new.weight))
                if new.bias is not None:
                    module.bias.copy_(comm.broadcast(new.bias))

    # ------------------------------------------------------------------ the pass

    def _rows(
        self, trainer: pl.Trainer, module: pl.LightningModule, comm: Communicator
    ) -> HeadRows:
        parts = []
        with self._given_to_head(module) as given:
            for step, counted in held_out_steps(self, trainer, module, self._loader(trainer, comm)):
                if not given:
                    raise self._not_called()
                parts.append(self._rows_of(step, given[-1], counted))
        own_width = torch.tensor(max((part.shape[1] for part in parts), default=0))
        width = int(comm.reduce(own_width.to(module.device), "max"))
        own = torch.cat(parts) if parts else torch.zeros(0, width, dtype=_precise(module.device))
        joint = comm.gather(own.to(module.device))
        joint = joint[joint.isfinite().all(1)]
        features = self._module_of(module).in_features
        return HeadRows(joint[:, :features], joint[:, features].long(), joint[:, features + 1 :])

    def _rows_of(self, step: Step, given: Tensor, counted: Tensor | None) -> Tensor:
        features, targets = given.flatten(0, -2), step.targets
        fits = isinstance(targets, Tensor) and not targets.is_floating_point()
        if not fits or targets.numel() != len(features):
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise RegularizationError(
                self,
                f"needs a class index for each row of the {tuple(given.shape)} that "
                f"{self.head!r} is given, got targets {shape}",
                cure='signals=Signals(targets="batch.<key>")',
            )
        labels = targets.reshape(-1)
        positions = len(labels) // max(1, len(targets))
        columns = [features, labels.unsqueeze(1)]
        extras = self.extras(step)
        if extras is not None:
            columns.append(extras.repeat_interleave(positions, 0))
        kind = _precise(features.device)
        rows = torch.cat([column.to(features.device, kind) for column in columns], 1)
        kept = (labels >= 0) & (labels < self._module_of(step.module).out_features)
        if counted is not None:
            kept &= counted.repeat_interleave(positions)
        return rows[kept]

    def _not_called(self) -> MissingSignalError:
        return MissingSignalError(
            self,
            f"needs the `features` that {self.head!r} is given, and `forward` does not call it",
            cure="def forward(self, x): return self.head(self.encoder(x))",
        )

    @contextmanager
    def _given_to_head(self, module: nn.Module) -> Iterator[list[Tensor]]:
        """The input of each call of the head."""
        head = self._module_of(module)
        given: list[Tensor] = []

        def keep(part: nn.Module, args: tuple[Tensor, ...]) -> None:
            given[:] = [args[0].detach()]

        handle = head.register_forward_pre_hook(keep)
        try:
            yield given
        finally:
            handle.remove()

    def _loader(self, trainer: pl.Trainer, comm: Communicator) -> Any:
        if self.dataloader is not None:
            return self.dataloader
        if self.data == "train":
            return self._training_set(trainer, comm)
        found = validation_loaders(trainer)
        if not found:
            raise RegularizationError(
                self,
                "fits the classifier on held-out data, and the Trainer has no validation data",
                cure="trainer.fit(module, train_dataloaders, val_dataloaders)",
            )
        return found[0]

    def _training_set(self, trainer: pl.Trainer, comm: Communicator) -> DataLoader[Any]:
        """The training set in order; the run's own loader, which may shuffle, is not touched."""
        loader = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        iterable = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
        if dataset is None or iterable:
            raise UnsupportedError(
                self,
                "goes through the training set once more, for which it needs one DataLoader with a "
                f"map-style dataset; this run has {type(loader).__name__}",
                cure=f"{type(self).__name__}(head={self.head!r}, dataloader=loader)",
            )
        several = comm.world_size > 1
        sampler: DistributedSampler[Any] | None = (
            DistributedSampler(dataset, comm.world_size, comm.rank, shuffle=False)
            if several
            else None
        )
        return DataLoader(
            dataset,
            batch_size=getattr(loader, "batch_size", None) or 32,
            sampler=sampler,
            collate_fn=loader.collate_fn,  # type: ignore[union-attr]
            generator=torch.Generator(),  # workers' seeds are not drawn from the user's
        )

    # ------------------------------------------------------------------ the head

    def _module_of(self, module: nn.Module) -> nn.Linear:
        return module.get_submodule(self.head)  # type: ignore[return-value]

    def _check_head(self, module: nn.Module) -> None:
        parts = dict(module.named_modules())
        head = parts.get(self.head)
        if isinstance(head, nn.Linear) and not is_parametrized(head):
            return
        linear = [name for name, part in parts.items() if isinstance(part, nn.Linear)]
        kind = "not there" if head is None else f"a {type(head).__name__}"
        raise UnsupportedError(
            self,
            f"fits a plain linear classifier, and {self.head!r} is {kind}; linear layers are "
            f"{', '.join(linear) or 'none'}",
            cure=f'{type(self).__name__}(head="{linear[-1] if linear else "head"}")',
        )


def _precise(device: torch.device) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if device.type == "mps" else torch.float64


__all__ = ["Data", "Head", "HeadRefit", "HeadRows", "refit_head"]
