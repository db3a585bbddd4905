"""Regularization techniques for PyTorch Lightning as callbacks, mixins, functions and metrics.

Everything public is here under one flat name (``lightning_reg.SAM``), imported when it is first
used. Importing the package registers the strategy ``"ddp_reg"`` and nothing else.
"""

from lightning_reg._lazy import attach as _attach
from lightning_reg.strategies.registry import register as _register

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = _attach(__name__, __file__)
_register()
