"""With 40 % wrong labels a network memorizes them; these techniques hold the accuracy."""

import functools

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ALDRLoss, CoTeaching, EarlyLearning, IndexedDataset, NestedDropout
from lightning_reg.compare.data import corrupt, load_digits
from lightning_reg.techniques.noise.nested_dropout import nested_dropout
from tests.engine.simple import trainer

SEEDS = (0, 1)
EPOCHS = 30


class Network(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def trained(callbacks, seed):
    """Accuracy on 597 clean samples, and the share of wrong labels that are reproduced."""
    x, y = load_digits()
    x = (x - x.mean()) / x.std()
    generator = torch.Generator().manual_seed(seed)
    used, held, test = torch.randperm(len(x), generator=generator).split([1000, 200, 597])
    noisy = corrupt(y[used], 0.4, 10, generator)
    torch.manual_seed(seed)
    module, data = Network(), TensorDataset(x[used], noisy)
    indexed = any("sample_index" in technique.needs for technique in callbacks)
    loader = DataLoader(
        IndexedDataset(data) if indexed else data, 100, shuffle=True, generator=generator
    )
    trainer(callbacks, max_epochs=EPOCHS, log_every_n_steps=100).fit(module, loader)
    # As wrong as in training.
    held_out = x[held], corrupt(y[held], 0.4, 10, generator)
    with torch.no_grad():
        said = logits(module, callbacks, x, held_out).argmax(1)
    wrong = noisy != y[used]
    accuracy = (said[test] == y[test]).float().mean().item()
    return accuracy, (said[used] == noisy)[wrong].float().mean().item()


def logits(module, callbacks, x, held_out):
    """Of the network, or the sum of both networks' at their best length."""
    if not any(isinstance(technique, CoTeaching) for technique in callbacks):
        return module(x)
    pair, cut = callbacks
    networks = [module, pair.peer]
    features = [network.encoder(held_out[0]) for network in networks]
    length = cut.select_length([(features, held_out[1])], [n.head for n in networks])
    return sum(n.head(nested_dropout(n.encoder(x), torch.tensor(length))) for n in networks)


@functools.cache
def plain():
    return [trained([], seed) for seed in SEEDS]


# By how much each is better for every seed; measured were 0.27, 0.24 and 0.21 at least.
TECHNIQUES = {
    "EarlyLearning": (lambda: [EarlyLearning(7.0, beta=0.7)], 0.2),
    "ALDRLoss": (lambda: [ALDRLoss(lam=10.0, margin=0.1, normalization="softplus")], 0.18),
    "CoTeaching": (
        lambda: [
            CoTeaching(0.4, start=7, num_gradual=7),
            NestedDropout(layer="encoder", sigma=10.0),
        ],
        0.15,
    ),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_accuracy_is_held_where_plain_training_memorizes(name):
    callbacks, margin = TECHNIQUES[name]
    for seed, (before, fitted) in zip(SEEDS, plain(), strict=True):
        accuracy, memorized = trained(callbacks(), seed)
        assert fitted > 0.8
        assert memorized < 0.2
        assert accuracy > before + margin
