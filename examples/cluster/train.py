"""Digits with wrong labels, on any number of machines: one script for torchrun, SLURM, Kubernetes.

Run: ``python examples/cluster/train.py --epochs 5`` (one process), or one of the files beside it.
Started again, it goes on from the newest checkpoint in ``--folder``, bit for bit.
"""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_reg as reg


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, 256),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(256, 10),
        )

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self(batch[0])  # CalibrationMonitor reads the logits

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Digits(L.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        draw = torch.Generator().manual_seed(0)
        other = (y + torch.randint(1, 10, y.shape, generator=draw)) % 10
        noisy = torch.where(torch.rand(y.shape, generator=draw) < 0.4, other, y)
        # EarlyLearning remembers each sample, so the dataset has to tell which one it is.
        self.training = reg.IndexedDataset(TensorDataset(x[:1200], noisy[:1200]))
        self.held_out = TensorDataset(x[1200:], y[1200:])

    def train_dataloader(self):
        # The order of an epoch follows from its number, and the loader knows its position: both
        # are needed to go on in the middle. `shuffle=True` would draw the order at random.
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        sampler = DistributedSampler(self.training, **ranks)
        return StatefulDataLoader(self.training, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.held_out, batch_size=self.batch_size)


class InsideEpochs(ModelCheckpoint):
    """Saves every n steps but at the last batch of an epoch, which the other one saves."""

    def on_train_batch_end(self, trainer, *args):
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)


class Preemption(Callback):
    """Saves and leaves when SIGTERM or SIGUSR1 comes, at the end of a step, on all ranks alike.

    A signal finds each rank at another place of a step. A checkpoint that is written in the
    handler is of no step, and its collectives meet those of the ranks that train on.
    """

    def __init__(self, folder, every_n_steps):
        self.folder, self.every_n_steps, self.told = folder, every_n_steps, False

    def on_train_start(self, trainer, module):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._take)  # in place of Lightning's own handlers

    def on_train_batch_end(self, trainer, module, *args):
        # The last batch of an epoch is left to the checkpoint between epochs.
        if trainer.is_last_batch or trainer.global_step % self.every_n_steps:
            return
        if trainer.strategy.reduce_boolean_decision(self.told, all=False):
            trainer.save_checkpoint(self.folder / "preempted.ckpt")
            ask_for_another_turn(trainer)

    def _take(self, number, frame):
        self.told = True


def ask_for_another_turn(trainer):
    """Of SLURM by its command; of torchrun and Kubernetes, which start anew what fails."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and trainer.is_global_zero:
        subprocess.run(["scontrol", "requeue", job], check=False)
    for logger in trainer.loggers:
        logger.finalize("preempted")
    sys.stdout.flush()
    # At once, since all is saved: a process group that the other ranks are leaving as well may
    # keep an orderly exit waiting until the scheduler kills the job, and its requeue with it.
    os._exit(75 if job is None else 0)


def newest(folder):
    """The checkpoint to go on from; the same on every rank, since none trains yet."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1] if found else None


def main(
    devices: int = 1,
    num_nodes: int = 1,
    accelerator: str = "auto",
    epochs: int = 20,
    batch_size: int = 32,
    save_every: int = 10,
    folder: str = "runs/digits",
    resume: str | None = "newest",
    timeout: int = 1800,
    callbacks: list[Callback] | None = None,
) -> L.Trainer:
    """Train.

    Args:
        devices: processes on each machine.
        num_nodes: machines.
        accelerator: "cpu", "gpu" or "auto".
        epochs: passes over the data.
        batch_size: samples per process and step.
        save_every: optimizer steps between two checkpoints inside an epoch.
        folder: of the checkpoints; all machines have to see it.
        resume: "newest" in the folder if there is one, a path, or null for a new run.
        timeout: seconds after which a rank gives up to wait for the others.
        callbacks: further ones.
    """
    L.seed_everything(0)
    path = Path(folder).resolve()
    # The two latest: should one be lost, there is another.
    kept = {
        "dirpath": path,
        "filename": "{step}",
        "save_top_k": 2,
        "monitor": "step",
        "mode": "max",
    }
    trainer = L.Trainer(
        # As strategy="ddp_reg", with an argument.
        strategy=reg.RegularizedDDPStrategy(timeout=timedelta(seconds=timeout)),
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        max_epochs=epochs,
        log_every_n_steps=10,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # SLURM gives ranks and addresses; `Preemption` saves and asks for a requeue.
        plugins=[SLURMEnvironment(auto_requeue=False)] if under_srun() else [],
        callbacks=[
            reg.SAM(rho=0.05),
            reg.NormLoss(1e-3),
            reg.EarlyLearning(strength=3.0),
            reg.LabelSmoothing(0.05),
            reg.CalibrationMonitor(figures=False),
            reg.ExactResume(),
            Preemption(path, save_every),
            InsideEpochs(every_n_train_steps=save_every, **kept),
            ModelCheckpoint(save_on_train_epoch_end=True, **kept),
            *(callbacks or []),
        ],
    )
    start = newest(path) if resume == "newest" else resume
    trainer.fit(Net(), Digits(batch_size), ckpt_path=start)
    if trainer.is_global_zero:
        print({name: round(float(v), 4) for name, v in trainer.callback_metrics.items()})
    torch.distributed.destroy_process_group()  # or its threads may abort the exit
    return trainer


def under_srun():
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main, as_positional=False)
