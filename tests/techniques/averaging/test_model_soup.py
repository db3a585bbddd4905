"""What is in a soup, and what a run ends with."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_reg.engine import ArgumentError, ConflictError, RegularizationError
from lightning_reg.techniques.averaging.ema import EMA
from lightning_reg.techniques.averaging.model_soup import ModelSoup, greedy_soup, model_soup
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, loader, trainer, weights


def point(*values, count=3):
    return {"w": torch.tensor(values), "count": torch.tensor(count)}


def test_soup_of_one_model_several_times_is_that_model():
    state = Host(batch_norm=True).state_dict()
    soup = model_soup([state] * 3)
    for name, value in state.items():
        assert soup[name].dtype == value.dtype
        torch.testing.assert_close(soup[name], value, rtol=0, atol=0)


def test_minima_of_quadratics_give_their_mean():
    soup = model_soup([point(1.0, 4.0), point(3.0, 0.0), point(2.0, 2.0, count=9)])
    torch.testing.assert_close(soup["w"], torch.tensor([2.0, 2.0]))
    assert int(soup["count"]) == 3
    uneven = model_soup([point(1.0, 4.0), point(3.0, 0.0)], shares=[3, 1])
    torch.testing.assert_close(uneven["w"], torch.tensor([1.5, 3.0]))


def test_greedy_takes_what_helps_and_leaves_out_what_does_not():
    def score(state):
        return -float((state["w"] - torch.tensor([1.0, 1.0])).norm())

    states = [point(9.0, 9.0), point(0.0, 1.5), point(2.0, 0.9), point(1.2, 5.0)]
    soup, chosen = greedy_soup(states, score)
    # The two near ones average to (1, 1.2); either of the far ones would move the soup away.
    assert chosen == [2, 1]
    torch.testing.assert_close(soup["w"], torch.tensor([1.0, 1.2]))
    assert score(soup) > max(score(state) for state in states)


def run(callback, folder, module=None, epochs=4, make=trainer):
    module = module or Host()
    kept = ModelCheckpoint(folder, "{epoch}", monitor="loss", save_top_k=4, save_weights_only=True)
    fit = make(callbacks=[kept, callback], max_epochs=epochs, enable_checkpointing=True)
    fit.fit(module, loader())
    return module


def saved(folder):
    files = sorted(folder.glob("*.ckpt"))
    return [torch.load(path, weights_only=True)["state_dict"] for path in files]


def flat(state):
    return torch.cat([state[name].flatten() for name, _ in Host().named_parameters()])


def test_run_ends_with_the_mean_of_its_checkpoints(tmp_path):
    technique = ModelSoup()
    module = run(technique, tmp_path)
    states = saved(tmp_path)
    assert len(states) == 4
    expected = torch.stack([flat(state) for state in states]).mean(0)
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-6)
    assert technique.chosen == [0, 1, 2, 3]


def test_greedy_run_is_no_worse_than_its_best_checkpoint(tmp_path):
    def score(module):
        assert not module.training
        return -float(F.cross_entropy(module(INPUTS), LABELS))

    technique = ModelSoup("greedy", score=score)
    module = run(technique, tmp_path)
    reached = score(module.eval())
    for state in saved(tmp_path):
        other = Host()
        other.load_state_dict(state)
        assert score(other.eval()) <= reached + 1e-6


def test_batch_norm_has_the_statistics_of_the_soup(tmp_path):
    module = run(ModelSoup(), tmp_path, Host(batch_norm=True))
    x = module.net[0](INPUTS).split(16)
    torch.testing.assert_close(
        module.net[1].running_mean, torch.stack([p.mean(0) for p in x]).mean(0).detach()
    )
    torch.testing.assert_close(
        module.net[1].running_var, torch.stack([p.var(0) for p in x]).mean(0).detach()
    )


def test_checkpoints_of_other_runs_are_taken_by_path(tmp_path):
    paths = []
    for i, scale in enumerate((1.0, 3.0)):
        other = Host()
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(scale)
        paths.append(tmp_path / f"{i}.pt")
        torch.save(other.state_dict(), paths[-1])
    module = Host()
    trainer([ModelSoup(checkpoints=paths)], max_epochs=1).fit(module, loader())
    assert torch.equal(weights(module), torch.full_like(weights(module), 2.0))


def on_ranks(folder):
    from pathlib import Path

    module = run(ModelSoup(), Path(folder), Host(batch_norm=True), epochs=2, make=rank_trainer)
    return weights(module), module.net[1].running_mean


def test_ranks_end_with_the_same_soup(ranks, tmp_path):
    one, other = ranks.run(on_ranks, str(tmp_path))
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


def test_refusals(tmp_path):
    with pytest.raises(RegularizationError, match="ModelSoup: found no checkpoint"):
        trainer([ModelSoup()], max_epochs=1).fit(Host(), loader())
    with pytest.raises(ConflictError, match="excludes"):
        trainer([ModelSoup(), EMA()], max_epochs=1).fit(Host(), loader())
    for make in (
        lambda: ModelSoup("best"),
        lambda: ModelSoup("greedy"),
        lambda: model_soup([]),
        lambda: model_soup([point(1.0), point(1.0, 2.0)]),
        lambda: model_soup([point(1.0)], shares=[1.0, 2.0]),
        lambda: model_soup([point(1.0)], shares=[-1.0]),
    ):
        with pytest.raises(ArgumentError, match="Try: "):
            make()
