"""Callbacks that own metrics and draw."""

from lightning_reg.monitors.calibration import (
    CalibrationMonitor,
)
from lightning_reg.monitors.entropy import (
    EntropyMonitor,
)
from lightning_reg.monitors.monitor import (
    Monitor,
)
from lightning_reg.monitors.overfit import (
    OverfitMonitor,
)
from lightning_reg.monitors.post_hoc_calibration import (
    PostHocCalibration,
)
from lightning_reg.monitors.sharpness import (
    SharpnessMonitor,
)

__all__ = [
    "CalibrationMonitor",
    "EntropyMonitor",
    "Monitor",
    "OverfitMonitor",
    "PostHocCalibration",
    "SharpnessMonitor",
]
