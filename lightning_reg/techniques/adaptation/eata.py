"""Adapts to the test data by the samples that are worth it, and keeps what was learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.adaptation import Adaptation, OptimizerFactory, TestTimeAdaptation
from lightning_reg.mechanisms.anchor import anchor_pull
from lightning_reg.mechanisms.fisher import diagonal_fisher
from lightning_reg.mechanisms.output_penalty import softmax_entropy

__all__ = ["EATA", "eata"]


def eata(
    logits: Tensor,
    mean_probability: Tensor | None = None,
    entropy_threshold: float | None = None,
    cosine_threshold: float = 0.05,
) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(E_0 - H(p)) H(p)`` of each sample, and which samples are reliable and which new.

    The factor is detached: surer predictions count more, and gain nothing by that.

    Args:
        logits: (B, C).
        mean_probability: ``m``, (C,), the moving average of earlier predictions; ``None`` in
            the beginning, when every sample is new.
        entropy_threshold: ``E_0`` in nats; ``None`` is ``0.4 log C``.
        cosine_threshold: ``d``.

    Returns:
        The losses (B,); True (B,) where ``H(p) < E_0``; True (B,) where ``|cos(p, m)| < d``.
    """
    threshold = 0.4 * math.log(logits.shape[1]) if entropy_threshold is None else entropy_threshold
    entropy = softmax_entropy(logits)
    losses = (threshold - entropy.detach()).exp() * entropy
    reliable = entropy.detach() < threshold
    if mean_probability is None:
        return losses, reliable, torch.ones_like(reliable)
    cosine = F.cosine_similarity(logits.detach().softmax(1), mean_probability[None], dim=1)
    return losses, reliable, cosine.abs() < cosine_threshold


class EATA(TestTimeAdaptation):
    """Tent on reliable and non-redundant samples, with a pull that prevents forgetting.

    Niu, Wu, Zhang, Chen, Zheng, Zhao, Tan (2022), Efficient Test-Time Model Adaptation without
    Forgetting, arXiv:2204.02610.

    A sample counts if its entropy is low, ``H(p) < E_0``, and its prediction is unlike the moving
    average ``m`` of earlier ones, ``|cos(p, m)| < d``; ``m <- 0.9 m + 0.1 mean(p of those
    that count)``, beginning with the mean of the first reliable ones. The loss is
    ``mean_kept[exp(E_0 - H) H] + beta sum_i F_i (theta_i - theta_i^0)^2`` with the factor of
    ``H`` detached, the trained weights ``theta^0``, and the Fisher information
    ``F_i = mean_n (d CE(f(x_n), argmax f(x_n)) / d theta_i)^2`` over in-distribution samples.
    A batch of which nothing counts makes no step, so the pull does not act either.

    Confirmed against mr-eggplant/EATA@f739b36, eata.py and main.py; ``d = 0.05``,
    ``beta = 2000`` and ``E_0 = 0.4 log C`` are the script's defaults for ImageNet (the class of
    that code has ``E_0 = log(1000) / 2 - 1``). There the gradient of each batch's mean is
    squared; here that of each sample, which is the definition and much larger for batches of
    64, so a smaller ``beta`` pulls as strongly. Predictions come from before the update, and
    everything but BatchNorm stays in evaluation mode, as in :class:`Tent`.

    Args:
        strength: the multiplier of the entropy part; 0 turns the technique off.
        entropy_threshold: ``E_0`` in nats, above 0; ``None`` is ``0.4 log C``.
        cosine_threshold: ``d`` in (0, 1]. For few classes predictions are never orthogonal and
            0.05 keeps next to nothing: about 0.4 is a beginning for ten.
        fisher_strength: ``beta``; 0 is the variant without a pull, which the paper calls ETA.
        fisher_loader: batches of in-distribution samples as the test step takes them; labels are
            not used. The paper takes 2000 samples.
        fisher_samples: the most samples that are taken of it, over all ranks.
        lr: the learning rate of SGD with momentum 0.9, unless ``optimizer`` is given.
        optimizer: makes an optimizer of the parameters that are adapted.
        steps: updates a batch.
        episodic: start every batch from the trained weights.
        keep: leave the adapted weights in the module after the run.
        stages: of ``"test"``, ``"validate"`` and ``"predict"``, those in which to adapt.
        signals: where ``logits`` (B, C) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is out of range, or there is no ``fisher_loader`` for a
            ``fisher_strength`` above 0.
        UnsupportedError: before the first batch, if the module has no normalization layer.

    Note:
        Over ranks: global; ``m`` and the mean run over the kept samples of all ranks, and each
        rank passes its own share of ``fisher_loader`` if that is sharded. BatchNorm takes the
        statistics of each rank's own batch, as in training, unless it is a SyncBatchNorm. Cost:
        one backward a batch, since samples are left out after the forward; and one backward for
        each of the Fisher information's samples, once.

        Logged are the loss before the update (``reg/eata``) and the share of samples that count
        (``reg/eata_kept``). It hurts where the shift is so strong that no prediction is sure:
        then nothing is adapted but the statistics.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EATA
        >>> trainer = L.Trainer(callbacks=[EATA(fisher_strength=0.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Efficient Test-Time Model Adaptation without Forgetting",
            "Niu et al.",
            2022,
            "2204.02610",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(eata)
    explanation: ClassVar[str] = "adapts normalization layers while the model is tested"

    def __init__(
        self,
        strength: float = 1.0,
        *,
        entropy_threshold: float | None = None,
        cosine_threshold: float = 0.05,
        fisher_strength: float = 2000.0,
        fisher_loader: Iterable[Any] | None = None,
        fisher_samples: int = 2000,
        lr: float = 0.00025,
        optimizer: OptimizerFactory | None = None,
        steps: int = 1,
        episodic: bool = False,
        keep: bool = False,
        stages: Sequence[str] = ("test",),
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            lr=lr,
            optimizer=optimizer,
            steps=steps,
            episodic=episodic,
            keep=keep,
            stages=stages,
            signals=signals,
            name=name,
        )
        if entropy_threshold is not None:
            cure = "EATA(entropy_threshold=0.9, fisher_strength=0)"
            check_range(self, "entropy_threshold", entropy_threshold, 0, low_open=True, cure=cure)
        cure = "EATA(cosine_threshold=0.4, fisher_strength=0)"
        check_range(self, "cosine_threshold", cosine_threshold, 0, 1, low_open=True, cure=cure)
        cure = "EATA(fisher_strength=0)"
        check_range(self, "fisher_strength", fisher_strength, 0, cure=cure)
        check_range(self, "fisher_samples", fisher_samples, 1, cure=cure)
        if fisher_strength > 0 and fisher_loader is None:
            raise ArgumentError(
                self,
                "`fisher_loader` must hold in-distribution batches, from which it is seen which "
                "weights matter to what was learnt; without it there is nothing to keep",
                cure="EATA(fisher_loader=validation_loader), or EATA(fisher_strength=0)",
            )
        self.entropy_threshold = entropy_threshold
        self.cosine_threshold = cosine_threshold
        self.fisher_strength = fisher_strength
        self.fisher_loader = fisher_loader
        self.fisher_samples = fisher_samples
        self._mean: Tensor | None = None
        self._start_weights: list[Tensor] = []
        self._fisher: list[Tensor] = []

    def before_adaptation(self, adaptation: Adaptation) -> None:
        """The Fisher information at the trained weights."""
        self._mean, self._fisher = None, []
        if self.fisher_strength == 0 or self.fisher_loader is None:
            return
        weights = adaptation.weights
        with torch.inference_mode(False), torch.enable_grad():
            share = -(-self.fisher_samples // adaptation.comm.world_size)
            losses = self._pseudo_losses(adaptation, self.fisher_loader)
            self._fisher = diagonal_fisher(losses, weights, adaptation.comm, share)
            self._start_weights = [w.detach().clone() for w in weights]

    def sample_losses(self, step: Step) -> tuple[Tensor, Tensor]:
        """Weighted entropies; reliable and new samples count."""
        logits = step.logits
        losses, reliable, new = eata(
            logits, self._mean, self.entropy_threshold, self.cosine_threshold
        )
        kept = reliable & new
        self._follow(step, logits.detach().softmax(1), kept)
        return losses, kept

    def pull(self, weights: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """``2 beta F (theta - theta^0)``."""
        if not self._fisher:
            return None
        _, gradients = anchor_pull(weights, self._start_weights, self._fisher)
        return list(torch._foreach_mul(gradients, self.fisher_strength))

    def _follow(self, step: Step, probability: Tensor, kept: Tensor) -> None:
        """The moving average of the kept predictions of all ranks."""
        rows = torch.cat([probability[kept].sum(0), kept.sum()[None].to(probability)])
        total = step.comm.reduce(rows)
        mean = total[:-1] / total[-1].clamp_min(1)
        if self._mean is not None:
            share = 0.1 * (total[-1] > 0).to(total)
            self._mean = (1 - share) * self._mean + share * mean
        elif bool(total[-1] > 0):
            self._mean = mean

    @staticmethod
    def _pseudo_losses(adaptation: Adaptation, batches: Iterable[Any]) -> Iterator[Tensor]:
        for batch in batches:
            logits = adaptation.observe(batch).logits
            yield F.cross_entropy(logits, logits.detach().argmax(1), reduction="none")

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a run under way stays with it.
        return {**super().__getstate__(), "_mean": None, "_start_weights": [], "_fisher": []}
