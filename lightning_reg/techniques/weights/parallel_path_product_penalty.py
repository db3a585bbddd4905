"""Makes a sum of parallel branches use few of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.selected_weights import LAYERS
from lightning_reg.mechanisms.weight_paths import Path, WeightPaths
from lightning_reg.mechanisms.weight_penalty import Mode

__all__ = ["ParallelPathProductPenalty", "parallel_path_product_penalty"]

Form = Literal["power", "product"]
_FORMS = ("power", "product")


def parallel_path_product_penalty(weights: Sequence[Tensor], form: Form = "power") -> Tensor:
    """``1/L sum_l ||W_l||_F^L``, or ``prod_l ||W_l||_F``, of the ``L`` weights of one branch.

    The product is the least value of the power form over all rescalings of the layers that leave
    the branch's function as it is; they are equal where all norms are.

    Args:
        weights: ``W_1`` to ``W_L``, any shapes.
        form: ``"power"`` or ``"product"``.

    Returns:
        A scalar, at least 0.
    """
    norms = torch.stack([torch.linalg.vector_norm(weight) for weight in weights])
    if form == "product":
        return norms.prod()
    return norms.pow(len(weights)).mean()


class ParallelPathProductPenalty(WeightPaths):
    r"""Makes a sum of parallel branches use few of them.

    Ergen, Pilanci (2021), Parallel Deep Neural Networks Have Zero Duality Gap, arXiv:2110.06482.

    For branches ``b`` (an ensemble of small networks, experts, heads) of ``L`` layers each, whose
    outputs are summed: ``R = sum_b 1/L sum_l ||W_bl||_F^L``. The power is the depth, not 2: for
    two layers it is weight decay, and for deeper branches what makes the problem's convex dual
    tight. Up to rescaling of layers it is ``sum_b prod_l ||W_bl||_F``, the l1 norm of the branches'
    sizes: whole branches vanish, as groups of a group lasso do, and linear branches of two layers
    pay the nuclear norm of their sum at its best factorization.

    The formula is from memory of the paper (its abstract says that the regularization is modified),
    not checked against code. The default strength is ours.

    Args:
        strength: ``beta``, at least 0.
        branches: a regular expression that fits the whole name of every branch, a submodule:
            ``r"experts\.\d+"``. A branch's layers are its linear and convolutional weights in
            their order.
        form: ``"power"``, the paper's; ``"product"``, which leaves the scale of layers free.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the penalty to the loss of every micro-batch. Equal to rounding.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, ``form`` is neither of the two, or ``branches``
            is no regular expression; before training, if it fits no submodule with such weights.
        UnsupportedError: where FSDP2 shards weights.

    Note:
        Over ranks: replica; nothing is communicated, and every rank computes the whole. Cost per
        optimizer step: a norm a weight and a pass over the weights. Frozen layers of a branch count
        with their norms. Biases are free. The claim needs activations that are positively
        homogeneous (ReLU, or none) and no normalization inside a branch. A branch that is zero has
        no gradient and stays so. Set the optimizer's ``weight_decay`` to 0 on the branches.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ParallelPathProductPenalty
        >>> few = ParallelPathProductPenalty(1e-3, branches=r"experts\.\d+")
        >>> trainer = L.Trainer(callbacks=[few], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Parallel Deep Neural Networks Have Zero Duality Gap",
            "Ergen et al.",
            2021,
            "2110.06482",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(parallel_path_product_penalty)
    explanation: ClassVar[str] = "makes parallel branches few"

    def __init__(
        self,
        strength: float | Schedule = 1e-3,
        *,
        branches: str = r"branches\.\d+",
        form: Form = "power",
        mode: Mode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, mode=mode, name=name)
        cure = r'ParallelPathProductPenalty(1e-3, branches=r"experts\.\d+")'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        if form not in _FORMS:
            raise ArgumentError(
                self, f"`form` must be one of {', '.join(_FORMS)}, got {form!r}", cure=cure
            )
        try:
            re.compile(branches)
        except (re.error, TypeError) as error:
            raise ArgumentError(
                self, f"`branches` must be a regular expression, got {branches!r}", cure=cure
            ) from error
        self.branches = branches
        self.form = form

    def find_paths(self, module: nn.Module) -> list[Path]:
        """The weights of each branch."""
        paths = []
        for path, branch in module.named_modules():
            if re.fullmatch(self.branches, path):
                names = [n for n, _ in branch.named_parameters(path)]
                chosen = {id(w) for w in _layers(branch)}
                paths.append(tuple(n for n in names if id(module.get_parameter(n)) in chosen))
        paths = [path for path in paths if path]
        if not paths:
            raise ArgumentError(
                self,
                f"`branches` = {self.branches!r} fits no submodule with linear or convolutional "
                f"weights of {type(module).__name__}",
                cure=r'ParallelPathProductPenalty(branches=r"experts\.\d+")',
            )
        return paths

    def values(self, paths: Sequence[Sequence[Tensor]]) -> Tensor:
        """The penalty of each branch."""
        return torch.stack([parallel_path_product_penalty(path, self.form) for path in paths])

    def closed_form(self, paths: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """The penalty and the gradients of each branch, from one norm a weight."""
        flat = [weight for path in paths for weight in path]
        norms = torch.stack(torch._foreach_norm(flat)).split([len(path) for path in paths])
        values, factors = [], []
        for norm in norms:
            value, factor = _product(norm) if self.form == "product" else _power(norm)
            values.append(value)
            factors.append(factor)
        scaled = list(torch._foreach_mul(flat, list(torch.cat(factors).unbind())))
        gradients = [[scaled.pop(0) for _ in path] for path in paths]
        return torch.stack(values), gradients


def _layers(branch: nn.Module) -> list[nn.Parameter]:
    """Weights of linear and convolutional layers, frozen ones too."""
    assert LAYERS.types is not None
    return [
        layer.weight
        for layer in branch.modules()
        if any(base.__name__ in LAYERS.types for base in type(layer).__mro__)
        and isinstance(layer.weight, nn.Parameter)
    ]


def _power(norms: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and what each weight is multiplied by: ``||W||^(L - 2)``."""
    depth = len(norms)
    # Of a single layer this is the norm itself, which has no gradient at zero.
    factors = torch.where(norms > 0, norms.pow(depth - 2), 0.0)
    return norms.pow(depth).mean(), factors


def _product(norms: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and what each weight is multiplied by: the others' product over its norm."""
    depth = len(norms)
    others = norms.repeat(depth, 1).fill_diagonal_(1.0).prod(1)
    return norms.prod(), torch.where(norms > 0, others / norms, 0.0)
