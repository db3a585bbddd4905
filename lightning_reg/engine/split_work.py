"""Work on weights that is split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lightning_reg.engine.carry import carry
from lightning_reg.engine.communicator import Communicator

Cost = Callable[[Tensor], float]


class Share:
    """The part of a set of weights that this rank works on.

    Args:
        weights: all of them, the same on every rank, by name.
        comm: the ranks; ``None`` leaves everything to this one.
        cost: the relative cost of one weight; every rank gets about the same sum.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        comm: Communicator | None = None,
        cost: Cost | None = None,
    ) -> None:
        names = list(weights)
        mine = range(len(names))
        if comm is not None and cost is not None:
            mine = comm.shard([cost(weight) for weight in weights.values()])  # type: ignore[assignment]
        self.own = {names[i]: weights[names[i]] for i in mine}
        self.others = [weight for name, weight in weights.items() if name not in self.own]
        self.scale = comm.world_size if comm is not None else 1

    def whole(self, value: Tensor) -> Tensor:
        """A sum over :attr:`own`, scaled so that its mean over ranks is the sum over all weights.

        It reaches every weight on every rank, with no gradient for those of others: a DDP that
        does not look for unused parameters would wait for them.
        """
        if self.scale == 1:
            return value
        scaled = value * self.scale
        return carry(scaled.detach(), scaled, [None] * len(self.others), self.others)


__all__ = ["Cost", "Share"]
