"""The bibliographic entry of a technique."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper that a technique implements.

    Args:
        title: the title as printed.
        authors: the authors, in full or as ``"Surname et al."``.
        year: the year of first publication.
        arxiv: the arXiv identifier, or ``None`` where there is none or it is not known for certain.
    """

    title: str
    authors: str
    year: int | None
    arxiv: str | None = None

    def __str__(self) -> str:
        where = f", arXiv:{self.arxiv}" if self.arxiv else ""
        return f"{self.authors} ({self.year}). {self.title}{where}"
