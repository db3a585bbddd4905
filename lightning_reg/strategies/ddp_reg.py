"""The strategy ``ddp_reg`` of ``lightning.pytorch``."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from lightning_reg.strategies.ddp_mixin import RegularizedDDPMixin


class RegularizedDDPStrategy(RegularizedDDPMixin, DDPStrategy):
    """Lightning's DDP, which splits penalties on weights over ranks and guards the replicas.

    Split penalties: each rank computes a penalty on weights (``NormLoss``,
    ``OrthogonalRegularizer``, ...) for its share of them, the shares balanced by cost, longest
    first. Shares are scaled by the number of ranks and enter the last backward of an optimizer
    step, so that the mean DDP takes is the undivided gradient, to rounding, without further
    communication. Once per optimizer step. With a communication hook, with parameters that DDP is
    to ignore, and under manual optimization every rank computes the whole, as under ``"ddp"``.

    Replica guard: every ``guard_every_n_steps`` optimizer steps, and at the end of training,
    checksums of all that the ranks have to share are compared: parameters, masks and
    parametrizations, and the state of techniques that are not local to a rank. On a difference
    every rank stops with one error, which names the first tensor that differs and the technique
    that last wrote it.

    Techniques work on plain ``"ddp"`` too: they find the ranks by themselves.

    Args:
        guard_every_n_steps: optimizer steps between two comparisons; 0 compares never.
        kwargs: arguments of Lightning's ``DDPStrategy`` and torch's ``DistributedDataParallel``.

    Raises:
        ArgumentError: if ``guard_every_n_steps`` is negative.
        ReplicaError: while training, if the replicas differ.

    Note:
        Memory: the closed-form gradients of a rank's share are held until the backward has taken
        them; hooks that you register on a weight see them too.

        Cost of a comparison: one pass over the weights, one reduction of two integers a tensor,
        and one synchronization of host and device. Between comparisons, version counters are
        read around each technique that writes weights or gradients. On one process nothing is
        split or compared. As with Lightning's own DDP, a static graph allows no gradient
        accumulation.

    Example:
        >>> import lightning as L
        >>> import lightning_reg
        >>> trainer = L.Trainer(strategy="ddp_reg", accelerator="cpu", devices=1, logger=False)
        >>> type(trainer.strategy).__name__
        'RegularizedDDPStrategy'
    """


__all__ = ["RegularizedDDPStrategy"]
