"""Techniques for samples and classes that training would pass over."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.reweighting.ada_wac import ada_wac
from lightning_reg.techniques.reweighting.class_gaussian_calibration import calibrated_gaussians
from lightning_reg.techniques.reweighting.lasso_task_weights import lasso_task_weights
from lightning_reg.techniques.reweighting.neural_collapse_regularizer import (
    class_compactness,
    class_separation,
)
from lightning_reg.techniques.reweighting.slice_discovery_rebalancing import slice_gaps
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import DictBatchHost
from tests.contract.cases.contrastive import VIEWS, TwoViewHost


def _ada_wac_value(probe):
    ce = F.cross_entropy(probe.logits, probe.targets, reduction="none")
    ac = (probe.features["first"] - probe.features["second"]).square().mean(1)
    return (ac / (1 + (ce - 2 * ac).exp())).mean()


def _random(*shapes):
    generator = torch.Generator().manual_seed(0)
    make = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return tuple(t.requires_grad_() for t in make)


def _ada_wac_function():
    supervised, consistency, odds = _random(5, 5, 5)
    return lambda a, b: ada_wac(odds, a, b), (supervised, consistency)


def _collapse_function():
    features, means = _random((6, 3), (4, 3))
    labels = F.one_hot(torch.tensor([0, 0, 1, 3, 0, 1]), 4).double()

    def both(h, mu):
        return class_compactness(h, mu, labels) + class_separation(mu)

    return both, (features, means)


def _gaussians():
    means, factors = _random((3, 2), (3, 2, 2))
    counts = torch.tensor([9.0, 3.0, 1.0], dtype=torch.float64)
    return lambda m, f: calibrated_gaussians(m, f @ f.mT, counts, 2), (means, factors)


def _gaps():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(12, dtype=torch.float64, generator=generator).requires_grad_()
    scores = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    return lambda r: slice_gaps(r, torch.arange(12) % 3, scores, 3), (right,)


def _gaps():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(12, dtype=torch.float64, generator=generator).requires_grad_()
    scores = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    return lambda r: slice_gaps(r, torch.arange(12) % 3, scores, 3), (right,)


def _lasso():
    sources, target = _random((6, 3), (6,))
    return lambda w, t: lasso_task_weights(w, t, 0.1), (sources, target)


def _lasso():
    sources, target = _random((6, 3), (6,))
    return lambda w, t: lasso_task_weights(w, t, 0.1), (sources, target)


_HEAD = [{"head": ""}, {"data": "test"}, {"weight_decay": -1.0}, {"max_iter": -1}]
_NO_HEAD = [{"head": "no_such_layer"}, {"head": "encoder"}]

CASES = {
    "AdaWAC": ContractCase(
        args={"strength": 2.0, "views": VIEWS},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"step_size": -1.0},
            {"replaces": "all"},
            {"views": []},
            {"num_samples": 0},
        ],
        bad_late=[{"views": ["first", "no_such_layer"]}],
        host=TwoViewHost,
        expected=_ada_wac_value,
        gradcheck=_ada_wac_function,
        logs=("reg/ada_wac", "reg/ada_wac_supervised"),
    ),
    "NeuralCollapseRegularizer": ContractCase(
        args={"strength": 0.5, "num_classes": 4, "layer": "encoder"},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"num_classes": 1},
            {"separation": -1.0},
            {"alpha": 0.0},
            {"alpha": 4.0},
            {"pooling": "max"},
        ],
        bad_late=[{"layer": "no_such_layer"}, {"layer": None}],
        gradcheck=_collapse_function,
        logs=("reg/neural_collapse_regularizer", "reg/neural_collapse_regularizer_angle"),
    ),
    "ClassGaussianCalibration": ContractCase(
        args={"head": "head", "contamination": 0.2, "weight_decay": 0.1},
        neutral={"max_iter": 0},
        bad=[
            *_HEAD,
            {"outliers": "all"},
            {"contamination": 0.6},
            {"gamma": 1.5},
            {"neighbours": 0},
            {"alpha": -1.0},
            {"max_per_class": -1},
        ],
        bad_late=_NO_HEAD,
        gradcheck=_gaussians,
        logs=(),
    ),
    "SliceDiscoveryRebalancing": ContractCase(
        args={
            "head": "head",
            "attributes": "batch.domain",
            "data": "train",
            "min_gap": 0.0,
            "weight_decay": 0.1,
        },
        neutral={"max_iter": 0},
        bad=[
            *_HEAD,
            {"attributes": "domain"},
            {"min_gap": 1.5},
            {"max_attributes": 0},
            {"limit": 0},
            {"combine": "all"},
        ],
        bad_late=_NO_HEAD,
        host=DictBatchHost,
        gradcheck=_gaps,
        logs=(),
    ),
    "LassoTaskWeights": ContractCase(
        args={"heads": "head", "num_tasks": 4, "lam": 0.01, "start": 0},
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.5},
            {"replaces": "all"},
            {"heads": ""},
            {"num_tasks": 1},
            {"target": 4},
            {"lam": -1.0},
            {"floor": 1.5},
            {"target_share": -0.1},
            {"start": -1},
        ],
        bad_late=[{"heads": "no_such_layer"}, {"num_tasks": 5}],
        host=DictBatchHost,
        gradcheck=_lasso,
        logs=("reg/lasso_task_weights",),
    ),
}
