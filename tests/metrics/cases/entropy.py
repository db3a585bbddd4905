"""Entropies of classifiers and of ensembles."""

import torch

from lightning_reg.testing import MetricCase
from tests.metrics.cases.data import (
    BINARY_LOGITS,
    BINARY_TARGETS,
    IGNORED,
    LOGITS,
    PROBABILITIES,
    SOFT,
    TARGETS,
)

BAD = (
    (LOGITS[:, 0], TARGETS),
    (LOGITS[:4], TARGETS[:3]),
    (LOGITS, torch.full((60,), 5)),
    (TARGETS, TARGETS),
)
WIDE = (LOGITS.repeat(1, 2), TARGETS)
TOKENS = LOGITS.view(60, 1, 5)

_generator = torch.Generator().manual_seed(5)
MEMBERS = 2 * torch.randn(3, 60, 5, generator=_generator, dtype=torch.float64)
DENSE_MEMBERS = MEMBERS.unsqueeze(3)


def _classes(soft=False, **args):
    """Labels, probabilities, ignored tokens; soft labels where there is a meaning."""
    usual = {"num_classes": 5, "from_logits": True, **args}
    cases = [
        MetricCase(args=usual, data=(LOGITS, TARGETS), bad=(*BAD, WIDE)),
        MetricCase(args={**usual, "from_logits": False}, data=(PROBABILITIES, TARGETS)),
        MetricCase(
            args={**usual, "ignore_index": -100, "class_dim": -1},
            data=(TOKENS, IGNORED.view(60, 1)),
            bad=((TOKENS,),),
        ),
    ]
    if not soft:
        return cases
    last = MetricCase(args={**usual, "class_dim": -1}, data=(TOKENS, SOFT.view(60, 1, 5)))
    return [*cases, MetricCase(args=usual, data=(LOGITS, SOFT)), last]


_MEMBERS = [
    MetricCase(
        args={"from_logits": True},
        data=(MEMBERS,),
        dims=(1,),
        bad=((LOGITS,), (MEMBERS.long(),), (MEMBERS, TARGETS[:3]), (MEMBERS[:, :, :1],)),
    ),
    MetricCase(
        args={"from_logits": False},
        data=(MEMBERS.softmax(2),),
        dims=(1,),
        bad=((MEMBERS,), (MEMBERS.softmax(1),)),
    ),
    MetricCase(
        args={"from_logits": True, "ignore_index": -100},
        data=(DENSE_MEMBERS, IGNORED.view(60, 1)),
        dims=(1, 0),
        bad=((DENSE_MEMBERS,), (DENSE_MEMBERS, IGNORED)),
    ),
]

CASES = {
    "ClassEntropy": [
        *_classes(),
        *_classes(by="prediction", normalized=True)[:1],
    ],
    "ConditionalEntropy": [
        *_classes(soft=True),
        *_classes(given="target", drawn=True, soft=True),
    ],
    "EnsembleEntropy": _MEMBERS,
    "EntropySeparation": [
        MetricCase(args={"from_logits": True}, data=(LOGITS, TARGETS), bad=(*BAD, (LOGITS, SOFT))),
        MetricCase(args={"from_logits": False, "n_bins": 7}, data=(PROBABILITIES, TARGETS)),
        MetricCase(
            args={"from_logits": True, "ignore_index": -100, "class_dim": -1},
            data=(TOKENS, IGNORED.view(60, 1)),
        ),
        MetricCase(
            args={"from_logits": True, "task": "binary"}, data=(BINARY_LOGITS, BINARY_TARGETS)
        ),
    ],
    "ExpectedEntropy": _MEMBERS,
    "LabelInformation": [*_classes(soft=True), *_classes(drawn=True, soft=True)],
    "MarginalEntropy": [*_classes(), *_classes(normalized=True)[:1]],
    "MutualInformation": _MEMBERS,
    "PredictiveEntropy": [
        MetricCase(args={"from_logits": True}, data=(LOGITS,), bad=((TARGETS,),)),
        MetricCase(args={"from_logits": False, "normalized": True}, data=(PROBABILITIES,)),
        MetricCase(args={"from_logits": True, "task": "binary"}, data=(BINARY_LOGITS,)),
        MetricCase(
            args={"from_logits": True, "ignore_index": -100, "class_dim": -1},
            data=(TOKENS, IGNORED.view(60, 1)),
            bad=((TOKENS,), (TOKENS, IGNORED)),
        ),
    ],
    "VariationRatio": _MEMBERS,
}
