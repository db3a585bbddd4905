"""What a check is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from lightning_reg.testing.errors import ContractError
from lightning_reg.testing.subject import Subject

Question = Callable[[Subject], "str | None"]


def always(subject: Subject) -> str | None:
    """For checks that have a meaning for every technique."""
    return None


@dataclass(frozen=True)
class Check:
    """One promise of the contract.

    Args:
        name: as exemptions name it.
        function: raises :class:`ContractError` if the promise is broken.
        without_meaning: the reason why the check has no meaning for a kind of technique, or
            ``None`` where it has one.
    """

    name: str
    function: Callable[[Subject], None]
    without_meaning: Question = always

    @property
    def description(self) -> str:
        """The promise in one line."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def __call__(self, subject: Subject) -> None:
        """Hold a technique to the promise.

        Raises:
            ContractError: with the name of the technique and of the check, what was measured,
                and what that means.
        """
        try:
            self.function(subject)
        except ContractError as error:
            raise error.of_check(self.name) from error.__cause__
        except Exception as error:
            problem = f"it fails with {type(error).__name__}: {error}"
            raise ContractError(subject.name, problem, self.name) from error
