"""None"""


__all__ = [
]
