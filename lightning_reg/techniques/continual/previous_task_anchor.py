"""Pulls the weights to those at the end of the task before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule, Signals, UnsupportedError
from lightning_reg.engine.checks import check_sharded
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.observe import Observer, evaluating, sparing_collections
from lightning_reg.engine.random import restore_rng_state, rng_state
from lightning_reg.engine.rerun import without_trace
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.anchor import WeightAnchor
from lightning_reg.mechanisms.fisher import diagonal_fisher

__all__ = ["PreviousTaskAnchor", "previous_task_anchor"]

Importance = Literal["uniform", "fisher"]
_IMPORTANCE = ("uniform", "fisher")
# The names that torchvision, timm, Hugging Face and the official code give to classifiers.
_ALL_BUT_CLASSIFIERS = ParameterSelection(
    types=("Module",),
    min_ndim=0,
    parameter=None,
    exclude=r"(^|\.)(head|heads|fc|classifier|last)\.",
)


def previous_task_anchor(
    weight: Tensor, reference: Tensor, importance: Tensor | None = None
) -> Tensor:
    """``sum_i O_i (theta_i - theta'_i)^2`` of one tensor of weights.

    Args:
        weight: ``theta``, of any shape.
        reference: ``theta'``, the same weight at the end of the task before.
        importance: ``O``, non-negative; ``None`` counts every entry one.

    Returns:
        A scalar; its gradient is ``2 O (theta - theta')``.
    """
    squares = (weight - reference).square()
    return squares.sum() if importance is None else (importance * squares).sum()


class PreviousTaskAnchor(WeightAnchor):
    """Pulls the weights to those at the end of the task before, against forgetting.

    Smith, Tian, Halbe, Hsu, Kira (2022), A Closer Look at Rehearsal-Free Continual Learning,
    arXiv:2203.17269.

    The loss of task t gets ``strength * sum_i O_i (theta_i - theta_i^(t-1))^2``. With
    ``importance="uniform"``, ``O = 1``: the plain L2 pull, which the paper finds better than EWC
    when the model is pretrained, best of all on the self-attention blocks of a ViT
    (``parameters="attn.qkv"``). With ``importance="fisher"`` it is online EWC: ``O`` is the
    diagonal of the empirical Fisher information, ``F_i = mean_n (d log p(y_n|x_n) / d theta_i)^2``
    over the samples of a task, summed over the tasks so far.

    Each ``fit`` is a task. When it ends without an error the weights become the reference, which
    stays in the technique: use the same instance for the next task, with the same Trainer or
    another one, or hand its ``state_dict()`` to a new instance. An end that you choose yourself
    is ``technique.take_reference(module)``.

    Formulas confirmed against shaunak27/data-free-continual-learning@b25364c,
    learners/kd.py:EWC_MC (a code base of one of the authors). As there, the classifier is left
    out, and the first task is pulled to the weights that it starts with. There the Fisher
    information squares the gradient of each batch's mean, of a binary cross-entropy over the
    task's classes; here it squares the gradient of each sample's cross-entropy, which is the
    definition and equals theirs at batches of one.

    Args:
        strength: ``lambda``. The paper tunes it on each benchmark; 0.01 is ours. A Fisher
            information is small, so EWC takes a strength that is larger by orders of magnitude.
        importance: ``"uniform"`` or ``"fisher"``.
        parameters: a regular expression on names, or a ParameterSelection; by default everything
            except what is called ``head``, ``heads``, ``fc``, ``classifier`` or ``last``.
        from_start: pull to the starting weights during the first task; meant for pretrained
            models. Without effect with ``"fisher"``, which is 0 before a task is done.
        fisher_samples: the most samples of a task that the Fisher information is taken of, over
            all ranks; ``None`` takes all.
        signals: where ``logits`` and ``targets`` are, for ``"fisher"``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0 or ``importance`` unknown; before training, if
            no parameter is chosen.
        RegularizationError: when a chosen parameter changed its shape since the last task.
        UnsupportedError: for ``"fisher"`` under manual optimization, where a training step
            cannot be looked at without taking it, and where FSDP2 shards weights.

    Note:
        Over ranks: replica; the Fisher information is reduced over ranks once a task, samples
        that a DistributedSampler repeats count twice. Acts once per optimizer step in closed
        form, so accumulation and precision make no difference. Cost per step: four passes over
        the chosen weights, and one copy of them in memory (two with ``"fisher"``); ``"fisher"``
        adds one backward a sample, once at the end of each task.

        It hurts where tasks need different weights: the pull that prevents forgetting also
        prevents learning. It does not keep a classifier from preferring new classes; train it on
        the current task's logits only.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PreviousTaskAnchor
        >>> trainer = L.Trainer(callbacks=[PreviousTaskAnchor(0.1)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "A Closer Look at Rehearsal-Free Continual Learning",
            "Smith et al.",
            2022,
            "2203.17269",
        ),
    )
    semantics: ClassVar[Semantics] = "replica"
    function: ClassVar[Callable[..., Any] | None] = staticmethod(previous_task_anchor)
    explanation: ClassVar[str] = "pulls weights to those at the end of the task before"
    default_selection = _ALL_BUT_CLASSIFIERS

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        importance: Importance = "uniform",
        parameters: str | ParameterSelection | None = None,
        from_start: bool = True,
        fisher_samples: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="PreviousTaskAnchor(0.01)")
        if importance not in _IMPORTANCE:
            raise ArgumentError(
                self,
                f"`importance` must be one of {', '.join(_IMPORTANCE)}, got {importance!r}",
                cure='PreviousTaskAnchor(importance="uniform")',
            )
        if fisher_samples is not None:
            cure = "PreviousTaskAnchor(importance='fisher', fisher_samples=1000)"
            check_range(self, "fisher_samples", fisher_samples, 1, cure=cure)
        self.kind = importance
        self.from_start = from_start
        self.fisher_samples = fisher_samples
        self.signals = signals

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an empty choice, and a Fisher information that cannot be taken."""
        super().validate(trainer, pl_module)
        check_sharded(
            trainer,
            self,
            self.kind == "fisher",
            "takes the gradient of each sample by whole weights",
            cure='PreviousTaskAnchor(importance="uniform")',
        )
        if self.kind == "fisher" and not pl_module.automatic_optimization:
            raise UnsupportedError(
                self,
                "takes the Fisher information by looking at training steps, which under manual "
                "optimization change the weights",
                cure='PreviousTaskAnchor(importance="uniform")',
            )

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first task's reference; later ones are there already."""
        super().on_reference(trainer, pl_module)
        if self.references_taken == 0 and self.from_start and self.kind == "uniform":
            self.take_reference(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of a task."""
        importance = self._fisher(trainer, pl_module) if self.kind == "fisher" else None
        self.take_reference(pl_module, importance)

    def _fisher(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, Tensor]:
        """The Fisher information of this task, on top of that of the tasks before."""
        chosen = self.selection.select(module, self)
        observer = Observer(self, trainer, module, "training_step")
        ranks = observer.comm.world_size
        share = None if self.fisher_samples is None else -(-self.fisher_samples // ranks)
        state = rng_state()
        try:
            with _looking_at(module), torch.enable_grad():
                losses = self._losses(observer)
                fisher = diagonal_fisher(losses, list(chosen.values()), observer.comm, share)
        finally:
            restore_rng_state(state)
            observer.close()
        found = dict(zip(chosen, fisher, strict=True))
        return {n: f + self.importance[n] if n in self.importance else f for n, f in found.items()}

    def _losses(self, observer: Observer) -> Iterator[Tensor]:
        """The loss of each sample of this rank's training data, batch by batch."""
        trainer = observer.trainer
        assert self.pipeline is not None
        step = self.pipeline.users_step
        counted = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        loader: Iterable[Any] = trainer.train_dataloader  # type: ignore[assignment]
        for index, raw in enumerate(loader):
            batch = trainer.precision_plugin.convert_input(raw)
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                seen = observer.observe(
                    lambda b, i=index: step(b, i) if counted else step(b),  # type: ignore[misc]
                    batch,
                    index,
                )
            losses = F.cross_entropy(seen.logits, seen.targets, reduction="none")
            yield losses if losses.ndim == 1 else losses.flatten(1).sum(1)


@contextmanager
def _looking_at(module: pl.LightningModule) -> Iterator[None]:
    with evaluating(module), without_trace(module), sparing_collections(module):
        yield
