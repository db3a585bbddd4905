"""The strategy ``ddp_reg`` of ``lightning.pytorch``."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from lightning_reg.strategies.ddp_mixin import RegularizedDDPMixin


class RegularizedDDPStrategy(RegularizedDDPMixin, DDPStrategy):
    """Lightning's DDP, with a guard that stops a run whose replicas have drifted apart.

    Every ``guard_every_n_steps`` optimizer steps, and at the end of training, checksums of all
    that the ranks have to share are compared: parameters, masks and parametrizations, and the
    state of techniques that are not local to a rank. On a difference every rank stops with one
    error, which names the first tensor that differs and the technique that last wrote it.

    Techniques work on plain ``"ddp"`` too: they find the ranks by themselves.

    Args:
        guard_every_n_steps: optimizer steps between two comparisons; 0 compares never.
        kwargs: arguments of Lightning's ``DDPStrategy`` and torch's ``DistributedDataParallel``.

    Raises:
        ArgumentError: if ``guard_every_n_steps`` is negative.
        ReplicaError: while training, if the replicas differ.

    Note:
        Cost of a comparison: one pass over the weights, one reduction of two integers a tensor,
        and one synchronization of host and device. Between comparisons, version counters are
        read around each technique that writes weights or gradients. On one process nothing is
        compared. As with Lightning's own DDP, a static graph allows no gradient accumulation.

    Example:
        >>> import lightning as L
        >>> import lightning_reg
        >>> trainer = L.Trainer(strategy="ddp_reg", accelerator="cpu", devices=1, logger=False)
        >>> type(trainer.strategy).__name__
        'RegularizedDDPStrategy'
    """


__all__ = ["RegularizedDDPStrategy"]
