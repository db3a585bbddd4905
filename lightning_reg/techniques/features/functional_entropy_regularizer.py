"""Makes a classifier use each of its input modalities, by what noise in them changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.criterion import soft_cross_entropy
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.step import full_precision
from lightning_reg.mechanisms.class_scores import Task, check_choice
from lightning_reg.mechanisms.forward_noise import OWN_NOISE, ActivationNoise
from lightning_reg.mechanisms.gradient_penalty import check_not_compiled, twice_differentiable

__all__ = ["FunctionalEntropyRegularizer", "functional_entropy_regularizer"]

_EPS = 1e-8


def functional_entropy_regularizer(
    values: Tensor, squared_gradients: Tensor, norm: float = 2.0
) -> Tensor:
    """``||(1 / I_1, ..., 1 / I_M)||`` with ``I_m = mean_n ||grad_{z_m} f(z_n)||^2 / f(z_n)``.

    ``I_m`` is the functional Fisher information of modality m; half of it, times the variance of
    the noise, bounds the functional entropy of ``f`` under noise in that modality from above.
    1e-8 stands beside ``f`` and ``I_m``.

    Args:
        values: ``f`` (N,), at least 0, one for each sample.
        squared_gradients: (M, N).
        norm: the order of the norm, from 1; 2 is Euclidean.

    Returns:
        A scalar.
    """
    return _inverse(_information(values, squared_gradients).mean(1), norm)


def _information(values: Tensor, squared_gradients: Tensor) -> Tensor:
    return squared_gradients / (values + _EPS)


def _inverse(information: Tensor, norm: float) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(1 / (information + _EPS), norm)
    return found


class FunctionalEntropyRegularizer(ActivationNoise):
    """Makes a classifier use each of its input modalities, by what noise in them changes.

    Gat, Schwartz, Schwing, Hazan (2020), Removing Bias in Multi-modal Classifiers: Regularization
    by Maximizing Functional Entropies, arXiv:2010.10802.

    With ``z_m`` the modality m with noise, and ``f(z) = -sum_y p(y | x) log p(y | z)``, how far the
    prediction moves, the loss becomes ``L + lambda ||(1 / I_1, ..., 1 / I_M)||``, where ``I_m =
    E ||grad_{z_m} f||^2 / f`` bounds the functional entropy of f in that modality (the log-Sobolev
    inequality). The norm of inverses is ruled by the modality that is used least, which the
    penalty brings in; see :func:`functional_entropy_regularizer`.

    Compared with itaigat/removing-bias-in-multi-modal-classifiers@f76416c (``regularization.py``):
    from there are the noise in all modalities at once, its size (the deviation of each feature
    over the batch), the Euclidean norm of the inverses, and gradients through ``p(y | x)``. Each
    sample's gradient is divided by its own ``f``, as the paper's formula says; that code divides
    by the mean of the batch, and differentiates that mean, which makes its ``I`` smaller by the
    square of the batch's size: its ``lambda = 1e-10`` means nothing here. It takes 10 draws a
    sample. ``strength = 1e-3`` is ours.

    Args:
        strength: ``lambda``, at least 0.
        layers: the submodules whose outputs are the modalities, tensors of one row a sample: their
            encoders, embeddings, or an ``nn.Identity`` that an input goes through. Each is called
            once a step.
        sigma: the noise's standard deviation, in units of each feature's own over the joint batch.
        draws: how many draws of noise, each with a forward and a backward pass.
        norm: the order of the norm, from 1.
        task: ``"multiclass"``, or ``"multilabel"`` (a sigmoid for each class, whose losses are
            added up).
        signals: where ``logits`` (B, C) are.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if an argument is outside its range, or a layer is not there.
        RegularizationError: in the first step, if logits are not (B, C), or do not depend on the
            output of a layer.
        UnsupportedError: with compiled networks, which have no second derivative.

    Note:
        Over ranks: the information is that of the joint batch, whose sums are added up with
        gradients before the inverse is taken; the noise is local, each rank draws for its own
        samples. Under accumulation each micro-batch has its own. Cost: ``draws`` forward passes of
        the whole step, each differentiated by the modalities and then a second time, and two
        all-reduces. Logs, metrics and running statistics do not count these passes.

        It hurts where a modality holds nothing: the network is paid for listening to noise. And
        information is larger where predictions are unsure: at a large strength modalities are
        balanced at the price of sure predictions, and one of them may work against the label. The
        inverse is steep where a modality is hardly used yet: raise the strength from small, and
        watch the accuracy.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import FunctionalEntropyRegularizer
        >>> both = FunctionalEntropyRegularizer(1e-3, layers=["image_encoder", "text_encoder"])
        >>> trainer = L.Trainer(callbacks=[both], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Removing Bias in Multi-modal Classifiers: Regularization by Maximizing Functional "
            "Entropies",
            "Gat et al.",
            2020,
            "2010.10802",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "features"})
    writes: ClassVar[frozenset[str]] = frozenset()
    exemptions: ClassVar[Mapping[str, str]] = OWN_NOISE
    sharded: ClassVar[bool | None] = False
    function: ClassVar[Callable[..., Any] | None] = staticmethod(functional_entropy_regularizer)
    explanation: ClassVar[str] = "pays for the information that each modality gives"

    def __init__(
        self,
        strength: float | Schedule = 1e-3,
        *,
        layers: Sequence[str],
        sigma: float = 1.0,
        draws: int = 1,
        norm: float = 2.0,
        task: Task = "multiclass",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layers=layers, name=name)
        self.signals = signals
        cure = 'FunctionalEntropyRegularizer(1e-3, layers=["image", "text"], sigma=1.0, draws=1)'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "sigma", sigma, 0, low_open=True, cure=cure)
        check_range(self, "norm", norm, 1, cure=cure)
        if type(draws) is not int or draws < 1:
            problem = f"`draws` must be a whole number from 1, got {draws!r}"
            raise ArgumentError(self, problem, cure=cure)
        check_choice(self, "task", task, ("multiclass", "multilabel"))
        self.sigma = sigma
        self.draws = draws
        self.norm = norm
        self.task: Task = task
        self._points: dict[str, Tensor] = {}
        self._recurrent = False
        self._checked = False

    # ------------------------------------------------------------------ phases

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse layers that are not there."""
        super().validate(trainer, pl_module)
        self._checked = False
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in pl_module.modules())

    @contextmanager
    def forward_context(self, step: Step) -> Iterator[None]:
        """Phase 2: the user's own pass has no noise."""
        yield

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        logits = step.logits
        if logits.ndim != 2 or (self.task == "multiclass" and logits.shape[1] < 2):
            raise RegularizationError(
                self,
                f"needs logits (B, C) of two classes or more, got {tuple(logits.shape)}",
                cure='FunctionalEntropyRegularizer(layers=[...], task="multilabel")',
            )
        p = logits.softmax(1) if self.task == "multiclass" else logits.sigmoid()
        generator = step.rng(self)
        sums = torch.stack([self._one_draw(step, p, generator) for _ in range(self.draws)]).sum(0)
        count = sums.new_full((1,), float(len(logits) * self.draws))
        joint = step.comm.reduce(torch.cat([sums, count]))
        return _inverse(joint[:-1] / joint[-1].detach().clamp_min(1), self.norm)

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        """Phase 5: nothing; a technique of this phase may run the user's step again."""
        return total

    def restore(self) -> None:
        """Nothing was moved."""

    # ------------------------------------------------------------------ the noisy pass

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The modality with noise, which is differentiated by."""
        assert self._now is not None
        size = self.sigma * _deviation(self._now[0], output)
        noise = torch.randn(
            output.shape, generator=generator, device=output.device, dtype=output.dtype
        )
        moved = output + size * noise
        return moved if moved.requires_grad else moved.requires_grad_()

    def change(self, layer: str, output: Any) -> Any:
        """Note whose output comes."""
        changed = super().change(layer, output)
        if self._now is not None:
            self._points[layer] = changed
        return changed

    def _one_draw(self, step: Step, p: Tensor, generator: torch.Generator) -> Tensor:
        """The sum over samples of each modality's information (M,)."""
        self._now, self._points = (step, generator), {}
        try:
            with twice_differentiable(self._recurrent):
                logits = step.rerun(lambda: step.asked_by(self).logits)
        finally:
            self._now = None
        if not self._checked:
            check_not_compiled(self, logits)
            self._checked = True
        points = [self._points[layer] for layer in self.layers if layer in self._points]
        self._points = {}
        values = self._values(logits, p)
        found: Sequence[Tensor | None] = ()
        if points and values.requires_grad:
            found = torch.autograd.grad(values.sum(), points, create_graph=True, allow_unused=True)
        squares = [_squared(gradient) for gradient in found if gradient is not None]
        if len(squares) < len(self.layers):
            raise RegularizationError(
                self,
                f"needs logits that depend on the outputs of {', '.join(self.layers)}, and one of "
                "them was not called, or something detached it",
                cure=f'{type(self).__name__}(layers=["<a layer that the step calls>"])',
            )
        return _information(values, torch.stack(squares)).sum(1)

    def _values(self, logits: Tensor, p: Tensor) -> Tensor:
        if self.task == "multiclass":
            return soft_cross_entropy(logits, p)
        return F.binary_cross_entropy_with_logits(logits, p, reduction="none").sum(1)

    def __getstate__(self) -> dict[str, Any]:
        # The points belong to a pass.
        return {**super().__getstate__(), "_points": {}}


def _squared(gradient: Tensor) -> Tensor:
    return full_precision(gradient).flatten(1).square().sum(1)


def _deviation(step: Step, output: Tensor) -> Tensor:
    """The standard deviation of each feature over the samples of all ranks, without a gradient."""
    rows = full_precision(output.detach())
    sums = torch.stack([rows.sum(0), rows.square().sum(0), torch.ones_like(rows).sum(0)])
    total, square, count = step.comm.reduce(sums)
    variance = (square - total.square() / count) / (count - 1).clamp_min(1)
    deviation: Tensor = variance.clamp_min(0).sqrt().to(output.dtype)
    return deviation
