"""Von Neumann entropy: known spectra, the finite gradient, and what it does to a rank."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.features.von_neumann_entropy import (
    VonNeumannEntropy,
    von_neumann_entropy,
)
from tests.engine.simple import INPUTS, Host, fit, trainer, weights

# sin(0.7 k) on a (4, 5) grid plus a ramp; see REFERENCE_GRADIENT.
FEATURES = (torch.arange(20, dtype=torch.float64).view(4, 5) * 0.7).sin() + torch.linspace(
    -0.5, 0.5, 5, dtype=torch.float64
)
# Value and gradient of get_vne of jaeill/CVPR23-VNE@c63961b, vne/__init__.py, run in float64.
REFERENCE_VALUE = 0.6500285109148599
REFERENCE_GRADIENT = [
    [-0.0333114702, -0.0664418828, -0.031035306, 0.01896766, 0.0227615056],
    [-0.0408209513, 0.0425300925, 0.0175118125, -0.0157425466, 0.0467738168],
    [-0.0830153685, 0.0359728216, -0.0023348425, -0.0395443937, 0.0822216755],
    [-0.0064319884, 0.0169644173, 0.0434468822, 0.0494955996, 0.0212010733],
]


def gradient(features):
    leaf = features.clone().requires_grad_()
    return torch.autograd.grad(von_neumann_entropy(leaf), leaf)[0]


def test_value_and_gradient_of_the_official_code():
    assert von_neumann_entropy(FEATURES).item() == pytest.approx(REFERENCE_VALUE, abs=1e-12)
    expected = torch.tensor(REFERENCE_GRADIENT, dtype=torch.float64)
    torch.testing.assert_close(gradient(FEATURES), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("samples", "width"), [(6, 6), (12, 6), (6, 12)])
def test_equal_eigenvalues_have_the_logarithm_of_their_number(samples, width):
    rows = torch.eye(6, dtype=torch.float64).repeat(samples // 6, 1)
    rows = torch.nn.functional.pad(rows, (0, width - 6))
    assert von_neumann_entropy(3.0 * rows).item() == pytest.approx(math.log(6), abs=1e-12)


def test_a_constant_feature_has_none():
    assert von_neumann_entropy(torch.ones(7, 3, dtype=torch.float64)).item() == pytest.approx(
        0.0, abs=1e-12
    )


def test_few_samples_bound_the_entropy():
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    value = von_neumann_entropy(rows).item()
    assert 1.2 < value <= math.log(4)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_value_is_the_entropy_of_the_squared_singular_values(shape):
    rows = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    unit = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    share = np.linalg.svd(unit, compute_uv=False) ** 2 / shape[0]
    expected = -(share * np.log(share)).sum()
    assert von_neumann_entropy(rows).item() == pytest.approx(expected, abs=1e-12)


def test_gradients_agree_with_finite_differences():
    assert torch.autograd.gradcheck(von_neumann_entropy, FEATURES.clone().requires_grad_())
    assert torch.autograd.gradcheck(von_neumann_entropy, FEATURES.T.clone().requires_grad_())


def test_length_of_a_row_does_not_matter():
    scale = torch.tensor([[0.1], [1.0], [7.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(von_neumann_entropy(FEATURES * scale), von_neumann_entropy(FEATURES))
    # So the gradient is orthogonal to each row.
    assert (gradient(FEATURES) * FEATURES).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]],
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, -1.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    ],
)
def test_zero_eigenvalues_have_a_finite_gradient(rows, dtype):
    # The official code gives NaN here, from 0 * inf.
    found = gradient(torch.tensor(rows, dtype=dtype))
    assert torch.isfinite(found).all()
    assert found.abs().max() < 10


def test_gradient_at_a_zero_eigenvalue_is_the_limit():
    # In the plane the second direction opens with angle t: l = (1 +- cos t)/2.
    def at(t):
        rows = torch.tensor([[1.0, 0.0], [math.cos(t), math.sin(t)]], dtype=torch.float64)
        return gradient(rows)

    zero, small = at(0.0), at(1e-4)
    assert zero.abs().max() == 0
    # dS/dt = -(sin t / 2) log((1 - cos t)/(1 + cos t)) is about 1e-3 there, and goes to 0.
    slope = 0.5 * math.sin(1e-4) * math.log((1 + math.cos(1e-4)) / (1 - math.cos(1e-4)))
    assert small[1, 1].item() == pytest.approx(slope, rel=1e-4)


def test_a_dead_row_gets_no_gradient_and_counts_as_a_sample():
    rows = torch.cat([torch.eye(3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)])
    # l = 1/4 three times, and nothing for the rest of the trace.
    assert von_neumann_entropy(rows).item() == pytest.approx(0.75 * math.log(4), abs=1e-12)
    assert (gradient(rows)[3] == 0).all()


def test_dead_rows_among_others_get_no_gradient_in_float32():
    # The rounding of the eigenvectors, divided by a length of almost 0, would be about 1e4.
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    rows[2] = rows[4] = 0
    assert (gradient(rows)[[2, 4]] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_gives_nan_and_does_not_raise(bad):
    rows = torch.randn(4, 3)
    rows[1, 2] = bad
    assert von_neumann_entropy(rows).isnan()


def effective_rank(module):
    with torch.no_grad():
        return von_neumann_entropy(module.net[0](X)).exp().item()


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(5)) + 0.5


@pytest.mark.parametrize(("strength", "low", "high"), [(0.5, 1.25, 99.0), (-0.5, 0.0, 0.67)])
def test_training_spreads_or_concentrates_the_spectrum(strength, low, high):
    def train(callbacks):
        module = Host(lr=0.5)
        y = torch.arange(64) % 4
        trainer(callbacks, max_epochs=40).fit(
            module, DataLoader(TensorDataset(X, y), batch_size=64)
        )
        return effective_rank(module)

    ratio = train([VonNeumannEntropy(strength, layer="net.0")]) / train([])
    assert low < ratio < high


def test_the_log_shows_minus_the_entropy():
    _, run = fit([VonNeumannEntropy(0.01, layer="net")], max_epochs=1, batch_size=64)
    with torch.no_grad():
        expected = -von_neumann_entropy(Host().net(INPUTS))
    logged = run.callback_metrics["reg/von_neumann_entropy"]
    assert logged == pytest.approx(expected.item(), abs=1e-6)


def test_identical_samples_train_on():
    class Same(Host):
        def training_step(self, batch, batch_idx):
            return super().training_step((torch.ones_like(batch[0]), batch[1]), batch_idx)

    module, _ = fit([VonNeumannEntropy(0.3, layer="net.0")], module=Same())
    assert torch.isfinite(weights(module)).all()


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ArgumentError, match="VonNeumannEntropy"):
        fit([VonNeumannEntropy(0.1, layer="backbone")], module=Host())
