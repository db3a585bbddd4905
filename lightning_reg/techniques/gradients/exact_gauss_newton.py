"""Replaces the gradient by the damped Gauss-Newton step, solved exactly in the space of outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    ParameterUpdate,
    Regularizer,
    Schedule,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.output_jacobian import OutputRows, joint_gram, output_rows
from lightning_reg.mechanisms.selected_weights import check_share
from lightning_reg.mechanisms.tensor_lists import filled, mean_over_ranks
from lightning_reg.mechanisms.trial_weights import TrialWeights, joint_loss

__all__ = ["ExactGaussNewton", "exact_gauss_newton"]

# Armijo's share of the fall that the slope promises, and Levenberg and Marquardt's rule: below the
# first ratio of actual to predicted fall the damping grows, above the second it shrinks.
_ARMIJO = 1e-4
_POOR, _GOOD, _MORE, _LESS = 0.25, 0.75, 1.5, 0.5
_LEAST, _MOST = 1e-12, 1e6


def exact_gauss_newton(
    jacobian: Tensor, curvature: Tensor, residuals: Tensor, damping: float
) -> Tensor:
    """``d = -(J^T Q J / b + lambda I)^-1 J^T r / b`` by a system of ``b c`` equations.

    ``d = -J^T (Q J J^T + b lambda I)^-1 r`` (Duncan, Guttman): as many unknowns as there are
    outputs, not weights, and ``Q`` may be singular, as that of a softmax is.

    Args:
        jacobian: ``J`` (b, c, P), of c outputs of b samples by P weights.
        curvature: ``Q`` (b, c, c), the Hessian of each sample's loss by its outputs.
        residuals: ``r`` (b, c), the gradient of each sample's loss by them.
        damping: ``lambda``, above 0.

    Returns:
        ``d`` (P,).
    """
    rows = jacobian.flatten(0, 1)
    solved = _solve(rows @ rows.T, curvature, residuals.reshape(-1, 1), len(jacobian) * damping)
    return -rows.T @ solved.squeeze(1)


class ExactGaussNewton(Regularizer):
    """Replaces the gradient by the damped Gauss-Newton step, solved exactly in output space.

    Korbit, Adeoye, Bemporad, Zanon (2024), Exact Gauss-Newton Optimization for Training Deep
    Neural Networks (EGN), arXiv:2405.14402.

    ``d = -(J^T Q J / b + lambda I)^-1 g``, with the Jacobian ``J`` of the outputs of a batch of
    ``b`` and the curvature ``Q`` of the loss in them, is computed as ``-J^T (Q J J^T + b lambda
    I)^-1 r``: a system as large as the batch has outputs. ``lambda`` is the regularizer: it keeps
    the step inside the region where the model of the loss is right. With ``SGD(lr=1.0)`` the
    optimizer makes exactly this step. To it can be added momentum (``m <- beta m + d``), Armijo's
    line search along it (halving), and the adaptation of ``lambda`` by how well the model predicted
    the fall of the loss (Levenberg, Marquardt).

    ``Q`` and ``r`` are taken from the graph of your loss, whatever it is, as long as it is a mean
    over samples of a convex function of the logits. Other terms of the loss (penalties on weights
    or features) are in ``g``, and the step is exact for them too; their curvature is not in ``Q``.

    The identity is the paper's. ``lambda`` = 1, momentum and the rule for ``lambda`` (0.25, 0.75,
    x 1.5, x 0.5, within [1e-12, 1e6]) are those of cor3bit/somax@4ea5c0e, methods/egn.py, optax.py
    and damping/trust_region.py, by the first author; it has no line search: Armijo's 1e-4 and
    halving are the usual ones. There the softmax's ``Q`` gets a small ``eps`` to have a root;
    here it needs none.

    Args:
        strength: the share of the way from the gradient to the step, in [0, 1].
        damping: ``lambda``, above 0; where it starts, if it adapts.
        adapt: change ``lambda`` after each step.
        line_search: the most halvings of a step; 0 takes each as it is.
        momentum: ``beta``, in [0, 1). Where momentum does not point downhill, it is left out of
            the step and starts anew.
        network: the submodule that maps ``inputs`` to the logits, sample by sample and without
            dropout or BatchNorm, if all that trains is in it: Jacobians are then b times cheaper.
        signals: where ``logits`` (and ``inputs``) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if the loss does not depend on the logits.
        UnsupportedError: beside penalties on weights whose gradients bypass the loss; if
            parameters are trained outside of ``network``; where weights are sharded; on MPS.

    Note:
        Over ranks and micro-batches: global; the step is that of the joint batch of all ranks and
        of the whole accumulation window. Cost: ``b c`` backward passes (``c`` with
        ``network``), memory for ``b c P`` numbers of each micro-batch, a system of all ``b c``
        unknowns in float64 on every rank, and all Jacobians sent once to all ranks, one weight at
        a time; for ``adapt`` and for each trial of the line search a forward pass. The log shows
        the fall of the loss that the model predicts, and ``_damping`` and ``_step`` where they
        change.

        Use SGD without momentum, and gradient clipping off; Adam divides the step's scale out
        again. It hurts where batches are small against the noise: the curvature of a batch is not
        that of the data, so ``lambda`` must not be small.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ExactGaussNewton
        >>> newton = ExactGaussNewton(damping=0.1, adapt=True)
        >>> trainer = L.Trainer(callbacks=[newton], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Exact Gauss-Newton Optimization for Training Deep Neural Networks",
            "Korbit et al.",
            2024,
            "2405.14402",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    reads: ClassVar[frozenset[str]] = frozenset({"losses", "weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"weight_perturbation"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(exact_gauss_newton)
    explanation: ClassVar[str] = "makes Gauss-Newton steps in the place of gradient steps"

    _rows: list[OutputRows]
    _gradient: list[Tensor]
    _losses: list[Tensor]
    _window: list[Step]
    _weights: list[nn.Parameter]
    _step: list[Tensor]
    _trial: TrialWeights
    _slope: Tensor
    _bend: Tensor
    _is_good: Tensor

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        damping: float = 1.0,
        adapt: bool = False,
        line_search: int = 0,
        momentum: float = 0.0,
        network: str | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        check_share(self, strength)
        cure = "ExactGaussNewton(damping=1.0, momentum=0.0)"
        check_range(self, "damping", damping, _LEAST, _MOST, cure=cure)
        check_range(self, "momentum", momentum, 0, 1, high_open=True, cure=cure)
        if isinstance(line_search, bool) or not isinstance(line_search, int) or line_search < 0:
            raise ArgumentError(
                self,
                f"`line_search` must be a whole number of halvings from 0, got {line_search!r}",
                cure="ExactGaussNewton(line_search=10)",
            )
        self.damping = damping
        self.adapt = adapt
        self.line_search = line_search
        self.momentum = momentum
        self.network = network
        self._now = torch.tensor(damping, dtype=torch.float64)
        self._average: list[Tensor] = []
        self._forget_window()

    # ------------------------------------------------------------------ phases

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse gradients that the step would not know of, and a network that is not there."""
        plan = self.pipeline.plan if self.pipeline is not None else None
        bypassing = plan.phases["parameter_gradient"] if plan is not None else ()
        if bypassing:
            other = type(bypassing[0]).__name__
            raise UnsupportedError(
                self,
                f"makes a step for the loss, and {other} adds to gradients behind its back",
                cure=f'{other}(..., mode="loss")',
            )
        if trainer.strategy.root_device.type == "mps":
            raise UnsupportedError(
                self,
                "solves in float64, which MPS does not have",
                cure='Trainer(accelerator="cpu")',
            )
        known = [name for name, _ in pl_module.named_modules() if name]
        if self.network is not None and self.network not in known:
            raise ArgumentError(
                self,
                f"`network` is {self.network!r}, which this module does not have; it has "
                f"{', '.join(known[:12])}",
                cure=f'ExactGaussNewton(network="{known[0]}")',
            )

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that starts anew starts with its own damping and no momentum."""
        if int(trainer.global_step) == 0:
            self._now = torch.tensor(self.damping, dtype=torch.float64)
            self._average = []
        self._now = self._now.to(pl_module.device)

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        """Phase 5: rows and gradient of this micro-batch; at the window's end its step."""
        weights = step.trainable_parameters()
        with torch.autocast(step.device.type, enabled=False):
            self._rows.append(output_rows(self, step, total, weights, self.network))
        found = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        gradients = filled(weights, list(found))
        before = self._gradient
        self._gradient = list(torch._foreach_add(before, gradients)) if before else gradients
        self._losses.append(total.detach())
        for earlier in self._window[-1:]:
            earlier.drop_outputs()
        self._window.append(step)
        if not step.trainer.fit_loop._should_accumulate():
            with torch.autocast(step.device.type, enabled=False):
                direction = self._direction(step, weights)
            self._search(step, weights, direction)
        return total

    def edit_gradients(self, update: ParameterUpdate) -> None:
        """Phase 7: the step in the place of the gradient."""
        found = {id(w): d for w, d in zip(self._weights, self._step, strict=True)}
        owned = [w for w in update.owned() if w.grad is not None and id(w) in found]
        self._weights, self._step = [], []
        if not owned:
            return
        gradients = [w.grad for w in owned if w.grad is not None]
        scale = update.gradient_scale()
        wanted = [-found[id(w)].view_as(w).to(w.dtype) for w in owned]
        if scale is not None:
            wanted = list(torch._foreach_mul(wanted, scale))
        share = update.strength(self)
        changed = wanted if share == 1 else list(torch._foreach_lerp(gradients, wanted, share))
        for gradient, new in zip(gradients, changed, strict=True):
            # A loss that is not finite stays one that scalers and users notice.
            gradient.copy_(new.where(self._is_good, gradient))

    def restore(self) -> None:
        """Weights of the line search are written back at its end."""

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write weights back after an exception in a trial; free the buffers."""
        self._trial.write_back()
        self._forget_window()

    # ------------------------------------------------------------------ the step

    def _direction(self, step: Step, weights: list[nn.Parameter]) -> list[Tensor]:
        """The step of the joint batch, and what the model expects of it."""
        comm, rows = step.comm, OutputRows.joined(self._rows)
        share = 1 / (float(step.trainer.accumulate_grad_batches) * comm.world_size)
        gradient = self._joint_gradient(step)
        gram = joint_gram(rows.jacobian, comm)
        own = comm.gather(torch.full((len(rows.residual),), comm.rank, device=step.device))
        own = own == comm.rank
        curvature = comm.gather(rows.curvature).double() * share
        residual = comm.gather(rows.residual).double() * share
        # What does not come from the outputs, unless it is nothing but rounding.
        rest = gradient - comm.reduce(rows.backward(residual[own]))
        there = rest.norm() > 16 * rows.rounding * gradient.norm()
        rest = rest.where(there, 0.0)
        carried = comm.gather(rows.forward(self._split(rest, weights))).double()
        asked = torch.stack([residual.flatten(), _curved(curvature, carried).flatten()], 1)
        solved = _solve(gram, curvature, asked, self._now)
        mixed = (solved[:, 0] - solved[:, 1] / self._now).view_as(residual)
        damped = (rest / self._now).to(rest.dtype)
        direction = -(comm.reduce(rows.backward(mixed[own])) + damped)
        direction = self._with_momentum(direction, gradient)
        # The model: L + slope t + bend t^2 / 2 along the step.
        moved = rows.forward(self._split(direction, weights)).double()
        bend = (moved * _curved(curvature[own], moved)).sum()
        self._slope = torch.dot(gradient.double(), direction.double())
        self._bend = comm.reduce(bend)
        self._is_good = torch.isfinite(direction).all() & torch.isfinite(gradient).all()
        self._rows = []
        return self._split(direction, weights)

    def _joint_gradient(self, step: Step) -> Tensor:
        """The gradient of the joint loss, flat."""
        windows = float(step.trainer.accumulate_grad_batches)
        mean = mean_over_ranks(step, list(torch._foreach_div(self._gradient, windows)))
        self._gradient = []
        return torch.cat([part.reshape(-1) for part in mean])

    def _with_momentum(self, direction: Tensor, gradient: Tensor) -> Tensor:
        if self.momentum == 0:
            return direction
        before = self._average[0] if self._average else torch.zeros_like(direction)
        before = before.to(direction)
        moving = direction + self.momentum * before
        found = moving.where(torch.dot(moving, gradient) < 0, direction)
        good = torch.isfinite(found).all()
        self._average = [found.where(good, before)]
        return found

    def _search(self, step: Step, weights: list[nn.Parameter], direction: list[Tensor]) -> None:
        """How far along the direction; then the damping of the next step."""
        length = 1.0
        if self.line_search or self.adapt:
            loss = joint_loss(step, self._losses)
            for halving in range(self.line_search + 1):
                new = self._trial.loss(self._window, weights, direction, length)
                falls = new <= loss + _ARMIJO * length * self._slope
                # Every rank has the same numbers, so all of them stop together.
                if bool(falls) or halving == self.line_search:
                    break
                length /= 2
            if self.adapt:
                step.log(self, self._now, "damping", joint=True)
                self._now = self._adapted(loss - new, self._predicted_fall(length))
            if self.line_search:
                step.log(self, length, "step", joint=True)
        step.log(self, self._predicted_fall(length), joint=True)
        self._weights = weights
        self._step = list(torch._foreach_mul(direction, length))
        self._window, self._losses = [], []

    def _predicted_fall(self, length: float) -> Tensor:
        return -(length * self._slope + length**2 * self._bend / 2)

    def _adapted(self, fall: Tensor, predicted: Tensor) -> Tensor:
        ratio = fall / predicted
        factor = torch.ones_like(self._now)
        factor = torch.where(ratio < _POOR, _MORE, torch.where(ratio > _GOOD, _LESS, factor))
        changed = (self._now * factor).clamp(_LEAST, _MOST)
        return changed.where(torch.isfinite(ratio), self._now)

    @staticmethod
    def _split(flat: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        parts = flat.split([w.numel() for w in weights])
        return [part.view_as(w).to(w.dtype) for part, w in zip(parts, weights, strict=True)]

    # ------------------------------------------------------------------ state

    @property
    def _has_state(self) -> bool:
        return self.adapt or self.momentum > 0

    def state_dict(self) -> dict[str, Any]:
        """Damping and momentum, where they change."""
        if not self._has_state:
            return {}
        return {"damping": self._now.cpu().clone(), "average": [a.cpu() for a in self._average]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        if self._has_state:
            self._now = state_dict["damping"]
            self._average = list(state_dict["average"])

    def _forget_window(self) -> None:
        self.__dict__.update(_no_window())

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a run under way stays with it.
        return {**super().__getstate__(), **_no_window()}


def _no_window() -> dict[str, Any]:
    lists = ("_rows", "_gradient", "_losses", "_window", "_weights", "_step")
    return {"_trial": TrialWeights(), **{name: [] for name in lists}}


def _solve(gram: Tensor, curvature: Tensor, asked: Tensor, damping: float | Tensor) -> Tensor:
    """``(Q K + damping I)^-1 a`` with ``Q`` block diagonal."""
    b, c = curvature.shape[:2]
    system = (curvature @ gram.view(b, c, b * c)).flatten(0, 1)
    system = system + damping * torch.eye(b * c, dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve_ex(system, asked)[0]
    return solved


def _curved(curvature: Tensor, outputs: Tensor) -> Tensor:
    """``Q u`` (B, C)."""
    return (curvature @ outputs[..., None]).squeeze(-1)
