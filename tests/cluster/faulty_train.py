"""The cluster example with one fault at step 27: rank 1 is killed, or told to make room.

The fault comes in the first turn of the job only, as torchrun and SLURM count turns.
"""

import os
import signal
import sys

from lightning.pytorch.callbacks import Callback

from tests.cluster.launch import load_example


class Fault(Callback):
    def __init__(self, number):
        self.number = number

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_rank == 1 and trainer.global_step == 27:
            os.kill(os.getpid(), self.number)


def main(
    fault: str,
    devices: int,
    num_nodes: int,
    folder: str,
    epochs: int,
    save_every: int,
    timeout: int,
):
    turns = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    first = all(os.environ.get(name, "0") == "0" for name in turns)
    load_example().main(
        devices=devices,
        num_nodes=num_nodes,
        accelerator="cpu",
        epochs=epochs,
        save_every=save_every,
        timeout=timeout,
        folder=folder,
        callbacks=[Fault(getattr(signal, fault))] if first else [],
    )


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main, as_positional=False, args=sys.argv[1:])
