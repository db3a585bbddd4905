"""``lightning-reg fit``: LightningCLI for a module, data and techniques named in a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_reg.cli.command import Command


def fit(arguments: Sequence[str]) -> int:
    """Run LightningCLI's ``fit`` with any module and data, given by ``class_path``."""
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # A second run in one folder is no mistake.
        save_config_kwargs={"overwrite": True},
        args=["fit", *arguments],
    )
    return 0


def make_parser() -> Any:
    """Stands in the list of subcommands; LightningCLI has a parser of its own."""
    from jsonargparse import ArgumentParser

    return ArgumentParser()


def run(arguments: Any) -> int:
    """Without any argument LightningCLI says what it needs."""
    return fit([])


COMMAND = Command("train from a YAML file (LightningCLI): fit --config FILE", make_parser, run)
