"""Keeps what the model says of an input near what it said at the end of the task before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.output_anchor import OutputAnchor

__all__ = ["PreviousTaskDistillation", "feature_distillation", "prediction_distillation"]

Target = Literal["predictions", "features"]
Form = Literal["softmax", "sigmoid"]
_TARGETS = ("predictions", "features")
# The official temperatures: the sigmoid form has none.
_TEMPERATURES = {"softmax": 2.0, "sigmoid": 1.0}


def prediction_distillation(
    logits: Tensor, reference: Tensor, temperature: float = 2.0, form: Form = "softmax"
) -> Tensor:
    """The divergence of predictions from those of the reference, in nats.

    ``"softmax"``: ``sum_c p'_c log(p'_c / p_c)`` with ``p = softmax(z / T)``.
    ``"sigmoid"``: ``1/C sum_c KL(s'_c || s_c)`` of coins ``s_c = sigmoid(z_c / T)``.

    Args:
        logits: (N, C) ``z``.
        reference: (N, C) ``z'``; no gradient flows.
        temperature: ``T`` above 0.
        form: one distribution over the classes, or one for each class.

    Returns:
        (N,), at least 0, and 0 where both say the same. The gradient by ``z`` is
        ``(p - p') / T``, or ``(s - s') / (T C)``.
    """
    now, then = logits / temperature, reference.detach() / temperature
    if form == "sigmoid":
        coins = then.sigmoid()
        cross = F.binary_cross_entropy_with_logits(now, coins, reduction="none")
        own = F.binary_cross_entropy_with_logits(then, coins, reduction="none")
        return (cross - own).mean(-1)
    log_p, log_then = F.log_softmax(now, dim=-1), F.log_softmax(then, dim=-1)
    p_then = log_then.exp()
    # 0 log 0 = 0: a class that the reference rules out, by -inf too, does not count.
    return (p_then * (log_then - log_p).masked_fill(p_then == 0, 0.0)).sum(-1)


def feature_distillation(features: Tensor, reference: Tensor) -> Tensor:
    """``1/D ||h - h'||^2`` of each sample.

    Args:
        features: (N, ...) ``h`` of ``D`` numbers a sample.
        reference: ``h'``, of the same shape; no gradient flows.

    Returns:
        (N,); the gradient by ``h`` is ``2 (h - h') / D``.
    """
    return (features - reference.detach()).square().flatten(1).mean(1)


class PreviousTaskDistillation(OutputAnchor):
    """Distills the model of the task before into that of the next one, against forgetting.

    Smith, Tian, Halbe, Hsu, Kira (2022), A Closer Look at Rehearsal-Free Continual Learning,
    arXiv:2203.17269; prediction distillation goes back to Li and Hoiem (2016), Learning without
    Forgetting, arXiv:1606.09282.

    The loss of task t gets ``strength * mean_n d_n`` on the inputs of task t, with a frozen copy
    ``'`` of the model from the end of task t-1 in eval mode:

    - ``target="predictions"`` (PredKD), ``form="softmax"``: ``d = KL(p' || p)`` with
      ``p = softmax(z / T)`` over the classes taught before;
    - ``target="predictions"``, ``form="sigmoid"``: the mean over these classes of ``KL(s' || s)``
      with ``s = sigmoid(z / T)``, the form for heads that are trained by binary cross-entropy;
    - ``target="features"`` (FeatKD): ``d = 1/D ||h - h'||^2`` of the output of a layer.

    Each ``fit`` is a task. When it ends without an error, its model becomes the reference, which
    stays in the technique: use the same instance for the next task, with the same Trainer or
    another one, or hand its ``state_dict()`` to a new instance. Nothing happens in the first
    task, unless ``from_start``. An end that you choose yourself is
    ``technique.take_reference(module)``.

    Formulas confirmed against shaunak27/data-free-continual-learning@b25364c, learners/kd.py
    (LWF, LWF_MC, LWF_MC_FEATKD) and learners/default.py (loss_fn_kd, Teacher), a code base of
    one of the authors. There predictions are compared by the cross-entropy, which differs from
    the divergence by the entropy of the reference: the gradient is the same, and the divergence
    is 0 at the reference. As there, the softmax form has no factor ``T^2``; for that of Hinton
    et al. multiply ``strength`` by ``T^2``. As there, the old classes alone are compared. Its
    sigmoid form is one mean over all classes in which the past predictions stand for the labels
    of the old ones: with C of A classes old, that is this one at the strength ``C / A`` beside
    the labels' own loss at ``1 - C / A`` on the new classes.

    Args:
        strength: ``mu``, at least 0. 1 is that of the scripts for features, and of Li and Hoiem.
        target: ``"predictions"`` or ``"features"``.
        layer: the submodule whose output is meant by ``"features"``; the official code takes
            what the classifier gets.
        temperature: ``T`` above 0, for predictions; ``None`` is the official 2 with softmax and
            1 with sigmoid.
        form: ``"softmax"`` or ``"sigmoid"``, for predictions.
        classes: the number of classes taught before, or their positions among the logits;
            ``None`` takes all that the reference has. Give it where the head has room for later
            classes from the start: the reference would else be right that they never occur. Set
            ``technique.classes`` before each task.
        from_start: take the model that the first task starts with for a reference; for
            pretrained models.
        ignore_index: positions with this label are left out; ``None`` keeps all.
        class_dim: where the classes lie in logits of more than two dimensions; by default it
            follows from the shape of the labels.
        signals: where ``inputs``, ``logits`` and labels are. Labels are optional.
        name: the name in logs and checkpoints. Both targets at once, as in the paper, are two
            instances with a name each.

    Raises:
        ArgumentError: if an argument is outside its range, there is no such layer, or
            ``classes`` names what the reference does not know.
        RegularizationError: if outputs of the reference do not fit, or a saved reference has
            other parts than the module.
        UnsupportedError: if the module has no ``forward`` that gives the outputs or cannot be
            copied, or if the strategy splits its weights over ranks.

    Note:
        Over ranks: global; a mean over samples, each counting once. Under accumulation nothing
        changes. Cost: one forward pass of the reference without gradients each micro-batch, a
        second copy of the weights in memory and in checkpoints.

        It hurts where inputs of the new task are far from those before: the reference is then
        asked about what it never saw. With a pretrained model the paper finds the plain pull on
        the weights (``PreviousTaskAnchor``) better than distilled features. It does not keep a
        classifier from preferring new classes: train the loss on the logits of the current
        task's classes only.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PreviousTaskDistillation
        >>> trainer = L.Trainer(callbacks=[PreviousTaskDistillation(1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "A Closer Look at Rehearsal-Free Continual Learning",
            "Smith et al.",
            2022,
            "2203.17269",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(prediction_distillation)
    explanation: ClassVar[str] = "keeps outputs near those at the end of the task before"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        target: Target = "predictions",
        layer: str | None = None,
        temperature: float | None = None,
        form: Form = "softmax",
        classes: int | Sequence[int] | None = None,
        from_start: bool = False,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            layer=layer,
            classes=classes,
            from_start=from_start,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="PreviousTaskDistillation(1.0)")
        self._check_choice("target", target, _TARGETS)
        self._check_choice("form", form, tuple(_TEMPERATURES))
        self._check_layer(target, layer)
        self.target = target
        self.form = form
        self.temperature = _TEMPERATURES[form] if temperature is None else temperature
        cure = "PreviousTaskDistillation(temperature=2.0)"
        check_range(
            self,
            "temperature",
            self.temperature,
            0,
            torch.inf,
            low_open=True,
            high_open=True,
            cure=cure,
        )

    def distance(self, now: Tensor, then: Tensor) -> Tensor:
        """How far the outputs of each sample have moved."""
        if self.target == "features":
            return feature_distillation(now, then)
        return prediction_distillation(now, then, self.temperature, self.form)

    def _check_choice(self, name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ArgumentError(
                self,
                f"`{name}` must be one of {', '.join(allowed)}, got {value!r}",
                cure=f'PreviousTaskDistillation({name}="{allowed[0]}")',
            )

    def _check_layer(self, target: Target, layer: str | None) -> None:
        named = isinstance(layer, str) and bool(layer)
        if named != (target == "features") or (layer is not None and not named):
            raise ArgumentError(
                self,
                f"features are those of a `layer`, and predictions have none: got {target=}, "
                f"{layer=}",
                cure='PreviousTaskDistillation(target="features", layer="encoder")',
            )
