"""Runs the trainings of a comparison, in this process or over several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lightning_reg.compare.run import Job, Run, train
from lightning_reg.compare.settings import BASELINE, Settings
from lightning_reg.testing.ranks import RankPair, rank_trainer

_HOUR = 3600.0


def jobs(settings: Settings) -> list[Job]:
    """All trainings: for each seed the baseline and every arm in turn.

    In turn, so that step times that are compared were measured side by side.
    """
    arms = (BASELINE, *dict.fromkeys(settings.techniques))
    return [Job(settings, arm, seed) for seed in range(settings.seeds) for arm in arms]


def run_all(settings: Settings, on_epoch: Callable[[int], None]) -> Iterator[Run]:
    """Train; the results come as they are done.

    Args:
        settings: what to compare.
        on_epoch: called with the number of epochs that were done since the last call.
    """
    if settings.devices == 1:
        for job in jobs(settings):
            yield train(job, lambda: on_epoch(1))
        return
    # The ranks stay up from one training to the next; this process only shows what they do.
    with RankPair(settings.devices, timeout=_HOUR) as ranks:
        for job in jobs(settings):
            yield ranks.run(train_on_rank, job)[0]
            on_epoch(settings.epochs)


def train_on_rank(job: Job) -> Run:
    """One training, on each of the processes of a :class:`RankPair`."""
    strategy = "ddp" if job.settings.strategy == "auto" else job.settings.strategy
    return train(job, make=rank_trainer, strategy=strategy)
