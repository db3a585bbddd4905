"""The contract that every technique keeps, for users' own techniques too."""

from lightning_reg.testing.case import ContractCase, Probe
from lightning_reg.testing.checks import CHECKS, Check
from lightning_reg.testing.contract import check_regularizer
from lightning_reg.testing.errors import ContractError
from lightning_reg.testing.hosts import (
    AutoencoderHost,
    ClassifierHost,
    ContractHost,
    DictBatchHost,
    HostOptions,
    ImageHost,
    RegressorHost,
    SeveralLossesHost,
)
from lightning_reg.testing.ranks import RankError, RankPair, rank_trainer

__all__ = [
    "CHECKS",
    "AutoencoderHost",
    "Check",
    "ClassifierHost",
    "ContractCase",
    "ContractError",
    "ContractHost",
    "DictBatchHost",
    "HostOptions",
    "ImageHost",
    "Probe",
    "RankError",
    "RankPair",
    "RegressorHost",
    "SeveralLossesHost",
    "check_regularizer",
    "rank_trainer",
]
