"""The techniques' mathematics as pure tensor functions, by name, imported on first use."""

from lightning_reg._lazy import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
