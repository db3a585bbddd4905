"""Weights of which some stay zero."""

from lightning_reg.testing import ContractCase, ImageHost


def _kept_share(probe):
    total = 4 * 9 + 64 * 16 + 16 * 4
    return round(0.5 * total) / total


CASES = {
    "RandomSparseMask": ContractCase(
        args={"density": 0.5},
        neutral={"density": 1.0},
        bad=[{"density": 0.0}, {"density": 1.1}, {"distribution": "even"}],
        bad_late=[{"parameters": "no_such_name"}],
        host=ImageHost,
        expected=_kept_share,
    ),
}
