"""Penalizes what parts of the input contribute to a prediction, where they should not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.contextual_decomposition import (
    check_layers,
    decompose,
    flat_layers,
)
from lightning_reg.mechanisms.input_mask import check_mask, read_mask

__all__ = ["CDEP", "cdep"]

Score = Literal["share", "contribution"]
_SCORES = ("share", "contribution")


def cdep(relevant: Tensor, irrelevant: Tensor, score: Score = "share") -> Tensor:
    """How much of each sample's logits belongs to the inputs under the mask.

    ``"share"``: the mean over classes of ``exp(b_c) / (exp(b_c) + exp(g_c))``; ``"contribution"``:
    ``sum_c |b_c|``, with ``b`` the relevant and ``g`` the irrelevant part of the logits.

    Args:
        relevant: ``b`` (B, C).
        irrelevant: ``g`` (B, C).
        score: which.

    Returns:
        (B,).
    """
    if score == "share":
        return torch.sigmoid(relevant - irrelevant).mean(-1)
    return relevant.abs().sum(-1)


class CDEP(Regularizer):
    """Keeps predictions from resting on parts of the input that are known to be irrelevant.

    Rieger, Singh, Murdoch, Yu (2019), Interpretations are useful: penalizing explanations to align
    neural networks with prior knowledge, arXiv:1909.13584.

    Contextual decomposition splits the logits of a sample, layer by layer, into the part ``b`` of
    the inputs under its mask and the part ``g`` of the rest, ``z = b + g``. The loss becomes
    ``L + lambda E s(b, g)``: with ``score="share"`` the softmax share of ``b`` against ``g``, mean
    over classes, as the released code has it; with ``"contribution"`` the paper's ``||b||_1`` for
    an explanation that should be 0. Unlike a gradient (RightForRightReasons) this is what the
    masked inputs do contribute, also through saturated units.

    Parts and penalty are those of laura-rieger/deep-explanation-penalization (``src/cd.py``,
    ``src/score_funcs.py``), whose values and gradients for convolutions and an LSTM are in the
    tests. BatchNorm has no rule there: here it is linear with its running statistics. There the
    bias of the step behind a span of words counts as irrelevant in one place, here each step's
    bias belongs to the part of its word; embeddings are learned through it, there not. Dropout is
    left out, as in that code's evaluation mode. A sample whose mask is all zeros has nothing to
    explain and is left out. The default strength is ours; the repository's runs use 0.1 to 1000.

    Args:
        strength: ``lambda``, at least 0.
        layers: the submodules that turn inputs into logits, in order: ``["net"]`` for a
            ``Sequential``, ``["embedding", "lstm", "head"]`` for a text classifier that reads the
            last hidden state (an LSTM in the chain passes on its last step).
        mask: where the masks are: a key (``"mask"``), a position (``"2"``) or a dotted path in the
            batch, or ``"outputs.<key>"`` of what ``training_step`` returns. 1 marks what must not
            matter; (B, T) for words.
        score: ``"share"`` or ``"contribution"``.
        signals: where ``inputs`` and ``logits`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is none of its values, or a layer does not exist.
        UnsupportedError: before training, if a layer has no rule.
        MissingSignalError: in the first step, if there is no mask.
        RegularizationError: in the first step, if the mask does not fit, or the layers do not
            compute the logits (checked where neither dropout nor BatchNorm is in the way).

    Note:
        Over ranks: global; the mean runs over the annotated samples of all ranks, for one
        all-reduce of two numbers a step. Cost: two passes through the layers and their backward;
        an LSTM runs step by step, without a fused kernel. No second derivative.

        It hurts where masks cover what does matter.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import CDEP
        >>> trainer = L.Trainer(callbacks=[CDEP(1.0, layers=["net"], mask="mask")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Interpretations are useful: penalizing explanations to align neural networks with "
            "prior knowledge",
            "Rieger et al.",
            2019,
            "1909.13584",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = False
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(cdep)
    explanation: ClassVar[str] = "penalizes what masked inputs contribute to the logits"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        layers: str | Sequence[str],
        mask: str = "mask",
        score: Score = "share",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        check_mask(self, mask)
        names = [layers] if isinstance(layers, str) else list(layers)
        if not names or not all(isinstance(n, str) and n for n in names):
            problem = f"`layers` must name the submodules from inputs to logits, got {layers!r}"
            raise ArgumentError(self, problem, cure='CDEP(layers=["net"])')
        if score not in _SCORES:
            problem = f"`score` must be one of {', '.join(_SCORES)}, got {score!r}"
            raise ArgumentError(self, problem, cure='CDEP(layers=["net"], score="share")')
        self.chain = tuple(names)
        self.mask = mask
        self.score = score
        self._checked = False

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse layers that are not there or have no rule."""
        self._checked = False
        known = [name for name, _ in pl_module.named_modules() if name]
        for name in self.chain:
            if name not in known:
                raise ArgumentError(
                    self,
                    f"`layers` names {name!r}, which this module does not have; it has "
                    f"{', '.join(known[:12])}",
                    cure=f'CDEP(layers=["{known[0] if known else "net"}"])',
                )
        check_layers(self, self._layers(pl_module), 'CDEP(layers=["<a plain Sequential>"])')

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        inputs, layers = step.inputs, self._layers(step.module)
        mask = read_mask(self, step, self.mask, inputs)
        relevant, irrelevant = decompose(layers, inputs, mask)
        self._check(step.logits, relevant + irrelevant, layers)
        annotated = mask.flatten(1).any(1).expand(len(relevant))
        return JointMean.of(cdep(relevant, irrelevant, self.score), annotated, fixed=True)

    def _layers(self, module: nn.Module) -> list[nn.Module]:
        return flat_layers([module.get_submodule(name) for name in self.chain])

    def _check(self, logits: Tensor, total: Tensor, layers: Sequence[nn.Module]) -> None:
        """Once: is it the logits that were split?"""
        if self._checked:
            return
        self._checked = True
        if logits.shape != total.shape:
            problem = f"splits {tuple(total.shape)}, and the logits are {tuple(logits.shape)}"
            raise RegularizationError(self, problem, cure='CDEP(layers=["<all up to the logits>"])')
        norm = nn.modules.batchnorm._BatchNorm
        random = any(isinstance(m, norm) or getattr(m, "p", 0) > 0 for m in layers)
        gap = (logits - total).detach().abs().max()
        # Under mixed precision the logits are rounded to three digits.
        if not random and bool(gap > 3e-2 * logits.detach().abs().max() + 1e-3):
            raise RegularizationError(
                self,
                f"the parts of {', '.join(self.chain)} add up to something else than the logits: "
                f"they are {float(gap):.3g} apart. Something lies between the layers",
                cure='CDEP(layers=["<all submodules in order>"])',
            )
