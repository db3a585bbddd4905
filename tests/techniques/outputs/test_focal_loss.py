"""Focal loss: the official values, binary and multilabel outputs, its exponents, calibration."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, Signals
from lightning_reg.techniques.labels.label_smoothing import LabelSmoothing
from lightning_reg.techniques.outputs.focal_loss import FocalLoss, focal_loss
from tests.engine.simple import INPUTS, LABELS, Host, fit, trainer, weights
from tests.techniques.outputs.noisy import overconfidence, plain_overconfidence

LOGITS = torch.tensor(
    [[2.0, -1.0, 0.5], [0.0, -3.0, 1.0], [-1.0, 0.3, 0.2], [4.0, 1.0, -2.0]], dtype=torch.float64
)
TARGETS = torch.tensor([0, 1, 2, 1])
# torrvision/focal_calibration@475422a, `size_average=True` on LOGITS and TARGETS:
# Losses/focal_loss.py with gamma 2, and Losses/focal_loss_adaptive_gamma.py with gamma 3 (FLSD-53).
OFFICIAL = {
    "focal": (
        {"gamma": 2.0},
        1.8232704527730133,
        [
            [-0.006821168520104702, 0.001244355240251529, 0.005576813279853174],
            [0.07209070059930871, -0.26805354203929116, 0.19596284143998244],
            [0.024035014594678127, 0.08819159895843234, -0.11222661355311048],
            [0.28097850028609855, -0.2816749763552791, 0.0006964760691806159],
        ],
    ),
    "flsd": (
        {"gamma": 3.0, "gamma_below": {0.2: 5.0}},
        1.6550450038236666,
        [
            [-0.0019295787512833573, 0.00035200441442848144, 0.001577574336854876],
            [0.08005960867934807, -0.297684188145962, 0.2176245794666139],
            [0.0179471364953999, 0.06585336813587858, -0.08380050463127849],
            [0.32770698274947124, -0.3285192871462702, 0.0008123043967990167],
        ],
    ),
}


@pytest.mark.parametrize("which", OFFICIAL)
def test_value_and_gradient_are_those_of_the_official_code(which):
    settings, value, gradient = OFFICIAL[which]
    z = LOGITS.clone().requires_grad_()
    loss = focal_loss(z, TARGETS, **settings).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(z.grad, torch.tensor(gradient, dtype=torch.float64))


@pytest.mark.parametrize("thresholds", [{0.2: 5.0, 0.5: 4.0}, {0.5: 4.0, 0.2: 5.0}])
def test_the_smallest_threshold_above_a_probability_counts(thresholds):
    p = LOGITS.softmax(1)[range(4), TARGETS]
    gamma = torch.where(p < 0.2, 5.0, torch.where(p < 0.5, 4.0, 3.0))
    assert set(gamma.tolist()) == {3.0, 4.0, 5.0}
    found = focal_loss(LOGITS, TARGETS, 3.0, gamma_below=thresholds)
    torch.testing.assert_close(found, -((1 - p) ** gamma) * p.log())


def test_thresholds_may_come_as_text():
    assert FocalLoss(gamma_below={"0.2": 5.0}).gamma_below == {0.2: 5.0}
    with pytest.raises(ArgumentError, match="gamma_below"):
        FocalLoss(gamma_below={"low": 5.0})


def test_gamma_0_is_the_cross_entropy_with_weights():
    alpha = [0.2, 1.0, 3.0]
    expected = F.cross_entropy(
        LOGITS, TARGETS, torch.tensor(alpha, dtype=torch.float64), reduction="none"
    )
    torch.testing.assert_close(focal_loss(LOGITS, TARGETS, 0.0, alpha=alpha), expected)


def test_soft_labels_weight_the_terms_of_their_classes():
    soft = torch.tensor([[0.7, 0.1, 0.2]] * 4, dtype=torch.float64)
    parts = [focal_loss(LOGITS, torch.full((4,), c), 2.0) for c in range(3)]
    expected = 0.7 * parts[0] + 0.1 * parts[1] + 0.2 * parts[2]
    torch.testing.assert_close(focal_loss(LOGITS, soft, 2.0), expected)


def test_multilabel_is_the_papers_sigmoid_form():
    targets = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).double()
    p = torch.special.expit(LOGITS).numpy()
    t = targets.numpy()
    p_t, alpha_t = np.where(t == 1, p, 1 - p), np.where(t == 1, 0.25, 0.75)
    expected = (-alpha_t * (1 - p_t) ** 2 * np.log(p_t)).mean(1)
    found = focal_loss(LOGITS, targets, 2.0, alpha=0.25, task="multilabel")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_two_classes_of_which_one_has_logit_0_are_the_sigmoid_form():
    z = LOGITS[:, :1]
    targets = torch.tensor([1, 0, 1, 0])
    one = focal_loss(z, targets.double().unsqueeze(1), 2.0, alpha=0.25, task="multilabel")
    two = focal_loss(F.pad(z, (1, 0)), targets, 2.0, alpha=[0.75, 0.25])
    torch.testing.assert_close(one, two)


def test_gradient_is_that_of_the_cross_entropy_times_g():
    # Mukhoti et al., proposition 1.
    p, gamma = LOGITS.softmax(1).gather(1, TARGETS.unsqueeze(1)), 3.0
    g = (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * p.log()
    grads = []
    for loss in (focal_loss, lambda z, y, _: F.cross_entropy(z, y, reduction="none")):
        z = LOGITS.clone().requires_grad_()
        loss(z, TARGETS, gamma).sum().backward()
        grads.append(z.grad)
    torch.testing.assert_close(grads[0], g * grads[1])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_sure_rows_and_masked_classes_give_finite_gradients(gamma):
    z = torch.tensor([[90.0, 0.0, -torch.inf], [0.0, 90.0, 0.0]], requires_grad=True)
    focal_loss(z, torch.tensor([0, 0]), gamma).sum().backward()
    assert torch.isfinite(z.grad[0, :2]).all()
    assert torch.isfinite(z.grad[1]).all()


def test_smoothed_labels_compose():
    module, _ = fit([LabelSmoothing(0.2), FocalLoss(gamma=2.0)], max_epochs=1)
    plain = Host()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
        optimizer.zero_grad()
        log_p = plain(x).log_softmax(1)
        smooth = 0.8 * F.one_hot(y, 4) + 0.2 / 4
        (-smooth * (1 - log_p.exp()) ** 2 * log_p).sum(1).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-5)


class Binary(Host):
    """One output column and the binary cross-entropy."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), batch[1].float())


def test_a_binary_output_of_one_column_takes_a_signal():
    signals = Signals(logits=lambda step: F.pad(step.records[""][-1], (1, 0)))
    loader = DataLoader(TensorDataset(INPUTS, LABELS % 2), batch_size=16)
    module = Binary()
    trainer([FocalLoss(gamma=2.0, signals=signals)], max_epochs=1).fit(module, loader)
    plain = Binary()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for x, y in zip(INPUTS.split(16), (LABELS % 2).split(16), strict=True):
        optimizer.zero_grad()
        p = plain(x).squeeze(1).sigmoid()
        p = torch.where(y == 1, p, 1 - p)
        (-((1 - p) ** 2) * p.log()).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-5)


def test_multilabel_replaces_the_whole_loss():
    class MultiLabel(Host):
        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    targets = torch.stack([LABELS % 2, LABELS // 2, LABELS % 3 % 2, LABELS % 2], 1).float()
    loader = DataLoader(TensorDataset(INPUTS, targets), batch_size=16)
    module = MultiLabel()
    ours = FocalLoss(task="multilabel", alpha=0.25, replaces="loss")
    trainer([ours], max_epochs=1).fit(module, loader)
    plain = MultiLabel()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for x, y in zip(INPUTS.split(16), targets.split(16), strict=True):
        optimizer.zero_grad()
        p = plain(x).sigmoid()
        p_t, alpha = torch.where(y == 1, p, 1 - p), torch.where(y == 1, 0.25, 0.75)
        (-alpha * (1 - p_t) ** 2 * p_t.log()).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-5)


def test_weights_of_another_number_of_classes_are_refused():
    with pytest.raises(ArgumentError, match="2 weights for 4 classes"):
        fit([FocalLoss(alpha=[1.0, 2.0])], max_epochs=1)


def test_confidence_stays_nearer_to_accuracy_than_with_the_cross_entropy():
    # Held-out confidence minus accuracy, three seeds: 0.22 to 0.27 with the cross-entropy, 0.10 to
    # 0.16 with FLSD-53.
    for seed in range(3):
        flsd = FocalLoss(gamma=3.0, gamma_below={0.2: 5.0})
        assert overconfidence([flsd], seed) < plain_overconfidence(seed) - 0.05
