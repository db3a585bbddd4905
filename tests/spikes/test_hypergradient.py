"""The place of the hypergradient in the engine, shown on ridge regression in closed form."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, Regularizer
from lightning_reg.engine.exact_resume import ExactResume
from lightning_reg.mechanisms.hypergradient import HypergradientTuner
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import trainer

ETA = 0.05


def generator(seed):
    return torch.Generator().manual_seed(seed)


# Columns of X are orthogonal with X^T X / n = I, so that the Hessian is the identity.
X = torch.linalg.qr(torch.randn(16, 3, dtype=torch.float64, generator=generator(0)))[0] * 4
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
Y = Y + 3 * torch.randn(16, dtype=torch.float64, generator=generator(1))
XV = torch.linalg.qr(torch.randn(16, 3, dtype=torch.float64, generator=generator(2)))[0] * 4
YV = XV @ torch.tensor([0.7, -1.2, 0.2], dtype=torch.float64)
VALIDATION = [(XV, YV)]


class Linear(L.LightningModule):
    """Half the mean squared error of a linear map."""

    def __init__(self, start=(1.5, 0.5, -1.0)):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        loss = 0.5 * (batch[0] @ self.w - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), ETA)


class Ridge(Regularizer):
    """The squared norm, in the loss."""

    def penalty(self, step):
        return step.module.w.square().sum()


class ClosedRidge(Regularizer):
    """The squared norm, in closed form."""

    def parameter_gradient(self, update):
        update.add_gradients(self, [update.module.w], [2 * update.module.w])


def one_step_by_hand(w, strength):
    """The weights behind a step, and the derivative of the validation loss by the strength."""
    x, y, xv, yv = (t.numpy() for t in (X, Y, XV, YV))
    after = w - ETA * (x.T @ (x @ w - y) / len(y) + strength * 2 * w)
    slope = xv.T @ (xv @ after - yv) / len(yv)
    return after, -ETA * slope @ (2 * w)


def fit(kind, strength, x=X, y=Y, size=16, run=trainer, lr=0.0, loader=VALIDATION, **settings):
    technique = kind(strength, name="ridge")
    tuner = HypergradientTuner("ridge", loader, lr=lr)
    module = Linear()
    run = run(callbacks=[technique, tuner], **{"max_epochs": 1, **settings})
    run.fit(module, DataLoader(TensorDataset(x, y), batch_size=size))
    return module, tuner, run


@pytest.mark.parametrize("kind", [Ridge, ClosedRidge])
@pytest.mark.parametrize("strength", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hypergradient_is_the_derivative_of_one_step(kind, strength, accumulate):
    module, _, run = fit(kind, strength, size=16 // accumulate, accumulate_grad_batches=accumulate)
    after, slope = one_step_by_hand(np.array([1.5, 0.5, -1.0]), strength)
    # A strength of 0 is measured as well, and measuring does not change what is trained.
    np.testing.assert_allclose(module.w.detach().numpy(), after, rtol=1e-12)
    logged = run.callback_metrics["reg/hypergradient_tuner_hypergradient"].item()
    assert logged == pytest.approx(slope, rel=1e-6)


def test_it_is_the_finite_difference_of_the_validation_loss():
    def loss_after(strength):
        module, _, _ = fit(Ridge, strength)
        return (0.5 * (XV @ module.w - YV).square().mean()).item()

    difference = (loss_after(0.3 + 1e-5) - loss_after(0.3 - 1e-5)) / 2e-5
    _, _, run = fit(Ridge, 0.3)
    logged = run.callback_metrics["reg/hypergradient_tuner_hypergradient"].item()
    assert logged == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("kind", [Ridge, ClosedRidge])
def test_tuning_ends_at_the_best_ridge_strength(kind):
    # With X^T X / n = I the solution is b / (1 + 2 strength), b = X^T y / n, and the best factor
    # on b for the validation data is <b, v> / <b, b>, v = XV^T yv / n.
    _, tuner, _ = fit(kind, 0.05, lr=20.0, max_epochs=400)
    b, v = (X.T @ Y / 16).numpy(), (XV.T @ YV / 16).numpy()
    factor = b @ v / (b @ b)
    best = (1 / factor - 1) / 2
    assert 0.1 < best < 10
    assert tuner.tuned == pytest.approx(best, rel=1e-3)


def fit_on_rank():
    share = (slice(0, 8), slice(8, 16))[torch.distributed.get_rank()]
    validation = [(XV[share], YV[share])]
    settings = {"use_distributed_sampler": False, "max_epochs": 5}
    module, tuner, _ = fit(
        ClosedRidge, 0.1, X[share], Y[share], 8, rank_trainer, 1.0, validation, **settings
    )
    return module.w.detach(), tuner.tuned


def test_two_ranks_tune_as_one_process(ranks):
    (w, first), (_, second) = ranks.run(fit_on_rank)
    module, tuner, _ = fit(ClosedRidge, 0.1, lr=1.0, max_epochs=5)
    assert first == second
    assert first == pytest.approx(tuner.tuned, abs=1e-12)
    torch.testing.assert_close(w, module.w.detach())
    assert abs(first - 0.1) > 1e-2


def test_a_resumed_run_goes_on_with_the_tuned_strength(tmp_path):
    def run(epochs, path=None):
        technique = Ridge(0.1, name="ridge")
        tuner = HypergradientTuner("ridge", VALIDATION, lr=1.0)
        module = Linear()
        t = trainer([technique, tuner, ExactResume()], max_epochs=epochs)
        loader = DataLoader(TensorDataset(X, Y), batch_size=16)
        t.fit(module, loader, ckpt_path=path)
        return module, tuner, technique, t

    whole, tuner, technique, _ = run(6)
    *_, stopped = run(3)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    again, resumed, _, _ = run(6, tmp_path / "stopped.ckpt")
    assert torch.equal(whole.w, again.w)
    assert tuner.tuned == resumed.tuned
    assert technique.strength == 0.1


def test_a_technique_that_is_not_there_is_named():
    with pytest.raises(ArgumentError, match=r"'rigde'.*has ridge"):
        trainer([Ridge(0.1), HypergradientTuner("rigde", VALIDATION)]).fit(
            Linear(), DataLoader(TensorDataset(X, Y))
        )
