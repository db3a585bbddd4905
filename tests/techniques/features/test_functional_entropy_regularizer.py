"""Functional entropies of modalities: the bound, official noise, double backward, and balance."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from numpy.polynomial.hermite_e import hermegauss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import FunctionalEntropyRegularizer
from lightning_reg.engine import RegularizationError
from lightning_reg.functional import functional_entropy_regularizer
from lightning_reg.techniques.features import functional_entropy_regularizer as file
from tests.engine.simple import Host, fit, trainer


class Two(L.LightningModule):
    """Two numbers of each of two modalities; the first one gives the label away."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Identity(), nn.Identity()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x):
        return self.net(torch.cat([self.a(x[:, :2]), self.b(x[:, 2:])], 1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


def samples(seed, size):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (size,), generator=generator)
    x = torch.randn(size, 4, generator=generator) * torch.tensor([0.3, 0.3, 0.7, 0.7])
    return x + (2 * y - 1).unsqueeze(1) * torch.tensor([1.0, 0.0, 1.0, 0.0]), y


def information(module, sigma):
    """Of both modalities on new samples, by a computation of its own."""
    x, _ = samples(50, 2000)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    z = (x + sigma * x.std(0) * noise).requires_grad_()
    f = -(module(x).softmax(1).detach() * module(z).log_softmax(1)).sum(1)
    (gradient,) = torch.autograd.grad(f.sum(), z)
    return [(gradient[:, part].square().sum(1) / f).mean() for part in (slice(0, 2), slice(2, 4))]


def test_the_bound_on_the_entropy_is_met_by_exponentials():
    # f = exp(a z) with z ~ N(0, 1): E[f log f] - E[f] log E[f] = a^2 / 2 e^(a^2 / 2).
    a = 0.7
    nodes, weights = (torch.from_numpy(part) for part in hermegauss(60))
    f = (a * nodes).exp()
    mass = weights / weights.sum()
    mean = (mass * f).sum()
    entropy = (mass * f * f.log()).sum() - mean * mean.log()
    fisher = (mass * file._information(f, (a * f).square())).sum()
    torch.testing.assert_close(entropy, fisher / 2, rtol=1e-6, atol=0)


def test_the_modality_that_is_used_least_rules():
    f = torch.tensor([0.5, 2.0]).double()
    squares = torch.tensor([[4.0, 4.0], [0.04, 0.04]]).double().requires_grad_()
    value = functional_entropy_regularizer(f, squares)
    # Information 5 and 0.05.
    assert value.item() == pytest.approx((0.2**2 + 20**2) ** 0.5, rel=1e-6)
    gradient = torch.autograd.grad(value, squares)[0] * squares
    assert (gradient < 0).all()
    assert (gradient[1, 0] / gradient[0, 0]).item() == pytest.approx(100**2, rel=1e-3)


def first_step(**kwargs):
    """The logged value of the first step and the module before it."""
    x, y = samples(0, 64)
    module, before = Two(), Two()
    technique = FunctionalEntropyRegularizer(1e-12, layers=["a", "b"], **kwargs)
    run = trainer([technique], max_epochs=1)
    run.fit(module, DataLoader(TensorDataset(x, y), 64))
    return run.logged_metrics["reg/functional_entropy_regularizer"].item(), before, x, technique


def test_many_draws_come_to_the_expected_information():
    found, before, x, _ = first_step(sigma=0.5, draws=60)
    z = x.repeat(400, 1)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    z = (z + 0.5 * x.std(0) * noise).requires_grad_()
    f = -(before(x).softmax(1).repeat(400, 1) * before(z).log_softmax(1)).sum(1)
    gradient = torch.autograd.grad(f.sum(), z)[0].square()
    squares = torch.stack([gradient[:, :2].sum(1), gradient[:, 2:].sum(1)])
    expected = functional_entropy_regularizer(f, squares).item()
    # 3840 and 25600 draws.
    assert found == pytest.approx(expected, rel=0.06)


def test_training_balances_what_modalities_are_used_for():
    # The smaller information over the larger: 0.16 without, 0.96 with; 0.42 and 0.91 with another
    # seed.
    ratios = []
    for strength in (0.0, 0.1):
        technique = FunctionalEntropyRegularizer(strength, layers=["a", "b"], sigma=0.3)
        module = Two()
        trainer([technique], max_epochs=20).fit(
            module, DataLoader(TensorDataset(*samples(0, 256)), 64)
        )
        a, b = information(module, 0.3)
        ratios.append(float(min(a, b) / max(a, b)))
    assert ratios[0] < 0.4
    assert ratios[1] > 0.75


def test_the_gradient_reaches_the_encoder_of_a_modality():
    class Encoded(Two):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return {"loss": 0.0 * logits.sum(), "logits": logits}

    module, before = Encoded(), Encoded()
    data = DataLoader(TensorDataset(*samples(0, 64)), 64)
    technique = FunctionalEntropyRegularizer(1.0, layers=["a", "b"])
    trainer([technique], max_epochs=1).fit(module, data)
    assert not torch.equal(module.a.weight, before.a.weight)


@pytest.mark.parametrize("layers", [["a", "b"], ["spare"]])
def test_a_layer_that_the_logits_do_not_depend_on_is_refused(layers):
    class Detached(Two):
        def __init__(self):
            super().__init__()
            self.spare = nn.Identity()

        def forward(self, x):
            return self.net(torch.cat([self.a(x[:, :2]), self.b(x[:, 2:]).detach()], 1))

    technique = FunctionalEntropyRegularizer(layers=layers)
    with pytest.raises(RegularizationError, match="detached"):
        trainer([technique], max_epochs=1).fit(
            Detached(), DataLoader(TensorDataset(*samples(0, 64)), 64)
        )


def test_sigmoid_outputs_of_one_column_are_a_task_of_their_own():
    class One(Host):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])[:, :1]
            return {"loss": 0.0 * logits.sum(), "logits": logits}

    with pytest.raises(RegularizationError, match="multilabel"):
        fit([FunctionalEntropyRegularizer(layers=["net.0"])], One(), max_epochs=1)
    _, run = fit(
        [FunctionalEntropyRegularizer(layers=["net.0"], task="multilabel")], One(), max_epochs=1
    )
    assert run.logged_metrics["reg/functional_entropy_regularizer"].isfinite()
