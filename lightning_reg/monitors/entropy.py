"""Tracks how undecided a classifier is, where, and whether it knows when it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, MissingSignalError
from lightning_reg.engine.signals import Signals, read_path
from lightning_reg.engine.step import Step
from lightning_reg.metrics.additive import AdditiveMetric
from lightning_reg.metrics.attention_entropy import AttentionEntropy
from lightning_reg.metrics.class_entropy import ClassEntropy, MarginalEntropy
from lightning_reg.metrics.entropy import PredictiveEntropy
from lightning_reg.metrics.entropy_separation import EntropySeparation
from lightning_reg.metrics.inputs import Task
from lightning_reg.monitors.drawings import Curve, curves_drawing
from lightning_reg.monitors.entropy_drawings import (
    attention_drawing,
    classes_drawing,
    split_drawing,
)
from lightning_reg.monitors.figures import Drawing
from lightning_reg.monitors.monitor import STAGES, Monitor, Stage
from lightning_reg.monitors.predictions import predictions_of
from lightning_reg.monitors.record import update_all

__all__ = ["EntropyMonitor"]

Mask = str | Callable[[Step], Tensor]
_LOGGED = {
    "entropy": "entropy",
    "entropy_separation": "separation",
    "marginal_entropy": "marginal entropy",
    "attention_entropy": "attention entropy",
}


class EntropyMonitor(Monitor):
    """Logs the entropy of predictions, of their mean, and of attention, in nats.

    - ``val/entropy``: of the predictions, on average;
    - ``val/entropy_separation``: how well entropy tells wrong predictions from right ones, as the
      area under the ROC curve; NaN while there are only right or only wrong ones;
    - ``val/marginal_entropy``, with ``num_classes``: of the mean prediction. Low if few classes are
      predicted at all; less ``val/entropy`` it is the mutual information of inputs and labels;
    - ``val/attention_entropy`` and ``val/attention_entropy_min``, with ``attention``: the mean over
      layers and heads, and that of the head that looks at the fewest keys (0: at one).

    Figures, by name:

    - ``"split"``: the distributions of entropy of right and of wrong predictions;
    - ``"classes"``: the mean entropy for each true class (needs ``num_classes``);
    - ``"attention"``: a map of layers and heads (needs ``attention``);
    - ``"drift"``: the logged values over epochs.

    Args:
        num_classes: C, for what is kept of each class.
        attention: layers that give attention probabilities (B, H, T, S): names of submodules
            whose output is that tensor, or a tuple that holds it; or ``"outputs.<key>"`` of what
            the user's step returns, ``"outputs.attentions.0"`` for the first of several.
        num_heads: H, needed with ``attention``.
        attention_mask: which keys may be looked at: ``"batch.attention_mask"`` (B, S), not 0 for a
            real token, which leaves out the queries of others too; or a callable that gets the
            step and returns a bool mask that broadcasts to (B, H, T, S).
        normalized: divide attention entropies by their largest value, log of the keys in sight.
        task: ``"multiclass"`` or ``"binary"``; see :class:`CalibrationMonitor`.
        from_logits: whether what the step's ``logits`` holds are scores before the softmax, or
            probabilities (``False``).
        ignore_index: positions with this class index do not count.
        stages: ``"val"``, ``"test"`` or both.
        figures: their names; ``True`` for ``split``, and for ``attention`` where it is given;
            ``False`` for none; ``None`` for those if matplotlib is installed.
        every_n_epochs: draw at each n-th epoch of a fit.
        signals: where the tensors are found, if not in the usual places.

    Attributes:
        results: the latest value of each log key.
        history: by tag (``"val"``), the values after each validation of the fit.

    Raises:
        ArgumentError: if an argument is outside its range, or one that another needs is missing.
        MissingSignalError: in the first step (of the sanity check, too) without logits, class
            indices or attention.

    Note:
        Exact over ranks, as in :class:`CalibrationMonitor`; samples that a DistributedSampler
        repeats count once. Fused kernels give no attention: ``attn_implementation="eager"`` in
        Hugging Face models, ``need_weights=True, average_attn_weights=False`` in
        ``nn.MultiheadAttention`` (whose fast path, in evaluation mode, needs them as well).

        Costs a log-softmax in float64 a batch and metric (two; four with ``num_classes``), and for
        attention one pass over it in blocks.

    Example:
        >>> from lightning_reg.monitors import EntropyMonitor
        >>> monitor = EntropyMonitor(num_classes=10, figures=False)
        >>> callbacks = [monitor]  # Trainer(callbacks=callbacks) then logs val/entropy_separation
    """

    figure_names: ClassVar[tuple[str, ...]] = ("split", "classes", "attention", "drift")

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        attention: Sequence[str] = (),
        num_heads: int | None = None,
        attention_mask: Mask | None = None,
        normalized: bool = False,
        task: Task = "multiclass",
        from_logits: bool = True,
        ignore_index: int | None = None,
        stages: Sequence[Stage] = STAGES,
        figures: bool | Sequence[str] | None = None,
        every_n_epochs: int = 1,
        signals: Signals | None = None,
    ) -> None:
        super().__init__(
            stages=stages, figures=figures, every_n_epochs=every_n_epochs, signals=signals
        )
        self._check_attention(attention, num_heads, attention_mask)
        self.num_classes = num_classes
        self.attention = tuple(attention)
        self.num_heads = num_heads
        self.attention_mask = attention_mask
        self.normalized = normalized
        self.task: Task = task
        self.from_logits = from_logits
        self.ignore_index = ignore_index
        self._check_needed(figures if isinstance(figures, Sequence) else ())
        self.build_metrics()  # refuses wrong arguments now

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The submodules that are watched."""
        return tuple(name for name in self.attention if not name.startswith("outputs."))

    @property
    def usual_figures(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of what is counted anyway."""
        return ("split", "attention") if self.attention else ("split",)

    def build_metrics(self) -> dict[str, AdditiveMetric]:  # type: ignore[override]
        """Those that the arguments ask for."""
        shared: dict[str, Any] = {
            "from_logits": self.from_logits,
            "ignore_index": self.ignore_index,
            "task": self.task,
        }
        metrics: dict[str, AdditiveMetric] = {
            "entropy": PredictiveEntropy(**shared),
            "entropy_separation": EntropySeparation(**shared),
        }
        if self.num_classes is not None:
            shared["num_classes"] = self.num_classes
            metrics["marginal_entropy"] = MarginalEntropy(**shared)
            metrics["class_entropy"] = ClassEntropy(**shared)
        if self.attention:
            metrics["attention_entropy"] = AttentionEntropy(
                num_layers=len(self.attention),
                num_heads=cast("int", self.num_heads),
                from_logits=False,
                normalized=self.normalized,
            )
        return metrics

    def observe(
        self, metrics: Mapping[str, AdditiveMetric], step: Step, counted: Tensor | None
    ) -> None:
        """Count a batch."""
        predictions = {n: m for n, m in metrics.items() if n != "attention_entropy"}
        update_all(predictions.values(), *predictions_of(step, self.task, counted))
        if self.attention:
            layers = [self._attention_of(step, name) for name in self.attention]
            mask = self._mask(step)
            if counted is not None:
                layers = [layer[counted] for layer in layers]
                mask = mask[counted] if mask is not None and len(mask) == len(counted) else mask
            metrics["attention_entropy"].update(layers, mask)

    def read(self, metrics: Mapping[str, AdditiveMetric]) -> dict[str, Tensor]:
        """The values."""
        values = {name: metrics[name].value() for name in _LOGGED if name in metrics}
        if "attention_entropy" in values:
            heads = values["attention_entropy"]
            values["attention_entropy"] = heads.nanmean()
            values["attention_entropy_min"] = heads.nan_to_num(nan=torch.inf).min()
        return values

    # ------------------------------------------------------------------ attention

    def _attention_of(self, step: Step, name: str) -> Tensor:
        calls = step.records.get(name, [])
        if len(calls) == 1 and isinstance(calls[0], (tuple, list)):
            found = [t for t in calls[0] if isinstance(t, Tensor) and t.ndim == 4]
            if len(found) == 1:
                return found[0]
        elif name.startswith("outputs.") or calls:
            return step.feature(name)
        raise MissingSignalError(
            self,
            f"found no attention (B, H, T, S) in what layer {name!r} gave in the first "
            f"{step.hook}: it was called {len(calls)} times",
            cure='attention=["outputs.attentions.0"]  # and return them from the step, or a layer '
            "that returns its weights per head",
        )

    def _mask(self, step: Step) -> Tensor | None:
        if self.attention_mask is None:
            return None
        if callable(self.attention_mask):
            return self.attention_mask(step)
        place, _, path = self.attention_mask.partition(".")
        real = read_path({"batch": step.batch, "outputs": step.outputs}[place], path) != 0
        whole: Tensor = real[:, None, None, :] & real[:, None, :, None]
        return whole

    # ------------------------------------------------------------------ figures

    def check_figure(self, name: str, trainer: pl.Trainer) -> None:
        """Refused when the monitor is made already."""

    def shows(self, name: str, tag: str) -> bool:
        """Drift needs a fit."""
        return name != "drift" or bool(self.history.get(tag))

    def drawing(self, name: str, tag: str, metrics: Mapping[str, AdditiveMetric]) -> Drawing:
        """Draw one of the figures."""
        self._check_needed([name])
        title = self.record.title(tag)
        if name == "drift":
            return self._drift(tag, title)
        if name == "classes":
            classes = cast("ClassEntropy", metrics["class_entropy"])
            return classes_drawing(classes.value(), classes.count, title)
        if name == "attention":
            return attention_drawing(
                metrics["attention_entropy"].value(), list(self.attention), title
            )
        split = cast("EntropySeparation", metrics["entropy_separation"])
        return split_drawing(split.histogram(), float(split.value()), title)

    def _drift(self, tag: str, title: str) -> Drawing:
        curves = {label: self.record.curve(tag, name) for name, label in _LOGGED.items()}
        panels = {label: [Curve("latest", *c)] for label, c in curves.items() if c[0]}
        return curves_drawing(panels, x_label="epoch", title=title)

    # ------------------------------------------------------------------ arguments

    def _check_attention(self, attention: Any, num_heads: Any, mask: Any) -> None:
        if isinstance(attention, str) or not all(isinstance(name, str) for name in attention):
            raise ArgumentError(
                self,
                f"`attention` must be a list of layers, got {attention!r}",
                cure='EntropyMonitor(attention=["encoder.0.attention"], num_heads=8)',
            )
        if attention and num_heads is None:
            raise ArgumentError(
                self,
                "needs the number of heads of the attention layers",
                cure=f"EntropyMonitor(attention={list(attention)!r}, num_heads=8)",
            )

        path = isinstance(mask, str) and mask.partition(".")[0] in ("batch", "outputs")
        if mask is not None and not callable(mask) and not path:
            raise ArgumentError(
                self,
                f"`attention_mask` must be a path in the batch or a callable, got {mask!r}",
                cure='EntropyMonitor(..., attention_mask="batch.attention_mask")',
            )

    def _check_needed(self, figures: Sequence[str]) -> None:
        for name, there, cure in (
            ("classes", self.num_classes is not None, "num_classes=10"),
            ("attention", bool(self.attention), 'attention=["encoder.0.attention"], num_heads=8'),
        ):
            if name in figures and not there:
                raise ArgumentError(
                    self,
                    f"cannot draw {name!r} of what is not counted",
                    cure=f"EntropyMonitor({cure})",
                )
