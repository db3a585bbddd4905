"""Which samples of the training set have been trained on, over all ranks.

What a technique asks :meth:`SeenSamples.share`: how much of a micro-batch has been seen before.
One bit a sample (a byte in memory), equal on all ranks, saved with the technique, also in the
middle of an epoch. A sample that a DistributedSampler repeats to fill a batch was seen before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator


class SeenSamples:
    """A growing table of what was seen."""

    def __init__(self) -> None:
        self.seen = torch.zeros(0, dtype=torch.bool)

    def share(self, index: Tensor, comm: Communicator) -> float:
        """The share of all ranks' samples that were seen in an earlier call; counts them from now.

        One gather of the positions, and a host sync: what follows a schedule has to be a number.

        Args:
            index: (B,) this rank's positions in the training set, from 0; B may be 0.
            comm: all ranks.
        """
        joint = comm.gather(index.reshape(-1)).cpu()
        if not len(joint):
            return 0.0
        missing = int(joint.max()) + 1 - len(self.seen)
        if missing > 0:
            # By half as much again, so that a stream does not copy the table with every batch.
            room = max(missing, len(self.seen) // 2)
            self.seen = torch.cat([self.seen, torch.zeros(room, dtype=torch.bool)])
        share = float(self.seen[joint].float().mean())
        self.seen[joint] = True
        return share

    def state_dict(self) -> dict[str, Any]:
        """The table."""
        return {"seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved table."""
        self.seen = state["seen"].clone()


__all__ = ["SeenSamples"]
