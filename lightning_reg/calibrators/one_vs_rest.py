"""Calibrators of one probability, applied to each class against the others."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_reg.calibrators.calibrator import FLOOR, GatheredCalibrator, one_hot


class OneVsRest(GatheredCalibrator):
    """Base of calibrators that map one probability to another.

    A binary task has one such map. For more classes each has its own, fitted on its probability
    against whether the label is that class; the results are divided by their sum. A subclass
    supplies :meth:`solve_column` and :meth:`map_column`.

    Calibrated probabilities stay 2^-52 away from 0 and 1, so that logits and likelihoods are
    finite; a row whose classes all have probability 0 becomes uniform.
    """

    @abstractmethod
    def solve_column(self, log_odds: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The numbers of one map, by buffer name; vectors may differ in length over classes.

        Args:
            log_odds: (N,) ``log p - log(1 - p)``, exact also where ``p`` rounds to 1.
            targets: (N,) in [0, 1].
        """

    @abstractmethod
    def map_column(self, log_odds: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        """The calibrated log-odds (N,)."""

    def solve(self, scores: Tensor, targets: Tensor) -> None:
        """One map per class; vectors are padded with their last number to one length."""
        if self.task == "binary":
            found = [self.solve_column(scores, targets.to(scores))]
        else:
            odds, labels = log_odds(scores), one_hot(targets, scores)
            found = [self.solve_column(o, t) for o, t in zip(odds.T, labels.T, strict=True)]
        for name in found[0]:
            longest = max(len(numbers[name]) for numbers in found)
            rows = [_padded(numbers[name], longest) for numbers in found]
            setattr(self, name, torch.stack(rows).to(getattr(self, name)))

    def map_rows(self, scores: Tensor) -> Tensor:
        """Map each class, and normalize."""
        numbers = {name: buffer.to(scores) for name, buffer in self.named_buffers()}
        if self.task == "binary":
            return self.map_column(scores, {name: value[0] for name, value in numbers.items()})
        columns = [
            self.map_column(odds, {name: value[c] for name, value in numbers.items()})
            for c, odds in enumerate(log_odds(scores).T)
        ]
        # log p of each class; the softmax divides by the sum.
        return torch.nn.functional.logsigmoid(torch.stack(columns, 1)).clamp_min(_LOG_FLOOR)


def log_odds(scores: Tensor) -> Tensor:
    """``log p_c - log(1 - p_c)`` of each class (N, C), exact also where a class is sure."""
    log_p = scores.log_softmax(1)
    top = scores.argmax(1, keepdim=True)
    # 1 - p of the largest class is the sum over the others, which would cancel otherwise.
    others = log_p.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    complement = torch.log1p(-log_p.exp()).scatter(1, top, others)
    return log_p - complement


_LOG_FLOOR = float(torch.tensor(FLOOR, dtype=torch.float64).log())


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values[-1:].expand(length - len(values))])
