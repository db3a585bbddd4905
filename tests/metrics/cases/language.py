"""Token sequences, attention, routing and modalities."""

import torch

from lightning_reg.testing import MetricCase
from tests.metrics.cases.data import LOGITS, PROBABILITIES

_generator = torch.Generator().manual_seed(6)

# 60 sequences of 7 tokens over a vocabulary of 6.
TOKENS = 2 * torch.randn(60, 7, 6, generator=_generator, dtype=torch.float64)
IDS = torch.randint(0, 6, (60, 7), generator=_generator)
PADDED = IDS.masked_fill(torch.arange(7) >= torch.randint(1, 8, (60, 1), generator=_generator), -1)
BYTES = torch.randint(1, 30, (60,), generator=_generator)

# 60 samples of 2 layers and 3 heads, 4 queries and 5 keys.
ATTENTION = torch.randn(2, 60, 3, 4, 5, generator=_generator, dtype=torch.float64)
KEYS = torch.arange(5) < torch.randint(1, 6, (60, 1, 1, 1), generator=_generator)
MASKED = ATTENTION.masked_fill(~KEYS, -torch.inf).softmax(-1)
VALUES = 0.1 + torch.rand(2, 4, 60, generator=_generator, dtype=torch.float64)
SQUARES = torch.rand(2, 4, 60, generator=_generator, dtype=torch.float64)


def as_text(tokens):
    return "".join("aäb€c𝄞"[t] for t in tokens)


_BAD = ((TOKENS[0], IDS[0]), (TOKENS, IDS[:, :3]), (TOKENS, IDS + 3), (TOKENS, TOKENS[..., 0]))
# The first of a sequence's tokens is in doubt: a token, and not the sequence, is left out.
_TOKEN = {"invalid": "a sequence loses the one token that is not finite"}


def _windows(**args):
    return [
        MetricCase(
            args={"from_logits": True, "window": 3, **args},
            data=(TOKENS,),
            bad=((TOKENS[0],), (IDS,)),
        ),
        MetricCase(args={"from_logits": False, "window": 1, **args}, data=(TOKENS.softmax(2),)),
        MetricCase(
            args={"from_logits": True, "window": 4, "ignore_index": -1, **args},
            data=(TOKENS, PADDED),
            bad=((TOKENS,), (TOKENS, PADDED[:5])),
        ),
    ]


def _attention(**args):
    usual = {"num_layers": 2, "num_heads": 3, "from_logits": True, **args}
    bad = (
        (ATTENTION[0], KEYS),
        (ATTENTION[:1], KEYS),
        (ATTENTION[:, :, :2], KEYS),
        (ATTENTION, KEYS.long()),
        (ATTENTION, KEYS[:3]),
    )
    return [
        MetricCase(args=usual, data=(ATTENTION,), dims=(1,)),
        MetricCase(args=usual, data=(ATTENTION, KEYS), dims=(1, 0), bad=bad),
        MetricCase(
            args={**usual, "from_logits": False},
            data=(MASKED, KEYS),
            dims=(1, 0),
            bad=((ATTENTION, KEYS), (ATTENTION.softmax(-1), KEYS)),
        ),
    ]


def _routing(**args):
    usual = {"num_experts": 5, "from_logits": True, **args}
    mask = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[:4] = True
    return [
        MetricCase(
            args=usual, data=(LOGITS,), bad=((LOGITS[:, :4],), (LOGITS, torch.zeros(60).long()))
        ),
        MetricCase(args={**usual, "from_logits": False}, data=(PROBABILITIES, mask)),
        MetricCase(args=usual, data=(LOGITS.view(60, 1, 5), mask.view(60, 1))),
    ]


_MODALITIES = [
    MetricCase(
        args={"num_modalities": 2},
        data=(VALUES, SQUARES),
        dims=(2, 2),
        bad=((VALUES[:1], SQUARES[:1]), (-VALUES, SQUARES), (VALUES, SQUARES[..., :3])),
    )
]

CASES = {
    "AttentionEntropy": [*_attention(), *_attention(normalized=True)[:2]],
    "BitsPerByte": [
        MetricCase(
            args={"from_logits": True},
            data=(TOKENS, IDS, BYTES),
            bad=(
                *((*b, BYTES) for b in _BAD),
                (TOKENS, IDS),
                (TOKENS, IDS, BYTES[:3]),
                (TOKENS, IDS, -BYTES),
                (TOKENS, IDS, BYTES.double()),
            ),
        ),
        MetricCase(
            args={"from_logits": True, "ignore_index": -1, "decode": as_text},
            data=(TOKENS, PADDED),
            bad=((TOKENS, PADDED, BYTES),),
        ),
    ],
    "ExpertLoadEntropy": [*_routing(), *_routing(top_k=2, of="importance", normalized=True)],
    "FunctionalEntropy": _MODALITIES,
    "FunctionalFisherInformation": _MODALITIES,
    "HighEntropyShare": _windows(threshold=1.1),
    "Perplexity": [
        MetricCase(args={"from_logits": True}, data=(TOKENS, IDS), bad=_BAD[1:], exemptions=_TOKEN),
        MetricCase(
            args={"from_logits": True, "ignore_index": -1, "class_dim": 1},
            data=(TOKENS.transpose(1, 2), PADDED),
            exemptions=_TOKEN,
        ),
        MetricCase(
            args={"from_logits": False},
            data=(TOKENS[:, :1].softmax(2), IDS[:, :1]),
        ),
    ],
    "RollingEntropy": _windows(),
    "RouterEntropy": [*_routing(), *_routing(normalized=True)[:1]],
    "RoutingInformation": _routing(),
}
