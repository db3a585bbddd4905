"""A calibrator between a module's logits and what its ``predict_step`` does with them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.calibrators.calibrator import Calibrator
from lightning_reg.calibrators.correctness_aware import CorrectnessAwareCalibration
from lightning_reg.engine.errors import MissingSignalError
from lightning_reg.engine.signals import replace_logits
from lightning_reg.monitors.held_out import transformed


class CalibratedPredictions:
    """Hooks on the place that logits come from, for as long as ``predict`` runs.

    Args:
        calibrator: fitted.
        trainer: whose strategy may wrap the module.
        module: the user's.
        source: where logits are, as :class:`~lightning_reg.engine.Signals` names it; ``None`` for
            the module's own ``forward``.
    """

    def __init__(
        self, calibrator: Calibrator, trainer: Any, module: pl.LightningModule, source: Any
    ) -> None:
        self._calibrator = calibrator
        self._module = module
        self._key = "logits"
        self._depth = 0
        self._fired = False
        self._handles: list[Any] = []
        target: nn.Module | None = module
        if isinstance(source, str) and source.startswith("module."):
            target = module.get_submodule(source[len("module.") :])
        elif isinstance(source, str) and source.startswith("outputs."):
            self._key, target = source[len("outputs.") :], None
        # A wrapper (DDP) calls the user's step through the module itself: what comes out of that
        # call is the step's result.
        wrapped = trainer.strategy.model is not module and target is module
        self._innermost = 1 if wrapped else 0
        if target is not None:
            self._handles.append(target.register_forward_pre_hook(self._enter))
            self._handles.append(target.register_forward_hook(self._leave))

    def detach(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finish(self, owner: object, outputs: Any) -> None:
        """After a step: something has to have been calibrated."""
        if not self._fired and isinstance(outputs, dict) and self._key in outputs:
            outputs[self._key] = self._calibrator.calibrate(outputs[self._key])
        elif not self._fired:
            raise MissingSignalError(
                owner,
                "saw no logits to calibrate in predict_step: the module's `forward` returned none, "
                f"and the step no dict with {self._key!r}",
                cure='signals=Signals(logits="module.<name>"), or '
                "PostHocCalibration(apply_in_predict=False)",
            )
        self._fired = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth < self._innermost:
            return None
        replaced = replace_logits(output, lambda logits: self._calibrate(module, args, logits))
        self._fired = self._fired or replaced is not None
        return replaced

    def _calibrate(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        if not isinstance(self._calibrator, CorrectnessAwareCalibration):
            return self._calibrator.calibrate(logits)
        views = transformed(self._calibrator, self._module, args[0] if args else None)
        return self._calibrator.calibrate(logits, views)
