"""Penalties on derivatives by the input: the loss contains a gradient and is differentiated again.

A technique supplies :meth:`GradientPenalty.values`: one number per sample, from outputs and the
points that they are a function of. The mechanism takes care of

- points that can be differentiated by: the inputs, made to require a gradient before the forward
  pass, or the output of a layer (``layer="embedding"`` where inputs are tokens);
- kernels that have a second derivative (fused attention and cuDNN's recurrent nets have none);
- a clear error for compiled networks, integer inputs, and outputs that do not depend on the input;
- the mean over all ranks, each sample counting once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_reg.engine import RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError, UnsupportedError
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics

Projections = int | Literal["exact"]


def input_gradient(outputs: Tensor, points: Tensor, vectors: Tensor | None = None) -> Tensor:
    """``sum_b v_b^T dy_b/dx``, with a graph, so that it can be differentiated again.

    Row b is sample b's own gradient wherever a sample's output depends on its own point alone
    (BatchNorm in training mode mixes the samples; the derivative is then that of the batch).

    Args:
        outputs: ``y``, (B, ...), a differentiable function of ``points``.
        points: ``x``, (B, ...), which requires a gradient.
        vectors: ``v``, of the outputs' shape; all ones by default.

    Returns:
        A tensor of the points' shape, in float32 at least.

    Raises:
        RegularizationError: if the outputs do not depend differentiably on the points.
    """
    gradient = None
    if outputs.requires_grad and points.requires_grad:
        vectors = torch.ones_like(outputs) if vectors is None else vectors
        (gradient,) = torch.autograd.grad(
            outputs, points, vectors, create_graph=True, allow_unused=True
        )
    if gradient is None:
        raise RegularizationError(
            "gradient penalty",
            "needs outputs that are a differentiable function of the points, and found no path "
            "between them: something detached them, or they are not what the network saw",
            cure='signals=Signals(inputs="batch.<key>"), and no detach() or no_grad() in between',
        )
    return full_precision(gradient)


def squared_jacobian(
    outputs: Tensor,
    points: Tensor,
    projections: Projections = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``||dy/dx||_F^2`` of each sample, exactly or by an unbiased estimate, with a graph.

    The estimate is the mean of ``||v^T dy/dx||^2`` over random ``v`` of length ``sqrt(C)``,
    uniform on the sphere: ``E[v v^T] = I``, with less variance than normal ``v``.

    Args:
        outputs: ``y``, (B, ...), with C numbers per sample.
        points: ``x``, (B, ...), which requires a gradient.
        projections: how many ``v``; ``"exact"`` takes one pass per output, C in all.
        generator: where the ``v`` are drawn from.

    Returns:
        (B,), in float32 at least.
    """
    outputs = outputs.flatten(1)
    width = outputs.shape[1]
    count = width if projections == "exact" else projections
    total = torch.zeros((), device=outputs.device)
    for index in range(count):
        if projections == "exact":
            vectors = torch.zeros_like(outputs)
            vectors[:, index] = 1.0
        else:
            vectors = _on_sphere(outputs, generator)
        total = total + input_gradient(outputs, points, vectors).flatten(1).square().sum(1)
    return total if projections == "exact" else total / count


def check_projections(owner: object, projections: Projections) -> None:
    """Raise unless ``projections`` is ``"exact"`` or a whole number from 1."""
    whole = isinstance(projections, int) and not isinstance(projections, bool)
    if projections != "exact" and not (whole and projections >= 1):  # type: ignore[operator]
        raise ArgumentError(
            owner,
            f'`projections` must be "exact" or a whole number from 1, got {projections!r}',
            cure=f"{type(owner).__name__}(projections=1)",
        )


@contextmanager
def twice_differentiable(recurrent: bool = False) -> Iterator[None]:
    """Kernels with a second derivative: plain attention, and recurrent nets without cuDNN.

    Args:
        recurrent: whether the network has recurrent layers, the only reason to leave cuDNN.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
            stack.callback(setattr, torch.backends.cudnn, "enabled", before)
        yield


def check_not_compiled(owner: object, outputs: Tensor) -> None:
    """Raise if compiled code, which has no second derivative, made ``outputs``; walks the graph."""
    waiting = [outputs.grad_fn]
    seen: set[object] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CompiledFunction" in node.name():
            raise UnsupportedError(
                owner,
                "differentiates twice, which torch.compile does not support",
                cure="compile without it: remove torch.compile(...) around the network, or use "
                'torch.compile(..., backend="eager")',
            )
        waiting += [parent for parent, _ in node.next_functions]


class GradientPenalty(Regularizer):
    """Base of penalties on how the network's outputs change with its inputs.

    Args:
        strength: the multiplier.
        layer: differentiate by this submodule's output instead of the inputs.
        signals: where ``inputs`` and ``logits`` (the outputs) are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        layer: str | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        if layer is not None and (not isinstance(layer, str) or not layer):
            problem = f"`layer` must be the name of a submodule or None, got {layer!r}"
            raise ArgumentError(self, problem, cure=f'{type(self).__name__}(layer="embedding")')
        self.layer = layer
        self._recurrent = False
        self._checked = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodules to capture."""
        return () if self.layer is None else (self.layer,)

    @abstractmethod
    def values(self, outputs: Tensor, points: Tensor, generator: torch.Generator | None) -> Tensor:
        """The penalty (B,) of each sample, with a graph.

        Args:
            outputs: (B, ...), in float32 at least.
            points: (B, ...), as the network saw them; ``outputs`` are a function of them.
            generator: for random projections; one stream a rank and micro-batch.
        """

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer that is not there."""
        self._checked = False
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in pl_module.modules())
        known = [name for name, _ in pl_module.named_modules() if name]
        if self.layer is not None and self.layer not in known:
            raise ArgumentError(
                self,
                f"`layer` is {self.layer!r}, which this module does not have; it has "
                f"{', '.join(known[:12])}",
                cure=f'{type(self).__name__}(layer="{known[0] if known else "embedding"}")',
            )

    def transform_batch(self, step: Step) -> None:
        """Phase 1: inputs that require a gradient; the user's own tensor stays as it is."""
        if self.layer is not None:
            return
        inputs = step.inputs
        if not isinstance(inputs, Tensor):
            raise RegularizationError(
                self,
                f"needs the inputs as one tensor, got {type(inputs).__name__}",
                cure='signals=Signals(inputs="batch.<key>")',
            )
        if not inputs.is_floating_point():
            raise UnsupportedError(
                self,
                f"differentiates by the inputs, which are {inputs.dtype}: integers (tokens, bytes) "
                "have no derivative. A layer that turns them into numbers does",
                cure=f'{type(self).__name__}(layer="embedding")',
            )

    def forward_context(self, step: Step) -> AbstractContextManager[Any]:
        """Phase 2, in each of its passes: another technique may have moved the inputs."""
        if self.layer is None and not step.inputs.requires_grad:
            step.inputs = step.inputs.detach().requires_grad_()
        return twice_differentiable(self._recurrent)

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        points = step.inputs
        if self.layer is not None:
            points = step.feature(self.layer, as_captured=True)
        outputs = step.logits
        if len(points) != len(outputs):
            raise RegularizationError(
                self,
                f"needs one output per point, got outputs {tuple(outputs.shape)} and points "
                f"{tuple(points.shape)}",
                cure='signals=Signals(inputs="batch.<key>", logits="module.<name>")',
            )
        if not self._checked:
            check_not_compiled(self, outputs)
            self._checked = True
        values = self.values(outputs, points, step.rng(self))
        # The backward of a gradient starts with weights that the gradient itself has put away.
        assert self.pipeline is not None
        self.pipeline.hold_weights()
        return JointMean.of(values)


def _on_sphere(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random row of length ``sqrt(C)`` for each row of ``like``, in its type."""
    normal = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    length = torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    return normal.mul(like.shape[1] ** 0.5 / length)


__all__ = [
    "GradientPenalty",
    "Projections",
    "check_not_compiled",
    "check_projections",
    "input_gradient",
    "squared_jacobian",
    "twice_differentiable",
]
