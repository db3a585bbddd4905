"""What the contract has to know of a technique to put it to the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_reg.testing.hosts import ClassifierHost, ContractHost, HostOptions


@dataclass(frozen=True)
class Probe:
    """The first training step, as :attr:`ContractCase.expected` sees it.

    Attributes:
        module: the host with the weights before the step.
        inputs: what the network saw.
        targets: the labels of the batch.
        index: positions of the samples in the dataset.
        logits: the scores, with a graph to ``inputs`` and to the weights.
        features: outputs of the host's submodules by name.
        loss: the host's own loss.
        technique: the technique.
    """

    module: pl.LightningModule
    inputs: Tensor
    targets: Tensor | None
    index: Tensor
    logits: Tensor
    features: Mapping[str, Tensor]
    loss: Tensor
    technique: Any


@dataclass(frozen=True)
class ContractCase:
    """How to build a technique for the contract, and what is known about it.

    ``cls(**args)`` must change what the default host trains within three steps: choose strong
    settings. Every size is tiny: 32 samples, 4 classes, batches of 8.

    Args:
        args: keyword arguments of a setting that acts. Plain numbers and strings, so that the
            same settings can be written to YAML; for others see ``yaml``.
        neutral: what to change in ``args`` so that nothing happens (``{"strength": 0.0}``);
            ``None`` if the technique has no such setting, which then needs an exemption.
        bad: changes to ``args``, each of which the constructor must refuse with an
            :class:`ArgumentError` that names the class and a cure. A ``strength`` that is not
            finite is always tried.
        bad_late: changes to ``args`` that can only be refused once the module is known, by
            ``validate``: a selection that is empty, a layer that is not there.
        host: the module that is trained: a class or a factory that takes
            :class:`~lightning_reg.testing.hosts.HostOptions`. Hosts that are ready:
            ``ClassifierHost`` (layers ``encoder``, ``head``; inputs (8,)), ``ImageHost``
            (inputs (1, 8, 8); layers ``stem``, ``encoder``, ``head``), ``AutoencoderHost``
            (layers ``encoder``, ``decoder``), ``RegressorHost``, ``DictBatchHost`` (a batch
            with ``x``, ``y`` and ``domain``). All have a frozen submodule ``unused`` that is
            never called.
        expected: what ``reg/<name>`` must show after the first step: the pure function, called
            on the :class:`Probe`. ``None`` if the technique logs nothing that a function gives.
        gradcheck: ``() -> (function, inputs)`` for ``torch.autograd.gradcheck``, in float64.
        companions: further callbacks that the technique needs in the Trainer.
        dataset: wraps the host's dataset.
        mixin: for classes that are subclassed by a module: takes HostOptions and ``args``,
            gives the module; ``host`` is then the same module without the mixin.
        stage: ``"test"`` for techniques that act in ``trainer.test``.
        yaml: the same arguments as YAML writes them, where ``args`` are not plain.
        logs: the log keys that must be there; ``()`` for none. Default: ``reg/<name>`` for
            techniques that act in a phase which has a value.
        joint: changes to ``args`` under which N ranks equal one process with the joint batch.
            For a technique whose semantics are ``"local"``, where it has such an option; for one
            that acts in ``trainer.test``, where the host allows it (``{}``: as it is).
        tolerance: of comparisons that are equal up to rounding, relative to the largest weight.

    Example:
        >>> from lightning_reg.testing import ContractCase
        >>> CASES = {
        ...     "NormLoss": ContractCase(
        ...         args={"strength": 0.1},
        ...         neutral={"strength": 0.0},
        ...         bad=[{"strength": -1.0}, {"mode": "both"}],
        ...         bad_late=[{"parameters": "no_such_name"}],
        ...     ),
        ... }
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] | None = None
    bad: Sequence[Mapping[str, Any]] = ()
    bad_late: Sequence[Mapping[str, Any]] = ()
    host: Callable[[HostOptions], ContractHost] = ClassifierHost
    expected: Callable[[Probe], Tensor | float] | None = None
    gradcheck: Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]] | None = None
    companions: Callable[[], Sequence[Callback]] = tuple
    dataset: Callable[[Any], Any] | None = None
    mixin: Callable[..., pl.LightningModule] | None = None
    stage: Literal["fit", "test"] = "fit"
    yaml: Mapping[str, Any] | None = None
    logs: Sequence[str] | None = None
    joint: Mapping[str, Any] | None = None
    tolerance: float = 1e-5
