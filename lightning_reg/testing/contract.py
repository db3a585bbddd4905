"""Holds a technique to the contract, a user's own as well as the package's."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_reg.engine.technique import Technique
from lightning_reg.testing.case import ContractCase
from lightning_reg.testing.checks import CHECKS
from lightning_reg.testing.errors import ContractError
from lightning_reg.testing.ranks import RankPair
from lightning_reg.testing.subject import Subject

KEPT = "kept"


def check_regularizer(
    technique_class: type[Technique],
    case: ContractCase,
    ranks: RankPair | None = None,
    checks: Iterable[str] | None = None,
) -> dict[str, str]:
    """Check that a technique does what a regularizer of this package promises to do.

    Every check of :data:`CHECKS` runs that the class does not exempt itself from and that has a
    meaning for its kind: callback, mixin, or callback that acts in ``trainer.test``.

    Args:
        technique_class: a :class:`Regularizer`, or a mixin that is a :class:`Technique`.
        case: how to build it and what is known about it.
        ranks: processes for the two-rank checks; without them a pair is started and ended here,
            which costs seconds, so share one between classes.
        checks: the names of the checks to run; all by default.

    Returns:
        For each check ``"kept"``, or the reason why it was not run.

    Raises:
        ContractError: at the first promise that is broken: names the technique and the check,
            what was measured, and what that means.

    Example:
        >>> from lightning_reg.testing import ContractCase, check_regularizer
        >>> from lightning_reg.testing.companions import ReferencePenalty
        >>> case = ContractCase(args={"strength": 0.1}, neutral={"strength": 0.0})
        >>> check_regularizer(ReferencePenalty, case, checks=["neutral", "acts"])
        {'neutral': 'kept', 'acts': 'kept'}
    """
    names = list(CHECKS if checks is None else checks)
    _check_names(technique_class, names)
    own = RankPair() if ranks is None else None
    try:
        subject = Subject(technique_class, case, ranks if ranks is not None else own)
        return {name: run_check(subject, name) for name in names}
    finally:
        if own is not None:
            own.close()


def run_check(subject: Subject, name: str) -> str:
    """Run one check of a subject; returns ``"kept"`` or the reason why it was not run."""
    reason = not_run(subject, name)
    if reason is not None:
        return reason
    CHECKS[name](subject)
    return KEPT


def not_run(subject: Subject, name: str) -> str | None:
    """Why a check is not run for a subject; ``None`` if it is."""
    exemptions = check_exemptions(subject.cls)
    if name in exemptions:
        return f"exempt: {exemptions[name]}"
    reason = CHECKS[name].without_meaning(subject)
    return None if reason is None else f"without meaning: {reason}"


def check_exemptions(technique_class: type[Technique]) -> dict[str, str]:
    """The exemptions of a class.

    Raises:
        ContractError: if one names no check, or gives no reason.
    """
    for name, reason in technique_class.exemptions.items():
        if name not in CHECKS:
            raise ContractError(
                technique_class.__name__,
                f"it exempts itself from {name!r}, which is no check; checks are "
                f"{', '.join(CHECKS)}",
                "exemptions",
            )
        if not isinstance(reason, str) or len(reason.split()) < 3:
            raise ContractError(
                technique_class.__name__,
                f"the exemption from {name!r} needs a reason that a user can read, got {reason!r}",
                "exemptions",
            )
    return dict(technique_class.exemptions)


def _check_names(technique_class: type[Technique], names: Iterable[str]) -> None:
    for name in names:
        if name not in CHECKS:
            known = ", ".join(CHECKS)
            raise ValueError(f"there is no check {name!r}; checks are {known}")
    check_exemptions(technique_class)
