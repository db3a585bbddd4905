"""Jacobians of a batch's outputs by the weights, and the loss's curvature in those outputs.

For techniques of second order, which solve in the space of outputs. What is offered:

- :func:`output_rows`: for a micro-batch the Jacobian ``J`` of its outputs, the gradient ``r`` and
  the Hessian blocks ``Q`` of the loss by them, whatever the loss is: all are taken from the graph
  of the user's own step;
- :func:`joint_gram`: ``J J^T`` of the rows of all ranks, of which no rank holds all of ``J``.

A row of ``J`` is as long as all weights together: this is for small batches, few outputs, or small
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.engine import RegularizationError, Step, UnsupportedError
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.signals import logits_of
from lightning_reg.engine.step import full_precision


@dataclass
class OutputRows:
    """What a micro-batch of B samples with C outputs each says of the weights.

    Attributes:
        jacobian: for each weight (B, C, size) of it.
        curvature: (B, C, C), the Hessian of the loss by a sample's outputs.
        residual: (B, C), the gradient of the loss by them.
        rounding: the relative rounding of a number in the graph.
    """

    jacobian: list[Tensor]
    curvature: Tensor
    residual: Tensor
    rounding: float

    @classmethod
    def joined(cls, parts: Sequence[OutputRows]) -> OutputRows:
        """Those of several micro-batches."""
        if len(parts) == 1:
            return parts[0]
        jacobians = zip(*(part.jacobian for part in parts), strict=True)
        return cls(
            [torch.cat(own) for own in jacobians],
            torch.cat([part.curvature for part in parts]),
            torch.cat([part.residual for part in parts]),
            max(part.rounding for part in parts),
        )

    def forward(self, direction: Sequence[Tensor]) -> Tensor:
        """``J p`` (B, C) of one tensor a weight."""
        parts = [j @ p.reshape(-1) for j, p in zip(self.jacobian, direction, strict=True)]
        return torch.stack(parts).sum(0)

    def backward(self, outputs: Tensor) -> Tensor:
        """``J^T u``, flat, of ``u`` (B, C)."""
        flat = outputs.reshape(-1)
        return torch.cat([j.flatten(0, 1).T @ flat.to(j) for j in self.jacobian])


def output_rows(
    owner: object,
    step: Step,
    total: Tensor,
    weights: Sequence[Tensor],
    network: str | None = None,
) -> OutputRows:
    """The rows of one micro-batch, whose graph is kept.

    Args:
        owner: the technique, for errors.
        step: the micro-batch.
        total: its loss; a sum or mean over samples of functions of their outputs.
        weights: by which to differentiate.
        network: the submodule that maps the inputs to the outputs, sample by sample. The Jacobian
            is then taken by ``torch.func`` for each sample alone; by default from the graph of the
            batch, which is right for every model and B times the work.
    """
    outputs = _captured(owner, step)
    (slope,) = torch.autograd.grad(total, outputs, create_graph=True, allow_unused=True)
    if slope is None:
        raise RegularizationError(
            owner,
            "needs a loss that is a function of the logits, and the loss does not reach them",
            cure='signals=Signals(logits="module.<the layer whose output the loss takes>")',
        )
    if network is None:
        jacobian = _jacobian(outputs, weights)
    else:
        jacobian = _sample_jacobian(owner, step, network, outputs, weights)
    return OutputRows(
        [full_precision(part) for part in jacobian],
        full_precision(_curvature(slope, outputs)),
        full_precision(slope.detach().flatten(1)),
        torch.finfo(outputs.dtype).eps,
    )


def joint_gram(jacobian: Sequence[Tensor], comm: Communicator) -> Tensor:
    """``J J^T`` (N C, N C) in float64 over the samples of all ranks, by rank.

    Weight by weight, so that no rank holds more of the others' rows than one weight's.
    """
    total: Tensor | None = None
    for part in jacobian:
        rows = comm.gather(part).flatten(0, 1)
        gram = (rows @ rows.T).double()
        total = gram if total is None else total + gram
    assert total is not None
    return total


def _captured(owner: object, step: Step) -> Tensor:
    """The outputs as they are in the graph: a copy in float32 would be no ancestor of the loss."""
    found: Any = step.find("logits")
    outputs: Tensor = step.logits if found is None else found
    if not outputs.requires_grad or outputs.ndim < 2:
        raise RegularizationError(
            owner,
            f"needs logits (B, C) with a graph, got {tuple(outputs.shape)}"
            + ("" if outputs.requires_grad else " without one"),
            cure='return {"loss": loss, "logits": logits} from training_step, not detached',
        )
    return outputs


def _curvature(slope: Tensor, outputs: Tensor) -> Tensor:
    """The blocks of the Hessian that belong to one sample each; others are 0."""
    b, c = len(outputs), outputs[0].numel()
    if not slope.requires_grad:
        return outputs.new_zeros(b, c, c)
    units = torch.eye(c, dtype=outputs.dtype, device=outputs.device)
    units = units.view(c, 1, *outputs.shape[1:]).expand(c, *outputs.shape)
    (rows,) = torch.autograd.grad(
        slope, outputs, units, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    return outputs.new_zeros(b, c, c) if rows is None else rows.flatten(2).movedim(0, 1)


def _jacobian(outputs: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    b, c = len(outputs), outputs[0].numel()
    units = torch.eye(b * c, dtype=outputs.dtype, device=outputs.device)
    rows = torch.autograd.grad(
        outputs,
        list(weights),
        units.view(b * c, *outputs.shape),
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    return [
        w.new_zeros(b, c, w.numel(), requires_grad=False) if r is None else r.reshape(b, c, -1)
        for r, w in zip(rows, weights, strict=True)
    ]


def _sample_jacobian(
    owner: object, step: Step, network: str, outputs: Tensor, weights: Sequence[Tensor]
) -> list[Tensor]:
    module: nn.Module = step.module.get_submodule(network)
    names = {id(p): name for name, p in module.named_parameters()}
    outside = [n for n, p in step.module.named_parameters() if p.requires_grad]
    outside = [n for n in outside if id(step.module.get_parameter(n)) not in names]
    own = {names[id(w)]: w.detach() for w in weights if id(w) in names}
    if outside:
        raise UnsupportedError(
            owner,
            f"takes Jacobians of `{network}` alone, and {outside[0]} is trained outside of it",
            cure=f"{type(owner).__name__}(network=None)",
        )

    def run(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        answer = logits_of(torch.func.functional_call(module, parameters, (sample[None],)))
        assert answer is not None
        return answer.flatten()

    per_sample = torch.func.vmap(torch.func.jacrev(run), in_dims=(None, 0))
    try:
        with torch.enable_grad():
            rows = per_sample(own, step.inputs)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UnsupportedError(
            owner,
            f"cannot run `{network}` on each sample alone: {reason}",
            cure=f"{type(owner).__name__}(network=None)",
        ) from error
    b, c = len(outputs), outputs[0].numel()
    found = [rows[names[id(w)]].reshape(b, c, -1) for w in weights]
    return [part.detach() for part in found]


__all__ = ["OutputRows", "joint_gram", "output_rows"]
