"""Mixes what a random layer makes of each sample, and its label, with another sample's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.batch_transform import (
    MIXING_EXEMPTIONS,
    Per,
    Replaces,
    draw_mix,
    mix_rows,
)
from lightning_reg.mechanisms.forward_noise import ActivationNoise
from lightning_reg.mechanisms.loss_replacement import check_replaces

__all__ = ["ManifoldMixup", "manifold_mixup"]

_INPUTS = "inputs"


def manifold_mixup(hidden: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """``lam_i h_i + (1 - lam_i) h_j`` with ``j = permutation[i]``; gradients flow to both.

    Args:
        hidden: (B, ...), what a layer returned.
        permutation: (B,), the partner of each sample.
        lam: (B,) or (1,), in [0, 1], the share that a sample keeps.

    Returns:
        (B, ...); where ``lam`` is 1 the sample itself, bit for bit.
    """
    return mix_rows(hidden, permutation, lam)


class ManifoldMixup(ActivationNoise):
    """Mixes what a random layer makes of each sample, and its label, with another sample's.

    Verma, Lamb, Beckham, Najafi, Mitliagkas, Courville, Lopez-Paz, Bengio (2018), Manifold Mixup:
    Better Representations by Interpolating Hidden States, arXiv:1806.05236.

    In each batch one of the layers is drawn, the input being one of them; with its output ``h``
    the network goes on from ``lam h_i + (1 - lam) h_j``, and the label becomes ``lam y_i +
    (1 - lam) y_j``, with ``lam ~ Beta(alpha, alpha)`` and a random permutation ``j`` of the batch.
    Mixing at the input alone is :class:`Mixup`. States of a class are drawn together, and
    decisions between classes become smoother than mixing at the input makes them.

    As in vikasverma1077/manifold_mixup@870ef77 (supervised/): one layer, one ``lam`` and one
    permutation a batch, ``alpha = 2``, the input or one of the first blocks of a residual network
    with equal chances. That code trains on binary cross-entropies of the softmax with the mixed
    labels; here it is the cross-entropy.

    Labels are treated as :class:`Mixup` does: class indices stay in the batch for your metrics, and
    the loss that is differentiated is the cross-entropy of the logits with the mixed labels; float
    targets are mixed in the batch.

    Args:
        alpha: of the Beta distribution, above 0.
        layers: submodules whose output, a tensor (B, ...), may be mixed; each is called once a
            step.
        include_inputs: whether the input is one of the layers; not where inputs are tokens.
        probability: of mixing a batch, or a sample with ``per="sample"``: a number in [0, 1] or a
            :class:`Schedule`; 0 turns the technique off.
        per: ``"batch"`` for one ``lam`` a batch, ``"sample"`` for one a sample.
        replaces: for class indices: ``"cross_entropy"`` if your loss is the cross-entropy of
            logits and labels (checked in the first step), ``"term"`` if it has other terms,
            ``"loss"`` to drop it.
        signals: where ``inputs``, ``targets`` and (for class indices) ``logits`` are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if an argument is outside its range, or a layer is not there.
        RegularizationError: if the layer that was drawn is not called, or returns no tensor with a
            row for each sample; if your loss is not the cross-entropy of logits and labels.

    Note:
        Over ranks: local; partners are of the same rank, and each rank draws its own layer and
        ``lam``. No collective. Under accumulation each micro-batch is mixed by itself. A second
        pass (SAM) sees the same mix. Cost: a gather and one interpolation over a layer's output,
        and the cross-entropy once more. ``reg/manifold_mixup`` logs the share of labels that was
        given away.

        It hurts where layers in front of the mix hold BatchNorm statistics of few samples, and in
        short trainings, which underfit.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ManifoldMixup
        >>> mix = ManifoldMixup(alpha=2.0, layers=["net.layer1", "net.layer2"])
        >>> trainer = L.Trainer(callbacks=[mix], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Manifold Mixup: Better Representations by Interpolating Hidden States",
            "Verma et al.",
            2018,
            "1806.05236",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "targets", "logits")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "features", "targets"})
    writes: ClassVar[frozenset[str]] = frozenset({"inputs", "features", "targets"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"batch_mixing"})
    exemptions: ClassVar[Mapping[str, str]] = MIXING_EXEMPTIONS
    function: ClassVar[Callable[..., Any] | None] = staticmethod(manifold_mixup)
    explanation: ClassVar[str] = (
        "mixes pairs of samples at a random layer; class indices stay in the batch for your "
        "metrics, and the loss is the cross-entropy of the captured logits with the mixed labels; "
        "float targets are mixed in the batch"
    )

    def __init__(
        self,
        alpha: float = 2.0,
        *,
        layers: str | Sequence[str],
        include_inputs: bool = True,
        probability: float | Schedule = 1.0,
        per: Per = "batch",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, layers=layers, name=name)
        self.signals = signals
        cure = 'ManifoldMixup(2.0, layers=["encoder"], probability=1.0, per="batch")'
        check_range(self, "alpha", alpha, 0, low_open=True, cure=cure)
        if not isinstance(probability, Schedule):
            check_range(self, "probability", probability, 0, 1, cure=cure)
        if per not in ("batch", "sample"):
            raise ArgumentError(self, f"`per` must be batch or sample, got {per!r}", cure=cure)
        check_replaces(self, replaces)
        self.alpha = alpha
        self.include_inputs = include_inputs
        self.per: Per = per
        self.replaces = replaces
        self._called = False

    def transform_batch(self, step: Step) -> None:
        """Phase 1: draw the layer, the partners and the shares; mix inputs and labels."""
        inputs = step.inputs
        size = len(inputs) if self.include_inputs else len(step.targets)
        # The stream of this rank and micro-batch, on the CPU whatever the module's device is.
        generator = torch.Generator().manual_seed(step.rng(self).initial_seed())
        draws = torch.rand(size if self.per == "sample" else 1, generator=generator)
        chosen = draws < step.strength(self)
        if not bool(chosen.any()):
            step.log(self, 0.0)
            return
        places = [*self.layers, *([_INPUTS] if self.include_inputs else [])]
        place = places[int(torch.randint(len(places), (), generator=generator))]
        permutation, lam = draw_mix(self.alpha, chosen.expand(size), self.per, generator)
        share = 1 - float(lam.mean())
        permutation, lam = permutation.to(step.device), lam.to(step.device)
        if place == _INPUTS:
            step.inputs = self._mixed(_INPUTS, inputs, permutation, lam)
        step.kept[self.name] = place, permutation, lam
        step.mix_targets(permutation, lam)
        step.log(self, share)

    @contextmanager
    def forward_context(self, step: Step) -> Iterator[None]:
        """Phase 2, in each of its passes: mix at the layer that was drawn."""
        self._called = False
        with super().forward_context(step):
            yield

    def penalty(self, step: Step) -> None:
        """Phase 4: nothing is added, but labels must not be mixed alone."""
        place = step.kept.get(self.name, (_INPUTS,))[0]
        if place != _INPUTS and not self._called:
            raise RegularizationError(
                self,
                f"was to mix the output of {place!r}, which {step.hook} did not call",
                cure=f'{type(self).__name__}(layers=["<a layer that the step calls>"])',
            )

    def change(self, layer: str, output: Any) -> Any:
        """Leave the layers that were not drawn as they are."""
        if self._now is None or self._now[0].kept.get(self.name, (_INPUTS,))[0] != layer:
            return output
        return super().change(layer, output)

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The mixed output of the layer that was drawn."""
        assert self._now is not None
        self._called = True
        place, permutation, lam = self._now[0].kept[self.name]
        return self._mixed(place, output, permutation, lam)

    def _mixed(self, place: str, rows: Any, permutation: Tensor, lam: Tensor) -> Tensor:
        fits = isinstance(rows, Tensor) and rows.is_floating_point() and rows.ndim > 0
        if not fits or len(rows) != len(permutation):
            raise RegularizationError(
                self,
                f"mixes the {'inputs' if place == _INPUTS else f'output of {place!r}'}, which must "
                f"be a float tensor with a row for each of {len(permutation)} samples",
                cure='ManifoldMixup(layers=["<a layer>"], include_inputs=False)',
            )
        return manifold_mixup(rows, permutation, lam)
