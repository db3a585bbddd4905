"""Regression: Gaussian predictions, intervals and quantiles."""

import torch

from lightning_reg.testing import MetricCase

_generator = torch.Generator().manual_seed(4)
MEAN = torch.randn(60, generator=_generator, dtype=torch.float64)
STD = 0.2 + torch.rand(60, generator=_generator, dtype=torch.float64)
TARGET = MEAN + STD * torch.randn(60, generator=_generator, dtype=torch.float64)
LEVELS = (0.1, 0.5, 0.9)
QUANTILES = MEAN.unsqueeze(1) + STD.unsqueeze(1) * torch.tensor([-1.3, 0.0, 1.3]).double()

BAD = (
    (MEAN, STD[:5], TARGET),
    (MEAN, -STD, TARGET),
    (MEAN, torch.zeros_like(STD), TARGET),
    (TARGET.long(), STD, TARGET),
)


def _gaussian(**args):
    """Standard deviations, variances, and a dense prediction with a spread that is not finite."""
    dense = tuple(t.view(60, 1).expand(60, 3) for t in (MEAN, STD, TARGET))
    return [
        MetricCase(args={"scale_is": "std", **args}, data=(MEAN, STD, TARGET), bad=BAD),
        MetricCase(args={"scale_is": "variance", **args}, data=(MEAN, STD, TARGET), invalid=1),
        # One pixel of a sample is not finite: the others count.
        MetricCase(
            args={"scale_is": "std", **args},
            data=dense,
            exemptions={"invalid": "a sample of several pixels loses one pixel only"},
        ),
    ]


_INTERVALS = [
    MetricCase(
        args={},
        data=(MEAN - STD, MEAN + STD, TARGET),
        bad=((MEAN + STD, MEAN - STD, TARGET), (MEAN, MEAN, TARGET[:3])),
        half=(0, 1),
    ),
]

CASES = {
    "ExpectedNormalizedCalibrationError": [
        *_gaussian(n_bins=5),
        *_gaussian(n_bins=4, limits=(0.1, 1.2))[:1],
    ],
    "GaussianCRPS": _gaussian(),
    "GaussianNLL": _gaussian(),
    "IntervalCoverage": _INTERVALS,
    "IntervalWidth": _INTERVALS,
    "PITHistogram": [
        *_gaussian(n_bins=8),
        *_gaussian(n_bins=8, discrepancy="chi2")[:1],
        *_gaussian(n_bins=8, discrepancy="ks")[:1],
    ],
    "QuantileCalibrationError": [
        MetricCase(
            args={"levels": LEVELS, "norm": norm},
            data=(QUANTILES, TARGET),
            bad=(
                (QUANTILES[:, :2], TARGET),
                (QUANTILES.flip(1), TARGET),
                (QUANTILES, TARGET[:4]),
                (QUANTILES.long(), TARGET),
            ),
        )
        for norm in ("l1", "l2", "max")
    ],
    "Sharpness": _gaussian(),
    "UncertaintyCalibrationError": [
        *_gaussian(n_bins=5),
        *_gaussian(n_bins=4, limits=(0.1, 1.2))[:1],
    ],
}
