"""What ``ddp_reg`` adds to Lightning's DDP, whichever package Lightning comes from."""

from __future__ import annotations

import multiprocessing
from multiprocessing import util
from typing import Any

import torch

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import check_range
from lightning_reg.strategies.guard import ReplicaGuard, techniques_of


class RegularizedDDPMixin:
    """Shares out penalties over ranks and guards replicas; mixed in before a ``DDPStrategy``.

    Args:
        args: arguments of ``DDPStrategy``.
        guard_every_n_steps: optimizer steps between two comparisons of the replicas; 0 compares
            never. The last weights of a run are compared too.
        kwargs: arguments of ``DDPStrategy`` and of ``DistributedDataParallel``.

    Raises:
        ArgumentError: if ``guard_every_n_steps`` is negative.
    """

    lightning_module: Any
    model: Any
    _ddp_comm_hook: Any

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

    def setup_environment(self) -> None:
        """Let a spawned process take its group down: `atexit`, where Lightning does, is not run."""
        super().setup_environment()  # type: ignore[misc]
        if multiprocessing.parent_process() is not None:
            util.Finalize(None, _leave_group, exitpriority=0)

    def on_train_start(self) -> None:
        """Share out penalties on weights; start to keep account of who writes weights."""
        super().on_train_start()  # type: ignore[misc]
        trainer = self.lightning_module.trainer
        comm = Communicator.of(trainer)
        if comm.world_size == 1:
            return
        techniques = techniques_of(trainer)
        pipelines = [t.pipeline for t in techniques if t.pipeline is not None]
        for pipeline in pipelines if self._averages_gradients() else ():
            pipeline.averages = self._averages_now
        if self.guard_every_n_steps == 0:
            return
        self._guard = ReplicaGuard(self.lightning_module, techniques, comm)
        self._guarded_step = int(trainer.global_step)
        for pipeline in pipelines:
            pipeline.writing = self._guard.ledger.writing

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

    def _averages_gradients(self) -> bool:
        """Whether DDP leaves the exact mean of every rank's gradients behind.

        Not with a communication hook, which may round or drop parts of it, nor for parameters
        that it was told to ignore. Under manual optimization only the user knows which backward
        is the last one of a step.
        """
        module = self.lightning_module
        hooked = self._ddp_comm_hook is not None or bool(getattr(self.model, "_comm_hooks", None))
        ignored = bool(getattr(module, "_ddp_params_and_buffers_to_ignore", None))
        return module.automatic_optimization and not hooked and not ignored

    def _averages_now(self) -> bool:
        """Whether the coming backward is the one that averages, not a micro-batch before it."""
        return bool(self.model.require_backward_grad_sync)

    def _compare(self, least_steps: int) -> None:
        if self._guard is None:
            return
        now = int(self.lightning_module.trainer.global_step)
        if now - self._guarded_step >= least_steps:
            self._guarded_step = now
            self._guard.check(now)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


__all__ = ["RegularizedDDPMixin"]
