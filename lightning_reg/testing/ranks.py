"""Two processes over gloo that are started once and run many checks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment


class RankError(RuntimeError):
    """A function failed on a rank; the message holds that rank's traceback."""


class RankPair:
    """Processes that stay up between checks, since starting one costs seconds.

    Args:
        world_size: the number of processes.
        timeout: seconds after which a check that does not answer is ended.

    Example:
        >>> from lightning_reg.testing import RankPair
        >>> with RankPair() as ranks:  # doctest: +SKIP
        ...     ranks.run(module_level_function, 1, key="value")
        [<what rank 0 returned>, <what rank 1 returned>]
    """

    def __init__(self, world_size: int = 2, timeout: float = 120.0) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a module-level function on every rank; returns what each returned, by rank.

        Raises:
            RankError: if a rank raised, died or did not answer in time; the next call starts
                fresh processes.
        """
        self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers = self._answers()
        failed = [text for good, text in answers if not good]
        if failed:
            self.close()
            raise RankError("\n\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> RankPair:
        """Use as a context."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes."""
        self.close()

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.close()
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        store = os.path.join(self._folder.name, "store")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, store, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _answers(self) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        seconds = self.timeout
        while len(answers) < self.world_size:
            waiting = [r for r in range(self.world_size) if r not in answers]
            ready = wait([self._pipes[r] for r in waiting], seconds)
            if not ready:
                answers |= {r: (False, f"rank {r} did not answer") for r in waiting}
            for rank in waiting:
                if self._pipes[rank] not in ready:
                    continue
                try:
                    answers[rank] = self._pipes[rank].recv()
                except (EOFError, OSError):
                    answers[rank] = (False, f"rank {rank} died")
                if not answers[rank][0]:
                    # The others may wait for this rank in a collective for ever.
                    seconds = 5.0
        return [answers[rank] for rank in range(self.world_size)]


class PairEnvironment(ClusterEnvironment):
    """Tells Lightning that the processes and their group exist already."""

    @property
    def creates_processes_externally(self) -> bool:
        """They do."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Unused, since the group exists."""
        return 29500

    @staticmethod
    def detect() -> bool:
        """Never chosen unasked."""
        return False

    def world_size(self) -> int:
        """The number of processes."""
        return torch.distributed.get_world_size()

    def set_world_size(self, size: int) -> None:
        """Fixed."""

    def global_rank(self) -> int:
        """This process."""
        return torch.distributed.get_rank()

    def set_global_rank(self, rank: int) -> None:
        """Fixed."""

    def local_rank(self) -> int:
        """This process: all are on one machine."""
        return torch.distributed.get_rank()

    def node_rank(self) -> int:
        """The only machine."""
        return 0


def rank_trainer(**settings: Any) -> pl.Trainer:
    """A quiet CPU Trainer for a function that :meth:`RankPair.run` calls, over all its ranks.

    Args:
        settings: arguments of the Trainer; ``strategy`` is ``"ddp"`` unless given.
    """
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": torch.distributed.get_world_size(),
        "strategy": "ddp",
        "plugins": [],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    chosen = {**defaults, **settings}
    chosen["plugins"] = [*chosen["plugins"], PairEnvironment()]
    return pl.Trainer(**chosen)


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    """The life of one rank: take a function, call it, send what it returned."""
    torch.set_num_threads(1)
    if os.path.exists("/sys/class/net/lo"):
        # Machines without a network cannot resolve their own name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, f"on rank {rank}:\n{traceback.format_exc()}")
        with contextlib.suppress(BrokenPipeError):
            pipe.send(answer)
