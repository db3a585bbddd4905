"""Which features are captured, how they become rows, and the gather over ranks."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import MissingSignalError, RegularizationError, RegularizeMixin
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.mechanisms.feature_penalty import FeaturePenalty
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, Host, fit, trainer, weights


class Spread(FeaturePenalty):
    """Minus the log-determinant of the rows' covariance: no mean over samples."""

    def value(self, features):
        eye = torch.eye(features.shape[1])
        return -torch.logdet(features.T @ features / len(features) + eye)


class Records(FeaturePenalty):
    """Keeps the rows that it was given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows = []

    def value(self, features):
        self.rows.append(features)
        return features.sum() * 0.0


def rows_of(features, **settings):
    return Records(1.0, layer="encoder", **settings)._rows(features)


def test_sequences_have_their_features_last():
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(rows_of(x), x.mean(1))
    assert torch.equal(rows_of(x, pooling="first"), x[:, 0])
    assert torch.equal(rows_of(x, pooling="positions"), x.reshape(10, 3))
    assert torch.equal(rows_of(x, pooling="flatten"), x.reshape(2, 15))


def test_maps_have_their_features_second():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(rows_of(x), x.mean((2, 3)))
    assert torch.equal(rows_of(x, pooling="first"), x[:, :, 0, 0])
    assert torch.equal(rows_of(x, pooling="positions"), x.permute(0, 2, 3, 1).reshape(40, 3))


def test_feature_dim_overrules():
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(rows_of(x, feature_dim=1), x.mean(2))


@pytest.mark.parametrize("pooling", ["mean", "flatten", "positions", "first"])
def test_vectors_stay_as_they_are(pooling):
    x = torch.randn(4, 3)
    assert rows_of(x, pooling=pooling) is x


def test_a_number_per_sample_is_refused():
    with pytest.raises(RegularizationError, match="Records"):
        rows_of(torch.zeros(4))


def test_feature_dim_outside_the_features_is_refused():
    with pytest.raises(ArgumentError, match="feature_dim"):
        rows_of(torch.zeros(2, 3, 4), feature_dim=3)


def test_a_nested_layer_is_captured():
    technique = Records(1.0, layer="net.0")
    fit([technique], max_epochs=1, batch_size=64)
    start = Host().net[0]
    torch.testing.assert_close(technique.rows[0], start(INPUTS))


def test_a_key_of_the_returned_dict_is_a_layer_too():
    class Returns(Host):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "embedding": batch[0] * 2}

    technique = Records(1.0, layer="outputs.embedding")
    fit([technique], module=Returns(), max_epochs=1, batch_size=64)
    assert torch.equal(technique.rows[0], INPUTS * 2)


def test_half_precision_features_are_raised_to_float32():
    technique = Records(1.0, layer="net")
    fit([technique], precision="bf16-mixed", max_epochs=1)
    assert technique.rows[0].dtype == torch.float32


@pytest.mark.parametrize("layer", [None, "backbone"])
def test_a_layer_that_is_not_there_is_refused_before_training(layer):
    with pytest.raises(ArgumentError, match=r"Spread: `layer`.*net.*layer="):
        fit([Spread(1.0, layer=layer)])


def test_a_layer_that_is_not_called_is_named():
    class Idle(Host):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(2, 2)

    with pytest.raises(MissingSignalError, match=r"Spread: needs the output of layer 'idle'"):
        fit([Spread(1.0, layer="idle")], module=Idle())


@pytest.mark.parametrize(
    "arguments",
    [{"pooling": "max"}, {"layer": 3}, {"layer": ""}, {"feature_dim": 0}, {"feature_dim": "1"}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="Spread"):
        Spread(1.0, **{"layer": "net", **arguments})


def test_manual_optimization_hands_the_features_over():
    class Manual(RegularizeMixin, Host):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            hidden = self.net(batch[0])
            loss = hidden.square().mean()
            optimizer.zero_grad()
            self.manual_backward(self.regularize(loss, features=hidden))
            optimizer.step()

    class Automatic(Host):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

    manual, _ = fit([Spread(0.5)], module=Manual())
    automatic, _ = fit([Spread(0.5, layer="net")], module=Automatic())
    assert torch.equal(weights(manual), weights(automatic))


# ---------------------------------------------------------------------- ranks

X = torch.randn(11, 8, generator=torch.Generator().manual_seed(3))
SHARES = (slice(0, 3), slice(3, 11))


class Encoder(L.LightningModule):
    """Its own loss is the same on every rank, so that only the penalty is at stake."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        self.encoder(batch[0])
        return 0.01 * self.encoder.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(run, share):
    module = Encoder()
    run.fit(module, DataLoader(TensorDataset(X[share]), batch_size=len(X)))
    return weights(module), run.callback_metrics["reg/spread"]


def train_on_ranks():
    share = SHARES[torch.distributed.get_rank()]
    settings = {"max_epochs": 4, "use_distributed_sampler": False}
    return train(rank_trainer(callbacks=[Spread(1.0, layer="encoder")], **settings), share)


def test_two_ranks_with_unequal_batches_equal_the_joint_batch(ranks):
    (first, value), (second, _) = ranks.run(train_on_ranks)
    callbacks = [Spread(1.0, layer="encoder")]
    joint, joint_value = train(trainer(callbacks, max_epochs=4), slice(None))
    assert (joint - weights(Encoder())).abs().max() > 1e-2
    assert torch.equal(first, second)
    torch.testing.assert_close(first, joint, rtol=0, atol=1e-6)
    torch.testing.assert_close(value, joint_value, rtol=0, atol=1e-6)
