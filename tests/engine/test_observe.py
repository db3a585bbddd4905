"""A look at a step outside of the pipeline finds its signals and leaves nothing behind."""

import pytest
import torch

from lightning_reg.engine import Signals
from lightning_reg.engine.observe import Observer, evaluating, sparing_collections
from tests.engine.simple import INPUTS, LABELS, Confidence, Host, trainer


@pytest.mark.parametrize("signals", [None, Signals(logits="module.net")])
def test_signals_are_found_where_a_technique_looks(signals):
    module = Host()
    observer = Observer(Confidence(1.0, signals=signals), trainer(), module, "test_step")
    step = observer.observe(lambda batch: module(batch[0]).sum(), (INPUTS, LABELS), 3)
    observer.close()
    assert torch.equal(step.logits, module(INPUTS))
    assert torch.equal(step.targets, LABELS)
    assert (step.hook, step.batch_idx) == ("test_step", 3)
    assert not any(part._forward_hooks for part in module.modules())


def test_every_part_gets_its_own_mode_back():
    module = Host(dropout=0.5)
    module.net[3].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert module.net.training
    assert not module.net[3].training


def test_what_a_step_collects_is_dropped():
    module = Host()
    module.outputs = kept = ["before"]
    with sparing_collections(module):
        module.outputs.append("during")
    assert module.outputs is kept
    assert kept == ["before"]
