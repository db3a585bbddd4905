"""What ``ddp_reg`` adds to Lightning's DDP, whichever package Lightning comes from."""

from __future__ import annotations

from typing import Any

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import check_range
from lightning_reg.strategies.guard import ReplicaGuard, techniques_of


class RegularizedDDPMixin:
    """Guards the replicas of a DDP strategy; to be mixed in before a ``DDPStrategy``.

    Args:
        args: arguments of ``DDPStrategy``.
        guard_every_n_steps: optimizer steps between two comparisons of the replicas; 0 compares
            never. The last weights of a run are compared too.
        kwargs: arguments of ``DDPStrategy`` and of ``DistributedDataParallel``.

    Raises:
        ArgumentError: if ``guard_every_n_steps`` is negative.
    """

    lightning_module: Any

    def __init__(self, *args: Any, guard_every_n_steps: int = 100, **kwargs: Any) -> None:
        check_range(
            "RegularizedDDPStrategy",
            "guard_every_n_steps",
            guard_every_n_steps,
            low=0,
            cure="RegularizedDDPStrategy(guard_every_n_steps=100)",
        )
        super().__init__(*args, **kwargs)
        self.guard_every_n_steps = guard_every_n_steps
        self._guard: ReplicaGuard | None = None
        self._guarded_step = 0

    def on_train_start(self) -> None:
        """Start to keep account of who writes weights."""
        super().on_train_start()  # type: ignore[misc]
        trainer = self.lightning_module.trainer
        comm = Communicator.of(trainer)
        if comm.world_size == 1 or self.guard_every_n_steps == 0:
            return
        techniques = techniques_of(trainer)
        self._guard = ReplicaGuard(self.lightning_module, techniques, comm)
        self._guarded_step = int(trainer.global_step)
        for technique in techniques:
            if technique.pipeline is not None:
                technique.pipeline.writing = self._guard.ledger.writing

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Compare the replicas as the steps before have left them, projections included."""
        super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        self._compare(self.guard_every_n_steps)

    def on_train_end(self) -> None:
        """Compare the weights that training ends with."""
        super().on_train_end()  # type: ignore[misc]
        self._compare(1)
        self._guard = None

    def teardown(self) -> None:
        """Let go of the module."""
        self._guard = None
        super().teardown()  # type: ignore[misc]

    def _compare(self, least_steps: int) -> None:
        if self._guard is None:
            return
        now = int(self.lightning_module.trainer.global_step)
        if now - self._guarded_step >= least_steps:
            self._guarded_step = now
            self._guard.check(now)


__all__ = ["RegularizedDDPMixin"]
