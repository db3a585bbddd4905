"""Symmetries: exact solutions stay exact solutions, of the parameters that theory gives them."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import RegularizationError
from lightning_reg.techniques.inputs.lie_symmetry_augment import LieSymmetryAugment, lie_symmetry
from tests.engine.simple import Host, fit, trainer

DOUBLE = torch.float64


def _grid(length, points, dt, rows):
    x = torch.arange(points, dtype=DOUBLE) * (length / points)
    return torch.arange(rows, dtype=DOUBLE)[:, None] * dt, x[None, :]


def _move(field, equation, length, dt, **changes):
    settings = {"start": 0.0, "shift": 0.0, "velocity": 0.0, "log_scale": 0.0, "amplitude": 1.0}
    numbers = {k: torch.tensor([v], dtype=DOUBLE) for k, v in {**settings, **changes}.items()}
    return lie_symmetry(field[None], equation, length=length, dt=dt, **numbers)[0]


def _soliton(t, x, c, centre):
    """u_t + u u_x + u_xxx = 0: a hump of height 3 c that travels with speed c."""
    return 3 * c / torch.cosh(c**0.5 / 2 * (x - c * t - centre)).square()


KDV = {"length": 60.0, "dt": 0.05}
T, X = _grid(60.0, 256, 0.05, 41)


def test_boosted_soliton_travels_faster_on_a_pedestal():
    moved = _move(_soliton(T, X, 1.0, 30.0), "kdv", **KDV, velocity=0.8)
    expected = _soliton(T, X, 1.0, 30.0 + 0.8 * T) + 0.8
    # Where the series is cut: 1e-10; tails at the border: e^-28.
    assert (moved - expected).abs().max().item() < 1e-8


def test_scaled_soliton_is_the_soliton_of_another_speed():
    scale = torch.tensor(0.2, dtype=DOUBLE).exp().item()
    moved = _move(_soliton(T, X, 1.0, 25.0), "kdv", **KDV, log_scale=0.2, start=0.5)
    speed = 1.0 / scale**2
    # At time 0 it is where the old one is at time 0.5, in new units of length.
    expected = _soliton(T, X, speed, scale * 25.5)
    inside = X[0] < 50.0
    # Between rows by a cubic: 3 dt^4 / 128 times the fourth derivative in time.
    assert (moved - expected)[:, inside].abs().max().item() < 1e-5


def test_all_together_still_solve_the_equation():
    """Residual of KdV by differences of fourth order: that of the soliton itself."""

    def residual(u):
        dx, dt = 60.0 / 256, 0.05
        time = (u[2:, 3:-3] - u[:-2, 3:-3]) / (2 * dt)
        inner = u[1:-1]
        first = (inner[:, 4:-2] - inner[:, 2:-4]) / (2 * dx)
        third = (inner[:, 5:-1] - 2 * inner[:, 4:-2] + 2 * inner[:, 2:-4] - inner[:, 1:-5]) / 2
        return (time + inner[:, 3:-3] * first + third / dx**3)[:, 20:-60].abs().max().item()

    soliton = _soliton(T, X, 1.0, 25.0)
    moves = {"velocity": 0.5, "log_scale": 0.1, "shift": 2.0}
    moved = _move(soliton, "kdv", **KDV, **moves)
    assert residual(moved) < 1.1 * residual(soliton)
    without_pedestal = moved - 0.5
    assert residual(without_pedestal) > 5 * residual(soliton)


def _burgers(t, x, k, nu):
    """Cole-Hopf of a solution of the heat equation with one wave."""
    decay = 0.5 * torch.exp(-nu * k**2 * t)
    return 2 * nu * decay * k * torch.sin(k * x) / (1 + decay * torch.cos(k * x))


def test_scaled_burgers_is_a_longer_wave_of_the_same_viscosity():
    length, dt, nu, k = 10.0, 0.02, 0.3, 2 * torch.pi / 10.0
    t, x = _grid(length, 64, dt, 21)
    moved = _move(_burgers(t, x, k, nu), "burgers", length, dt, log_scale=0.3, shift=1.5)
    expected = _burgers(t, x - 1.5, k / torch.tensor(0.3, dtype=DOUBLE).exp(), nu)
    assert (moved - expected).abs().max().item() < 1e-8


def test_heat_is_scaled_and_multiplied():
    length, dt, nu, k = 8.0, 0.05, 0.1, 2 * torch.pi / 8.0
    t, x = _grid(length, 32, dt, 21)

    def wave(k):
        return torch.exp(-nu * k**2 * t) * torch.cos(k * x)

    moved = _move(wave(k), "heat", length, dt, log_scale=-0.2, start=0.0, amplitude=2.5)
    stretched = wave(k * torch.tensor(0.2, dtype=DOUBLE).exp())
    # Behind these, a slower evolution would need later rows than there are.
    rows = 14
    assert (moved - 2.5 * stretched)[:rows].abs().max().item() < 1e-8


def test_kuramoto_sivashinsky_has_the_residual_of_the_moved_place():
    """u_t + u u_x + u_xx + u_xxxx of a boosted field, solution or not, is that of x - v t."""
    length, rows, dt = 2 * torch.pi, 9, 1e-3
    t, x = _grid(length, 32, dt, rows)

    def residual(u):
        waves = 1j * torch.arange(17, dtype=DOUBLE)
        first, second, fourth = (
            torch.fft.irfft(torch.fft.rfft(u) * waves**n, n=32) for n in (1, 2, 4)
        )
        time = (u[2:] - u[:-2]) / (2 * dt)
        return time + (u * first + second + fourth)[1:-1]

    u = torch.sin(x - 2 * t) + 0.3 * torch.cos(2 * x + t)
    boosted = _move(u, "ks", length, dt, velocity=0.7)
    # The residual starts one row later, when the place has moved by v dt.
    expected = _move(residual(u), "ks", length, dt, velocity=0.7, shift=0.7 * dt) - 0.7
    assert (residual(boosted) - expected).abs().max().item() < 1e-5


def test_nothing_is_the_identity_and_boosts_add_up():
    field = torch.randn(5, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    field = _move(field, "kdv", 3.0, 0.1)
    torch.testing.assert_close(_move(field, "kdv", 3.0, 0.1), field)
    # Without the highest mode, which a shift cannot keep on an even grid.
    field = torch.fft.irfft(torch.fft.rfft(field)[..., :8], n=16)
    twice = _move(_move(field, "kdv", 3.0, 0.1, velocity=0.4), "kdv", 3.0, 0.1, velocity=0.5)
    torch.testing.assert_close(twice, _move(field, "kdv", 3.0, 0.1, velocity=0.9))
    torch.testing.assert_close(_move(field, "kdv", 3.0, 0.1, shift=3.0), field)


def test_a_window_leaves_room_for_slower_evolutions_and_later_starts():
    x = torch.arange(8) * (5.0 / 8)
    rows = torch.linspace(0, 1, 21)
    field = (rows[:, None] + 0 * x).expand(300, 21, 8)
    technique = LieSymmetryAugment("burgers", length=5.0, dt=0.05, scale=0.3, window=11)
    times = technique.view(field, torch.Generator().manual_seed(0))[..., 0]
    # u is the time: divided by l, and t / l^2 apart.
    spans = times[:, -1] - times[:, 0]
    assert times.shape == (300, 11)
    assert spans.min() < 0.5
    assert spans.max() > 0.5
    log_scale = -(spans / 0.5).log() / 3
    assert log_scale.min().item() == pytest.approx(-0.3, abs=0.02)
    assert log_scale.max().item() == pytest.approx(0.3, abs=0.02)
    latest = times[:, -1] * log_scale.exp()
    assert 0.95 < latest.max().item() <= 1.0 + 1e-5
    assert times.min().item() >= 0


class Fields(Host):
    """Steps a field on; keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Linear(8, 8), []

    def training_step(self, batch, batch_idx):
        self.seen.append([part.detach() for part in batch])
        return F.mse_loss(self.net(batch[0]), batch[1])


def _field_loader():
    t, x = _grid(8.0, 8, 0.1, 8)
    starts = torch.arange(6, dtype=DOUBLE)[:, None, None]
    fields = torch.sin(2 * torch.pi / 8 * (x - t - starts)).float()
    return DataLoader(TensorDataset(fields[:, :4], fields[:, 4:]), batch_size=6), fields


def test_targets_that_are_the_continuation_move_along():
    data, fields = _field_loader()
    settings = {"length": 8.0, "dt": 0.1, "shift": 0.0, "velocity": 0.5, "targets": "field"}
    module = Fields()
    trainer([LieSymmetryAugment("burgers", **settings)], max_epochs=1).fit(module, data)
    inputs, targets = module.seen[0]
    moved = torch.cat([inputs, targets], 1)
    velocity = moved.mean((1, 2))
    assert velocity.abs().max() > 0.05
    for field, found, v in zip(fields, moved, velocity, strict=True):
        expected = _move(field.double(), "burgers", 8.0, 0.1, velocity=v.item())
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


def test_samples_that_are_not_drawn_stay_bit_for_bit_and_shapes_are_checked():
    data, fields = _field_loader()
    module = Fields()
    technique = LieSymmetryAugment("kdv", length=8.0, dt=0.1, velocity=1.0, probability=0.5)
    trainer([technique], max_epochs=1).fit(module, data)
    same = [torch.equal(a, b) for a, b in zip(module.seen[0][0], fields[:, :4], strict=True)]
    assert 0 < sum(same) < 6
    with pytest.raises(RegularizationError, match=r"\(B, ..., T, X\)"):
        fit([LieSymmetryAugment("kdv", length=8.0, dt=0.1)])
    wrong = LieSymmetryAugment("kdv", length=8.0, dt=0.1, targets="field")
    with pytest.raises(RegularizationError, match="further rows"):
        trainer([wrong]).fit(Fields(), DataLoader(TensorDataset(fields, fields[:, 0]), 6))


class Viscosity(L.LightningModule):
    """Reads the viscosity off a decaying field."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def _decays(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    nu = torch.rand(samples, generator=generator, dtype=DOUBLE)
    t, x = _grid(2 * torch.pi, 16, 0.2, 8)
    phase = 2 * torch.pi * torch.rand(2, samples, 1, 1, generator=generator, dtype=DOUBLE)
    nu_ = nu[:, None, None]
    one = torch.exp(-nu_ * t) * torch.sin(x - phase[0])
    two = torch.exp(-4 * nu_ * t) * torch.sin(2 * x - phase[1])
    return (one + 0.5 * two).float(), nu.float()


def test_coefficients_are_read_better_from_few_fields():
    """The paper's invariant task, from 32 fields. Measured: 0.080, and 0.049 with it."""
    errors = []
    for callbacks in ([], [LieSymmetryAugment("heat", length=2 * torch.pi, dt=0.2)]):
        module = Viscosity(0)
        data = DataLoader(TensorDataset(*_decays(32, 0)), batch_size=32)
        trainer(callbacks, max_epochs=200).fit(module, data)
        fields, nu = _decays(1000, 1)
        with torch.no_grad():
            errors.append(F.mse_loss(module.net(fields)[:, 0], nu).item())
    assert errors[1] < 0.75 * errors[0]
