"""A small GAN on points of the plane, with two optimizers under manual optimization."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import RegularizeMixin
from tests.engine.simple import trainer

_generator = torch.Generator().manual_seed(0)
POINTS = torch.randn(64, 2, generator=_generator) * 0.5 + torch.tensor([2.0, 0.0])
NOISE = torch.randn(64, 3, generator=_generator)


class GAN(RegularizeMixin, L.LightningModule):
    """A Wasserstein GAN; the step is written as users write theirs.

    Args:
        critic: the critic; a linear one has a known gradient.
        critic_steps: critic updates for each update of the generator.
        hand_over: whether the critic's call passes the critic.
    """

    def __init__(self, critic=None, critic_steps: int = 1, hand_over: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.critic = critic if critic is not None else mlp()
        self.critic_steps = critic_steps
        self.hand_over = hand_over

    def training_step(self, batch, batch_idx):
        real, noise = batch
        generator_optimizer, critic_optimizer = self.optimizers()

        self.toggle_optimizer(critic_optimizer)
        for _ in range(self.critic_steps):
            fake = self.generator(noise).detach()
            loss = self.critic(fake).mean() - self.critic(real).mean()
            if self.hand_over:
                loss = self.regularize(loss, critic=self.critic, real=real, fake=fake)
            self.log("critic_loss", loss)
            critic_optimizer.zero_grad()
            self.manual_backward(loss)
            critic_optimizer.step()
        self.untoggle_optimizer(critic_optimizer)

        self.toggle_optimizer(generator_optimizer)
        loss = self.regularize(-self.critic(self.generator(noise)).mean())
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()
        self.untoggle_optimizer(generator_optimizer)

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.generator.parameters(), 0.05),
            torch.optim.SGD(self.critic.parameters(), 0.05),
        )


def mlp(middle: nn.Module | None = None) -> nn.Sequential:
    """A critic that is not linear."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(2, 8), middle if middle is not None else nn.Identity(), nn.Tanh(), nn.Linear(8, 1)
    )


def loader(rows: slice = slice(None), batch_size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(POINTS[rows], NOISE[rows]), batch_size=batch_size)


def fit(techniques=(), module: GAN | None = None, epochs: int = 2, **settings):
    """Train; returns the module and the Trainer."""
    module = module if module is not None else GAN()
    run = trainer(techniques, max_epochs=epochs, **settings)
    run.fit(module, loader())
    return module, run
