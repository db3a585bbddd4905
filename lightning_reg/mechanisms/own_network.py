"""A small network that a technique trains beside the user's module, with an optimizer of its own.

A technique supplies the network, an optimizer, and a loss for each micro-batch. The mechanism
takes care of

- where it is: no part of the module, its parameters, its checkpoint or DDP; on the device of the
  tensors that it is given, in its own type, outside autocast;
- gradients: of the loss by its parameters alone, summed over micro-batches and over ranks, and
  divided by the samples of all of them; one collective for them and for what the technique wants
  to sum beside them;
- the step: once per optimizer step of the user's, and not at all if a number is not finite on any
  rank, so that all ranks hold the same network, bit for bit;
- initial weights: those of rank 0;
- state: weights, buffers and the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.communicator import Communicator

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


class OwnNetwork:
    """A network and its optimizer.

    Args:
        network: trained from now on.
        make_optimizer: from its parameters.
        sums: how many numbers are summed beside the gradients; the first counts samples.
    """

    def __init__(self, network: nn.Module, make_optimizer: MakeOptimizer, sums: int = 1) -> None:
        self.network = network.train()
        self.optimizer = make_optimizer(list(network.parameters()))
        self._width = sums
        self._gradients: list[Tensor] = []
        self._sums: Tensor | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return list(self.network.parameters())

    def __call__(self, inputs: Tensor) -> Tensor:
        """The network's output in its own type, with a graph to its parameters alone."""
        self._follow(inputs.device)
        dtype = self.parameters[0].dtype
        with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
            output: Tensor = self.network(inputs.detach().to(dtype))
        return output

    def share(self, comm: Communicator) -> None:
        """Take the weights and buffers of rank 0."""
        with torch.no_grad():
            for tensor in (*self.network.parameters(), *self.network.buffers()):
                tensor.copy_(comm.broadcast(tensor))

    def collect(self, loss: Tensor, sums: Tensor) -> None:
        """Add the gradient of a sum over samples, and what else is to be summed.

        Args:
            loss: the sum of the losses of a micro-batch's samples.
            sums: (sums,) detached; the first is the number of samples.
        """
        found = torch.autograd.grad(
            loss, self.parameters, allow_unused=True, materialize_grads=True
        )
        if self._sums is None:
            self._gradients, self._sums = list(found), sums
        else:
            torch._foreach_add_(self._gradients, list(found))
            self._sums = self._sums + sums

    def step(self, comm: Communicator) -> Tensor | None:
        """Step on the mean gradient over all ranks' samples since the last step; a host sync.

        Every rank has to call it, with or without samples.

        Returns:
            (sums,) the sums of all ranks; ``None`` if there was no sample, or a number is not
            finite.
        """
        parts = self._collected()
        joint = comm.reduce(torch.cat([part.to(parts[-1]) for part in parts]))
        sums, *gradients = joint.split([part.numel() for part in parts])
        self._gradients, self._sums = [], None
        if not bool(torch.isfinite(joint).all() & (sums[0] > 0)):
            return None
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = (gradient / sums[0]).view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        found: Tensor = sums
        return found

    def _collected(self) -> list[Tensor]:
        if self._sums is not None:
            return [self._sums, *(g.reshape(-1) for g in self._gradients)]
        zeros = [torch.zeros_like(p).reshape(-1) for p in self.parameters]
        return [zeros[0].new_zeros(self._width), *zeros]

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers and the optimizer's state, on the CPU."""
        network = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
        return {"network": network, "optimizer": _on_cpu(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _follow(self, device: torch.device) -> None:
        if self.parameters[0].device == device:
            return
        # In place, so that the optimizer goes on with the same parameters; its own tensors are
        # moved by loading them.
        self.network.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    return [_on_cpu(v) for v in value] if isinstance(value, list) else value


__all__ = ["MakeOptimizer", "OwnNetwork"]
