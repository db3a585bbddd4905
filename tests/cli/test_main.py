"""The command's subcommands, and where each goes."""

import json

import pytest

from lightning_reg.cli.main import main

FIT = """
seed_everything: 0
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  limit_train_batches: 2
  callbacks:
    - class_path: lightning_reg.SAM
    - class_path: lightning_reg.CalibrationMonitor
      init_args: {figures: false}
model:
  class_path: lightning_reg.compare.model.SmallNet
data:
  class_path: lightning_reg.compare.data.SmallData
  init_args: {train_fraction: 0.2}
"""


def test_help_names_the_subcommands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name in ("list", "show", "compare", "fit"):
        assert name in printed


def test_list_gives_json(capsys):
    assert main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {"SAM", "EarlyLearning", "CalibrationError"} <= {e["class"] for e in entries}


def test_show_takes_a_name(capsys):
    assert main(["show", "CalibrationError"]) == 0
    assert "n_bins" in capsys.readouterr().out


def test_an_unknown_name_is_one_line(capsys):
    assert main(["show", "CalibrationEror"]) == 2
    error = capsys.readouterr().err
    assert "CalibrationError" in error
    assert "Traceback" not in error


def test_fit_reads_a_yaml_file(tmp_path, monkeypatch, capsys):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.chdir(tmp_path)  # LightningCLI saves its configuration where it runs
    config = tmp_path / "given.yaml"
    config.write_text(FIT)
    assert main(["fit", "--config", str(config)]) == 0
    assert "lightning_reg.SAM" in (tmp_path / "config.yaml").read_text()


def test_a_subcommand_is_asked_for(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
