"""One cycle: torch's own values at every step, momentum against the rate, exact on resume."""

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from lightning_reg.engine import UnsupportedError
from lightning_reg.techniques.tuning.one_cycle import OneCycle, one_cycle
from tests.engine.simple import Host, fit


def _torch_values(total, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.4, total_steps=total, **settings)
    values = []
    for _ in range(total):
        group = optimizer.param_groups[0]
        values.append((group["lr"], group["momentum"]))
        optimizer.step()
        if len(values) < total:
            scheduler.step()
    return values


@pytest.mark.parametrize("anneal", ["linear", "cos"])
@pytest.mark.parametrize(("three_phase", "pct"), [(True, 0.45), (True, 0.3), (False, 0.3)])
def test_every_value_is_that_of_torch(three_phase, pct, anneal):
    settings = {"pct_start": pct, "three_phase": three_phase, "anneal_strategy": anneal}
    expected = _torch_values(47, div_factor=10.0, final_div_factor=1000.0, **settings)
    rates = [one_cycle(i, 47, 0.04, 0.4, 4e-5, pct, three_phase, anneal) for i in range(47)]
    momenta = [one_cycle(i, 47, 0.95, 0.85, 0.95, pct, three_phase, anneal) for i in range(47)]
    assert rates == pytest.approx([rate for rate, _ in expected], abs=1e-15)
    assert momenta == pytest.approx([momentum for _, momentum in expected], abs=1e-15)


def test_short_runs_end_at_the_end():
    for total in (1, 2, 3, 4):
        values = [one_cycle(i, total, 0.1, 1.0, 0.001) for i in range(total + 2)]
        assert values[total - 1 :] == [0.001] * 3


class Groups(Host):
    """Two groups of different rates, one without momentum; keeps what each step used."""

    def __init__(self, optimizer="sgd"):
        super().__init__()
        self.kind, self.used = optimizer, []

    def configure_optimizers(self):
        if self.kind == "adam":
            return torch.optim.Adam(self.parameters(), 0.01, betas=(0.7, 0.99))
        groups = [
            {"params": self.net[0].parameters(), "lr": 0.4, "momentum": 0.5},
            {"params": self.net[4].parameters(), "lr": 0.04},
        ]
        return torch.optim.SGD(groups, 0.1)

    def on_before_optimizer_step(self, optimizer):
        momentum = "betas" if self.kind == "adam" else "momentum"
        self.used.append([(g["lr"], g[momentum]) for g in optimizer.param_groups])


def test_groups_keep_their_ratio_and_only_momentum_that_is_there_moves():
    module = Groups()
    _, run = fit([OneCycle()], module=module)
    rates = torch.tensor([[lr for lr, _ in used] for used in module.used], dtype=torch.float64)
    torch.testing.assert_close(rates[:, 0], rates[:, 1] * 10)
    assert rates[0, 0].item() == pytest.approx(0.04)
    assert rates[-1, 0].item() == pytest.approx(4e-5)
    # 8 steps: the turn is at 0.45 * 8 - 1, between the third and the fourth.
    assert rates[:, 0].argmax().item() == 3
    momenta = [used[0][1] for used in module.used]
    assert momenta[0] == 0.95
    assert min(momenta) == momenta[3]
    assert {used[1][1] for used in module.used} == {0}
    # The own values are back.
    own = [(g["lr"], g["momentum"]) for g in run.optimizers[0].param_groups]
    assert own == [(0.4, 0.5), (0.04, 0)]


def test_first_beta_of_adam_is_cycled():
    module = Groups("adam")
    fit([OneCycle(momentum=[0.8, 0.9])], module=module)
    assert module.used[0][0] == (pytest.approx(0.001), (0.9, 0.99))
    assert 0.8 <= module.used[3][0][1][0] < 0.82


def test_accumulated_micro_batches_have_one_rate_and_a_shorter_cycle():
    module = Groups()
    fit([OneCycle()], module=module, accumulate_grad_batches=2)
    expected = [one_cycle(i, 4, 0.04, 0.4, 4e-5) for i in range(4)]
    assert [used[0][0] for used in module.used] == pytest.approx(expected)


def test_what_sets_the_rate_as_well_is_refused():
    class Scheduled(Host):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(UnsupportedError, match="scheduler of its own"):
        fit([OneCycle()], module=Scheduled())
    with pytest.raises(UnsupportedError, match="no end"):
        fit([OneCycle()], max_epochs=-1)
