"""Schedules of sizes, rates, strengths and learning rates."""

from torch import nn

from lightning_reg.techniques.inputs.adaptive_regularization_schedule import progressive_value
from lightning_reg.techniques.tuning.one_cycle import one_cycle
from lightning_reg.techniques.tuning.regularize_only_on_repeat import repeat_factor
from lightning_reg.techniques.weights.l2_penalty import L2Penalty
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ImageHost


class PooledHost(ImageHost):
    """Images of any size."""

    def build(self, options):
        super().build(options)
        self.encoder = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 16), nn.Tanh()
        )


def penalized():
    return [L2Penalty(1.0)]


CASES = {
    "AdaptiveRegularizationSchedule": ContractCase(
        args={"sizes": [4, 8], "knobs": {"callbacks.L2Penalty.strength": [0.2, 0.3]}, "stages": 2},
        neutral={"sizes": [8, 8], "knobs": {"callbacks.L2Penalty.strength": [1.0, 1.0]}},
        bad=[
            {"sizes": [4]},
            {"sizes": [4.5, 8]},
            {"sizes": [0, 8]},
            {"dropout": [0.0, 1.5]},
            {"knobs": {"dropout.p": [0.1]}},
            {"sizes": None, "knobs": None},
            {"stages": 1},
            {"multiple": 0},
        ],
        bad_late=[{"knobs": {"dropout.q": [0.1, 0.2]}}, {"dropout": [0.1, 0.2], "pattern": "no"}],
        host=PooledHost,
        companions=penalized,
        expected=lambda probe: progressive_value(0.2, 0.3, 0.0),
        logs=(
            "reg/adaptive_regularization_schedule",
            "reg/adaptive_regularization_schedule_size",
        ),
    ),
    "OneCycle": ContractCase(
        args={"div_factor": 4.0},
        neutral={"div_factor": 1.0, "final_div_factor": 1.0, "momentum": None},
        bad=[
            {"max_lr": 0.0},
            {"div_factor": 0.5},
            {"final_div_factor": 0.5},
            {"pct_start": 0.0},
            {"pct_start": 0.6},
            {"pct_start": 1.0, "three_phase": False},
            {"anneal": "exp"},
            {"momentum": [0.9]},
            {"momentum": [0.95, 0.85]},
            {"momentum": [0.9, 1.0]},
        ],
        # A run of one step has the end of the cycle alone.
        expected=lambda probe: one_cycle(0, 1, 0.025, 0.1, 0.000025),
        logs=("reg/one_cycle", "reg/one_cycle_momentum"),
    ),
    "RegularizeOnlyOnRepeat": ContractCase(
        args={"techniques": ["l2_penalty"], "dropout": False},
        neutral={"strength": 0.0},
        bad=[{"strength": 1.5}, {"techniques": "l2_penalty"}, {"unit": "step"}, {"paths": "p"}],
        bad_late=[{"techniques": ["no_such_technique"]}, {"techniques": []}, {"paths": ["head.p"]}],
        companions=penalized,
        expected=lambda probe: repeat_factor(0.0),
        logs=("reg/regularize_only_on_repeat",),
    ),
}
