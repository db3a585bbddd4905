"""The guard notices replicas that have drifted apart, and names where and by whom."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.strategies.ddp_reg import RegularizedDDPStrategy
from lightning_reg.strategies.guard import WriteLedger, checksum
from tests.strategies.drift import Drifts, message, subjects, tripped_by_the_catalogue

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4)])
def test_checksum_sees_one_changed_element(dtype, shape):
    tensor = torch.ones(shape, dtype=dtype)
    changed = tensor.clone()
    changed.view(-1)[-1] = 0
    assert checksum(tensor.clone()) == checksum(tensor)
    assert checksum(changed) != checksum(tensor)
    assert checksum(tensor).dtype == torch.int64


def test_checksum_of_a_tensor_without_elements_is_zero():
    assert int(checksum(torch.zeros(0, 3))) == 0


def test_checksum_sees_the_last_bit_and_exchanged_rows():
    tensor = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    nudged = tensor.clone()
    nudged[3, 1] = torch.nextafter(nudged[3, 1], torch.tensor(9.0))
    assert checksum(nudged) != checksum(tensor)
    assert checksum(tensor.flip(0)) != checksum(tensor)
    assert checksum(tensor[:, 0].flip(0)) != checksum(tensor[:, 0])


def test_checksum_is_that_of_the_values_whatever_the_layout():
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)


def test_ledger_knows_the_last_writer_of_each_parameter():
    module = nn.Linear(2, 2)
    ledger = WriteLedger(module)
    first, second = Drifts(), Drifts(name="second")
    module.weight.grad = torch.zeros(2, 2)
    with ledger.writing(first), torch.no_grad():
        module.weight.add_(1)
        module.bias.add_(1)
    with ledger.writing(second):
        module.weight.grad.add_(1)
    with torch.no_grad():
        module.bias.add_(1)
    assert ledger.writer("weight") == "Drifts (reg/second), through its gradient"
    assert ledger.writer("bias") == "Drifts (reg/drifts)"


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        ("drifts", "after 1 steps, first in parameter 'net.4.weight'; the technique that last"),
        ("drifts", "wrote it is Drifts (reg/drifts)"),
        ("gradient", "parameter 'net.4.bias'"),
        ("gradient", "wrote it is DriftsByGradient (reg/drifts_by_gradient), through its gradient"),
        ("state", "after 1 steps, first in StateDrifts.state['table']['rows']; that technique"),
        ("own", "after 3 steps, first in parameter 'net.0.bias'; no technique wrote it"),
        (
            "own_and_sam",
            "parameter 'net.0.bias'; the technique that last wrote it is SAM (reg/sam)",
        ),
    ],
)
def test_every_rank_stops_with_one_error_that_names_place_and_writer(ranks, callbacks, expected):
    one, other = ranks.run(message, callbacks)
    assert one == other
    assert expected in one


def test_masks_are_compared_and_running_statistics_are_not(ranks):
    assert ranks.run(message, "nothing", "norm") == ["", ""]
    one, other = ranks.run(message, "nothing", "masked")
    assert one == other
    assert "first in buffer 'net.0.mask'" in one


def test_no_technique_of_the_catalogue_trips_it(ranks):
    assert len(subjects()) > 10
    assert ranks.run(tripped_by_the_catalogue) == [{}, {}]


def test_compares_every_n_steps_and_at_the_end(ranks):
    # 64 samples on 2 ranks in batches of 8 are 4 steps an epoch; the third step drifts.
    assert "after 4 steps" in ranks.run(message, "own", every=4)[0]
    assert "after 8 steps" in ranks.run(message, "own", every=8)[0]
    assert "after 8 steps" in ranks.run(message, "own", every=100)[0]


def test_zero_turns_it_off(ranks):
    assert ranks.run(message, "own", every=0) == ["", ""]


@pytest.mark.parametrize("every", [-1, "often", float("nan")])
def test_bad_interval_is_refused(every):
    with pytest.raises(ArgumentError, match=r"Try: RegularizedDDPStrategy\("):
        RegularizedDDPStrategy(guard_every_n_steps=every)
