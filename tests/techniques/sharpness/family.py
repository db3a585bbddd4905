"""Problems on which the SAM family is compared with the official optimizers."""

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.engine.simple import trainer

DOUBLE = {"dtype": torch.float64}
POINTS = torch.tensor(
    [
        [1.0, -0.5],
        [0.3, 0.8],
        [-1.2, 0.4],
        [0.6, 0.6],
        [-0.4, -0.9],
        [1.5, 0.2],
        [-0.7, 1.1],
        [0.2, -1.3],
    ],
    **DOUBLE,
)
KINDS = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0])


class Quadratic(L.LightningModule):
    """L = a'Ha / 2 + b'Hb / 2 + a'b over two parameters."""

    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], **DOUBLE)

    def __init__(self, lr=0.1, momentum=0.0):
        super().__init__()
        self.lr, self.momentum = lr, momentum
        self.a = torch.nn.Parameter(torch.tensor([1.0, -0.5], **DOUBLE))
        self.b = torch.nn.Parameter(torch.tensor([0.2, 0.1], **DOUBLE))

    def training_step(self, batch, batch_idx):
        a, b = self.a, self.b
        return 0.5 * (a @ self.H @ a) + 0.5 * (b @ self.H @ b) + a @ b

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum)

    def train_dataloader(self):
        return DataLoader(range(100))


def on_quadratic(technique, steps, **arguments):
    """The weights after some steps."""
    module = Quadratic(**arguments)
    run = trainer([technique], max_epochs=1, precision="64-true", limit_train_batches=steps)
    run.fit(module)
    return torch.cat([module.a, module.b]).detach().numpy()


class Points(L.LightningModule):
    """A linear classifier of eight points, in one batch."""

    def __init__(self, lr=0.2):
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Linear(2, 2).double()
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[0.5, -0.2], [0.1, 0.4]]))
            self.net.bias.copy_(torch.tensor([0.1, -0.1]))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def on_points(technique, epochs, batch_size=8, **settings):
    """The weights after some epochs."""
    module = Points()
    run = trainer([technique], max_epochs=epochs, precision="64-true", **settings)
    run.fit(module, DataLoader(TensorDataset(POINTS, KINDS), batch_size=batch_size))
    return torch.cat([p.detach().flatten() for p in module.parameters()]).numpy()


def hessian():
    h = Quadratic.H.numpy()
    return np.block([[h, np.eye(2)], [np.eye(2), h]])


START = np.array([1.0, -0.5, 0.2, 0.1])
