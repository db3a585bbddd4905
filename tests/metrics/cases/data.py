"""Predictions and targets that cases share."""

import torch

_generator = torch.Generator().manual_seed(0)

# 60 rows of 5 classes, and 60 scores of a positive class.
LOGITS = 2 * torch.randn(60, 5, generator=_generator, dtype=torch.float64)
TARGETS = torch.randint(0, 5, (60,), generator=_generator)
IGNORED = torch.where(torch.rand(60, generator=_generator) < 0.2, -100, TARGETS)
IGNORED[:4] = TARGETS[:4]
PROBABILITIES = LOGITS.softmax(1)
SOFT = torch.rand(60, 5, generator=_generator, dtype=torch.float64).softmax(1)
BINARY_LOGITS = 2 * torch.randn(60, generator=_generator, dtype=torch.float64)
BINARY_TARGETS = torch.randint(0, 2, (60,), generator=_generator)
LABELS = torch.randint(0, 2, (60, 5), generator=_generator)
LABELS_IGNORED = LABELS.masked_fill(torch.rand(60, 5, generator=_generator) < 0.2, 7)

CASES: dict[str, object] = {}
