"""Callbacks that own metrics and draw."""

from lightning_reg.monitors.calibration import CalibrationMonitor
from lightning_reg.monitors.monitor import Monitor

__all__ = ["CalibrationMonitor", "Monitor"]
