"""A checkpoint that cannot be resumed from is refused as a whole, with one error."""

import pytest
import torch

from lightning_reg.engine.errors import ArgumentError, RegularizationError
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.resume import StartAfresh
from tests.engine.simple import Confidence, Host, fit, loader, trainer, weights


class Counting(Regularizer):
    """Remembers how many steps it has seen."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = 0

    def prepare(self, step):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]


def checkpoint(path, callbacks):
    module, run = fit(callbacks, max_epochs=1)
    run.save_checkpoint(path)
    return module


def resume(path, callbacks, module=None):
    module = module or Host()
    run = trainer(callbacks, max_epochs=2)
    run.fit(module, loader(), ckpt_path=path)
    return module


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_that_is_cut_off_is_refused_and_nothing_is_loaded(tmp_path, share):
    path = tmp_path / "cut.ckpt"
    checkpoint(path, [Counting()])
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    module, technique = Host(), Counting()
    before = weights(module).clone()
    with pytest.raises(RegularizationError, match=r"cut\.ckpt cannot be read: it is cut off"):
        resume(path, [technique], module)
    assert torch.equal(weights(module), before)
    assert technique.steps == 0


def test_a_file_that_is_not_there_keeps_lightnings_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        resume(tmp_path / "none.ckpt", [Counting()])


def test_an_error_that_the_file_is_not_to_blame_for_passes(tmp_path, monkeypatch):
    path = tmp_path / "good.ckpt"
    checkpoint(path, [Counting()])
    run = trainer([Counting()])
    monkeypatch.setattr(run.strategy, "load_checkpoint", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.fit(Host(), loader(), ckpt_path=path)


def test_a_lacking_state_is_refused_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "first.ckpt"
    checkpoint(path, [Counting()])
    module, known = Host(), Counting()
    before = weights(module).clone()
    unknown = Counting(name="second")
    with pytest.raises(RegularizationError, match=r"Counting\[second\]: .* no state") as caught:
        resume(path, [known, unknown], module)
    assert "StartAfresh(['second'])" in str(caught.value)
    assert torch.equal(weights(module), before)
    assert known.steps == 0


def test_all_lacking_states_are_named_at_once(tmp_path):
    checkpoint(tmp_path / "bare.ckpt", [])
    with pytest.raises(RegularizationError, match=r"Counting, Counting\[second\]: "):
        resume(tmp_path / "bare.ckpt", [Counting(), Counting(name="second")])


def test_a_technique_without_state_may_join(tmp_path):
    checkpoint(tmp_path / "bare.ckpt", [])
    resume(tmp_path / "bare.ckpt", [Confidence(0.1)])


@pytest.mark.parametrize("name", ["second", "Counting[second]"])
def test_start_afresh_lets_a_named_one_begin_and_the_others_go_on(tmp_path, name):
    checkpoint(tmp_path / "first.ckpt", [Counting()])
    known, unknown = Counting(), Counting(name="second")
    with pytest.warns(UserWarning, match=r"Counting\[second\].* starts afresh"):
        resume(tmp_path / "first.ckpt", [known, unknown, StartAfresh([name])])
    assert known.steps == 8
    assert unknown.steps == 4


def test_start_afresh_by_class_name(tmp_path):
    checkpoint(tmp_path / "bare.ckpt", [])
    technique = Counting(name="other")
    resume(tmp_path / "bare.ckpt", [technique, StartAfresh(["Counting"])])
    assert technique.steps == 4


def test_start_afresh_of_an_unknown_name_is_an_error(tmp_path):
    checkpoint(tmp_path / "first.ckpt", [Counting()])
    with pytest.raises(ArgumentError, match="no technique named 'Conting'"):
        resume(tmp_path / "first.ckpt", [Counting(), StartAfresh(["Conting"])])


def test_start_afresh_wants_a_list():
    with pytest.raises(ArgumentError, match=r"StartAfresh\(\['SAM'\]\)"):
        StartAfresh("SAM")


def test_the_strategy_is_as_before_afterwards(tmp_path):
    path = tmp_path / "bare.ckpt"
    checkpoint(path, [])
    for callbacks in ([Counting()], [Counting(), StartAfresh(["counting"])]):
        run = trainer(callbacks, max_epochs=2)
        before = set(vars(run.strategy))
        if len(callbacks) == 1:
            with pytest.raises(RegularizationError):
                run.fit(Host(), loader(), ckpt_path=path)
        else:
            run.fit(Host(), loader(), ckpt_path=path)
        assert "load_checkpoint" not in vars(run.strategy)
        assert before <= set(vars(run.strategy))
