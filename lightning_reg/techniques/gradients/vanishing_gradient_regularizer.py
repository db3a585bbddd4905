"""Keeps the error signal of a recurrent network from fading on its way back through time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    ParameterUpdate,
    RegularizationError,
    Regularizer,
    Schedule,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.feature_penalty import check_layer

__all__ = ["VanishingGradientRegularizer", "vanishing_gradient_penalty"]

_SLOPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda h: 1 - h.square(),
    "relu": lambda h: (h > 0).to(h),
    "sigmoid": lambda h: h * (1 - h),
    "linear": torch.ones_like,
}
_GATED = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
_KNOWN = (nn.RNN, nn.RNNCell)
# Of the squared norm of an error signal, below which a step counts as one that gets none.
_BOUND = 1e-20


def vanishing_gradient_penalty(
    gradients: Tensor, states: Tensor, weight: Tensor, nonlinearity: str = "tanh"
) -> tuple[Tensor, Tensor]:
    r"""How much the error signal grows or shrinks in each step back, squared distance from 1.

    .. math:: \Omega_k = \left( \frac{\lVert g_k^T\, \partial h_k / \partial h_{k-1} \rVert}
        {\lVert g_k \rVert} - 1 \right)^2, \qquad
        \frac{\partial h_k}{\partial h_{k-1}} = \mathrm{diag}(s'(h_k))\, W

    for states :math:`h_k = s(W h_{k-1} + \dots)`. Only :math:`W` takes a gradient: signals and
    states are constants, as if they did not depend on it.

    Args:
        gradients: :math:`g_k = dE/dh_k`, (T, B, H), through all later steps.
        states: :math:`h_k`, (T, B, H), behind the nonlinearity.
        weight: :math:`W`, (H, H), as ``nn.RNN`` has it.
        nonlinearity: :math:`s`: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"linear"``.

    Returns:
        The terms (T, B), at least 0, and whether (T, B) each counts: steps that get no signal, as
        those of padding, do not.
    """
    signal = gradients.detach()
    size = signal.square().sum(2)
    counts = size >= _BOUND
    back = (signal * _SLOPES[nonlinearity](states.detach())) @ weight
    ratio = torch.linalg.vector_norm(back, dim=2) / size.where(counts, 1.0).sqrt()
    return (ratio - 1).square().where(counts, 0.0), counts


class VanishingGradientRegularizer(Regularizer):
    """Makes a recurrent network carry its error signal back through time, neither more nor less.

    Pascanu, Mikolov, Bengio (2012), On the difficulty of training Recurrent Neural Networks,
    arXiv:1211.5063. Both of its remedies: the soft constraint ``Omega`` against signals that
    vanish, and the clipping of gradients whose norm explodes, ``g <- g tau / ||g||`` where
    ``||g|| > tau``.

    ``Omega`` is the mean over samples and steps of ``(||g_k^T J_k|| / ||g_k|| - 1)^2`` with the
    error signals ``g_k = dE/dh_k`` of your own loss and ``J_k = dh_k/dh_{k-1}``; see
    :func:`vanishing_gradient_penalty`. An isometry in the directions that matter for the task
    costs nothing. Its gradient goes through the recurrent weight alone.

    As in pascanur/trainingRNNs@3f5df3f (``RNN.py``; read, in Theano, not run) it is a mean over
    the steps that get a signal (squared norm from 1e-20), where the paper's formula sums; the
    defaults ``strength = 2`` and ``tau = 1`` are those of that code. It takes the ratio of
    *squared* norms; here, as in the paper's formula, of the norms.

    Args:
        strength: the multiplier of ``Omega``, at least 0; 0 turns clipping off as well.
        clip_norm: ``tau``, above 0: the largest norm of the gradient by all weights of an
            optimizer together; ``None`` clips nothing.
        layers: the recurrent layers by name; ``None`` takes every ``nn.RNN`` and ``nn.RNNCell``.
            A module of your own that is called once a time step, returns the next state (B, H),
            and has ``weight_hh`` (H, H) and ``nonlinearity`` (a name) can be named as well.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, a layer is not there or is none.
        UnsupportedError: for gated cells, whose states do not follow from one recurrent weight;
            for several layers or two directions in one ``nn.RNN``, which keep their states to
            themselves; for packed sequences; where weights are sharded over ranks.
        RegularizationError: in the first step, if the loss does not depend on the states.

    Note:
        Over ranks: global; a mean over samples and steps, and ratios do not depend on the size
        of the batch. Under accumulation nothing changes, but for padded batches, each of which
        is a mean of its own. Clipping comes once per optimizer step, after gradients are reduced
        over ranks. Cost: a backward pass from the loss to the states, which for ``nn.RNN`` stops
        behind the recurrent layer, and two products (B, H) by (H, H) for each time step; no
        second derivative is taken.

        It hurts where forgetting is the task: a state that is to ignore noise has to shrink it.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import VanishingGradientRegularizer
        >>> trainer = L.Trainer(callbacks=[VanishingGradientRegularizer(2.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "On the difficulty of training Recurrent Neural Networks",
            "Pascanu et al.",
            2012,
            "1211.5063",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = False
    needs: ClassVar[tuple[str, ...]] = ("features",)
    reads: ClassVar[frozenset[str]] = frozenset({"features", "gradients"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(vanishing_gradient_penalty)
    explanation: ClassVar[str] = "keeps the error signal's norm from step to step back in time"

    def __init__(
        self,
        strength: float | Schedule = 2.0,
        *,
        clip_norm: float | None = 1.0,
        layers: str | Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, name=name)
        cure = "VanishingGradientRegularizer(2.0, clip_norm=1.0)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        if clip_norm is not None:
            check_range(self, "clip_norm", clip_norm, 0, low_open=True, cure=cure)
        names = [layers] if isinstance(layers, str) else layers
        if names is not None and not (names and all(isinstance(n, str) and n for n in names)):
            raise ArgumentError(
                self,
                f"`layers` must be names of recurrent layers or None, got {layers!r}",
                cure='VanishingGradientRegularizer(layers="rnn")',
            )
        self.clip_norm = clip_norm
        self.named = None if names is None else tuple(names)
        self._found: tuple[str, ...] = self.named or ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodules to capture."""
        return self._found

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module without a plain recurrent layer."""
        for name in self.named or ():
            check_layer(self, name, pl_module)
        modules = dict(pl_module.named_modules())
        kinds = _KNOWN if any(isinstance(m, _KNOWN) for m in modules.values()) else _GATED
        found = tuple(name for name, module in modules.items() if isinstance(module, kinds))
        self._found = self.named or found
        if not self._found:
            raise ArgumentError(
                self,
                f"finds no recurrent layer in {type(pl_module).__name__}",
                cure='VanishingGradientRegularizer(layers="<a recurrent cell>")',
            )
        for name in self._found:
            self._check_recurrent(name, modules[name])

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        parts = [part for name in self._found for part in self._terms(step, name)]
        if not parts:
            raise RegularizationError(
                self,
                f"saw no call of {', '.join(self._found)} in {step.hook}",
                cure='VanishingGradientRegularizer(layers="<what training_step calls>")',
            )
        terms, counts = (torch.cat([part[i].flatten() for part in parts]) for i in (0, 1))
        return JointMean.of(terms, counts)

    def edit_gradients(self, update: ParameterUpdate) -> None:
        """Phase 7: clip the norm."""
        if self.clip_norm is None:
            return
        scale = update.gradient_scale()
        limit = self.clip_norm if scale is None else self.clip_norm * float(scale)
        torch.nn.utils.clip_grad_norm_([p for p in update.owned() if p.grad is not None], limit)

    # ------------------------------------------------------------------ signals and states

    def _terms(self, step: Step, name: str) -> list[tuple[Tensor, Tensor]]:
        """The terms, and whether they count, of each sequence that a layer has gone through."""
        layer: Any = step.module.get_submodule(name)
        calls: Sequence[Any] = step.records.get(name, ())
        if not calls:
            return []
        assert step.loss is not None
        scale = _scale(step)
        if isinstance(layer, nn.RNN):
            recurrent: Any = layer.weight_hh_l0
            weight = full_precision(recurrent)
            sequences = [
                self._of_layer(step.loss, scale, call, layer, weight.detach()) for call in calls
            ]
        else:
            weight = full_precision(layer.weight_hh)
            sequences = [self._of_cell(step.loss, scale, calls, name)]
        return [
            vanishing_gradient_penalty(signals, states, weight, layer.nonlinearity)
            for signals, states in sequences
        ]

    def _of_layer(
        self, loss: Tensor, scale: Tensor | None, call: Any, layer: nn.RNN, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Signals and states (T, B, H) of an ``nn.RNN``, whose steps are one operation."""
        outputs, last = call
        if not isinstance(outputs, Tensor):
            raise UnsupportedError(
                self,
                "needs the states of all samples in one tensor, and this layer gives a packed "
                "sequence",
                cure="states, last = self.rnn(padded)",
            )
        direct, of_last = self._differentiate(loss, scale, [outputs, last])
        states, direct = (_time_first(t, layer) for t in (full_precision(outputs).detach(), direct))
        direct[-1] += of_last.reshape(direct[-1].shape)
        # What reaches a state beside the direct way comes through the next one.
        slopes = _SLOPES[layer.nonlinearity](states)
        signals = [direct[-1]]
        for here, slope in zip(reversed(direct[:-1]), reversed(slopes[1:]), strict=True):
            signals.append(here + (signals[-1] * slope) @ weight)
        return torch.stack(signals[::-1]), states

    def _of_cell(
        self, loss: Tensor, scale: Tensor | None, calls: Sequence[Any], name: str
    ) -> tuple[Tensor, Tensor]:
        """Signals and states (T, B, H) of a cell that is called once a time step."""
        shapes = {tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__ for c in calls}
        if len(shapes) > 1 or not isinstance(calls[0], Tensor) or calls[0].ndim != 2:
            raise RegularizationError(
                self,
                f"needs one state (B, H) from each call of {name!r}, got "
                f"{', '.join(map(str, shapes))}",
                cure="h = self.cell(x[:, t], h)  # for all samples, in every time step",
            )
        signals = self._differentiate(loss, scale, calls)
        return torch.stack(signals), torch.stack([full_precision(c).detach() for c in calls])

    def _differentiate(
        self, loss: Tensor, scale: Tensor | None, points: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradients by points; 0 where the loss does not depend on one."""
        whole = loss if scale is None else loss * scale
        known = [p for p in points if p.requires_grad]
        found = (
            torch.autograd.grad(whole, known, retain_graph=True, allow_unused=True)
            if known and loss.requires_grad
            else []
        )
        by_point = dict(zip(map(id, known), found, strict=True)) if found else {}
        gradients = [by_point.get(id(p)) for p in points]
        if all(g is None for g in gradients):
            raise RegularizationError(
                self,
                "needs a loss that depends on the states of the recurrent layer, and found no "
                "path between them",
                cure="no detach() and no no_grad() between self.rnn(x) and the loss",
            )
        full = [
            torch.zeros_like(full_precision(p)) if g is None else full_precision(g)
            for p, g in zip(points, gradients, strict=True)
        ]
        return full if scale is None else [g / scale for g in full]

    def _check_recurrent(self, name: str, layer: Any) -> None:
        kind = type(layer).__name__
        if isinstance(layer, _GATED):
            raise UnsupportedError(
                self,
                f"needs states that follow from one recurrent weight, and {name!r} is an "
                f"{kind}, whose gates carry the signal on ways of their own (and whose fused "
                "kernels hide its steps)",
                cure='nn.RNN(..., nonlinearity="tanh"), or a cell of your own with `weight_hh`',
            )
        if isinstance(layer, nn.RNN) and (layer.num_layers > 1 or layer.bidirectional):
            raise UnsupportedError(
                self,
                f"needs the state of every time step, and {name!r} shows those of its last layer "
                "or of both directions together",
                cure="nn.ModuleList([nn.RNN(d, h, batch_first=True), nn.RNN(h, h, ...)])",
            )
        weight = getattr(layer, "weight_hh_l0", None)
        weight = getattr(layer, "weight_hh", None) if weight is None else weight
        square = isinstance(weight, Tensor) and weight.ndim == 2 and len(set(weight.shape)) == 1
        if not square or getattr(layer, "nonlinearity", None) not in _SLOPES:
            raise ArgumentError(
                self,
                f"needs a recurrent weight and the name of a nonlinearity, and {name!r} ({kind}) "
                f"has none of {', '.join(_SLOPES)}",
                cure='self.weight_hh = nn.Parameter(torch.eye(h)); self.nonlinearity = "tanh"',
            )


def _time_first(tensor: Tensor, layer: nn.RNN) -> Tensor:
    """(T, B, H) of what an ``nn.RNN`` returned, with a batch of one where there was none."""
    if tensor.ndim == 2:
        return tensor[:, None].clone()
    return (tensor.transpose(0, 1) if layer.batch_first else tensor).clone()


def _scale(step: Step) -> Tensor | None:
    """Under fp16 gradients go through the scale, so that none underflows."""
    scaler = getattr(step.trainer.precision_plugin, "scaler", None)
    assert step.loss is not None
    one = torch.ones((), device=step.loss.device)
    return None if scaler is None else scaler.scale(one)
