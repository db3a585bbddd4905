"""Penalties on weights from papers."""

import torch
from torch import nn

from lightning_reg.techniques.weights.group_sparse_envelope import group_sparse_envelope
from lightning_reg.techniques.weights.mini_batch_aware_l2 import mini_batch_aware_l2
from lightning_reg.techniques.weights.orthogonal_conv_regularizer import (
    orthogonal_conv_regularizer,
)
from lightning_reg.techniques.weights.parallel_path_product_penalty import (
    parallel_path_product_penalty,
)
from lightning_reg.techniques.weights.path_norm_penalty import path_norm_penalty
from lightning_reg.techniques.weights.spectral_regularization import spectral_regularization
from lightning_reg.techniques.weights.theory_scaled_l1 import theory_scaled_l1
from lightning_reg.techniques.weights.wasserstein_init import wasserstein_init
from lightning_reg.testing import ClassifierHost, ContractCase, ImageHost

NEUTRAL = {"strength": 0.0}
NOWHERE = [{"parameters": "no_such_name"}]


def _matrix(rows=5, columns=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).requires_grad_()


def _spectral(probe):
    module = probe.module
    layers = [module.stem[0], module.encoder[1], module.head]
    return sum(
        spectral_regularization(layer.weight) + spectral_regularization(layer.bias, kind="bias")
        for layer in layers
    )


def _kernel():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()


class EmbeddingHost(ClassifierHost):
    """A classifier that looks its inputs up in a table."""

    def build(self, options):
        super().build(options)
        self.table = nn.Embedding(12, 1)

    def forward(self, x):
        return super().forward(x + self.table(_ids(x))[..., 0])


def _ids(x):
    return ((3 * x.detach()).nan_to_num().round().long() + 6).clamp(0, 11)


def _of_first_batch(probe):
    ids = _ids(probe.inputs)
    counts = torch.bincount(ids.flatten(), minlength=12)
    return mini_batch_aware_l2(probe.module.table.weight, ids, counts)


CASES = {
    "GroupSparseEnvelope": ContractCase(
        args={"strength": 0.2, "k": 2, "groups": "columns"},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"k": 0}, {"k": 1.5}, {"groups": "layers"}, {"finish": 2.0}],
        bad_late=NOWHERE,
        host=ImageHost,
        gradcheck=lambda: (lambda w: group_sparse_envelope(w, 2), (_matrix(),)),
    ),
    "PathNormPenalty": ContractCase(
        args={"strength": 0.3, "pairs": [["encoder.0", "head"]]},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"mode": "both"}, {"pairs": [["encoder.0"]]}],
        bad_late=[
            {"pairs": [["encoder.0", "no_such_name"]]},
            {"pairs": [["encoder.0", "encoder.0"]]},
        ],
        expected=lambda probe: path_norm_penalty(
            probe.module.encoder[0].weight, probe.module.head.weight
        ),
        gradcheck=lambda: (path_norm_penalty, (_matrix(), _matrix(2, 5))),
    ),
    "ParallelPathProductPenalty": ContractCase(
        args={"strength": 0.3, "branches": "encoder|head"},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"mode": "both"}, {"form": "sum"}, {"branches": "("}],
        bad_late=[{"branches": "no_such_name"}],
        host=ImageHost,
        expected=lambda probe: sum(
            parallel_path_product_penalty([w])
            for w in (probe.module.encoder[1].weight, probe.module.head.weight)
        ),
        gradcheck=lambda: (
            lambda a, b: parallel_path_product_penalty([a, b, 2 * a]),
            (_matrix(), _matrix(2, 5)),
        ),
    ),
    "OrthogonalConvRegularizer": ContractCase(
        args={"strength": 0.1},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"mode": "both"}],
        bad_late=[*NOWHERE, {"parameters": "head.weight"}],
        host=ImageHost,
        expected=lambda probe: orthogonal_conv_regularizer(probe.module.stem[0].weight, 2),
        gradcheck=lambda: (orthogonal_conv_regularizer, (_kernel(),)),
    ),
    "SpectralRegularization": ContractCase(
        args={"strength": 0.3},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"mode": "both"}, {"k": 0}, {"k": 1.5}],
        bad_late=NOWHERE,
        host=ImageHost,
        expected=_spectral,
        gradcheck=lambda: (spectral_regularization, (_kernel(),)),
    ),
    "WassersteinInit": ContractCase(
        args={"strength": 300.0},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}],
        bad_late=NOWHERE,
        # Nothing has moved when the first value is logged.
        expected=lambda probe: sum(
            wasserstein_init(w, probe.technique.reference[n])
            for n, w in probe.module.named_parameters()
            if w.requires_grad
        ),
        gradcheck=lambda: (wasserstein_init, (_matrix(), _matrix(4, 5).detach())),
    ),
    "MiniBatchAwareL2": ContractCase(
        args={"strength": 20.0},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}],
        bad_late=[*NOWHERE, {"parameters": "head.weight"}, {"counts": {"table.weight": [1]}}],
        host=EmbeddingHost,
        expected=_of_first_batch,
        gradcheck=lambda: (
            lambda w: mini_batch_aware_l2(
                w, torch.tensor([1, 3, 3]), torch.tensor([1, 2, 3, 4, 5])
            ),
            (_matrix(),),
        ),
    ),
    "TheoryScaledL1": ContractCase(
        args={"strength": 0.2, "samples": 32, "mode": "gradient"},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"rule": "bayes"}, {"samples": 1}, {"outputs": 0}],
        bad_late=NOWHERE,
        host=ImageHost,
        expected=lambda probe: sum(
            theory_scaled_l1(w, 32)
            for w in (
                probe.module.stem[0].weight,
                probe.module.encoder[1].weight,
                probe.module.head.weight,
            )
        ),
        gradcheck=lambda: (lambda w: theory_scaled_l1(w, 20), (_matrix(),)),
    ),
}
