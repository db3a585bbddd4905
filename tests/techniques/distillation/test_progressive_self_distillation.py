"""Which past softens which labels, by how much, and that no past is no change."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import (
    ArgumentError,
    IndexedDataset,
    MissingSignalError,
    Regularizer,
    UnsupportedError,
)
from lightning_reg.techniques.distillation.progressive_self_distillation import (
    ProgressiveSelfDistillation,
    progressive_self_distillation,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, fit, trainer, weights


def indexed(count=64, **settings):
    data = IndexedDataset(TensorDataset(INPUTS[:count], LABELS[:count]))
    return DataLoader(data, **{"batch_size": 16, **settings})


def train(callbacks, epochs=3, data=None, module=None, **settings):
    module, run = module or Host(), trainer(callbacks, max_epochs=epochs, **settings)
    run.fit(module, indexed() if data is None else data)
    return module, run


# ---------------------------------------------------------------------- the function


def test_official_value_and_gradient():
    """lgcnsai/PS-KD-Pytorch@9aa0828, main.py and loss/pskd_loss.py, epoch 2 of 5, alpha_T 0.8."""
    places = torch.arange(12, dtype=torch.float64).view(3, 4)
    z, past = torch.sin(1.3 * places).requires_grad_(), torch.sin(0.7 * places).softmax(1)
    labels = F.one_hot(torch.tensor([0, 3, 1]), 4).double()
    targets = progressive_self_distillation(labels, past, 0.8 * 3 / 5)
    loss = F.cross_entropy(z, targets)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(1.7289513978263484, rel=1e-12)
    expected = [-0.05327760883120711, 0.03304564738318287, 0.13440812588452, -0.11417616443649674]
    torch.testing.assert_close(gradient[1], torch.tensor(expected, dtype=torch.float64))


def test_gradient_is_prediction_less_softened_label():
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels, past = F.one_hot(torch.arange(5) % 4, 4).double(), torch.rand(5, 4).double().softmax(1)
    targets = progressive_self_distillation(labels, past, 0.3)
    (-(targets * z.log_softmax(1)).sum()).backward()
    torch.testing.assert_close(z.grad, z.detach().softmax(1) - 0.7 * labels - 0.3 * past)


def test_alpha_one_ignores_the_label_and_alpha_zero_the_past():
    labels, past = torch.eye(4), torch.rand(4, 4).softmax(1)
    assert torch.equal(progressive_self_distillation(labels, past, 1.0), past)
    assert torch.equal(progressive_self_distillation(labels, past, 0.0), labels)


def test_no_gradient_reaches_the_past():
    past = torch.rand(4, 4, requires_grad=True)
    assert not progressive_self_distillation(torch.eye(4), past, 0.5).requires_grad


# ---------------------------------------------------------------------- the schedule


class Alphas(ProgressiveSelfDistillation):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.targets = [], []

    def transform_targets(self, step, distribution):
        self.seen.append(self.alpha(step))
        self.targets.append((step.batch_idx, super().transform_targets(step, distribution)))
        return self.targets[-1][1]


def test_alpha_rises_by_epochs_and_reaches_its_end_in_the_last():
    technique = Alphas(0.8)
    train([technique], epochs=4)
    # alpha_T (t / T) with t from 1, as in the official main.py.
    assert technique.seen[::4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert technique.seen[0] == technique.seen[3]


def test_epochs_can_be_given():
    technique = Alphas(0.8, epochs=8)
    train([technique], epochs=2)
    assert technique.seen[::4] == pytest.approx([0.1, 0.2])


def test_unknown_number_of_epochs_is_refused():
    with pytest.raises(ArgumentError, match=r"max_epochs.*epochs=300"):
        train([ProgressiveSelfDistillation()], epochs=-1, max_steps=2)


# ---------------------------------------------------------------------- the past


@pytest.mark.parametrize("memory", ["predictions", "model"])
def test_first_epoch_is_plain_cross_entropy(memory):
    ours, _ = train([ProgressiveSelfDistillation(memory=memory)], epochs=1)
    plain, _ = fit([], max_epochs=1)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-6)


class Outputs(L.Callback):
    """The logits of each batch, and the module at the start of each epoch."""

    def __init__(self):
        self.logits, self.starts = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        handle = pl_module.net.register_forward_hook(self._keep)
        self._handle = handle

    def _keep(self, module, args, output):
        self.logits.append(output.detach())
        self._handle.remove()


def test_predictions_are_those_of_the_training_pass_one_epoch_ago():
    technique, outputs = Alphas(0.8), Outputs()
    train([technique, outputs], epochs=3, module=Host(dropout=0.5))
    for batch in range(4):
        labels = F.one_hot(LABELS[16 * batch : 16 * batch + 16], 4).float()
        for epoch in (1, 2):
            past = outputs.logits[4 * (epoch - 1) + batch].softmax(1)
            alpha = 0.8 * (epoch + 1) / 3
            expected = (1 - alpha) * labels + alpha * past
            index, targets = technique.targets[4 * epoch + batch]
            assert index == batch
            torch.testing.assert_close(targets, expected)


def test_model_is_that_of_the_end_of_the_last_epoch_in_eval_mode():
    technique, outputs = Alphas(0.8, memory="model"), Outputs()
    train([technique, outputs], epochs=3, module=Host(dropout=0.5))
    for epoch in (1, 2):
        past = Host()
        past.load_state_dict(outputs.starts[epoch])
        alpha = 0.8 * (epoch + 1) / 3
        labels = F.one_hot(LABELS[48:], 4).float()
        expected = (1 - alpha) * labels + alpha * past.eval()(INPUTS[48:]).softmax(1)
        torch.testing.assert_close(technique.targets[4 * epoch + 3][1], expected)


def test_sample_without_a_past_keeps_its_label():
    technique = Alphas(0.8)
    train([technique], epochs=1)
    half = DataLoader(technique_data(), batch_size=16)
    technique = Alphas(0.8)
    run = trainer([technique], max_epochs=1)
    run.fit(Host(), half)
    run.fit_loop.max_epochs = 2
    run.fit(Host(), indexed())
    # Samples 0 to 31 were trained on before, the others never.
    late = torch.cat([targets for _, targets in technique.targets[-2:]])
    assert torch.equal(late, F.one_hot(LABELS[32:], 4).float())


def technique_data():
    data = IndexedDataset(TensorDataset(INPUTS, LABELS))
    return torch.utils.data.Subset(data, range(32))


def test_second_pass_sees_the_targets_of_the_first():
    technique = Alphas(0.8)
    train([technique, Ascent(0.05)], epochs=2)
    passes = technique.targets
    # Each batch has a first and a second pass; the first step has one more, as a check.
    late = [targets for _, targets in passes[-8:]]
    for first, second in zip(late[::2], late[1::2], strict=True):
        assert torch.equal(first, second)


def test_mixed_samples_have_no_past_of_their_own():
    class Mixer(Regularizer):
        writes = frozenset({"inputs"})

        def transform_batch(self, step):
            order = torch.arange(15, -1, -1)
            step.inputs = 0.5 * step.inputs + 0.5 * step.inputs[order]
            step.mix_targets(order, torch.full((16,), 0.5))

    with pytest.raises(UnsupportedError, match=r'mixed.*memory="model"'):
        train([ProgressiveSelfDistillation(), Mixer()])
    train([ProgressiveSelfDistillation(memory="model"), Mixer()], epochs=2)


def test_predictions_need_an_indexed_dataset_and_the_model_does_not():
    with pytest.raises(MissingSignalError, match=r"ProgressiveSelfDistillation.*IndexedDataset"):
        fit([ProgressiveSelfDistillation()])
    fit([ProgressiveSelfDistillation(memory="model")])


@pytest.mark.parametrize(
    "arguments", [{"strength": 1.5}, {"memory": "weights"}, {"epochs": 0}, {"replaces": "all"}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="ProgressiveSelfDistillation"):
        ProgressiveSelfDistillation(**arguments)


# ---------------------------------------------------------------------- ranks


def train_on_ranks(distributed, memory, shuffle):
    technique = ProgressiveSelfDistillation(memory=memory)
    settings = {"callbacks": [technique], "max_epochs": 3}
    module, sampler = Host(), None
    data = IndexedDataset(TensorDataset(INPUTS[:32], LABELS[:32]))
    if distributed and not shuffle:
        sampler = torch.utils.data.DistributedSampler(data, shuffle=False)
    run = rank_trainer(**settings) if distributed else trainer(**settings)
    size = 4 if distributed else 8
    run.fit(module, DataLoader(data, batch_size=size, sampler=sampler))
    return weights(module), technique.state_dict()["memory"].get("table")


@pytest.mark.parametrize("memory", ["predictions", "model"])
def test_two_ranks_train_as_one_process_with_the_joint_batch(memory, ranks):
    (first, table), (second, other) = ranks.run(train_on_ranks, True, memory, False)
    joint, joint_table = train_on_ranks(False, memory, False)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, joint, rtol=0, atol=1e-5)
    if memory == "predictions":
        assert torch.equal(table, other)
        torch.testing.assert_close(table, joint_table, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- the paper's claim


def test_predictions_become_less_sure():
    def mean_confidence(callbacks):
        data = None if callbacks else DataLoader(TensorDataset(INPUTS, LABELS), batch_size=16)
        module, _ = train(callbacks, epochs=40, data=data)
        with torch.no_grad():
            said = module(INPUTS).softmax(1)
        return said.amax(1).mean().item()

    assert mean_confidence([ProgressiveSelfDistillation(0.8)]) < mean_confidence([]) - 0.05
