"""``Trainer(strategy="ddp_reg")`` works after ``import lightning_reg``, for both import names."""

import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_reg.strategies.ddp_reg import RegularizedDDPStrategy
from lightning_reg.strategies.registry import register
from lightning_reg.techniques.sharpness.sam import SAM
from tests.engine.simple import fit, weights

PROGRAM = """
import sys
import pytorch_lightning as pl
import torch
import lightning_reg
assert "lightning_reg.strategies.ddp_mixin" not in sys.modules, "not lazy"

import lightning as L
settings = dict(strategy="ddp_reg", accelerator="cpu", logger=False)
trainer = L.Trainer(devices=2, **settings)
assert type(trainer.strategy).__module__ == "lightning_reg.strategies.ddp_reg"
trainer = pl.Trainer(devices=2, **settings)
assert isinstance(trainer.strategy, pl.strategies.DDPStrategy)
assert trainer.strategy.guard_every_n_steps == 100

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

module = Module()
start = module.layer.weight.detach().clone()
settings |= dict(max_steps=2, enable_checkpointing=False, callbacks=[lightning_reg.SAM(0.1)])
trainer = pl.Trainer(devices=1, **settings)
trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4))
assert trainer.global_step == 2
assert not torch.equal(start, module.layer.weight)
"""


def test_importing_the_package_is_enough_for_both_import_names():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddp_reg", {}),
        ("ddp_reg_find_unused_parameters_true", {"find_unused_parameters": True}),
        ("ddp_reg_find_unused_parameters_false", {"find_unused_parameters": False}),
        ("ddp_reg_static_graph", {"static_graph": True}),
        ("ddp_reg_spawn", {}),
    ],
)
def test_variants_carry_their_settings_to_ddp(name, settings):
    trainer = L.Trainer(strategy=name, accelerator="cpu", devices=2, logger=False)
    assert type(trainer.strategy) is RegularizedDDPStrategy
    assert trainer.strategy._ddp_kwargs == settings
    assert trainer.strategy._start_method == ("spawn" if "spawn" in name else "popen")


def test_has_a_variant_for_each_of_lightnings():
    theirs = {name for name in StrategyRegistry if name == "ddp" or name.startswith("ddp_")}
    theirs = {name for name in theirs if not name.startswith("ddp_reg")}
    ours = {name.replace("ddp_reg", "ddp") for name in StrategyRegistry if "ddp_reg" in name}
    assert theirs <= ours


def test_registering_twice_is_harmless():
    before = list(StrategyRegistry)
    register()
    assert list(StrategyRegistry) == before


def test_one_device_trains_as_without_it():
    plain, _ = fit([SAM(0.1)])
    try:
        module, trainer = fit(
            [SAM(0.1)], strategy="ddp_reg", devices=1, use_distributed_sampler=False
        )
        assert type(trainer.strategy) is RegularizedDDPStrategy
        assert trainer.strategy._guard is None
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(weights(module), weights(plain))


SPAWNED = """
import os
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
import torch
from lightning_reg import SAM, NormLoss
from tests.engine.simple import fit, weights

def train(**settings):
    return weights(fit([NormLoss(0.3), SAM(0.1, sharpness="global")], **settings)[0])

if __name__ == "__main__":
    torch.set_num_threads(1)
    # Each step takes all samples, so that no sampler's order matters.
    joint = train(batch_size=64, max_epochs=6)
    spawned = train(batch_size=32, max_epochs=6, strategy="ddp_reg_spawn", devices=2)
    torch.testing.assert_close(spawned, joint, rtol=0, atol=1e-6)
    bare = weights(fit(batch_size=64, max_epochs=6)[0])
    assert (spawned - bare).abs().max() > 1e-2
"""


def test_spawned_ranks_train_what_one_process_trains():
    done = subprocess.run([sys.executable, "-c", SPAWNED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
