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

__all__ = [
    "AutoencoderHost",
    "ClassifierHost",
    "ContractCase",
    "ContractHost",
    "DictBatchHost",
    "HostOptions",
    "ImageHost",
    "Probe",
    "RegressorHost",
    "SeveralLossesHost",
]
