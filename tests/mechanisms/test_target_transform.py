"""What every change of targets is owed: the right distribution, rows that count, whole labels."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError, MissingSignalError, UnsupportedError
from lightning_reg.mechanisms.target_transform import TargetTransform
from tests.engine.simple import CLASSES, LABELS, Host, fit, weights


class Towards(TargetTransform):
    """Moves labels to class 0, and keeps what it was given."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.given = []

    def new_targets(self, distribution, strength, step):
        self.given.append(distribution)
        first = torch.zeros_like(distribution)
        first[:, 0] = 1
        return (1 - strength) * distribution + strength * first


def test_the_loss_is_the_cross_entropy_with_the_new_targets():
    class Plain(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            q = 0.7 * F.one_hot(y, CLASSES).float()
            q[:, 0] += 0.3
            return F.cross_entropy(self(x), q)

    technique = Towards(0.3)
    ours, _ = fit([technique], max_epochs=1)
    plain, _ = fit([], module=Plain(), max_epochs=1)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-6)
    assert torch.equal(torch.cat(technique.given), F.one_hot(LABELS, CLASSES).float())


def test_a_strength_of_zero_leaves_the_users_loss():
    technique = Towards(0.0)
    ours, _ = fit([technique])
    plain, _ = fit([])
    assert torch.equal(weights(ours), weights(plain))
    assert technique.given == []


def test_tokens_that_are_ignored_are_no_rows():
    labels = LABELS.masked_fill(LABELS == 2, -100).view(16, 4)

    class Tokens(Host):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])[:, None].expand(-1, 4, -1)
            y = labels[: len(logits)]
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            return {"loss": loss, "logits": logits, "targets": y}

    technique = Towards(0.3)
    fit([technique], module=Tokens(), max_epochs=1, limit_train_batches=1)
    assert len(technique.given[0]) == int((LABELS != 2).sum())


def test_missing_targets_are_named():
    class Unlabeled(Host):
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

    from torch.utils.data import DataLoader

    from tests.engine.simple import INPUTS, trainer

    with pytest.raises(MissingSignalError, match="Towards: needs `targets`"):
        trainer([Towards(0.3)]).fit(Unlabeled(), DataLoader(INPUTS, 16))


def test_manual_optimization_without_regularize_is_refused():
    module = Host()
    module.automatic_optimization = False
    with pytest.raises(UnsupportedError, match="Towards"):
        fit([Towards(0.3)], module=module)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="Towards: `replaces`"):
        Towards(0.3, replaces="everything")
