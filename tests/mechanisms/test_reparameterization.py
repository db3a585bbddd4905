"""Reparameterization: what trains, what is left behind, and what a checkpoint holds."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_reg.engine import UnsupportedError
from lightning_reg.mechanisms.reparameterization import Reparameterization
from lightning_reg.techniques.reparameterization.weight_compander import WeightCompander
from tests.engine.simple import INPUTS, Host, fit, loader, trainer, weights


class Twice(nn.Module):
    def forward(self, v):
        return 2 * v

    def right_inverse(self, w):
        return w / 2


class Doubled(Reparameterization):
    """``w = 2 v``: a step on v moves w four times as far, and all numbers stay exact."""

    def parametrization(self, name, weight):
        return Twice()


class Tied(Host):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
        self.net[2].weight = self.net[0].weight


class Faster(Tied):
    """The same training of plain weights: kernels have four times the rate."""

    def configure_optimizers(self):
        kernels = [p for p in self.parameters() if p.ndim > 1]
        biases = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": kernels, "lr": 4 * self.lr}, {"params": biases}]
        return torch.optim.SGD(groups, self.lr, momentum=0.9)


def test_optimizer_trains_v_and_tied_weights_stay_tied():
    ours, _ = fit([Doubled()], module=Tied())
    plain, _ = fit(module=Faster())
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-6)
    assert ours.net[2].weight is ours.net[0].weight


def test_parameters_are_the_same_objects_in_the_same_order_afterwards():
    module = Tied()
    before = list(module.named_parameters())
    fit([Doubled()], module=module)
    after = list(module.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(one is other for (_, one), (_, other) in zip(before, after, strict=True))
    assert type(module.net[0]) is nn.Linear


def test_network_starts_as_it_was():
    class First(Callback):
        logits = None

        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                self.logits = pl_module(INPUTS)

    first = First()
    module = Tied()
    with torch.no_grad():
        expected = module(INPUTS)
    fit([first, WeightCompander()], module=module)
    torch.testing.assert_close(first.logits, expected, rtol=0, atol=1e-6)


def test_checkpoint_holds_plain_weights_that_load_without_the_technique(tmp_path):
    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "mid.ckpt")
            with torch.no_grad():
                self.logits = pl_module(INPUTS)

    saves = Saves()
    fit([WeightCompander(), saves], module=Tied(), max_epochs=1)
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)["state_dict"]
    plain = Tied()
    plain.load_state_dict(saved)
    assert torch.equal(plain(INPUTS), saves.logits)


def test_checkpoint_after_the_fit_resumes_like_one_unbroken_run(tmp_path):
    path = tmp_path / "end.ckpt"
    whole, _ = fit([WeightCompander()], module=Tied(), max_epochs=3)
    _, run = fit([WeightCompander()], module=Tied(), max_epochs=2)
    run.save_checkpoint(path)
    again = Tied()
    resumed = trainer([WeightCompander()], max_epochs=3)
    resumed.fit(again, loader(), ckpt_path=path, weights_only=True)
    assert torch.equal(weights(again), weights(whole))


def test_checkpoint_of_a_run_without_it_is_taken_over_with_a_warning(tmp_path):
    path = tmp_path / "plain.ckpt"
    plain, run = fit(module=Tied(), max_epochs=1)
    run.save_checkpoint(path)
    module = Tied()
    module.lr = 0.0
    with pytest.warns(UserWarning, match="holds no state"):
        trainer([Doubled()], max_epochs=2).fit(module, loader(), ckpt_path=path, weights_only=True)
    assert torch.equal(weights(module), weights(plain))


def test_deep_copy_during_a_fit_computes_the_same():
    class Copies(Callback):
        twin = None

        def on_train_batch_end(self, trainer, pl_module, *args):
            if self.twin is None:
                self.twin = copy.deepcopy(pl_module.net)
                with torch.no_grad():
                    self.same = torch.equal(self.twin(INPUTS), pl_module.net(INPUTS))
                    self.twin[0].bias.add_(1)
                    self.apart = not torch.equal(self.twin(INPUTS), pl_module.net(INPUTS))

    copies = Copies()
    fit([WeightCompander(), copies], module=Tied(), max_epochs=1)
    assert copies.same
    assert copies.apart


def test_failure_in_the_second_layer_leaves_the_first_plain():
    class Picky(Doubled):
        def parametrization(self, name, weight):
            if name.startswith("net.4"):
                raise RuntimeError("no")
            return Twice()

    module = Host()
    before = weights(module)
    with pytest.raises(RuntimeError, match="no"):
        fit([Picky()], module=module)
    assert torch.equal(weights(module), before)
    assert not hasattr(module.net[0], "parametrizations")


def test_parameter_of_the_module_itself_is_refused():
    class Own(Host):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(2, 2))

    with pytest.raises(UnsupportedError, match="Doubled"):
        fit([Doubled(parameters="matrix")], module=Own())


def test_parametrized_weight_is_refused():
    module = Host()
    nn.utils.parametrize.register_parametrization(module.net[0], "weight", Twice())
    with pytest.raises(UnsupportedError, match="parametrized already"):
        fit([Doubled(parameters="net.0")], module=module)
