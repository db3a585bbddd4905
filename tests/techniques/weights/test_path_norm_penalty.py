"""Path norm: what a unit is worth whatever its scale, and the total variation of f'."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.path_norm_penalty import PathNormPenalty, path_norm_penalty
from tests.engine.simple import Host, fit, trainer
from tests.techniques.weights.penalty import matrix


def test_it_is_the_total_variation_of_the_derivative_in_one_dimension():
    # f(x) = sum_k v_k relu(w_k x + b_k): its slope jumps at the kinks, by |w_k v_k| each.
    w, v, b = matrix(7, 1), matrix(1, 7, seed=1), matrix(7, 1, seed=2)
    net = nn.Sequential(nn.Linear(1, 7), nn.ReLU(), nn.Linear(7, 1)).double()
    with torch.no_grad():
        for p, value in zip(net.parameters(), (w, b[:, 0], v, v[0, :1]), strict=True):
            p.copy_(value)
    kinks = np.sort((-b / w).numpy().ravel())
    # A slope between each two neighbours, measured on the function.
    middles = np.concatenate([[kinks[0] - 1], (kinks[1:] + kinks[:-1]) / 2, [kinks[-1] + 1]])
    h = np.diff(kinks).min() / 8
    with torch.no_grad():
        high, low = (net(torch.from_numpy(middles + s)[:, None]) for s in (h, -h))
    slopes = ((high - low) / (2 * h)).numpy().ravel()
    variation = np.abs(np.diff(slopes)).sum()
    assert path_norm_penalty(w, v).item() == pytest.approx(variation, rel=1e-9)


def test_rescaling_units_changes_weight_decay_but_not_the_path_norm():
    w, v, c = matrix(5, 3), matrix(2, 5, seed=1), matrix(5, 1, seed=2).exp()
    plain, scaled = path_norm_penalty(w, v), path_norm_penalty(c * w, v / c.T)
    torch.testing.assert_close(plain, scaled)
    # At most half the squares, and equal if every unit is balanced.
    assert plain < (w.square().sum() + v.square().sum()) / 2
    balance = (v.norm(dim=0) / w.norm(dim=1)).sqrt()[:, None]
    squares = (balance * w).square().sum() + (v / balance.T).square().sum()
    torch.testing.assert_close(plain, squares / 2)


def test_convolutions_count_filters_and_what_reads_them():
    first, second = torch.randn(4, 3, 2, 2).double(), torch.randn(5, 4, 3, 3).double()
    expected = sum(first[k].norm() * second[:, k].norm() for k in range(4))
    torch.testing.assert_close(path_norm_penalty(first, second), expected)
    # Behind a flatten a linear layer has six inputs for each channel.
    head = torch.randn(7, 24).double()
    expected = sum(first[k].norm() * head[:, 6 * k : 6 * k + 6].norm() for k in range(4))
    torch.testing.assert_close(path_norm_penalty(first, head), expected)


@pytest.mark.parametrize(
    "shapes", [((4, 3), (2, 4)), ((4, 3, 2, 2), (5, 4, 3, 3)), ((4, 3), (7, 24))]
)
def test_closed_form_is_the_gradient_of_the_value(shapes):
    generator = torch.Generator().manual_seed(0)
    w, v = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    leaves = [w.clone().requires_grad_(), v.clone().requires_grad_()]
    expected = torch.autograd.grad(path_norm_penalty(*leaves), leaves)
    values, (found,) = PathNormPenalty().closed_form([(w, v)])
    torch.testing.assert_close(values[0], path_norm_penalty(w, v))
    torch.testing.assert_close(found, list(expected))


def test_unit_of_zeros_has_no_gradient():
    w, v = torch.zeros(2, 3), torch.ones(1, 2)
    _, ((of_w, of_v),) = PathNormPenalty().closed_form([(w, v)])
    assert torch.equal(of_w, w)
    assert torch.equal(of_v, torch.zeros(1, 2))


def deep():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Conv2d(6, 6, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(54, 5), nn.Tanh(),
        nn.Linear(5, 2),
    )  # fmt: skip


def test_pairs_are_found_where_units_can_be_rescaled_and_nowhere_else():
    net = nn.Module()
    net.body = deep()
    found = PathNormPenalty().find_paths(net)
    # Not through a BatchNorm, nor through a tanh.
    assert found == [
        ("body.0.weight", "body.3.weight"),
        ("body.6.weight", "body.9.weight"),
    ]


def test_layer_in_two_pairs_takes_both_pulls():
    class Three(Host):
        def __init__(self):
            super().__init__(lr=0.0)
            self.net = nn.Sequential(
                nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)
            )

    grads = []
    for mode in ("gradient", "loss"):
        module = Three()
        module.net[4].weight.requires_grad_(False)

        class Looks(PathNormPenalty):
            def edit_gradients(self, update):
                grads.append(update.module.net[2].weight.grad.clone())
                assert update.module.net[4].weight.grad is None

        fit([Looks(1.0, mode=mode)], module=module, batch_size=64, max_epochs=1)
    torch.testing.assert_close(grads[0], grads[1])


class Knots(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 30), nn.ReLU(), nn.Linear(30, 1))

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


def test_training_moves_the_function_to_less_variation_of_slope():
    x = torch.linspace(-1, 1, 21)[:, None]
    y = x.abs() + 0.2 * torch.randn(21, 1, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, y), batch_size=21)
    variations = []
    for callbacks in ([], [PathNormPenalty(3e-3)]):
        module = Knots()
        trainer(callbacks, max_epochs=300).fit(module, data)
        variations.append(float(path_norm_penalty(module.net[0].weight, module.net[2].weight)))
        fit_error = float((module.net(x) - y).square().mean())
        assert fit_error < 0.03
    # |x| has a variation of 2, which the noise makes the free fit exceed (3.1 against 1.7).
    assert variations[1] < 2.1 < 2.7 < variations[0]


@pytest.mark.parametrize("arguments", [{"strength": -1.0}, {"pairs": [["a"]]}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="PathNormPenalty"):
        PathNormPenalty(**arguments)


@pytest.mark.parametrize("pairs", [[["net.0", "head"]], [["net.0", "net.0"]]])
def test_pairs_that_are_none_are_refused_before_training(pairs):
    with pytest.raises(ArgumentError, match="PathNormPenalty"):
        fit([PathNormPenalty(1.0, pairs=pairs)])


def test_network_without_a_pair_is_refused():
    with pytest.raises(ArgumentError, match="pairs="):
        PathNormPenalty().find_paths(nn.Linear(2, 2))
