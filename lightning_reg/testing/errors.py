"""What a technique that breaks the contract raises."""

from __future__ import annotations


class ContractError(AssertionError):
    """A technique breaks the contract.

    Args:
        technique: the class.
        problem: what was measured, and what that means.
        check: the name of the check; ``check_regularizer`` fills it in.
    """

    def __init__(self, technique: str, problem: str, check: str = "") -> None:
        self.technique, self.problem, self.check = technique, problem, check
        super().__init__(f"{technique} breaks the check {check!r}: {problem}")

    def of_check(self, check: str) -> ContractError:
        """The same error with the name of the check."""
        return type(self)(self.technique, self.problem, check)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.technique, self.problem, self.check))
