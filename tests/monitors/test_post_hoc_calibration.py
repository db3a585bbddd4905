"""The callback: what it fits on, what it logs, what it saves, and what predictions come out."""

import copy
from types import SimpleNamespace

import jsonargparse
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_reg.calibrators.beta import BetaCalibration
from lightning_reg.calibrators.correctness_aware import CorrectnessAwareCalibration
from lightning_reg.calibrators.isotonic import IsotonicCalibration
from lightning_reg.calibrators.temperature import TemperatureScaling, fit_temperature
from lightning_reg.calibrators.vector import VectorScaling
from lightning_reg.engine import ArgumentError, MissingSignalError, RegularizationError, Signals
from lightning_reg.metrics import calibration_error, predictive_entropy
from lightning_reg.monitors import CalibrationMonitor, PostHocCalibration
from lightning_reg.monitors.calibrated_predictions import CalibratedPredictions
from lightning_reg.testing import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, loader, trainer


class Silent(Host):
    """Logs nothing of its own in evaluation."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


OTHER = torch.randn(45, 8, generator=torch.Generator().manual_seed(9))
OTHER_LABELS = torch.arange(45) % 4


def logits_of(module, x=INPUTS):
    module.eval()
    with torch.no_grad():
        return module(x)


def data(x, y, batch_size=16):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def expected(logits, labels):
    return {
        "nll": float(F.cross_entropy(logits.double(), labels)),
        "ece": float(calibration_error(logits, labels, from_logits=True)),
        "entropy": float(predictive_entropy(logits, from_logits=True)),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
    }


def check(metrics, stage, raw, calibrated, labels, suffix=""):
    for name, value in expected(raw, labels).items():
        assert float(metrics[f"{stage}/{name}{suffix}"]) == pytest.approx(value, abs=1e-6), name
    for name, value in expected(calibrated, labels).items():
        key = f"{stage}/{name}_calibrated{suffix}"
        assert float(metrics[key]) == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("calibrator", [TemperatureScaling, VectorScaling, IsotonicCalibration])
def test_validation_fits_and_logs_raw_and_calibrated_values(calibrator):
    ours, module = PostHocCalibration(calibrator()), Silent()
    run = trainer([ours])
    run.fit(module, loader(), loader(batch_size=24))
    raw = logits_of(module)
    fresh = calibrator().fit(raw, LABELS)
    torch.testing.assert_close(ours.calibrator.calibrate(raw), fresh.calibrate(raw))
    check(run.callback_metrics, "val", raw, fresh.calibrate(raw), LABELS)
    nll, calibrated = (run.callback_metrics[f"val/nll{end}"] for end in ("", "_calibrated"))
    assert calibrated < nll


def test_test_values_are_those_of_the_calibrator_that_validation_fitted():
    ours, module = PostHocCalibration(), Silent()
    run = trainer([ours])
    run.validate(module, loader(), verbose=False)
    run.test(module, data(OTHER, OTHER_LABELS), verbose=False)
    raw = logits_of(module, OTHER)
    temperature = fit_temperature(logits_of(module), LABELS)
    check(run.callback_metrics, "test", raw, raw / temperature, OTHER_LABELS)


def test_without_a_fit_test_has_raw_values_alone():
    run = trainer([PostHocCalibration()])
    run.test(Silent(), loader(), verbose=False)
    assert "test/nll" in run.callback_metrics
    assert "test/nll_calibrated" not in run.callback_metrics


def test_nothing_is_fitted_in_the_sanity_check():
    class After(L.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            self.fitted = ours.calibrator.fitted

    ours, after = PostHocCalibration(), After()
    trainer([ours, after], num_sanity_val_steps=2).fit(Silent(), loader(), loader())
    assert not after.fitted
    assert ours.calibrator.fitted


def test_several_dataloaders_are_calibrated_by_the_one_that_is_named():
    ours, module = PostHocCalibration(dataloader_idx=1), Silent()
    run = trainer([ours])
    run.validate(module, [loader(), data(OTHER, OTHER_LABELS)], verbose=False)
    raw = [logits_of(module), logits_of(module, OTHER)]
    temperature = fit_temperature(raw[1], OTHER_LABELS)
    assert ours.calibrator.temperature == pytest.approx(temperature, rel=1e-6)
    for index, labels in enumerate([LABELS, OTHER_LABELS]):
        calibrated = raw[index] / temperature
        suffix = f"/dataloader_idx_{index}"
        check(run.callback_metrics, "val", raw[index], calibrated, labels, suffix)


def test_a_dataloader_of_its_own_is_fitted_on():
    ours, module = PostHocCalibration(dataloader=data(OTHER, OTHER_LABELS)), Silent()
    run = trainer([ours])
    run.fit(module, loader(), loader())
    raw = logits_of(module)
    temperature = fit_temperature(logits_of(module, OTHER), OTHER_LABELS)
    assert ours.calibrator.temperature == pytest.approx(temperature, rel=1e-6)
    check(run.callback_metrics, "val", raw, raw / temperature, LABELS)


@pytest.mark.parametrize("own", [False, True])
def test_fit_end_fits_once_on_the_trained_model(own):
    other = {"dataloader": data(OTHER, OTHER_LABELS)} if own else {}
    ours, module = PostHocCalibration(fit_on="fit_end", **other), Silent()
    run = trainer([ours])
    run.fit(module, loader(), loader())
    x, labels = (OTHER, OTHER_LABELS) if own else (INPUTS, LABELS)
    raw = logits_of(module, x)
    temperature = fit_temperature(raw, labels)
    assert ours.calibrator.temperature == pytest.approx(temperature, rel=1e-6)
    assert "val/nll" in run.callback_metrics
    assert "val/nll_calibrated" not in run.callback_metrics
    check(ours.results, "fit", raw, raw / temperature, labels)


def test_a_pass_of_its_own_leaves_modes_and_hooks():
    module = Silent(batch_norm=True, dropout=0.5)
    module.net[3].eval()
    before = {name: child.training for name, child in module.named_modules()}
    statistics = []

    class Reads(L.Callback):
        def on_train_end(self, trainer, pl_module):
            statistics.append(pl_module.net[1].running_mean.clone())

    ours = PostHocCalibration(fit_on="fit_end")
    trainer([Reads(), ours], max_epochs=1).fit(module, loader(), loader())
    assert {name: child.training for name, child in module.named_modules()} == before
    assert torch.equal(module.net[1].running_mean, statistics[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_predictions_come_out_calibrated():
    ours, module = PostHocCalibration(VectorScaling()), Silent()
    run = trainer([ours])
    run.validate(module, loader(), verbose=False)
    predicted = torch.cat(run.predict(module, loader()))
    raw = logits_of(module)
    torch.testing.assert_close(predicted, VectorScaling().fit(raw, LABELS).calibrate(raw))
    assert not torch.allclose(predicted, raw)
    # Outside predict the module is what it was.
    torch.testing.assert_close(logits_of(module), raw)


def test_predict_steps_compute_with_calibrated_logits():
    class Probabilities(Silent):
        def predict_step(self, batch, batch_idx):
            return self(batch[0]).softmax(1)

    ours, module = PostHocCalibration(), Probabilities()
    run = trainer([ours])
    run.validate(module, loader(), verbose=False)
    raw = logits_of(module)
    expected = (raw / fit_temperature(raw, LABELS)).softmax(1)
    torch.testing.assert_close(torch.cat(run.predict(module, loader())), expected)


class Bypasses(Silent):
    """Calls its layers, not itself."""

    def validation_step(self, batch, batch_idx):
        return {"logits": self.net(batch[0])}

    def predict_step(self, batch, batch_idx):
        return {"logits": self.net(batch[0]), "other": 1}


@pytest.mark.parametrize("signals", [None, Signals(logits="outputs.logits")])
def test_logits_in_the_dict_that_a_step_returns_are_calibrated(signals):
    ours, module = PostHocCalibration(signals=signals), Bypasses()
    run = trainer([ours])
    run.validate(module, loader(), verbose=False)
    raw = logits_of(module)
    found = torch.cat([out["logits"] for out in run.predict(module, loader())])
    torch.testing.assert_close(found, raw / fit_temperature(raw, LABELS))


def test_logits_of_forward_that_are_returned_in_a_dict_are_calibrated_once():
    class Both(Silent):
        def predict_step(self, batch, batch_idx):
            return {"logits": self(batch[0])}

    ours, module = PostHocCalibration(), Both()
    run = trainer([ours])
    run.validate(module, loader(), verbose=False)
    raw = logits_of(module)
    found = torch.cat([out["logits"] for out in run.predict(module, loader())])
    torch.testing.assert_close(found, raw / fit_temperature(raw, LABELS))


class Wrapper(torch.nn.Module):
    """What strategies like DeepSpeed put around a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def test_the_call_by_which_a_wrapper_runs_the_step_is_not_calibrated_again():
    module = Silent()
    raw = logits_of(module)
    scaling, wrapper = TemperatureScaling().fit(raw, LABELS), Wrapper(module)
    run = SimpleNamespace(strategy=SimpleNamespace(model=wrapper))
    applied = CalibratedPredictions(scaling, run, module, None)
    found = _ForwardRedirection()(wrapper, module, "predict_step", (INPUTS, LABELS), 0)
    applied.detach()
    torch.testing.assert_close(found.detach(), scaling.calibrate(raw))


def test_logits_of_a_named_layer_are_calibrated_once():
    ours, module = PostHocCalibration(signals=Signals(logits="module.net")), Silent()
    run = trainer([ours])
    run.validate(module, loader(), verbose=False)
    raw = logits_of(module)
    found = torch.cat(run.predict(module, loader()))
    torch.testing.assert_close(found, raw / fit_temperature(raw, LABELS))


def test_predictions_without_logits_are_an_error():
    class Hides(Silent):
        def predict_step(self, batch, batch_idx):
            return self.net.forward(batch[0]).argmax(1)

    ours, module = PostHocCalibration(), Hides()
    run = trainer([ours])
    run.validate(module, loader(), verbose=False)
    with pytest.raises(MissingSignalError, match="apply_in_predict=False"):
        run.predict(module, loader())
    assert not module._forward_hooks


def test_predict_without_a_fit_is_refused_unless_nothing_is_applied():
    with pytest.raises(RegularizationError, match="no fitted calibrator"):
        trainer([PostHocCalibration()]).predict(Silent(), loader())
    run, module = trainer([PostHocCalibration(apply_in_predict=False)]), Silent()
    torch.testing.assert_close(torch.cat(run.predict(module, loader())), logits_of(module))


@pytest.mark.parametrize("calibrator", [TemperatureScaling, IsotonicCalibration])
def test_the_calibrator_goes_with_the_checkpoint(calibrator, tmp_path):
    ours, module = PostHocCalibration(calibrator()), Silent()
    saved = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer([ours, saved], enable_checkpointing=True)
    run.fit(module, loader(), loader())
    predicted = torch.cat(run.predict(module, loader()))
    fresh = trainer([PostHocCalibration(calibrator())])
    again = fresh.predict(Silent(), loader(), ckpt_path=saved.last_model_path)
    assert torch.equal(torch.cat(again), predicted)
    assert fresh.callbacks[-1].results["val/nll_calibrated"] == ours.results["val/nll_calibrated"]
    other = trainer([PostHocCalibration(VectorScaling())])
    with pytest.raises(RegularizationError, match=calibrator.__name__):
        other.predict(Silent(), loader(), ckpt_path=saved.last_model_path)


def test_two_callbacks_have_two_names():
    first = PostHocCalibration()
    second = PostHocCalibration(BetaCalibration(), suffix="beta", apply_in_predict=False)
    run = trainer([first, second, CalibrationMonitor(figures=False)])
    run.fit(Silent(), loader(), loader())
    assert {"val/nll", "val/nll_calibrated", "val/nll_beta"} <= set(run.callback_metrics)
    assert len({first.state_key, second.state_key}) == 2


def test_binary_logits_of_one_column():
    class Binary(Silent):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(8, 1)

    ours, module = PostHocCalibration(TemperatureScaling(task="binary")), Binary()
    run = trainer([ours])
    labels = LABELS % 2
    run.validate(module, data(INPUTS, labels), verbose=False)
    temperature = fit_temperature(logits_of(module).squeeze(1), labels, task="binary")
    assert ours.calibrator.temperature == pytest.approx(temperature, rel=1e-6)
    torch.testing.assert_close(
        torch.cat(run.predict(module, data(INPUTS, labels))), logits_of(module) / temperature
    )


class Tokens(Silent):
    """Logits (B, T, C) with labels (B, T)."""

    def forward(self, x):
        return self.net(x.unsqueeze(1) + torch.arange(3).view(1, 3, 1))


def test_token_logits_with_ignored_positions():
    labels = torch.stack([LABELS, torch.full((64,), -100), LABELS.flip(0)], 1)
    calibrator = TemperatureScaling(class_dim=-1, ignore_index=-100)
    ours, module = PostHocCalibration(calibrator), Tokens()
    run = trainer([ours])
    run.validate(module, data(INPUTS, labels), verbose=False)
    raw, kept = logits_of(module), labels.reshape(-1) >= 0
    rows, row_labels = raw.reshape(-1, 4)[kept], labels.reshape(-1)[kept]
    temperature = fit_temperature(rows, row_labels)
    assert calibrator.temperature == pytest.approx(temperature, rel=1e-6)
    check(run.callback_metrics, "val", rows, rows / temperature, row_labels)
    found = torch.cat(run.predict(module, data(INPUTS, labels)))
    torch.testing.assert_close(found, raw / temperature)


def test_a_class_dimension_that_does_not_fit_is_an_error():
    labels = LABELS.unsqueeze(1).expand(-1, 3)
    with pytest.raises(ArgumentError, match="class_dim=-1"):
        trainer([PostHocCalibration()]).validate(Tokens(), data(INPUTS, labels), verbose=False)


def test_transformed_inputs_are_run_through_the_model():
    calibrator = CorrectnessAwareCalibration([torch.neg, lambda x: 2 * x], lr=1e-2, epochs=20)
    ours, module = PostHocCalibration(calibrator), Silent()
    run = trainer([ours])
    run.validate(module, loader(), verbose=False)
    raw = logits_of(module)
    views = torch.stack([logits_of(module, -INPUTS), logits_of(module, 2 * INPUTS)], 1)
    alone = CorrectnessAwareCalibration(lr=1e-2, epochs=20).fit(raw, LABELS, views=views)
    expected = alone.calibrate(raw, views)
    torch.testing.assert_close(
        torch.cat(run.predict(module, loader())), expected, atol=1e-4, rtol=0
    )


def test_a_copy_works():
    ours = PostHocCalibration()
    trainer([ours]).validate(Silent(), loader(), verbose=False)
    again = copy.deepcopy(ours)
    assert again.calibrator.temperature == ours.calibrator.temperature
    trainer([again]).validate(Silent(), loader(), verbose=False)


@pytest.mark.parametrize(
    "arguments",
    [{"fit_on": "epoch"}, {"dataloader_idx": -1}, {"calibrator": "temperature"}, {"suffix": ""}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="PostHocCalibration"):
        PostHocCalibration(**arguments)


def test_a_calibrator_can_be_named_in_yaml():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=L.Callback)
    arguments = {"calibrator": {"class_path": "lightning_reg.VectorScaling"}, "fit_on": "fit_end"}
    named = {"class_path": "lightning_reg.PostHocCalibration", "init_args": arguments}
    # The newer of its two names.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    ours = instantiate(parser.parse_object({"callback": named})).callback
    assert isinstance(ours.calibrator, VectorScaling)
    assert ours.fit_on == "fit_end"


def test_a_missing_validation_loader_is_an_error():
    with pytest.raises(ArgumentError, match="dataloader"):
        trainer([PostHocCalibration(fit_on="fit_end")]).fit(Silent(), loader())


def _own(own, sampled):
    dataset = TensorDataset(INPUTS[:43], LABELS[:43])
    sampler = DistributedSampler(dataset, shuffle=False) if sampled else None
    return DataLoader(dataset, batch_size=10, sampler=sampler)


def _on_ranks(kind, own, batch_size):
    """45 samples on two ranks: the sampler repeats one."""
    calibrator = {"temperature": TemperatureScaling, "isotonic": IsotonicCalibration}[kind]
    given = {"dataloader": _own(own, sampled=own == "sampled")} if own else {}
    ours, module = PostHocCalibration(calibrator(), **given), Silent()
    run = rank_trainer(callbacks=[ours])
    run.validate(module, data(OTHER, OTHER_LABELS, batch_size), verbose=False)
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    predicted = torch.cat(run.predict(module, data(INPUTS, LABELS)))
    return dict(ours.calibrator.named_buffers()), values, predicted


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
@pytest.mark.parametrize("own", [None, "plain", "sampled"])
def test_two_ranks_fit_and_predict_as_one(ranks, kind, own):
    found = ranks.run(_on_ranks, kind, own, 8)
    calibrator = {"temperature": TemperatureScaling, "isotonic": IsotonicCalibration}[kind]()
    module = Silent()
    given = {"dataloader": _own(own, sampled=False)} if own else {}
    run = trainer([PostHocCalibration(calibrator, **given)])
    run.validate(module, data(OTHER, OTHER_LABELS, 8), verbose=False)
    for rank, (buffers, values, predicted) in enumerate(found):
        for name, value in calibrator.named_buffers():
            # Batches of other sizes may round a logit another way.
            torch.testing.assert_close(buffers[name], value, rtol=1e-6, atol=1e-6)
            assert torch.equal(buffers[name], found[0][0][name])
        for name, value in run.callback_metrics.items():
            assert values[name] == pytest.approx(float(value), abs=1e-6), name
        expected = calibrator.calibrate(logits_of(module))[rank::2]
        torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-5)
