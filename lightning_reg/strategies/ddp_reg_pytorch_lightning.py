"""The strategy ``ddp_reg`` of the standalone ``pytorch_lightning``."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy

from lightning_reg.strategies.ddp_mixin import RegularizedDDPMixin


class RegularizedDDPStrategy(RegularizedDDPMixin, DDPStrategy):
    """See :class:`lightning_reg.strategies.ddp_reg.RegularizedDDPStrategy`."""


__all__ = ["RegularizedDDPStrategy"]
