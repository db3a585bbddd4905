"""Values that the monitor logs, where it finds its tensors, and what it leaves behind."""

import copy
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import (
    ArgumentError,
    MissingSignalError,
    RegularizationError,
    Signals,
)
from lightning_reg.engine.closed_loop import ClosedLoop
from lightning_reg.metrics import (
    calibration_error,
    predictive_entropy,
    smooth_calibration_error,
)
from lightning_reg.monitors import CalibrationMonitor
from lightning_reg.testing import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Confidence, Host, loader, trainer


class Silent(Host):
    """Returns nothing from its steps."""

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def test_step(self, batch, batch_idx):
        self(batch[0])


def monitor(**kwargs):
    return CalibrationMonitor(**{"figures": False, **kwargs})


def expected(module, x=INPUTS, y=LABELS):
    module.eval()
    with torch.no_grad():
        logits = module(x)
    return {
        "ece": float(calibration_error(logits, y, from_logits=True)),
        "nll": float(F.cross_entropy(logits.double(), y)),
        "entropy": float(predictive_entropy(logits, from_logits=True)),
        "accuracy": float((logits.argmax(1) == y).double().mean()),
    }


def check(metrics, module, stage="val", suffix="", **data):
    for name, value in expected(module, **data).items():
        assert float(metrics[f"{stage}/{name}{suffix}"]) == pytest.approx(value, abs=1e-6), name


def test_logs_the_values_of_all_batches():
    module, run = Silent(), trainer([monitor()])
    run.validate(module, loader(batch_size=24), verbose=False)
    check(run.callback_metrics, module)


def test_further_values_are_logged_where_asked_for():
    names = ["confidence_gap", "overconfidence", "underconfidence", "smece", "aurc"]
    module, run = Silent(), trainer([monitor(metrics=names, n_bins=10)])
    run.validate(module, loader(batch_size=24), verbose=False)
    values = {key[4:]: float(value) for key, value in run.callback_metrics.items()}
    assert set(values) == {*names, "ece", "nll", "entropy", "accuracy"}
    logits = module(INPUTS).detach().double()
    confidence, top = logits.softmax(1).max(1)
    right = (top == LABELS).double()
    gap = float((confidence - right).mean())
    assert values["confidence_gap"] == pytest.approx(gap, abs=1e-6)
    assert values["overconfidence"] - values["underconfidence"] == pytest.approx(gap, abs=1e-6)
    both = values["overconfidence"] + values["underconfidence"]
    assert both == pytest.approx(values["ece"], abs=1e-6)
    assert min(values["overconfidence"], values["underconfidence"]) > 0
    order = confidence.argsort(descending=True)
    risks = (1 - right[order]).cumsum(0) / torch.arange(1, 65)
    # Two of the 64 confidences share a cell of the histogram and count as tied.
    assert values["aurc"] == pytest.approx(float(risks.mean()), abs=1e-3)
    smooth = float(smooth_calibration_error(logits, LABELS, from_logits=True))
    assert values["smece"] == pytest.approx(smooth, abs=1e-5)


def test_logs_test_steps_under_their_own_name():
    module, run = Silent(), trainer([monitor()])
    run.test(module, loader(), verbose=False)
    check(run.callback_metrics, module, "test")


def test_one_monitor_for_validation_and_one_for_test(tmp_path):
    one, other = monitor(stages=["val"], n_bins=5), monitor(stages=["test"], n_bins=20)
    module, run = Silent(), trainer([one, other], max_epochs=1)
    run.fit(module, loader(), loader())
    run.test(module, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]
    assert saved["CalibrationMonitor[val]"]["results"] == one.results
    assert saved["CalibrationMonitor[test]"]["results"] == other.results
    assert not set(one.results) & set(other.results)


class AfterSanityCheck(L.Callback):
    def on_sanity_check_end(self, trainer, pl_module):
        self.seen = dict(trainer.callback_metrics)


def test_each_epoch_starts_afresh_and_the_sanity_check_is_not_counted():
    ours, after = monitor(), AfterSanityCheck()
    module = Silent()
    run = trainer([ours, after], num_sanity_val_steps=2)
    run.fit(module, loader(), loader(batch_size=20))
    assert after.seen == {}
    check(run.callback_metrics, module)
    assert int(ours.reliability["val"].counts.sum()) == len(INPUTS)


def test_the_returned_dict_comes_first():
    class Returns(Silent):
        def validation_step(self, batch, batch_idx):
            self(batch[0])
            return {"logits": 3 * self(batch[0]), "targets": (batch[1] + 1) % 4}

    module, run = Returns(), trainer([monitor()])
    run.validate(module, loader(), verbose=False)
    logits = 3 * module(INPUTS)
    value = calibration_error(logits.detach(), (LABELS + 1) % 4, from_logits=True)
    assert float(run.callback_metrics["val/ece"]) == pytest.approx(float(value), abs=1e-6)


def test_signals_name_another_place():
    class Elsewhere(Silent):
        def validation_step(self, batch, batch_idx):
            self.net[0](batch["features"])
            self.net(batch["features"])

    rows = [{"features": x, "kind": y} for x, y in zip(INPUTS, LABELS, strict=True)]
    signals = Signals(logits="module.net", targets="batch.kind")
    module, run = Elsewhere(), trainer([monitor(signals=signals)])
    run.validate(module, DataLoader(rows, batch_size=16), verbose=False)
    check(run.callback_metrics, module)


def test_a_missing_tensor_is_an_error_in_the_sanity_check():
    class Hides(Silent):
        def validation_step(self, batch, batch_idx):
            self.net.forward(batch[0])

    run = trainer([monitor()], num_sanity_val_steps=1)
    with pytest.raises(MissingSignalError, match=r"CalibrationMonitor.*validation_step") as error:
        run.fit(Hides(), loader(), loader())
    assert 'return {"loss": loss, "logits": logits} from validation_step' in str(error.value)


def test_two_forwards_are_ambiguous():
    class Twice(Silent):
        def validation_step(self, batch, batch_idx):
            self(batch[0]), self(batch[0])

    with pytest.raises(MissingSignalError, match="2 times"):
        trainer([monitor()]).validate(Twice(), loader(), verbose=False)


def test_calls_outside_the_step_are_not_taken_for_it():
    class Meddles(L.Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            pl_module(INPUTS)

    module, run = Silent(), trainer([monitor(), Meddles()])
    run.validate(module, loader(), verbose=False)
    check(run.callback_metrics, module)


def test_several_dataloaders_have_their_own_values():
    class Several(Silent):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    parts = [slice(0, 40), slice(40, 64)]
    loaders = [DataLoader(TensorDataset(INPUTS[p], LABELS[p]), batch_size=16) for p in parts]
    module, run = Several(), trainer([monitor()])
    run.validate(module, loaders, verbose=False)
    for index, part in enumerate(parts):
        suffix = f"/dataloader_idx_{index}"
        check(run.callback_metrics, module, suffix=suffix, x=INPUTS[part], y=LABELS[part])


def test_binary_logits_of_one_column():
    class Binary(Silent):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(8, 1)

    module, run = Binary(), trainer([monitor(task="binary")])
    labels = LABELS % 2
    data = DataLoader(TensorDataset(INPUTS, labels), batch_size=16)
    run.validate(module, data, verbose=False)
    logits = module.net(INPUTS).squeeze(1).detach()
    value = calibration_error(logits, labels, from_logits=True, task="binary")
    assert float(run.callback_metrics["val/ece"]) == pytest.approx(float(value), abs=1e-6)


def test_checkpoints_and_closed_loops_can_follow(tmp_path):
    loop = ClosedLoop("val/ece", target=0.0, gain=1.0)
    best = ModelCheckpoint(tmp_path, monitor="val/ece", save_top_k=1)
    run = trainer([monitor(), Confidence(loop), best], enable_checkpointing=True, max_epochs=1)
    run.fit(Silent(), loader(), loader())
    assert float(best.best_model_score) == float(run.callback_metrics["val/ece"])
    assert loop.value() == pytest.approx(float(run.callback_metrics["val/ece"]), abs=1e-6)


def hooks(module):
    return [len(m._forward_hooks) for m in module.modules()]


def test_leaves_the_module_as_it_was():
    module = Silent()
    trainer().validate(module, loader(), verbose=False)  # Lightning leaves attributes of its own
    before, names = hooks(module), set(vars(module))
    run = trainer([monitor()])
    run.fit(module, loader(), loader())
    run.validate(module, loader(), verbose=False)
    assert hooks(module) == before
    assert set(vars(module)) == names


def test_leaves_the_module_as_it_was_after_an_exception():
    class Fails(Silent):
        def validation_step(self, batch, batch_idx):
            self(batch[0])
            raise RuntimeError("on purpose")

    module = Fails()
    before = hooks(module)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer([monitor()]).validate(module, loader(), verbose=False)
    assert hooks(module) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_works(duplicate):
    ours = monitor()
    trainer([ours]).validate(Silent(), loader(), verbose=False)
    module, run = Silent(), trainer([duplicate(ours)])
    run.validate(module, loader(), verbose=False)
    check(run.callback_metrics, module)


def test_works_on_a_compiled_module():
    module = Silent()
    compiled = torch.compile(module, backend="eager")
    run = trainer([monitor()])
    run.validate(compiled, loader(), verbose=False)
    check(run.callback_metrics, module)


def test_figures_without_matplotlib(monkeypatch):
    monkeypatch.setattr("lightning_reg.monitors.monitor.have_matplotlib", lambda: False)
    with pytest.raises(RegularizationError, match=r"lightning_reg\[demo\]"):
        trainer([monitor(figures=True)]).validate(Silent(), loader(), verbose=False)
    module, run = Silent(), trainer([monitor(figures=None)])
    run.validate(module, loader(), verbose=False)
    check(run.callback_metrics, module)


def fit_on_ranks(size: int):
    """61 samples: one is repeated to give both ranks the same number."""
    data = DataLoader(TensorDataset(INPUTS[:size], LABELS[:size]), batch_size=8)
    module, ours = Silent(), monitor()
    run = rank_trainer(callbacks=[ours], max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, loader(), data)
    fitted = {k: float(v) for k, v in run.callback_metrics.items()}
    run.validate(module, data, verbose=False)
    again = {k: float(v) for k, v in run.callback_metrics.items()}
    return fitted, again, expected(module, INPUTS[:size], LABELS[:size])


def test_two_ranks_equal_one_process_and_repeats_count_once(ranks):
    for fitted, again, wanted in ranks.run(fit_on_ranks, 61):
        for name, value in wanted.items():
            assert fitted[f"val/{name}"] == pytest.approx(value, abs=1e-6), name
            assert again[f"val/{name}"] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ({"n_bins": 0}, "n_bins=15"),
        ({"stages": ["train"]}, "stages="),
        ({"stages": "val"}, "stages="),
        ({"every_n_epochs": 0}, "every_n_epochs=1"),
        ({"from_logits": None}, "from_logits=True"),
        ({"figures": ["pie"]}, r'figures=\["reliability"\]'),
        ({"figures": "reliability"}, r'figures=\["reliability"\]'),
        ({"metrics": ["ece3"]}, r'metrics=\["overconfidence"\]'),
    ],
)
def test_bad_arguments_are_refused(arguments, cure):
    with pytest.raises(ArgumentError, match=cure):
        CalibrationMonitor(**arguments)


def test_token_logits_have_their_classes_last():
    class Tokens(Silent):
        def validation_step(self, batch, batch_idx):
            return {"logits": self(batch[0]).view(-1, 2, 4), "targets": batch[1].view(-1, 2)}

    module, run = Tokens(), trainer([monitor()])
    run.validate(module, loader(), verbose=False)
    check(run.callback_metrics, module)


def test_a_dict_of_dataloaders():
    class Several(Silent):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    module, run = Several(), trainer([monitor()])
    run.validate(module, {"one": loader(), "other": loader()}, verbose=False)
    check(run.callback_metrics, module, suffix="/dataloader_idx_1")
