"""Entropies."""

from lightning_reg.testing import MetricCase
from tests.metrics.cases.data import BINARY_LOGITS, LOGITS, PROBABILITIES, TARGETS

CASES = {
    "PredictiveEntropy": [
        MetricCase(args={"from_logits": True}, data=(LOGITS,), bad=((TARGETS,),)),
        MetricCase(args={"from_logits": False, "normalized": True}, data=(PROBABILITIES,)),
        MetricCase(args={"from_logits": True, "task": "binary"}, data=(BINARY_LOGITS,)),
    ],
}
