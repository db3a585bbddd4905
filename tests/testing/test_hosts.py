"""Hosts offer every variant that the checks rely on."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_reg.engine import MissingSignalError, Regularizer
from lightning_reg.testing import (
    AutoencoderHost,
    ClassifierHost,
    DictBatchHost,
    HostOptions,
    ImageHost,
    RegressorHost,
    SeveralLossesHost,
)
from lightning_reg.testing.hosts import SAMPLES, HostFailure, indexed, recorded

HOSTS = [
    AutoencoderHost,
    ClassifierHost,
    DictBatchHost,
    ImageHost,
    RegressorHost,
    SeveralLossesHost,
]
OMISSIONS = [(host, signal) for host in HOSTS for signal in sorted(host.omits)]


class Reads(Regularizer):
    """Asks for one signal, and remembers what it saw."""

    def __init__(self, signal):
        super().__init__(1.0)
        self.signal = signal
        self.seen = []

    def penalty(self, step):
        value = getattr(step, self.signal)
        if value is None:
            raise MissingSignalError(self, self.signal)
        self.seen.append(value)


def fit(host, options, callbacks=(), **kwargs):
    module = host(options)
    data = indexed(host.dataset(options), options)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **kwargs,
    )
    trainer.fit(module, DataLoader(data, batch_size=8))
    return module


@pytest.mark.parametrize(("host", "signal"), OMISSIONS)
def test_an_omitted_signal_cannot_be_found(host, signal):
    found = Reads(signal)
    fit(host, HostOptions(), [found])
    assert len(found.seen) == 4
    with pytest.raises(MissingSignalError):
        fit(host, HostOptions(omit=signal), [Reads(signal)])


@pytest.mark.parametrize("host", HOSTS)
def test_manual_optimization_trains_the_same_weights(host):
    weights = [
        [p.detach() for p in fit(host, HostOptions(manual=manual), [Reads("inputs")]).parameters()]
        for manual in (False, True)
    ]
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_start_the_same_and_leave_the_global_generator_alone(host):
    state = torch.get_rng_state()
    one, other = host(), host()
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_sample_is_counted_once():
    assert int(fit(ClassifierHost, HostOptions(), [Reads("inputs")]).counted.samples) == SAMPLES


def test_only_the_poisoned_step_sees_nan():
    finite = [
        bool(loss.isfinite())
        for loss, _ in fit(ClassifierHost, HostOptions(nan_at=3), [Reads("inputs")]).seen
    ]
    assert finite == [True, True, True, False]


@pytest.mark.parametrize(("rank", "clean"), [(0, False), (1, True)])
def test_poison_can_be_meant_for_one_rank(rank, clean):
    module = fit(ClassifierHost, HostOptions(nan_at=0, nan_rank=rank), [Reads("inputs")])
    assert bool(module.seen[0][0].isfinite()) is clean


def test_failure_can_wait_for_the_second_run_of_a_step():
    fit(ClassifierHost, HostOptions(fail_at=1, fail_call=1), [Reads("inputs")])
    with pytest.raises(HostFailure):
        fit(ClassifierHost, HostOptions(fail_at=1), [Reads("inputs")])


def test_recorded_outputs_have_the_names_of_submodules():
    host = ClassifierHost()
    with recorded(host) as outputs:
        logits = host(torch.zeros(2, 8))
    assert outputs["head"] is logits
    assert outputs["encoder"].shape == (2, 16)
    assert not any(part._forward_hooks for part in host.modules())
