"""How a technique gets into a training step."""

from lightning_reg.engine.communicator import Communicator, JointMean
from lightning_reg.engine.errors import (
    ArgumentError,
    ConflictError,
    MissingSignalError,
    RegularizationError,
    UnsupportedError,
)
from lightning_reg.engine.explain import explain
from lightning_reg.engine.manual import RegularizeMixin
from lightning_reg.engine.memory import IndexedDataset, SampleMemory
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.pipeline import TrainingStepPipeline
from lightning_reg.engine.planner import Plan
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.selection import ParameterSelection
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.step import Step
from lightning_reg.engine.technique import Technique
from lightning_reg.engine.update import ParameterUpdate

__all__ = [
    "ArgumentError",
    "Communicator",
    "ConflictError",
    "IndexedDataset",
    "JointMean",
    "MissingSignalError",
    "Paper",
    "ParameterSelection",
    "ParameterUpdate",
    "Plan",
    "RegularizationError",
    "RegularizeMixin",
    "Regularizer",
    "SampleMemory",
    "Schedule",
    "Signals",
    "Step",
    "Technique",
    "TrainingStepPipeline",
    "UnsupportedError",
    "explain",
]
