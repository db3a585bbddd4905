"""Predictions that tests of order statistics share, given by formulas."""

import numpy as np
import torch

_NUMBER = np.arange(1, 201)
# 200 confidences of the predicted class, all different, and whether it was right.
CONFIDENCE = 0.5 + 0.5 * ((_NUMBER * 0.6180339887498949) % 1)
CORRECT = ((_NUMBER * 1.4142135623730951) % 1 < CONFIDENCE**1.5).astype(np.int64)
# The same on 16 levels: many ties.
TIED = np.round(CONFIDENCE * 16) / 16


def two_classes(confidence):
    """Probabilities of two classes, of which the second one is predicted."""
    return torch.tensor(np.stack([1 - confidence, confidence], 1))


def binary(function, confidence, correct, **arguments):
    """A functional twin on scores of the positive class."""
    value = function(
        torch.as_tensor(confidence),
        torch.as_tensor(correct),
        from_logits=False,
        task="binary",
        **arguments,
    )
    return float(value)


def filled(metric, confidence, correct):
    """A binary metric of these predictions."""
    metric.update(torch.as_tensor(confidence), torch.as_tensor(correct))
    return metric


def adversarial():
    """Confidences that crowd in few cells, with correctness sorted within, by name."""
    rng = np.random.default_rng(0)
    near_one = 1 - np.geomspace(1e-13, 1e-3, 400)
    half = 0.5 + np.linspace(0, 1e-5, 400)
    first_wrong = (np.arange(400) >= 200).astype(np.int64)
    uniform = rng.random(2000)
    ends = np.concatenate([np.zeros(100), np.ones(100), rng.random(200)])
    return {
        "one cell, wrong before right": (half, first_wrong),
        "one cell, right before wrong": (half, 1 - first_wrong),
        "crowded at one": (near_one, first_wrong),
        "crowded at zero": (1 - near_one, 1 - first_wrong),
        "calibrated": (uniform, (rng.random(2000) < uniform).astype(np.int64)),
        "overconfident": (uniform**0.2, (rng.random(2000) < uniform).astype(np.int64)),
        "exactly zero and one": (ends, rng.integers(0, 2, 400)),
        "soft": (uniform, uniform * rng.random(2000)),
    }
