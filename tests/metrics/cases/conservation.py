"""Conservation laws."""

import torch

from lightning_reg.testing import MetricCase

_generator = torch.Generator().manual_seed(5)
PREDS = torch.randn(60, 4, generator=_generator, dtype=torch.float64)
TOTAL = torch.randn(60, generator=_generator, dtype=torch.float64)
WEIGHTS = (0.1, 0.2, 0.3, 0.4)

CASES = {
    "ConservationError": MetricCase(
        args={"weights": WEIGHTS},
        data=(PREDS, TOTAL),
        bad=((PREDS[:, :3], TOTAL), (PREDS, TOTAL[:4]), (PREDS.long(), TOTAL)),
    ),
}
