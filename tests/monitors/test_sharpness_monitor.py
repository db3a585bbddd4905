"""What the monitor measures, that it leaves no trace, and where it refuses."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError, UnsupportedError
from lightning_reg.metrics import hessian_eigenvalues, hessian_trace
from lightning_reg.monitors import SharpnessMonitor
from lightning_reg.testing import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Confidence, Host, fit, loader, trainer, weights


class Validated(Host):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def expected(module, rows):
    module.eval()
    parameters = list(module.parameters())
    loss = F.cross_entropy(module(INPUTS[rows]), LABELS[rows])
    trace = hessian_trace(loss, parameters, probes=6)
    top = hessian_eigenvalues(loss, parameters, 2, iterations=40, tolerance=1e-3)
    return float(trace.value), float(trace.standard_error), top.values


def check(metrics, module, rows, stage="val"):
    trace, error, top = expected(module, rows)
    # Batches of one set differ from the whole by float32 rounding.
    assert float(metrics[f"{stage}/hessian_trace"]) == pytest.approx(trace, rel=1e-4)
    assert float(metrics[f"{stage}/hessian_trace_error"]) == pytest.approx(error, rel=1e-3)
    assert float(metrics[f"{stage}/hessian_top_eigenvalue"]) == pytest.approx(
        float(top[0]), rel=2e-3
    )
    assert float(metrics[f"{stage}/hessian_top_eigenvalue_2"]) == pytest.approx(
        float(top[1]), rel=2e-3
    )


def monitor(**kwargs):
    return SharpnessMonitor(**{"probes": 6, "k": 2, "iterations": 40, **kwargs})


@pytest.mark.parametrize("batch_norm", [False, True])
def test_measures_the_first_batches_in_eval_mode(batch_norm):
    module = Validated(batch_norm=batch_norm, dropout=0.3)
    run = trainer([monitor(batches=2)])
    run.validate(module, loader(batch_size=24), verbose=False)
    check(run.callback_metrics, module, slice(0, 48))


def test_measures_the_users_loss_without_the_techniques_at_each_validation():
    ours, module = monitor(batches=4), Validated()
    run = trainer([ours, Confidence(0.5)])
    run.fit(module, loader(), loader())
    check(run.callback_metrics, module, slice(None))
    assert ours._kept == []


def test_training_batches_of_the_epoch():
    module = Validated(lr=0.0)
    run = trainer([monitor(batches=2, data="train")], num_sanity_val_steps=0)
    run.fit(module, loader(), loader())
    check(run.callback_metrics, module, slice(0, 32), "train")


def test_training_does_not_notice():
    plain, ours = Validated(batch_norm=True, dropout=0.3), Validated(batch_norm=True, dropout=0.3)
    metrics = []
    for module, callbacks in ((plain, []), (ours, [monitor()])):
        torch.manual_seed(5)
        run = trainer(callbacks)
        run.fit(module, loader(), loader())
        metrics.append(run.callback_metrics)
    assert torch.equal(weights(plain), weights(ours))
    for one, other in zip(plain.buffers(), ours.buffers(), strict=True):
        assert torch.equal(one, other)
    assert metrics[0]["loss"] == metrics[1]["loss"]
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in ours.parameters())


def test_a_loss_of_ones_own_under_manual_optimization():
    class Manual(Validated):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    module, run = Manual(), trainer([monitor(batches=4, loss=loss)])
    run.validate(module, loader(), verbose=False)
    check(run.callback_metrics, module, slice(None))
    with pytest.raises(UnsupportedError, match="SharpnessMonitor: takes the loss"):
        trainer([monitor()]).validate(Manual(), loader(), verbose=False)


def test_parts_that_are_not_asked_for_are_left_out():
    run = trainer([SharpnessMonitor(probes=0)])
    run.validate(Validated(), loader(), verbose=False)
    assert set(run.callback_metrics) == {"val/hessian_top_eigenvalue"}
    run = trainer([SharpnessMonitor(probes=2, k=0)])
    run.validate(Validated(), loader(), verbose=False)
    assert set(run.callback_metrics) == {"val/hessian_trace", "val/hessian_trace_error"}


def measure():
    module, run = Validated(), rank_trainer(callbacks=[monitor(batches=2)])
    run.validate(module, loader(batch_size=16), verbose=False)
    return {key: float(value) for key, value in run.callback_metrics.items()}


def test_ranks_measure_what_one_process_measures(ranks):
    one, other = ranks.run(measure)
    assert one == other
    check(one, Validated(), slice(None))


def test_a_run_without_validation_is_left_alone():
    _, run = fit([monitor()])
    assert "val/hessian_trace" not in run.callback_metrics


@pytest.mark.parametrize(
    "arguments",
    [
        {"batches": 0},
        {"probes": -1},
        {"k": 1.5},
        {"data": "test"},
        {"every_n_epochs": 0},
        {"distribution": "cauchy"},
        {"iterations": 0},
    ],
)
def test_bad_arguments_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match="Try: "):
        SharpnessMonitor(**arguments)
