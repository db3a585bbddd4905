"""A linear classifier of a class of 2 %, and its F1 score."""

import torch


def rare_f1(loss, seed, steps=200):
    """The F1 score on new samples after descent on ``loss(logits, labels)``."""
    x, y = _samples(seed, 4000)
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], 0.3)
    for _ in range(steps):
        value = loss(x @ weight[:2] + weight[2], y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    x, y = _samples(seed + 100, 20000)
    chosen = (x @ weight[:2] + weight[2] > 0).double()
    return float(2 * (chosen * y).sum() / (chosen.sum() + y.sum()))


def _samples(seed, size):
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(size, generator=generator) < 0.02).double()
    x = torch.randn(size, 2, generator=generator, dtype=torch.float64)
    x[:, 0] += 2.0 * y
    return x, y
