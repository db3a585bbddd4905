"""Gives each sample its own temperature, from whether its prediction is likely to be right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.calibrators.calibrator import Calibrator, content_order
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.inputs import Task

__all__ = ["CorrectnessAwareCalibration"]

_LOWEST, _HIGHEST = 0.1, 10.0


class CorrectnessAwareCalibration(Calibrator):
    """Gives each sample its own temperature, from whether its prediction is likely to be right.

    Liu, Wang, Zhao, Gould, Zheng (2024), Optimizing Calibration by Gaining Aware of Prediction
    Correctness, arXiv:2404.13016.

    A small network reads probabilities of transformed views of the input (rotated, grey, jittered)
    at the four classes that the model finds most likely in the original, and returns ``T(x)`` in
    [0.1, 10]. It is trained on ``sum_i w_i (max softmax(z_i / T_i) - 1[argmax z_i = y_i])^2 /
    sum_i w_i``: down with confidence on wrong predictions, up on right ones. ``w`` balances the
    two: the share of wrong ones for right ones, and the other way round. The predicted class never
    changes.

    Confirmed against the released code (liuyvchi/Correctness-aware-calibration, src/cal_metrics/
    temperature_scaling_CA.py and src/run_cal.py): loss and weights, which it takes over each batch
    and we over all held-out data, four classes, 5 hidden units with ReLU, Adam with 1e-4, 10 epochs
    of batches of 1000, and the clamp. There the first output may fall below 0.1, where the clamp
    has no gradient; here it starts near ``T = 1``. Balanced weights make right and wrong
    predictions count alike: that separates them, and what comes out is less sure than the
    accuracy where most predictions are right.

    Without views the network reads the sample's own four largest probabilities. The paper finds
    that a sample alone says too little of whether it is right; expect less from it.

    Args:
        transforms: functions of the model's input; :class:`PostHocCalibration` runs the model on
            each. Used alone, pass their logits as ``views=``.
        top_k: the number of classes that are read.
        hidden: the units of the network.
        lr: of Adam.
        epochs: passes over the held-out data.
        batch_size: of a step.
        task: ``"multiclass"``.
        ignore_index: rows with this label are left out of the fit.

    Raises:
        ArgumentError: if a number is outside its range, or the views of a fit are missing.

    Note:
        Over ranks: logits and views' probabilities are gathered once, to every rank, and put into
        an order that follows from their contents; initial weights and batches come from a seed of
        their own, so that every number of ranks trains the same network. Cost: one more forward
        pass per transform, in ``predict`` too.

        It hurts with fewer than some thousand held-out samples: the rate is small, and the
        network stays where it starts.

    Example:
        >>> import torch
        >>> from lightning_reg import CorrectnessAwareCalibration
        >>> logits, labels = torch.randn(40, 5), torch.arange(40) % 5
        >>> views = torch.randn(40, 3, 5)
        >>> head = CorrectnessAwareCalibration(lr=1e-2).fit(logits, labels, views=views)
        >>> head.calibrate(logits, views=views).shape
        torch.Size([40, 5])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Optimizing Calibration by Gaining Aware of Prediction Correctness",
            "Liu et al.",
            2024,
            "2404.13016",
        ),
    )
    tasks: ClassVar[tuple[Task, ...]] = ("multiclass",)
    first_weight: Tensor
    first_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor

    def __init__(
        self,
        transforms: Sequence[Callable[[Any], Any]] = (),
        *,
        top_k: int = 4,
        hidden: int = 5,
        lr: float = 1e-4,
        epochs: int = 10,
        batch_size: int = 1000,
        task: Task = "multiclass",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(task=task, ignore_index=ignore_index)
        name = type(self).__name__
        for argument, value in (
            ("top_k", top_k),
            ("hidden", hidden),
            ("epochs", epochs),
            ("batch_size", batch_size),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(
                    self,
                    f"`{argument}` must be a whole number from 1, got {value!r}",
                    cure=f"{name}({argument}=4)",
                )
        check_range(self, "lr", lr, 0, low_open=True, cure=f"{name}(lr=1e-4)")
        self.transforms = tuple(transforms)
        self.top_k, self.hidden = top_k, hidden
        self.lr, self.epochs, self.batch_size = lr, epochs, batch_size
        self.n_views = len(self.transforms)
        for buffer, shape in (
            ("first_weight", (hidden, 1)),
            ("first_bias", (hidden,)),
            ("last_weight", (1, hidden)),
            ("last_bias", (1,)),
        ):
            self.register_buffer(buffer, torch.zeros(shape, dtype=torch.float64))
        self._features: Tensor | None = None

    def fit(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        views: Tensor | None = None,
        comm: Communicator | None = None,
    ) -> Calibrator:
        """Train the network.

        Args:
            logits: (N, C).
            targets: (N,) class indices, or (N, C) soft labels.
            views: (N, V, C) the logits of transformed inputs.
            comm: the ranks of a run.
        """
        self.n_views = 0 if views is None else views.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            keep = torch.isfinite(logits).all(1)
            if not targets.is_floating_point() and self.ignore_index is not None:
                keep &= targets != self.ignore_index
            logits, targets = logits[keep], targets[keep]
            views = None if views is None else views[keep]
            self._features = self.features(self._precise(logits.clone()), views)
            try:
                return super().fit(logits, targets, comm=comm)
            finally:
                self._features = None

    def fit_rows(self, scores: Tensor, targets: Tensor, comm: Communicator) -> None:
        """Gather, sort, train."""
        assert self._features is not None
        scores, targets = comm.gather(scores), comm.gather(targets)
        features = comm.gather(self._features)
        order = content_order(scores, targets, features)
        self._train(scores[order], targets[order], features[order])
        if comm.world_size > 1:
            for name, buffer in list(self._buffers.items()):
                assert buffer is not None
                # Ranks may run on different processors, whose last bits differ.
                self._buffers[name] = comm.broadcast(buffer.to(scores.device)).to(buffer.device)

    def calibrate(self, logits: Tensor, views: Tensor | None = None) -> Tensor:
        """Calibrated logits (N, C), given those of as many views (N, V, C) as in the fit."""
        self._check_fitted()
        rows, shape = self._as_rows(logits)
        rows = self._precise(rows)
        weights = [buffer.to(rows) for buffer in self.buffers()]
        temperature = _temperature(weights, self.features(rows, views))
        return self._as_given(rows / temperature, shape, logits)

    forward = calibrate

    def map_rows(self, scores: Tensor) -> Tensor:
        """Calibrated logits of rows without views."""
        return self.calibrate(scores)

    def features(self, scores: Tensor, views: Tensor | None) -> Tensor:
        """(N, V k) probabilities of the views at the sample's k largest classes."""
        given = 0 if views is None else views.shape[1]
        if given != self.n_views:
            raise ArgumentError(
                self,
                f"was fitted with {self.n_views} views per sample and got {given}",
                cure="calibrator.calibrate(logits, views=views)  # (N, V, C)",
            )
        top = scores.topk(min(self.top_k, scores.shape[1]), 1).indices
        of_views = scores.unsqueeze(1) if views is None else self._precise(views)
        p = of_views.softmax(2)
        return p.gather(2, top.unsqueeze(1).expand(-1, p.shape[1], -1)).flatten(1)

    def get_extra_state(self) -> dict[str, Any]:
        """Primitives of the state."""
        return {**super().get_extra_state(), "n_views": self.n_views}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load them."""
        super().set_extra_state(state)
        self.n_views = int(state["n_views"])

    def _train(self, scores: Tensor, targets: Tensor, features: Tensor) -> None:
        right = _correctness(scores, targets)
        share = right.mean()
        weights = right * (1 - share) + (1 - right) * share
        draws = torch.Generator().manual_seed(0)
        parameters = [p.to(scores) for p in _initial(features.shape[1], self.hidden, draws)]
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        with torch.enable_grad():
            for _ in range(self.epochs):
                order = torch.randperm(len(scores), generator=draws).to(scores.device)
                for rows in order.split(self.batch_size):
                    optimizer.zero_grad()
                    confidence = (scores[rows] / _temperature(parameters, features[rows])).softmax(
                        1
                    )
                    error = (confidence.amax(1) - right[rows]).square()
                    loss = (weights[rows] * error).sum() / weights[rows].sum().clamp_min(1e-300)
                    loss.backward()
                    optimizer.step()
        for name, parameter in zip(list(self._buffers), parameters, strict=True):
            self._buffers[name] = parameter.detach().to(torch.float64).cpu()


def _correctness(scores: Tensor, targets: Tensor) -> Tensor:
    """The label's mass on the largest class."""
    top = scores.argmax(1)
    if targets.is_floating_point():
        return targets.gather(1, top.unsqueeze(1)).squeeze(1)
    return (top == targets).to(scores)


def _temperature(weights: Sequence[Tensor], features: Tensor) -> Tensor:
    """(N, 1)."""
    hidden = nn.functional.linear(features, weights[0], weights[1]).relu()
    return nn.functional.linear(hidden, weights[2], weights[3]).clamp(_LOWEST, _HIGHEST)


def _initial(features: int, hidden: int, draws: torch.Generator) -> list[Tensor]:
    """Torch's initial weights of two linear layers, the last one around 1."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draws, dtype=torch.float64) * 2 - 1

    return [
        uniform(hidden, features) / features**0.5,
        uniform(hidden) / features**0.5,
        uniform(1, hidden) / hidden**0.5 * 0.1,
        torch.ones(1, dtype=torch.float64),
    ]
