"""Reconstruction contraction: known optima, the learned score, and its two parts' scale."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.techniques.gradients.reconstruction_contraction import (
    ReconstructionContraction,
    reconstruction_contraction,
    reconstruction_score,
)
from tests.engine.simple import trainer

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 1.0, 0.3])
SIGMA2 = 0.25


class Linear(L.LightningModule):
    """``r(x) = A x``, whose optimum is known."""

    def __init__(self, reduction="mean", rotate=None):
        super().__init__()
        self.reduction = reduction
        self.decoder = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.decoder.weight)

    def forward(self, x):
        return self.decoder(x)

    def training_step(self, batch, batch_idx):
        error = (self(batch[0]) - batch[0]).square()
        return error.mean() if self.reduction == "mean" else error.sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.3 if self.reduction == "mean" else 0.1)


def train(technique, reduction="mean", data=X, epochs=200):
    module = Linear(reduction)
    trainer([technique], max_epochs=epochs).fit(
        module, DataLoader(TensorDataset(data), batch_size=len(data))
    )
    return module.decoder.weight.detach()


def optimum(data, sigma2):
    """``A = M (M + sigma^2 I)^-1`` with the second moment ``M`` minimizes both parts' sum."""
    moment = data.T @ data / len(data)
    return moment @ torch.linalg.inv(moment + sigma2 * torch.eye(3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_linear_network_comes_to_the_known_optimum(reduction):
    technique = ReconstructionContraction(SIGMA2, reduction=reduction, projections="exact")
    found = train(technique, reduction)
    torch.testing.assert_close(found, optimum(X, SIGMA2), rtol=0, atol=1e-4)


def test_each_coordinate_shrinks_by_its_own_variance():
    # Independent coordinates: a = s^2 / (s^2 + sigma^2), and the score is -x / (s^2 + sigma^2).
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    spread = torch.tensor([2.0, 1.0, 0.5])
    data = signs * spread
    technique = ReconstructionContraction(SIGMA2, projections="exact")
    matrix = train(technique, data=data)
    expected = torch.diag(spread**2 / (spread**2 + SIGMA2))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-4)
    score = reconstruction_score(data @ matrix.T, data, SIGMA2)
    torch.testing.assert_close(score, -data / (spread**2 + SIGMA2), rtol=0, atol=1e-3)


def test_random_projections_come_to_the_same_optimum():
    technique = ReconstructionContraction(SIGMA2, projections=1)
    # 64 samples a step average the projections' noise.
    torch.testing.assert_close(train(technique), optimum(X, SIGMA2), rtol=0, atol=0.02)


def test_contraction_counts_the_decoder_too():
    x = X[:5].double().requires_grad_()
    encoder, decoder = torch.randn(2, 3).double(), torch.randn(3, 2).double()
    value = reconstruction_contraction(x @ encoder.T @ decoder.T, x)
    expected = (decoder @ encoder).square().sum().expand(5)
    torch.testing.assert_close(value, expected)
    mean = reconstruction_contraction(x @ encoder.T @ decoder.T, x, reduction="mean")
    torch.testing.assert_close(mean, expected / 3)


def test_gradients_agree_with_finite_differences():
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def contraction(x, weight):
        return reconstruction_contraction(torch.sigmoid(x @ weight.T) @ weight, x)

    assert torch.autograd.gradcheck(contraction, (X[:4].double().requires_grad_(), weight))


def test_small_noise_denoising_agrees():
    # The abstract: the criterion is that of a denoising autoencoder with small noise. For a
    # linear r, E ||x - A (x + e)||^2 with e of variance sigma^2 is exactly the same function.
    torch.manual_seed(0)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    x = X.double().requires_grad_()
    both = (x @ matrix.T - x).square().sum(1).mean() + SIGMA2 * reconstruction_contraction(
        x @ matrix.T, x
    ).mean()
    noise = SIGMA2**0.5 * torch.randn(20000, *X.shape, dtype=torch.float64)
    denoising = ((X.double() + noise) @ matrix.T - X.double()).square().sum(-1).mean()
    assert denoising.item() == pytest.approx(both.item(), rel=5e-3)


def test_a_loss_on_another_scale_is_refused():
    with pytest.raises(RegularizationError, match=r'ReconstructionContraction.*reduction="sum"'):
        train(ReconstructionContraction(SIGMA2), reduction="sum")


def test_a_loss_with_further_terms_need_not_be_checked():
    class Weighted(Linear):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 1.0

    loader = DataLoader(TensorDataset(X), batch_size=64)
    with pytest.raises(RegularizationError, match="check_loss=False"):
        trainer([ReconstructionContraction(SIGMA2)]).fit(Weighted(), loader)
    trainer([ReconstructionContraction(SIGMA2, check_loss=False)]).fit(Weighted(), loader)


def test_a_classifier_is_refused():
    class Classifier(Linear):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(3, 2)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[0].argmax(1) % 2)

    loader = DataLoader(TensorDataset(X), batch_size=64)
    with pytest.raises(RegularizationError, match=r"inputs' shape.*\(64, 2\)"):
        trainer([ReconstructionContraction(SIGMA2)]).fit(Classifier(), loader)


@pytest.mark.parametrize("arguments", [{"reduction": "none"}, {"projections": 0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="ReconstructionContraction"):
        ReconstructionContraction(**arguments)
