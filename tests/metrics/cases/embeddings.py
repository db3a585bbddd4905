"""Metrics of embeddings."""

import torch

from lightning_reg.testing import MetricCase

_generator = torch.Generator().manual_seed(3)
QUERIES = torch.randn(60, 4, generator=_generator, dtype=torch.float64)
REFERENCES = torch.randn(20, 4, generator=_generator, dtype=torch.float64)

CASES = {
    "Utilization": [
        MetricCase(
            args={"references": REFERENCES},
            data=(QUERIES,),
            bad=((QUERIES[:, :2],), (QUERIES[0],), (QUERIES.long(),)),
        )
    ],
}
