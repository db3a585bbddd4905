"""The contracts that every technique and metric keeps, for users' own too."""

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
from lightning_reg.testing.metric_case import MetricCase
from lightning_reg.testing.metric_checks import METRIC_CHECKS, simulate_ranks
from lightning_reg.testing.metrics import check_metric
from lightning_reg.testing.ranks import RankError, RankPair, rank_trainer

__all__ = [
    "CHECKS",
    "METRIC_CHECKS",
    "AutoencoderHost",
    "Check",
    "ClassifierHost",
    "ContractCase",
    "ContractError",
    "ContractHost",
    "DictBatchHost",
    "HostOptions",
    "ImageHost",
    "MetricCase",
    "Probe",
    "RankError",
    "RankPair",
    "RegressorHost",
    "SeveralLossesHost",
    "check_metric",
    "check_regularizer",
    "rank_trainer",
    "simulate_ranks",
]
