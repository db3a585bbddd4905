"""Pulls the weights to those at the end of the task before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule, Signals, UnsupportedError
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.observe import Observer, evaluating
from lightning_reg.engine.random import restore_rng_state, rng_state
from lightning_reg.engine.rerun import without_trace
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.anchor import WeightAnchor
from lightning_reg.mechanisms.fisher import squared_gradients

__all__ = ["PreviousTaskAnchor", "previous_task_anchor"]
