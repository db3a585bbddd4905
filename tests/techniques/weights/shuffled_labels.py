"""Twenty tasks in a row, each with new random labels for the same digits."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.engine.simple import trainer

TASKS, EPOCHS, SAMPLES = 20, 15, 128


class Shuffled(L.LightningModule):
    """A small network that learns labels by heart, and counts how many it had right."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 10, (TASKS, SAMPLES), generator=generator)
        self.right = torch.zeros(TASKS)

    def training_step(self, batch, batch_idx):
        task = self.current_epoch // EPOCHS
        labels = self.labels[task][batch[1]]
        logits = self.net(batch[0])
        self.right[task] += (logits.argmax(1) == labels).sum() / (SAMPLES * EPOCHS)
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def late_accuracy(callbacks, seed=0):
    """The share of right answers while the last five tasks are learned."""
    x = torch.from_numpy(load_digits().data[:SAMPLES]).float()
    data = TensorDataset((x - x.mean()) / x.std(), torch.arange(SAMPLES))
    module = Shuffled(seed)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch_size=64, shuffle=True, generator=generator)
    trainer(callbacks, max_epochs=TASKS * EPOCHS, log_every_n_steps=1000).fit(module, loader)
    return float(module.right[-5:].mean())
