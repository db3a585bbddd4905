"""Attributes that follow a schedule: when they are set, and that they come back."""

import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.engine.schedule import LinearSchedule, StepSchedule
from lightning_reg.mechanisms.attribute_schedule import AttributeSchedule
from lightning_reg.techniques.inputs.mixup import Mixup
from tests.engine.simple import Ascent, Host, fit


class Scale(AttributeSchedule):
    """Sets ``module.scale``."""

    def targets(self, trainer, pl_module):
        return {"scale": (pl_module, "scale")}


class Scaled(Host):
    scale = 3.0

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.scale)
        return super().training_step(batch, batch_idx)


def test_each_step_sees_the_value_of_its_position():
    module = Scaled()
    fit([Scale(LinearSchedule(1.0, 0.0, end=4, by="step"))], module=module)
    assert module.seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_a_relative_schedule_multiplies_the_own_value():
    module = Scaled()
    schedule = StepSchedule([1.0, 0.0, 2.0], [1, 2], by="step")
    fit([Scale(schedule, relative=True)], module=module, max_epochs=1)
    assert module.seen == [3.0, 0.0, 6.0, 6.0]


def test_all_micro_batches_and_passes_of_an_optimizer_step_see_one_value():
    module = Scaled()
    technique = Scale(LinearSchedule(1.0, 0.0, end=4, by="step"))
    fit([technique, Ascent(0.05)], module=module, max_epochs=1, accumulate_grad_batches=2)
    # The first step runs once more for the check that it can be repeated.
    assert module.seen == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.75, 0.75, 0.75]


@pytest.mark.parametrize("fails", [False, True])
def test_the_own_value_comes_back(fails):
    class Fails(Scaled):
        def training_step(self, batch, batch_idx):
            if fails:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module = Fails()
    module.scale = 5.0
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            fit([Scale(0.5)], module=module)
    else:
        fit([Scale(0.5)], module=module)
    assert module.scale == 5.0


@pytest.mark.parametrize("path", ["callbacks.Mixup.strength", "callbacks.mixup.strength"])
def test_a_technique_that_is_driven_acts_in_the_same_step(path):
    def inputs(callbacks):
        class Keeps(Host):
            batches = []

            def training_step(self, batch, batch_idx):
                self.batches.append(batch[0])
                return super().training_step(batch, batch_idx)

        module = Keeps(lr=0.0)
        fit(callbacks, module=module, max_epochs=1)
        return module.batches

    schedule = StepSchedule([0.0, 1.0], [2], by="step")
    drive = AttributeSchedule(schedule, paths=[path])
    clean, mixed = inputs([]), inputs([drive, Mixup(1.0, probability=0.5)])
    equal = [torch.equal(a, b) for a, b in zip(clean, mixed, strict=True)]
    assert equal == [True, True, False, False]


def test_the_mean_of_the_values_is_logged():
    class Two(Scale):
        def targets(self, trainer, pl_module):
            pl_module.other = 5.0
            return {"scale": (pl_module, "scale"), "other": (pl_module, "other")}

    _, run = fit([Two(0.5, relative=True)], module=Scaled())
    assert run.callback_metrics["reg/two"] == 2.0


@pytest.mark.parametrize("value", [None, True, "1.0"])
def test_what_is_no_number_is_refused_before_training(value):
    module = Scaled()
    module.scale = value
    with pytest.raises(ArgumentError, match="must be a number"):
        fit([Scale(0.5)], module=module)
    assert module.seen == []


def test_what_is_not_there_is_refused_before_training():
    with pytest.raises(ArgumentError, match="does not exist"):
        fit([Scale(0.5)], module=Host())


def test_a_dotted_path_leads_into_the_module():
    class Watch(Host):
        rates = []

        def training_step(self, batch, batch_idx):
            self.rates.append(self.net[3].p)
            return super().training_step(batch, batch_idx)

    module = Watch(dropout=0.5)
    schedule = LinearSchedule(0.4, 0.0, end=4, by="step")
    fit([AttributeSchedule(schedule, paths=["net.3.p"])], module=module, max_epochs=1)
    assert module.rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert module.net[3].p == 0.5


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("net.9.p", "no '9' on the way"),
        ("net.3.rate", "does not exist"),
        ("net.0.weight", "must be a number"),
        ("callbacks.SAM.rho", "callback 'SAM'"),
        ("callbacks.", "callback ''"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_before_training(path, reason):
    module = Scaled()
    with pytest.raises(ArgumentError, match=reason):
        fit([AttributeSchedule(0.5, paths=[path])], module=module)
    assert module.seen == []


def test_without_a_path_there_is_nothing_to_set():
    with pytest.raises(ArgumentError, match="sets nothing"):
        fit([AttributeSchedule(0.5)])
    with pytest.raises(ArgumentError, match="a list of dotted paths"):
        AttributeSchedule(0.5, paths="net.3.p")
