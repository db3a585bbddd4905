"""Drops whole modalities of random samples, so that a network does not lean on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.forward_noise import OWN_NOISE, ActivationNoise

__all__ = ["ModalityDropout", "kept_modalities", "modality_dropout"]


def modality_dropout(features: Tensor, kept: Tensor, null: float = 0.0) -> Tensor:
    """``m_i e_i + (1 - m_i) e_null`` for each sample; nothing is scaled.

    Args:
        features: (B, ...) ``e``, what an encoder made of one modality.
        kept: (B,) bool ``m``.
        null: the value in place of a dropped modality.

    Returns:
        Of the shape of ``features``.
    """
    dropped = ~kept.view(-1, *[1] * (features.ndim - 1))
    return features.masked_fill(dropped, null)


def kept_modalities(draw: Tensor, p: Tensor | float, keep_one: bool) -> Tensor:
    """Which modalities each sample keeps.

    Args:
        draw: (B, M) uniform numbers.
        p: the probability of dropping each, a number or (M,).
        keep_one: a sample that would lose all keeps the one with the largest draw relative to its
            ``p``.

    Returns:
        (B, M) bool.
    """
    kept = draw >= p
    if not keep_one:
        return kept
    # Of what is dropped, the draw that came nearest to being kept.
    best = torch.nn.functional.one_hot((draw - p).argmax(1), draw.shape[1]).bool()
    return kept | (best & ~kept.any(1, keepdim=True))


class ModalityDropout(ActivationNoise):
    """Replaces what encoders make of random samples' modalities by a null value.

    McKee, Salamon, Sivic, Russell (2023), Language-Guided Music Recommendation for Video via
    Prompt Analogies, arXiv:2306.09327, drops the text of a sample (text dropout), so that the
    other modality is learned, too.

    Each sample loses each named modality with probability ``p``: ``e <- m e + (1 - m) e_null``.
    The null value is what the network is to see where a modality is missing at test time, so
    nothing is divided by ``1 - p``. The paper's abstract names the method; ``p``, the null value
    and the rule that one modality stays are from memory or ours, not checked against code.

    Args:
        p: the probability with which a sample loses a modality, in [0, 1], or a Schedule; 0 turns
            the technique off.
        layers: the encoders, one for each modality that may be dropped; each returns a tensor
            (B, ...) and runs once a step.
        keep_one: with several layers: a sample never loses all of them.
        null: the value in place of a dropped modality.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if ``p`` is outside [0, 1], or a layer is not there.

    Note:
        In training steps only; a second pass (SAM) sees the same masks. Over ranks: local, every
        rank draws for its own samples. Cost: one draw and one masking for each encoder; what is
        dropped is computed all the same.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ModalityDropout
        >>> technique = ModalityDropout(0.5, layers=["text_encoder", "image_encoder"])
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Language-Guided Music Recommendation for Video via Prompt Analogies",
            "McKee et al.",
            2023,
            "2306.09327",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = OWN_NOISE
    function: ClassVar[Callable[..., Any] | None] = staticmethod(modality_dropout)
    explanation: ClassVar[str] = "drops whole modalities of random samples"

    def __init__(
        self,
        p: float | Schedule = 0.5,
        *,
        layers: str | Sequence[str],
        keep_one: bool = True,
        null: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(p, layers=layers, name=name)
        cure = 'ModalityDropout(0.5, layers=["text_encoder"], null=0.0)'
        if not isinstance(p, Schedule):
            check_range(self, "p", p, 0, 1, cure=cure)
        check_range(self, "null", null, cure=cure)
        self.keep_one = keep_one
        self.null = null
        self._kept: Tensor | None = None

    @contextmanager
    def forward_context(self, step: Step) -> Iterator[None]:
        """Phase 2; the masks of all modalities are one draw."""
        with super().forward_context(step):
            try:
                yield
            finally:
                self._kept = None

    def change(self, layer: str, output: Any) -> Any:
        """Note whose output comes, then drop."""
        self._column = self.layers.index(layer)
        return super().change(layer, output)

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The output, null for the samples that lose it."""
        if self._kept is None:
            shape = (len(output), len(self.layers))
            draw = torch.rand(shape, generator=generator, device=output.device)
            self._kept = kept_modalities(draw, strength, self.keep_one and shape[1] > 1)
        return modality_dropout(output, self._kept[:, self._column], self.null)

    def __getstate__(self) -> dict[str, Any]:
        # The masks belong to a step.
        return {**super().__getstate__(), "_kept": None}
