"""What belongs to one instance of a technique: its phases, and nothing of the run it is in."""

import pickle
import threading

from lightning.pytorch.callbacks import Callback

from lightning_reg.engine import Plan, Regularizer
from lightning_reg.engine.regularizer import overrides
from tests.engine.simple import Host, fit


class Either(Regularizer):
    """A penalty or an edit of gradients, as it is told."""

    def __init__(self, in_loss: bool) -> None:
        super().__init__()
        self.in_loss = in_loss

    def acts_in(self, phase: str) -> bool:
        return phase != "penalty" or self.in_loss

    def penalty(self, step):
        return None

    def edit_gradients(self, update):
        return None


def test_an_instance_may_leave_out_a_phase_of_its_class():
    assert overrides(Either(True), "penalty")
    assert not overrides(Either(False), "penalty")
    assert overrides(Either(False), "edit_gradients")
    assert not overrides(Either(True), "project")
    plan = Plan.of([Either(False)])
    assert plan.phases["penalty"] == ()
    assert len(plan.phases["edit_gradients"]) == 1


def test_pickle_during_a_run_does_not_drag_the_module_along():
    class Pickles(Callback):
        done = False

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            twin = pickle.loads(pickle.dumps(trainer.callbacks[0]))
            self.done = twin.in_loss and twin.pipeline is None

    module = Host()
    module.lock = threading.Lock()
    pickles = Pickles()
    fit([Either(True), pickles], module=module, max_epochs=1)
    assert pickles.done
