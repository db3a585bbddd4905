"""What a comparison is made of."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_reg.engine.errors import RegularizationError, check_range
from lightning_reg.engine.optional import require

BASELINE = "no technique"
DEFAULT_TECHNIQUES = ("SAM", "EarlyLearning", "SAM+EarlyLearning")


@dataclass(frozen=True)
class Settings:
    """The arguments of ``lightning-reg compare``; see there.

    Attributes:
        techniques: one run each, as written: ``"SAM(rho=0.1)+Mixup"``.
        data: a data set's name.
        module: a LightningModule by import path, in place of the small network.
        datamodule: a LightningDataModule by import path, in place of ``data``.
        label_noise: the share of training labels that are replaced by a wrong one.
        train_fraction: the share of the training set that is used.
        seeds: the number of repetitions.
        epochs: of each training.
        batch_size: over all devices.
        lr: the learning rate of the small network.
        devices: processes for each training.
        strategy: the Trainer's strategy if there are several.
        accelerator: the Trainer's accelerator.
    """

    techniques: tuple[str, ...] = DEFAULT_TECHNIQUES
    data: str = "digits"
    module: str | None = None
    datamodule: str | None = None
    label_noise: float = 0.4
    train_fraction: float = 1.0
    seeds: int = 5
    epochs: int = 40
    batch_size: int = 64
    lr: float = 1e-3
    devices: int = 1
    strategy: str = "auto"
    accelerator: str = "cpu"

    def __post_init__(self) -> None:
        owner = "lightning-reg compare"
        check_range(owner, "label_noise", self.label_noise, 0, 1, cure="--label-noise 0.4")
        check_range(
            owner,
            "train_fraction",
            self.train_fraction,
            0,
            1,
            low_open=True,
            cure="--train-fraction 0.1",
        )
        for name in ("seeds", "epochs", "batch_size", "devices"):
            cure = f"--{name.replace('_', '-')} {max(1, getattr(Settings, name))}"
            check_range(owner, name, getattr(self, name), 1, cure=cure)
        if self.batch_size % self.devices:
            raise RegularizationError(
                owner,
                f"a batch of {self.batch_size} cannot be split over {self.devices} devices",
                cure=f"--batch-size {self.devices * max(1, self.batch_size // self.devices)}",
            )
        if (self.module is None) != (self.datamodule is None):
            raise RegularizationError(
                owner,
                "your own module and data go together: give both --module and --datamodule",
                cure="--module my.Net --datamodule my.Data",
            )
        if self.devices > 1 and self.accelerator != "cpu":
            raise RegularizationError(
                owner,
                "several devices are compared on CPU processes",
                cure=f"--devices {self.devices} --accelerator cpu",
            )


def require_all(*modules: str) -> None:
    """Refuse to start without what the comparison needs beyond the package.

    Raises:
        ModuleNotFoundError: naming the line that installs it.
    """
    for module in modules:
        require(module, "demo", "lightning-reg compare")
