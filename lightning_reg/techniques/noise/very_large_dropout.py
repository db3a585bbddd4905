"""Fine-tunes a network with nearly all of its last representation dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.forward_noise import OWN_NOISE, ActivationNoise

__all__ = ["VeryLargeDropout", "inverted_dropout"]


def inverted_dropout(features: Tensor, mask: Tensor, p: float) -> Tensor:
    """``m h / (1 - p)``, which is ``h`` in the mean over masks.

    Args:
        features: ``h``, of any shape.
        mask: ``m``, 1 with probability ``1 - p`` and else 0, of a shape that broadcasts to it.
        p: the probability of being dropped, in [0, 1).

    Returns:
        Of the shape of ``features``.
    """
    return features * (mask / (1 - p))


class VeryLargeDropout(ActivationNoise):
    """Fine-tunes with a dropout rate of 0.9 or more on the penultimate representation.

    Zhang, Bottou (2024), Fine-tuning with Very Large Dropout, arXiv:2403.00946.

    ``logits = W (m h) / (1 - p)``. A pretrained network is rich in features of which fine-tuning
    would keep those that suffice on its data; with nearly all of them dropped at random it has to
    keep using the weaker ones as well, which helps under a change of distribution, more than
    ensembles and weight averages do in the paper. Name the layer whose output the head reads (for
    residual networks: the pooled sum, not a block). The rate of about 0.9 is from memory of the
    paper; not checked against code.

    Args:
        p: the probability of being dropped, in [0, 1), or a Schedule; 0 turns the technique off.
        layers: names of submodules whose output, a tensor, is dropped.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if ``p`` is outside [0, 1), or a layer is not there.

    Note:
        In training steps only; a second pass (SAM) sees the same mask. Over ranks: local, every
        rank draws for its own samples. Cost: one draw and one product for each output.

        For fine-tuning: a network that is trained from the start with such a rate hardly learns.
        Train longer rather than at a smaller rate.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import VeryLargeDropout
        >>> trainer = L.Trainer(callbacks=[VeryLargeDropout(0.9, layers="encoder")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Fine-tuning with Very Large Dropout", "Zhang and Bottou", 2024, "2403.00946"),
    )
    exemptions: ClassVar[Mapping[str, str]] = OWN_NOISE
    function: ClassVar[Callable[..., Any] | None] = staticmethod(inverted_dropout)
    explanation: ClassVar[str] = "drops most of the representation that the head reads"

    def __init__(
        self,
        p: float | Schedule = 0.9,
        *,
        layers: str | Sequence[str],
        name: str | None = None,
    ) -> None:
        super().__init__(p, layers=layers, name=name)
        if not isinstance(p, Schedule):
            cure = 'VeryLargeDropout(0.9, layers="encoder")'
            check_range(self, "p", p, 0, 1, high_open=True, cure=cure)

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The output with most of it dropped."""
        draw = torch.rand(output.shape, generator=generator, device=output.device)
        return inverted_dropout(output, (draw >= strength).to(output.dtype), strength)
