"""Orders the units of a representation by importance: it is cut off at a random length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Communicator, Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.forward_noise import OWN_NOISE, ActivationNoise

__all__ = ["NestedDropout", "length_probabilities", "nested_dropout", "truncation_accuracy"]

Per = Literal["batch", "sample"]
_PER = ("batch", "sample")
# A shorter representation wins only if it is better than one more correct answer in 100,000 would
# show: the official tie-break.
_TIE = 1e-5


def nested_dropout(features: Tensor, lengths: Tensor) -> Tensor:
    """The first ``k`` units of each sample, the others 0.

    Args:
        features: (B, D, ...).
        lengths: ``k``: (B,), or a scalar for all samples.

    Returns:
        Of the shape of ``features``; nothing is scaled.
    """
    units = torch.arange(features.shape[1], device=features.device)
    kept = units < lengths.reshape(-1, 1)
    return features * kept.view(*kept.shape, *[1] * (features.ndim - 2)).to(features.dtype)


def length_probabilities(width: int, sigma: float | None, mu: float = 0.0) -> Tensor:
    """``p(k)`` proportional to ``exp(-((k - mu) / sigma)^2)`` for ``k`` from 1 to ``width``.

    Args:
        width: ``D``.
        sigma: without a factor of 1/2 beside it; ``None`` is the uniform distribution.
        mu: the most likely length.

    Returns:
        (D,) float64, of sum 1.
    """
    lengths = torch.arange(1, width + 1, dtype=torch.float64)
    if sigma is None:
        return torch.full_like(lengths, 1 / width)
    return (-((lengths - mu) / sigma).square()).softmax(0)


def truncation_accuracy(
    features: Tensor | Sequence[Tensor], targets: Tensor, head: nn.Linear | Sequence[nn.Linear]
) -> Tensor:
    """How many samples are right when only the first ``k`` features are kept, for all ``k``.

    Args:
        features: (N, D); or one such for each of several networks, whose logits are added.
        targets: (N,) classes.
        head: the linear layer that reads the features; or one for each network.

    Returns:
        (D,) int64 counts, for ``k`` from 1 to ``D``.
    """
    features = [features] if isinstance(features, Tensor) else list(features)
    heads = [head] if isinstance(head, nn.Linear) else list(head)
    width, networks = features[0].shape[1], list(zip(features, heads, strict=True))
    right = torch.zeros(width, dtype=torch.int64, device=targets.device)
    logits = features[0].new_zeros(len(targets), heads[0].out_features)
    for _, layer in networks:
        logits = logits if layer.bias is None else logits + layer.bias
    for k in range(width):
        for values, layer in networks:
            logits = torch.addcmul(logits, values[:, k : k + 1], layer.weight[:, k])
        right[k] = (logits.argmax(1) == targets).sum()
    return right


class NestedDropout(ActivationNoise):
    """Keeps the first ``k`` units of a representation, for a ``k`` that is drawn in each step.

    Chen, Hu, Shen, Ai, Suykens (2022), Compressing Features for Learning with Noisy Labels; the
    ordering of Rippel, Gelbart, Adams (2014). Also in Alaluf, Richardson, Metzer, Cohen-Or (2023),
    A Neural Space-Time Representation for Text-to-Image Personalization, arXiv:2305.15391.

    The first units are nearly always there and take up what matters most; the last ones get few
    gradients and hold detail, of which the memorization of wrong labels is a part. At the end the
    representation is cut off at the length that does best on held-out data (``select_length``).
    For a linear autoencoder the units become the principal components in their order.

    Confirmed with the official code of the first paper (yingyichen-cyy/Nested-Co-teaching,
    nested/train_resnet.py): one ``k`` per batch from ``p(k) ~ exp(-((k - mu) / sigma)^2)``, no
    factor of 1/2, ``mu = 0``, ``sigma`` 100 or more; no scaling; the best length by accuracy on
    held-out data, a shorter one preferred by 1e-5 for each unit. ``per="sample"`` with
    ``sigma=None`` is the uniform draw of the second paper, applied with probability 0.5 there
    (``probability``). For the first paper's second part put :class:`CoTeaching` beside it, which
    cuts the features of both its networks.

    Args:
        probability: with which a batch (a sample) is cut, in [0, 1], or a Schedule; 0 turns the
            technique off.
        layer: the submodule whose output (B, D, ...) is cut along dimension 1.
        sigma: of the distribution of lengths, above 0; ``None`` draws them evenly.
        mu: its centre.
        per: ``"batch"`` or ``"sample"``: who shares a length.
        name: the name in logs, checkpoints and random streams.

    Attributes:
        best_length: where validation, test and prediction cut the representation; ``None`` keeps
            it whole. Set by :meth:`select_length`, saved with the checkpoint.

    Raises:
        ArgumentError: if a number is outside its range, or the layer is not there.

    Note:
        Over ranks: local, ranks draw lengths of their own, as batches do. A second pass (SAM) sees
        the same length. Cost: one product over the representation. Late units learn slowly:
        train longer, or draw evenly.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import NestedDropout
        >>> technique = NestedDropout(layer="encoder", sigma=100.0)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Compressing Features for Learning with Noisy Labels", "Chen et al.", 2022, None),
        Paper(
            "A Neural Space-Time Representation for Text-to-Image Personalization",
            "Alaluf et al.",
            2023,
            "2305.15391",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = OWN_NOISE
    function: ClassVar[Callable[..., Any] | None] = staticmethod(nested_dropout)
    explanation: ClassVar[str] = "keeps the first units of a representation, a random number"

    def __init__(
        self,
        probability: float | Schedule = 1.0,
        *,
        layer: str,
        sigma: float | None = 100.0,
        mu: float = 0.0,
        per: Per = "batch",
        name: str | None = None,
    ) -> None:
        super().__init__(probability, layers=layer, name=name)
        cure = 'NestedDropout(1.0, layer="encoder", sigma=100.0, per="batch")'
        if not isinstance(probability, Schedule):
            check_range(self, "probability", probability, 0, 1, cure=cure)
        if sigma is not None:
            check_range(self, "sigma", sigma, 0, low_open=True, cure=cure)
        if per not in _PER:
            raise ArgumentError(
                self, f"`per` must be one of {', '.join(_PER)}, got {per!r}", cure=cure
            )
        self.layer = layer
        self.sigma = sigma
        self.mu = mu
        self.per = per
        self.best_length: int | None = None
        self._evaluating = False
        self._watching = False

    def change(self, layer: str, output: Any) -> Any:
        """Cut at a random length in training steps, at the best one in evaluation."""
        evaluating = self._evaluating if self._now is None else self._now[0].evaluating
        if evaluating and self.best_length is not None:
            return nested_dropout(output, torch.tensor(self.best_length, device=output.device))
        return super().change(layer, output)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut at the best length from now on."""
        self._evaluate(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut no more."""
        self._train()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut at the best length from now on."""
        self._evaluate(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut no more."""
        self._train()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut at the best length from now on."""
        self._evaluate(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut no more."""
        self._train()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Cut no more: the stage's own end does not come."""
        super().on_exception(trainer, pl_module, exception)
        self._train()

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The output, cut off."""
        width, number = output.shape[1], len(output) if self.per == "sample" else 1
        weights = length_probabilities(width, self.sigma, self.mu).to(output.device)
        draw = torch.multinomial(weights, number, replacement=True, generator=generator) + 1
        chosen = torch.rand(number, generator=generator, device=output.device) < strength
        return nested_dropout(output, torch.where(chosen, draw, torch.full_like(draw, width)))

    @torch.no_grad()
    def select_length(
        self,
        batches: Iterable[tuple[Tensor | Sequence[Tensor], Tensor]],
        head: nn.Linear | Sequence[nn.Linear],
        comm: Communicator | None = None,
    ) -> int:
        """Find the length with the best accuracy on held-out data, and cut there from now on.

        Args:
            batches: pairs of whole representations (B, D), or of one for each network, and classes
                (B,); this rank's.
            head: the linear layer that reads them; or one for each network.
            comm: the ranks that share the data; every one has to call this.

        Returns:
            The length, also kept as ``best_length``.
        """
        width = head.in_features if isinstance(head, nn.Linear) else head[0].in_features
        right, total = torch.zeros(width, dtype=torch.int64), torch.zeros(1).long()
        for features, targets in batches:
            right += truncation_accuracy(features, targets, head).cpu()
            total += len(targets)
        joint = torch.cat([right, total])
        joint = joint if comm is None else comm.reduce(joint)
        accuracy = joint[:-1].double() / joint[-1].clamp_min(1)
        penalized = accuracy - _TIE * torch.arange(len(accuracy))
        self.best_length = int(penalized.argmax()) + 1
        return self.best_length

    def _evaluate(self, module: pl.LightningModule) -> None:
        self._train()
        self._evaluating = True
        if not self._handles and self.best_length is not None:
            # Outside of a fit nobody watches the layer yet.
            self.on_reference(module.trainer, module)
            self._watching = True

    def _train(self) -> None:
        self._evaluating = False
        if self._watching:
            while self._handles:
                self._handles.pop().remove()
        self._watching = False

    def state_dict(self) -> dict[str, Any]:
        """The best length."""
        return {**super().state_dict(), "best_length": self.best_length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Cut at the saved length."""
        super().load_state_dict(state_dict)
        self.best_length = state_dict["best_length"]
