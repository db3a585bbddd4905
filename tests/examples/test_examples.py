"""The examples run as they stand, at a short setting."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lightning_reg import SAM, CalibrationMonitor, EarlyLearning

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_seed_left(monkeypatch):
    """`seed_everything` writes to the environment, which later tests would read."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


def test_quickstart_learns_the_clean_labels(capsys):
    metrics = load("quickstart").main(epochs=8)
    # 40 % of the training labels are wrong: a network that learned them would stay below.
    assert metrics["val/accuracy"] > 0.8
    assert {"val/ece", "val/nll", "val/entropy"} <= set(metrics)


def test_config_builds_the_callbacks_it_names():
    cli = load("fit_cli").main(
        ["fit", "--config", str(FOLDER / "config.yaml"), "--trainer.max_epochs", "1"]
    )
    kinds = [type(c) for c in cli.trainer.callbacks]
    assert {SAM, EarlyLearning, CalibrationMonitor} <= set(kinds)
    assert cli.trainer.callback_metrics["val/accuracy"] > 0.3


def test_own_technique_keeps_the_contract():
    checks = ("neutral", "acts", "formula", "gradient", "arguments")
    assert load("own_technique").main(*checks) == dict.fromkeys(checks, "kept")


def test_calibration_tracking_draws_and_holds_the_confidence(tmp_path):
    metrics = load("calibration_tracking").main(epochs=21, folder=str(tmp_path))
    assert {"val/confidence_gap", "val/nll_calibrated", "gap/loss"} <= set(metrics)
    drawn = {path.name.split("_step_")[0] for path in (tmp_path / "figures").glob("*.png")}
    assert {
        "val_reliability",
        "val_temperature",
        "val_strength",
        "val_split",
        "val_curves",
    } <= drawn
