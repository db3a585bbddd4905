"""Group lasso: norms of filters and inputs, and groups that vanish as a whole."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.group_lasso import GroupLasso, group_lasso
from tests.engine.simple import INPUTS, Host, fit
from tests.techniques.weights.penalty import Still, check_closed_form, check_proximal, matrix

KERNEL = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_value_is_the_sum_of_norms_times_root_of_size():
    flat = KERNEL.numpy().reshape(5, 12)
    rows = sum(np.sqrt(12) * np.linalg.norm(row) for row in flat)
    columns = sum(np.sqrt(5) * np.linalg.norm(column) for column in flat.T)
    np.testing.assert_allclose(group_lasso(KERNEL).item(), rows, rtol=1e-12)
    np.testing.assert_allclose(group_lasso(KERNEL, "columns").item(), columns, rtol=1e-12)


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_closed_form_is_the_gradient_of_the_value(groups):
    technique = GroupLasso(groups=groups)
    check_closed_form(technique, [matrix(), matrix(2, 5), matrix(seed=1)])


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_proximal_step_is_the_minimum_with_groups_of_zeros(groups):
    w = matrix()
    w[0] *= 0.1
    w[:, 1] *= 0.1
    technique = GroupLasso(groups=groups)
    found = check_proximal(technique, w, 0.3, lambda u: group_lasso(u, groups))
    zeros = (found == 0).all(1 if groups == "rows" else 0)
    assert zeros.any()
    assert not zeros.all()
    # No zero outside of such a group.
    assert (found == 0).sum() == zeros.sum() * (found.numel() // len(zeros))


def test_group_of_zeros_has_no_gradient_and_stays():
    w = torch.zeros(2, 3)
    technique = GroupLasso()
    assert technique.closed_form([w])[1][0].tolist() == w.tolist()
    assert technique.proximal_form([w], [0.1])[0].tolist() == w.tolist()
    assert technique.proximal_form([w], [0.0])[0].tolist() == w.tolist()


def test_group_is_gone_after_its_norm_over_the_step():
    # Without a loss a row loses lr * strength * sqrt(8) of its norm per step, to exactly zero.
    module = Still()
    norms = module.net[0].weight.detach().norm(dim=1)
    technique = GroupLasso(0.2, mode="proximal", parameters="net.0.weight")
    fit([technique], module=module, max_epochs=1)
    left = (norms - 4 * 0.1 * 0.2 * 8**0.5).clamp_min(0)
    torch.testing.assert_close(module.net[0].weight.detach().norm(dim=1), left)
    fit([technique], module=module, max_epochs=3)
    assert (module.net[0].weight == 0).all()


def test_inputs_that_carry_nothing_are_cut_off():
    # Columns of the first layer are inputs; the labels depend on the first two only.
    class Two(Host):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], (batch[0][:, :2].sum(1) > 0).long()), 0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    technique = GroupLasso(0.03, groups="columns", mode="proximal", parameters="net.0.weight")
    module, _ = fit([technique], module=Two(), batch_size=64, max_epochs=150)
    norms = module.net[0].weight.detach().norm(dim=0)
    # 64 samples: two of the six other inputs happen to say something about the labels.
    assert (norms[2:] == 0).sum() >= 4
    assert norms[:2].min() > 4 * norms[2:].max()
    with torch.no_grad():
        right = (module(INPUTS).argmax(1) == (INPUTS[:, :2].sum(1) > 0)).float().mean()
    assert right > 0.9


@pytest.mark.parametrize("arguments", [{"strength": -1.0}, {"groups": "layers"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="GroupLasso"):
        GroupLasso(**arguments)
