"""Where FSDP2 shards weights a technique trains what it trains under DDP, or refuses at setup."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_reg import SAM, OrthoGrad, RandomSparseMask, catalogue
from lightning_reg.engine import Regularizer
from lightning_reg.engine.checks import right_when_sharded
from lightning_reg.mechanisms.projection import ProximalStep
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost, HostOptions
from lightning_reg.testing.runs import Setting
from lightning_reg.testing.snapshot import first_difference, largest_gap, tensors_of
from tests.contract.cases.mixins import distilled_host
from tests.contract.test_contract import CASES, CLASSES
from tests.sharded.host import (
    ChildrenAndRoot,
    EveryLayer,
    HeadLeftOut,
    HeldThroughTheStep,
    RootOnly,
    Way,
    resume,
    train,
)

NAMES = sorted(CASES)
RIGHT = [name for name in NAMES if right_when_sharded(CLASSES[name])]
REFUSED = [name for name in NAMES if name not in RIGHT]
# Gradients are exact sums over two ranks; norms and dot products add up parts in another order.
ROUNDING = 1e-6
ACCUMULATED = Setting(batch=4, accumulate=2)


class UnevenHost(ClassifierHost):
    """Weights of three rows and of one, which two ranks cannot share evenly."""

    def build(self, options):
        self.encoder = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh())
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(1, 4)


def _case(name, **changes):
    case = CASES[name]
    # A rank's own gradient does not exist there; the option that does is a neighbour's contract.
    return replace(case, args={**case.args, **(case.joint or {})}, **changes)


def _check_equal(ranks, name, way=None, **changes):
    return _check_class(ranks, CLASSES[name], _case(name, **changes), way or Way())


def _check_class(ranks, cls, case, way):
    split = train(ranks, cls, case, way)
    replicas = train(ranks, cls, case, replace(way, shard=None))
    assert [r.error for r in [*split, *replicas]] == [None] * 4
    assert all("Shard" in p for p in split[0].placements)
    assert split[0].placements
    gap, where = largest_gap(split[0].weights, replicas[0].weights)
    assert gap <= ROUNDING, f"{where} is off by {gap:.3g}"
    assert split[0].logs == pytest.approx(replicas[0].logs, rel=1e-5)
    assert split[0].state.keys() == replicas[0].state.keys()
    assert largest_gap(split[0].state, replicas[0].state)[0] <= ROUNDING
    return split


@pytest.mark.parametrize("name", RIGHT)
def test_trains_what_replicas_train(name, ranks):
    split = _check_equal(ranks, name)
    assert split[0].patched == set()


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_at_setup_and_names_what_to_use(name, ranks):
    for result in train(ranks, CLASSES[name], _case(name), Way()):
        kind, words = result.error
        assert kind == "UnsupportedError"
        assert words.startswith(f"{name}: ")
        assert "ModelParallelStrategy" in words
        assert "ddp_reg" in words
        assert result.steps == 0
        assert result.patched == set()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SAM", {"sharpness": "micro"}),
        ("SAM", {"sharpness": "rank"}),
        ("AdversarialModelPerturbation", {"sharpness": "micro"}),
        ("PreviousTaskAnchor", {"importance": "fisher"}),
        ("ProgressiveSelfDistillation", {"memory": "model"}),
    ],
)
def test_refuses_an_argument_at_setup_and_names_what_to_use(name, changes, ranks):
    results = train(ranks, CLASSES[name], _case(name), Way(changes=changes))
    for kind, words in (r.error for r in results):
        assert kind == "UnsupportedError"
        assert words.startswith(f"{name}: ")
        assert "ModelParallelStrategy" in words
        assert any(use in words for use in ("ddp_reg", 'sharpness="global"', 'e="uniform"'))
    assert all(r.steps == 0 and r.patched == set() for r in results)


@pytest.mark.parametrize("name", ["ConfidencePenalty", "NormLoss"])
def test_refuses_ranks_that_share_their_samples(name, ranks):
    way = Way(strategy={"data_parallel_size": 1, "tensor_parallel_size": 2})
    for result in train(ranks, CLASSES[name], _case(name), way):
        assert result.error[0] == "UnsupportedError"
        assert "tensor_parallel_size=1" in result.error[1]


def test_refuses_a_module_of_which_a_part_is_sharded(ranks):
    case = _case("NormLoss", host=ClassifierHost)
    for result in train(ranks, CLASSES["NormLoss"], case, Way(HeadLeftOut)):
        kind, words = result.error
        assert kind == "UnsupportedError"
        assert "head.weight is not" in words
        assert "fully_shard(self" in words
        assert result.steps == 0


WEIGHTS = [
    ("NormLoss", {}),
    ("NormLoss", {"mode": "loss"}),
    ("OrthogonalRegularizer", {}),
    ("OrthogonalRegularizer", {"mode": "loss"}),
    ("OrthoGrad", {"strength": 0.5}),
    ("LogitAttenuatingWeightNorm", {"strength": 0.5}),
    ("PreviousTaskAnchor", {}),
    ("SAM", {"adaptive": True}),
    ("SAM", {"steps": 2}),
    ("AdversarialModelPerturbation", {"per_tensor": False, "steps": 2}),
]


@pytest.mark.parametrize(("name", "changes"), WEIGHTS)
def test_uneven_parts_make_no_difference(name, changes, ranks):
    _check_equal(ranks, name, Way(changes=changes), host=UnevenHost)


@pytest.mark.parametrize(("name", "changes"), [*WEIGHTS, ("JacobianPenalty", {})])
@pytest.mark.parametrize("layout", [RootOnly, EveryLayer, HeldThroughTheStep])
def test_what_is_sharded_together_makes_no_difference(layout, name, changes, ranks):
    _check_equal(ranks, name, Way(layout, changes=changes))


class IdleHost(ClassifierHost):
    """A host with a layer that its loss does not reach."""

    def build(self, options):
        super().build(options)
        self.idle = nn.Linear(8, 3)


@pytest.mark.parametrize(("name", "changes"), WEIGHTS)
def test_weights_that_the_loss_does_not_reach(name, changes, ranks):
    setting = Setting(strategy="ddp_find_unused_parameters_true")
    split = _check_equal(ranks, name, Way(changes=changes, setting=setting), host=IdleHost)
    moved = not torch.equal(split[0].weights["idle.weight"], IdleHost().idle.weight)
    assert moved == (name in ("NormLoss", "OrthogonalRegularizer"))


class ValidatedHost(ClassifierHost):
    """A host that is validated before its first step and after each epoch."""

    def build(self, options):
        super().build(options)
        # A weight of the root itself, which a pass without a backward leaves whole.
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x):
        return super().forward(x) * self.scale

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def val_dataloader(self):
        return DataLoader(self.dataset(self.options), batch_size=8)


@pytest.mark.parametrize(("name", "changes"), [*WEIGHTS, ("RandomSparseMask", {})])
@pytest.mark.parametrize("layout", [ChildrenAndRoot, RootOnly])
def test_a_validation_that_leaves_whole_weights_makes_no_difference(layout, name, changes, ranks):
    way = Way(layout, changes=changes, setting=Setting(epochs=2))
    _check_equal(ranks, name, way, host=ValidatedHost)


@pytest.mark.parametrize(("name", "changes"), [*WEIGHTS, ("JacobianPenalty", {})])
def test_accumulates(name, changes, ranks):
    _check_equal(ranks, name, Way(setting=ACCUMULATED, changes=changes))


@pytest.mark.parametrize("name", ["NormLoss", "OrthogonalRegularizer"])
def test_weights_may_be_gathered_one_after_the_other(name, ranks):
    _check_equal(ranks, name, Way(group=1))


@pytest.mark.parametrize("name", ["NormLoss", "SAM", "OrthoGrad", "JacobianPenalty"])
def test_clipping_counts_what_the_technique_left(name, ranks):
    clip = {"gradient_clip_val": 0.05}
    split = _check_equal(ranks, name, Way(trainer=clip))
    free = train(ranks, CLASSES[name], _case(name), Way())
    assert largest_gap(split[0].weights, free[0].weights)[0] > 1e-3


def _sam():
    return [SAM(0.3, sharpness="global")]


def _mask_and_pull():
    return [RandomSparseMask(0.5), OrthoGrad()]


@pytest.mark.parametrize(
    ("name", "changes", "others"),
    [
        ("NormLoss", {"mode": "loss"}, _sam),
        ("JacobianPenalty", {}, _sam),
        ("EntropyPenalty", {}, _sam),
        ("NormLoss", {}, _mask_and_pull),
    ],
)
def test_techniques_meet(name, changes, others, ranks):
    _check_equal(ranks, name, Way(changes=changes, others=others))


class Undeclared(Regularizer):
    """Acts on weights and says nothing of sharded ones."""

    def project(self, update):
        return None


class UndeclaredLoss(Regularizer):
    """Acts on the loss and says nothing of sharded weights."""

    def penalty(self, step):
        return step.comm.mean(step.logits.square().sum(1))


def test_a_technique_on_weights_has_to_say_that_it_is_right(ranks):
    results = train(ranks, Undeclared, ContractCase(), Way())
    assert [r.error[0] for r in results] == ["UnsupportedError"] * 2
    results = train(ranks, UndeclaredLoss, ContractCase(), Way())
    assert [r.error for r in results] == [None, None]


def conflicting_host(options, args):
    """A student whose teacher says the opposite of the labels, so that gradients conflict."""
    mapping = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    teacher = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(-4 * mapping.T)
    return distilled_host(options, {**args, "teacher": teacher})


@pytest.mark.parametrize("layout", [ChildrenAndRoot, EveryLayer])
def test_conflicting_gradients_are_those_of_whole_weights(layout, ranks):
    split = _check_equal(ranks, "DualHeadDistillationMixin", Way(layout), mixin=conflicting_host)
    assert split[0].logs["reg/dual_head_distillation_factor"] > 1.05


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["NormLoss", "SAM", "OrthoGrad", "ConfidencePenalty"])
def test_half_precision_forward_passes(name, precision, ranks):
    _check_equal(ranks, name, Way(setting=Setting(precision=precision)))


@pytest.mark.parametrize("name", RIGHT)
def test_the_catalogue_says_so(name):
    assert {e.name: e.sharded for e in catalogue.entries()}[name]


STATEFUL = ["PreviousTaskAnchor", "LogitAttenuatingWeightNorm", "RandomSparseMask", "EarlyLearning"]


@pytest.mark.parametrize("name", STATEFUL)
def test_resumes_from_a_checkpoint_that_is_whole(name, ranks, tmp_path):
    for whole, resumed, states in resume(ranks, CLASSES[name], _case(name), tmp_path):
        assert first_difference(whole, resumed) is None
        kept, again = map(tensors_of, states)
        assert kept
        assert first_difference(kept, again) is None
        assert all(type(tensor) is torch.Tensor for tensor in kept.values())


class SeesParts(Callback):
    """Fails where a module still holds whole weights at the end of a batch."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, parameter in pl_module.named_parameters():
            assert isinstance(parameter, DTensor), name


def _sees_parts():
    return [SeesParts()]


@pytest.mark.parametrize("name", ["JacobianPenalty", "R1Penalty", "SAM"])
def test_whole_weights_do_not_outlive_the_backward(name, ranks):
    results = train(ranks, CLASSES[name], _case(name), Way(others=_sees_parts))
    assert [r.error for r in results] == [None, None]


@pytest.mark.parametrize("name", ["SAM", "AdversarialModelPerturbation"])
def test_weights_are_back_when_the_second_pass_fails(name, ranks):
    way = Way(setting=Setting(options=HostOptions(fail_at=1, fail_call=1)))
    split = train(ranks, CLASSES[name], _case(name), way)
    replicas = train(ranks, CLASSES[name], _case(name), replace(way, shard=None))
    assert {r.error[0] for r in [*split, *replicas]} == {"HostFailure"}
    assert largest_gap(split[0].weights, replicas[0].weights)[0] <= ROUNDING


class ShrinkNorm(ProximalStep):
    """Moves each weight towards zero by its step, as the norm as a penalty does."""

    def proximal(self, weights, steps):
        pairs = list(zip(weights.values(), steps, strict=True))
        return [w * (1 - t / w.norm()).clamp_min(0) for w, t in pairs], None


@pytest.mark.parametrize("layout", [RootOnly, EveryLayer])
def test_proximal_steps_see_whole_weights(layout, ranks):
    case = ContractCase(args={"strength": 0.5}, host=UnevenHost)
    split = _check_class(ranks, ShrinkNorm, case, Way(layout))
    free = train(ranks, ShrinkNorm, replace(case, args={"strength": 0.0}), Way(layout))
    assert largest_gap(split[0].weights, free[0].weights)[0] > 1e-3
