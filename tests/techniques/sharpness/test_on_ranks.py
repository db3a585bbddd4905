"""Two ranks: replicas stay equal, and each kind of sharpness is what it says."""

import pytest
import torch

from tests.techniques.sharpness.runs import Setting, reference, train

SHARPNESS = ["micro", "rank", "global"]


def sam(sharpness="micro", rho=0.1, **settings):
    return Setting("SAM", {"rho": rho, "sharpness": sharpness}, **settings)


def close(one, other, atol=1e-6):
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("precision", "sharpness", "accumulate"),
    [
        ("32-true", "micro", 1),
        ("bf16-true", "micro", 1),
        ("bf16-true", "rank", 2),
    ],
)
def test_replicas_are_bit_equal_after_200_steps(ranks, precision, sharpness, accumulate):
    setting = sam(
        sharpness, 0.5, precision=precision, batch=4, epochs=25 * accumulate, accumulate=accumulate
    )
    one, other = ranks.run(train, setting)
    assert len(one.history) == 200 * accumulate
    assert torch.equal(one.weights, other.weights)
    assert torch.isfinite(one.weights.float()).all()


@pytest.mark.parametrize("technique", ["SAM", "AMP"])
def test_logs_metrics_and_statistics_are_those_of_a_run_without_it(ranks, technique):
    host = {"batch_norm": True, "dropout": 0.3, "lr": 0.0}
    plain = ranks.run(train, Setting("", {}, host=host, epochs=2))
    ours = ranks.run(train, Setting(technique, {"sharpness": "global"}, host=host, epochs=2))
    for without, with_it in zip(plain, ours, strict=True):
        for key in ("loss", "accuracy"):
            assert with_it.metrics[key] == without.metrics[key]
        assert with_it.losses == without.losses
        for name, buffer in without.buffers.items():
            assert torch.equal(with_it.buffers[name], buffer), name
        assert torch.equal(with_it.weights, without.weights)


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_perturbation_follows_the_gradient_of_its_group(ranks, sharpness, accumulate):
    """Micro-batches, ranks' windows, or the joint window, as a plain loop has them."""
    setting = sam(sharpness, batch=4, accumulate=accumulate, epochs=2)
    one, other = ranks.run(train, setting)
    assert torch.equal(one.weights, other.weights)
    close(one.weights, reference(setting, sharpness, 0.1, world=2))


def test_the_three_kinds_of_sharpness_differ():
    setting = Setting(batch=4, accumulate=2, epochs=2)
    micro, rank, joint = (reference(setting, kind, 0.1, world=2) for kind in SHARPNESS)
    assert min((micro - rank).abs().max(), (rank - joint).abs().max()) > 1e-4


@pytest.mark.parametrize("technique", ["SAM", "AMP"])
@pytest.mark.parametrize("steps", [1, 2])
def test_global_sharpness_equals_one_process_with_the_joined_batch(ranks, technique, steps):
    arguments = {"sharpness": "global", "steps": steps}
    split = Setting(technique, arguments, batch=4, accumulate=2, epochs=2, penalty=True)
    joint = Setting(technique, arguments, batch=16, epochs=2, penalty=True)
    one, other = ranks.run(train, split)
    assert torch.equal(one.weights, other.weights)
    # The penalty is a variance over the micro-batches of all ranks, so only ranks are joined.
    alone = train(Setting(technique, arguments, batch=8, accumulate=2, epochs=2, penalty=True))
    close(one.weights, alone.weights)
    assert (train(joint).weights - alone.weights).abs().max() > 1e-4


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_penalty_with_collectives_leaves_replicas_equal(ranks, sharpness):
    one, other = ranks.run(train, sam(sharpness, batch=4, accumulate=2, penalty=True))
    assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize(
    ("strategy", "accumulate"),
    [("find_unused", 2), ("bucket_view", 2), ("ddp_reg", 2), ("static_graph", 1)],
)
def test_every_variant_of_ddp_trains_the_same_bits(ranks, sharpness, strategy, accumulate):
    setting = sam(sharpness, batch=4, accumulate=accumulate, strategy=strategy)
    plain = sam(sharpness, batch=4, accumulate=accumulate)
    one, other = ranks.run(train, setting)
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.weights, ranks.run(train, plain)[0].weights)


@pytest.mark.parametrize("sharpness", ["micro", "global"])
def test_layers_that_not_every_micro_batch_uses(ranks, sharpness):
    """The last micro-batch of a window does not reach a layer that an earlier one trained."""
    settings = {"hard": "sometimes", "accumulate": 2, "epochs": 2}
    split = sam(sharpness, batch=4, strategy="find_unused", **settings)
    one, other = ranks.run(train, split)
    assert torch.equal(one.weights, other.weights)
    if sharpness == "global":
        close(one.weights, train(sam(sharpness, batch=8, **settings)).weights)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_fp16_with_a_scaler_agrees_with_fp32(ranks, sharpness):
    settings = {"batch": 4, "accumulate": 2, "epochs": 2}
    full = ranks.run(train, sam(sharpness, **settings))
    half = ranks.run(train, sam(sharpness, precision="fp16", **settings))
    assert torch.equal(half[0].weights, half[1].weights)
    # fp16 rounds to 3 digits; the weights are of order 1.
    close(half[0].weights, full[0].weights, atol=2e-3)
    assert not torch.equal(half[0].weights, full[0].weights)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_overflow_on_one_rank_skips_the_step_on_both(ranks, sharpness):
    one, other = ranks.run(train, sam(sharpness, precision="fp16", hard="overflows", epochs=2))
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.isfinite(mine).all()
    skipped = [torch.equal(a, b) for a, b in zip(one.history, one.history[1:], strict=False)]
    assert skipped == [True, False, False, False, True, False, False]


def test_overflow_on_one_rank_leaves_the_weights_of_both_in_place(ranks):
    """So that no second pass meets weights that are not finite, which user code may refuse."""
    for outcome in ranks.run(train, sam(precision="fp16", hard="overflows")):
        first, again, perturbed, second_first, second_again = outcome.seen[:5]
        assert torch.equal(first, again)
        assert not torch.equal(first, perturbed)
        assert torch.equal(second_first, second_again)


@pytest.mark.parametrize("sharpness", ["micro", "global"])
@pytest.mark.parametrize("step", [1, 3])
def test_resume_inside_an_epoch_is_bit_equal(ranks, tmp_path, sharpness, step):
    """In the first epoch and in the second, after shuffling; momentum included."""
    setting = sam(sharpness, batch=8, accumulate=2, epochs=3)
    whole = ranks.run(train, setting, str(tmp_path))
    resumed = ranks.run(train, setting, "", str(tmp_path / f"step={step}.ckpt"))
    for one, other in zip(whole, resumed, strict=True):
        assert len(other.history) == 12 - 2 * step
        assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_resume_on_one_process_is_bit_equal(tmp_path, sharpness):
    setting = sam(sharpness, batch=8, accumulate=2, epochs=2)
    whole = train(setting, str(tmp_path))
    resumed = train(setting, "", str(tmp_path / "step=3.ckpt"))
    assert len(resumed.history) == 10
    assert torch.equal(whole.weights, resumed.weights)
