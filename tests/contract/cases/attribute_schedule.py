"""Dropout over the run."""

from lightning_reg.techniques.noise.dropout_schedule import dropout_factor
from lightning_reg.testing import ContractCase

# With every unit dropped the masks are certain, so that ranks and micro-batches can be compared.
CASES = {
    "DropoutSchedule": ContractCase(
        args={"p": 1.0, "mode": "early", "cutoff": 0.5, "shape": "constant"},
        neutral={"p": None, "cutoff": 1.0},
        bad=[
            {"p": 1.5},
            {"mode": "middle"},
            {"cutoff": -1.0},
            {"cutoff": 2.0},
            {"by": "week"},
            {"shape": "cosine"},
            {"end": 0.9},
            {"mode": "late", "shape": "linear", "cutoff": 5, "by": "epoch"},
            {"pattern": "("},
            {"attributes": "rate"},
        ],
        bad_late=[{"pattern": "no_such_name"}, {"p": None}],
        expected=lambda probe: dropout_factor(0.0, 0.5, "early", "constant"),
        logs=("reg/dropout_schedule",),
    ),
}
