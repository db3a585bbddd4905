"""The contract that every technique keeps, for users' own techniques too."""

from lightning_reg.testing.case import ContractCase, Probe
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
    "AutoencoderHost",
    "ClassifierHost",
    "ContractCase",
    "ContractHost",
    "DictBatchHost",
    "HostOptions",
    "ImageHost",
    "Probe",
    "RankError",
    "RankPair",
    "RegressorHost",
    "SeveralLossesHost",
    "rank_trainer",
]
