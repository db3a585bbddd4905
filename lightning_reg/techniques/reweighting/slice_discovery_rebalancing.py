"""Finds the attributes whose lack makes errors, and fits the classifier evenly over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.memory import take_index
from lightning_reg.engine.signals import read_path
from lightning_reg.engine.stages import fitting
from lightning_reg.mechanisms.head_choice import HeadChoice
from lightning_reg.mechanisms.head_refit import Data, Head, HeadRefit, HeadRows

__all__ = ["SliceDiscoveryRebalancing", "balanced_rows", "slice_gaps"]

Attributes = str | Callable[[Any], Tensor]
Combine = Literal["attribute", "mean"]
_COMBINE = ("attribute", "mean")


def slice_gaps(correct: Tensor, labels: Tensor, scores: Tensor, num_classes: int) -> Tensor:
    """Accuracy with an attribute minus accuracy without it, of each class and attribute.

    A sample of a class has an attribute if its score is above the class's mean score.

    Args:
        correct: (N,) whether the prediction is right.
        labels: (N,) class indices.
        scores: (N, A) how much of each attribute a sample has.
        num_classes: ``C``.

    Returns:
        (C, A) in [-1, 1]; 0 where a class has samples on one side only.
    """
    one_hot = torch.nn.functional.one_hot(labels, num_classes).to(scores)
    means = one_hot.t() @ scores / one_hot.sum(0).clamp_min(1).unsqueeze(1)
    has = (scores > means[labels]).to(scores)
    right = correct.to(scores).unsqueeze(1)
    sides = []
    for side in (has, 1 - has):
        sizes = one_hot.t() @ side
        sides.append((one_hot.t() @ (side * right) / sizes.clamp_min(1), sizes > 0))
    (with_it, some), (without, others) = sides
    return torch.where(some & others, with_it - without, 0.0)


def balanced_rows(
    labels: Tensor, scores: Tensor, num_classes: int, limit: int | None = None
) -> Tensor:
    """As many samples with an attribute as without it, and as many of each class.

    Of each class the ``m`` samples with the highest scores and the ``m`` with the lowest, where
    ``m`` is the smallest number of samples that any class has on either side of its mean score
    (half of a class that is all on one side), and one at least.

    Args:
        labels: (N,) class indices.
        scores: (N,) of one attribute.
        num_classes: ``C``.
        limit: ``m`` is not larger than this.

    Returns:
        Positions of the samples, ``2 m C`` of them; classes without samples are passed over.
    """
    orders, sizes = [], []
    for k in range(num_classes):
        own = torch.where(labels == k)[0]
        if len(own) == 0:
            continue
        own = own[scores[own].argsort(descending=True, stable=True)]
        with_it = int((scores[own] > scores[own].mean()).sum())
        orders.append(own)
        # A class that is all on one side is halved.
        one_sided = with_it in (0, len(own))
        sizes += [len(own) // 2] if one_sided else [with_it, len(own) - with_it]
    count = max(1, min([*sizes, *([] if limit is None else [limit])], default=0))
    parts = [own[part] for own in orders for part in (slice(count), slice(len(own) - count, None))]
    return torch.cat(parts) if parts else labels[:0]


class SliceDiscoveryRebalancing(HeadRefit):
    """Fits the classifier again on data that are even over discovered attributes (LADDER).

    Ghosh, Syed, Wang, Choudhary, Li, Poynton, Visweswaran, Batmanghelich (2024), LADDER: Language
    Driven Slice Discovery and Error Rectification.

    A network that leans on what goes along with the label fails where it does not. Given scores of
    attributes for each sample (similarities of its embedding to sentences, tags, outputs of
    another network: wherever they come from), this finds, when training ends, the slices of
    held-out data where errors are: attributes with a gap between the accuracy of a class's samples
    that have them and those that do not (:func:`slice_gaps`). For each of these attributes a
    classifier is fitted on as many samples with it as without it, in each class
    (:func:`balanced_rows`); a sample is then classified by that of the attribute it has most of.

    As in the official code (batmanlab/Ladder@47ff4fc, mitigate_error_slices.py): the samples with
    the highest and the lowest scores of each class, 200 at most; a classifier per attribute, fitted
    from the trained one with weight decay 1e-4; the attribute with the largest score chooses among
    them. There the low-scoring samples of the one class are taken from the other by mistake, and
    on Waterbirds the choice looks at the label: here neither. Not more are taken than the rarer
    side has, so that groups are even. It fits by ten epochs of SGD, this to the optimum. Attributes
    come from a language model and a vision-language model there, which stay outside.

    Args:
        head: the name of the classifier, an ``nn.Linear`` whose input are the features.
        attributes: where the scores (B, A) are: a place in the batch (``"batch.attributes"``,
            ``"batch.2"``), or a callable that gets the batch.
        min_gap: the least gap of an attribute that is acted on, in [0, 1].
        max_attributes: how many are acted on, those with the largest gaps.
        limit: the most samples of each class on either side.
        combine: ``"attribute"``: each sample's largest score chooses its classifier, in validate,
            test and predict of this Trainer; ``"mean"``: the average of the classifiers (of their
            logits) is used, which asks for no attributes. The module keeps that average either
            way.
        data: what slices are found in and the classifier fitted on: ``"validation"``, since errors
            on training data say little, or ``"train"``.
        dataloader: data of its own in place of that.
        weight_decay: of the classifier in the fit.
        max_iter: the most iterations of the fit; 0 leaves the head as training left it.
        signals: where ``inputs``, ``logits`` and ``targets`` are.
        name: the name in messages and checkpoints.

    Attributes:
        gaps: (C, A) of the trained network, after a fit.
        chosen: the attributes that were acted on, largest gap first.
        heads: their classifiers.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: if ``head`` is no plain linear layer.
        RegularizationError: at the end of training, without held-out data or attributes.

    Note:
        The second stage runs in ``on_fit_end``: checkpoints that were written before hold the old
        head, ``trainer.save_checkpoint`` afterwards the new ones. Over ranks: global; features of
        all ranks are gathered, and the head is that of rank 0. Training itself does not change.
        Cost: one pass over the data, N x (d + A) float64 numbers on every rank, and a logistic
        regression for each attribute. Without a gap of ``min_gap`` nothing changes.

        It hurts where an attribute is the class itself: without it the class has no signal.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SliceDiscoveryRebalancing
        >>> rebalancing = SliceDiscoveryRebalancing(head="head", attributes="batch.2")
        >>> trainer = L.Trainer(callbacks=[rebalancing], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "LADDER: Language Driven Slice Discovery and Error Rectification",
            "Ghosh et al.",
            2024,
            None,
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(slice_gaps)
    explanation: ClassVar[str] = (
        "fits the classifier evenly over attributes whose lack makes errors"
    )

    def __init__(
        self,
        *,
        head: str,
        attributes: Attributes = "batch.attributes",
        min_gap: float = 0.1,
        max_attributes: int = 5,
        limit: int = 200,
        combine: Combine = "attribute",
        data: Data = "validation",
        dataloader: Any = None,
        weight_decay: float = 1e-4,
        max_iter: int = 100,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            head=head,
            data=data,
            dataloader=dataloader,
            weight_decay=weight_decay,
            max_iter=max_iter,
            signals=signals,
            name=name,
        )
        cure = 'SliceDiscoveryRebalancing(head="head", attributes="batch.attributes")'
        named = isinstance(attributes, str) and attributes.startswith("batch.")
        if not named and not callable(attributes):
            raise ArgumentError(
                self,
                f"`attributes` must be a place in the batch or a callable, got {attributes!r}",
                cure=cure,
            )
        if combine not in _COMBINE:
            raise ArgumentError(
                self,
                f"`combine` must be one of {', '.join(_COMBINE)}, got {combine!r}",
                cure=cure,
            )
        check_range(self, "min_gap", min_gap, 0, 1, cure=cure)
        check_range(self, "max_attributes", max_attributes, 1, cure=cure)
        check_range(self, "limit", limit, 1, cure=cure)
        self.attributes = attributes
        self.min_gap = min_gap
        self.max_attributes = int(max_attributes)
        self.limit = int(limit)
        self.combine: Combine = combine
        self.gaps = torch.zeros(0, 0)
        self.chosen: list[int] = []
        self.heads = self._no_heads()

    # ------------------------------------------------------------------ the second stage

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run from step 0 has found nothing yet."""
        if int(trainer.global_step) == 0:
            self.gaps, self.chosen, self.heads = torch.zeros(0, 0), [], self._no_heads()

    def extras(self, step: Step) -> Tensor:
        """The scores of the batch."""
        return self._scores_of(step.batch)

    def new_head(self, rows: HeadRows, head: Head) -> Head | None:
        """A classifier for each attribute with a gap, and their average."""
        classes = len(head.weight)
        logits = nn.functional.linear(
            rows.features,
            head.weight.to(rows.features),
            None if head.bias is None else head.bias.to(rows.features),
        )
        self.gaps = slice_gaps(logits.argmax(1) == rows.labels, rows.labels, rows.extras, classes)
        largest = self.gaps.abs().amax(0)
        order = largest.argsort(descending=True, stable=True).tolist()
        fits = ((a, self._balanced(rows, head, a)) for a in order if largest[a] >= self.min_gap)
        some = ((a, fit) for a, fit in fits if fit is not None)
        found = list(itertools.islice(some, self.max_attributes))
        self.chosen = [a for a, _ in found]
        if not found:
            return None
        return self.heads.hold([fit for _, fit in found], head.weight)

    def _balanced(self, rows: HeadRows, head: Head, attribute: int) -> Head | None:
        scores = rows.extras[:, attribute]
        chosen = balanced_rows(rows.labels, scores, len(head.weight), self.limit)
        return self.fitted(rows.of(chosen), head) if len(chosen) else None

    def _scores_of(self, batch: Any) -> Tensor:
        try:
            found = self._found(batch)
        except KeyError as error:
            raise RegularizationError(
                self,
                f"looks for attributes at {self.attributes!r}, and the batch has no "
                f"{error.args[0]!r}",
                cure='SliceDiscoveryRebalancing(head="head", attributes="batch.<key>")',
            ) from error
        scores = torch.as_tensor(found)
        return scores.reshape(len(scores), -1).double()

    def _found(self, batch: Any) -> Any:
        if isinstance(self.attributes, str):
            return read_path(batch, self.attributes[len("batch.") :])
        return self.attributes(batch)

    # ------------------------------------------------------------------ after training

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let attributes choose, unless training is under way."""
        if not fitting(trainer):
            self._serve(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let attributes choose."""
        self._serve(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let attributes choose."""
        self._serve(pl_module)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the attributes of the batch."""
        self._look(batch)

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the attributes of the batch."""
        self._look(batch)

    def on_predict_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the attributes of the batch."""
        self._look(batch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the head to itself."""
        self.heads.detach()
        super().on_validation_end(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the head to itself."""
        self.heads.detach()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the head to itself."""
        self.heads.detach()

    def _serve(self, module: pl.LightningModule) -> None:
        if self.combine == "attribute":
            self.heads.attach(self._module_of(module))

    def _look(self, batch: Any) -> None:
        if self.heads.attached:
            scores = self._scores_of(take_index(batch)[0])
            self.heads.choose(scores[:, self.chosen].argmax(1))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What was found, and the classifiers."""
        return {
            **super().state_dict(),
            "gaps": self.gaps.cpu(),
            "chosen": list(self.chosen),
            "heads": self.heads.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved classifiers."""
        super().load_state_dict(state_dict)
        self.gaps = state_dict["gaps"].clone()
        self.chosen = [int(a) for a in state_dict["chosen"]]
        self.heads.load_state_dict(state_dict["heads"])

    def _no_heads(self) -> HeadChoice:
        return HeadChoice(self, 'SliceDiscoveryRebalancing(head="head", combine="mean")')

    def _close(self) -> None:
        self.heads.detach()
        super()._close()
