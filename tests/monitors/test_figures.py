"""Where figures go: each logger in its own way, files where one takes none, never nothing."""

import importlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure

from lightning_reg.monitors import CalibrationMonitor
from lightning_reg.monitors.figures import Drawing, write_figure
from lightning_reg.testing import rank_trainer
from tests.engine.simple import Host, loader, trainer


class Quiet(Host):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def drawing():
    figure = Figure(figsize=(2, 2))
    figure.add_subplot().plot([0, 1], [0.25, 0.75])
    return Drawing(figure, {"error": 0.25, "empty": float("nan")})


def run_with(folder, *loggers, step=7, **more):
    return SimpleNamespace(
        log_dir=str(folder), is_global_zero=True, global_step=step, loggers=list(loggers), **more
    )


def files(folder):
    return sorted(p.name for p in Path(folder).glob("figures/*"))


WRITTEN = ["val_shape_step_00000007.json", "val_shape_step_00000007.png"]
ROOTS = ["lightning.pytorch", "pytorch_lightning"]


def class_of(root, name):
    return getattr(importlib.import_module(f"{root}.loggers"), name)


@pytest.mark.parametrize("root", ROOTS)
def test_tensorboard_holds_the_picture_at_its_step(tmp_path, root):
    logger = class_of(root, "TensorBoardLogger")(tmp_path)
    write_figure(run_with(tmp_path, logger), "val/shape", drawing)
    logger.experiment.flush()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [event.step for event in events.Images("val/shape")] == [7]
    assert events.Images("val/shape")[0].width > 100
    assert files(tmp_path) == []


@pytest.mark.parametrize("root", ROOTS)
def test_wandb_holds_the_picture_with_the_step(tmp_path, root, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = class_of(root, "WandbLogger")(save_dir=tmp_path, offline=True)
    write_figure(run_with(tmp_path, logger), "val/shape", drawing)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["trainer/global_step"] == 7
    assert [p.name for p in tmp_path.rglob("media/images/val/*.png")] != []
    assert files(tmp_path) == []


@pytest.mark.parametrize("root", ROOTS)
def test_mlflow_holds_the_picture_under_its_step(tmp_path, root, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = class_of(root, "MLFlowLogger")(tracking_uri=f"file:{tmp_path}/mlruns")
    write_figure(run_with(tmp_path, logger), "val/shape", drawing)
    (picture,) = tmp_path.rglob("step_00000007.png")
    assert picture.parent.parts[-3:] == ("figures", "val", "shape")
    assert files(tmp_path) == []


class WandbLike:
    """`WandbLogger`: pictures through `log_image`, its experiment is a run."""

    experiment = SimpleNamespace(log=lambda *args, **kwargs: None)

    def log_image(self, key, images, step=None, **kwargs):
        assert isinstance(images, list)
        assert images[0].savefig
        self.call = (key, step)


class MlflowLike:
    """`MLFlowLogger`: its experiment is a client, whose artifacts belong to a run."""

    run_id = "run"

    def __init__(self):
        self.experiment = self

    def log_figure(self, run_id, figure, artifact_file):
        assert figure.savefig
        self.call = (run_id, artifact_file)


class Fails:
    def __init__(self):
        self.asked = 0

    @property
    def experiment(self):
        self.asked += 1
        raise ConnectionError("no server")


@pytest.mark.parametrize(
    ("logger", "call"),
    [
        (WandbLike(), ("val/shape", 7)),
        (MlflowLike(), ("run", "figures/val/shape/step_00000007.png")),
    ],
)
def test_loggers_are_known_by_what_they_can_do(tmp_path, logger, call):
    write_figure(run_with(tmp_path, logger), "val/shape", drawing)
    assert logger.call == call
    assert files(tmp_path) == []


def test_without_a_logger_files_hold_the_picture_and_its_numbers(tmp_path):
    write_figure(run_with(tmp_path), "val/shape", drawing)
    assert files(tmp_path) == WRITTEN
    assert (tmp_path / "figures" / WRITTEN[1]).read_bytes()[1:4] == b"PNG"
    # Strict JSON has no NaN.
    numbers = json.loads(
        (tmp_path / "figures" / WRITTEN[0]).read_text(), parse_constant=pytest.fail
    )
    assert numbers == {"step": 7, "error": 0.25, "empty": None}


def test_several_loggers_each_get_it_and_files_stand_in_for_those_that_take_none(tmp_path):
    one, other = WandbLike(), MlflowLike()
    write_figure(run_with(tmp_path, one, other), "val/shape", drawing)
    assert (one.call[0], other.call[0]) == ("val/shape", "run")
    assert files(tmp_path) == []
    write_figure(run_with(tmp_path, one, CSVLogger(tmp_path)), "val/shape", drawing)
    assert files(tmp_path) == WRITTEN


def test_a_logger_that_fails_warns_once_and_files_are_written(tmp_path):
    broken, other = Fails(), WandbLike()
    runs = [run_with(tmp_path, broken, other, step=step) for step in (7, 8)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for run in runs:
            write_figure(run, "val/shape", drawing)
    said = [str(warning.message) for warning in caught]
    told = [line for line in said if "Fails took no figure (ConnectionError: no server)" in line]
    assert len(told) == 1
    assert len(files(tmp_path)) == 4
    assert broken.asked == 2
    assert other.call == ("val/shape", 8)


def test_only_rank_zero_draws(tmp_path):
    run = run_with(tmp_path)
    run.is_global_zero = False
    write_figure(run, "val/shape", lambda: pytest.fail("drawn on another rank"))
    assert files(tmp_path) == []


def monitor():
    return CalibrationMonitor(figures=["reliability"])


@pytest.mark.parametrize("with_logger", [True, False])
def test_a_run_writes_into_its_log_folder(tmp_path, with_logger):
    logger = CSVLogger(tmp_path) if with_logger else False
    ours = monitor()
    run = trainer([ours], logger=logger, default_root_dir=tmp_path)
    run.validate(Quiet(), loader(), verbose=False)
    folder = Path(logger.log_dir) if with_logger else tmp_path
    assert files(folder) == [
        "val_reliability_step_00000000.json",
        "val_reliability_step_00000000.png",
    ]
    numbers = json.loads((folder / "figures" / files(folder)[0]).read_text())
    assert numbers["counts"] == ours.reliability["val"].counts.tolist()


def test_a_run_with_tensorboard_and_csv(tmp_path):
    board, table = TensorBoardLogger(tmp_path, version=0), CSVLogger(tmp_path)
    run = trainer([monitor()], logger=[board, table], max_epochs=1)
    run.fit(Quiet(), loader(), loader())
    board.experiment.flush()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert [event.step for event in events.Images("val/reliability")] == [4]
    assert files(board.log_dir) == [
        "val_reliability_step_00000004.json",
        "val_reliability_step_00000004.png",
    ]


def test_a_fast_dev_run_leaves_nothing(tmp_path):
    run = trainer([monitor()], default_root_dir=tmp_path, fast_dev_run=True)
    run.fit(Quiet(), loader(), loader())
    assert list(tmp_path.iterdir()) == []


def draw_on_ranks(folder):
    run = rank_trainer(callbacks=[monitor()], max_epochs=1, default_root_dir=folder)
    run.fit(Quiet(), loader(8), loader(8))
    return run.callback_metrics["val/ece"].item()


def test_two_ranks_write_one_picture(ranks, tmp_path):
    first, second = ranks.run(draw_on_ranks, str(tmp_path))
    assert first == second
    pictures = [p.name for p in tmp_path.rglob("*.png")]
    assert pictures == ["val_reliability_step_00000004.png"]
