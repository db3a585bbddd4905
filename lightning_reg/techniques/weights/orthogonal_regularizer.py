"""Makes the weight vectors of a layer's output units orthogonal to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.weight_penalty import Mode, WeightPenalty

__all__ = ["OrthogonalRegularizer", "orthogonal_regularizer"]

Form = Literal["off_diagonal", "full"]
_FORMS = ("off_diagonal", "full")


def orthogonal_regularizer(weight: Tensor, form: Form = "off_diagonal") -> Tensor:
    """``||W W^T o (1 - I)||_F^2``, or ``||W W^T - I||_F^2`` in the full form.

    ``o`` is the elementwise product, and the rows of ``W`` are the weight vectors of the output
    units. The gradients are ``4 (W W^T o (1 - I)) W`` and ``4 (W W^T - I) W``.

    Args:
        weight: (out, ...); everything behind the first dimension belongs to one row.
        form: ``"off_diagonal"`` compares directions and leaves norms free; ``"full"`` asks for
            rows of norm one as well.

    Returns:
        A scalar, at least 0.
    """
    return _value_and_gram(weight.flatten(1), form)[0]


class OrthogonalRegularizer(WeightPenalty):
    """Makes the weight vectors of a layer's output units orthogonal to each other.

    Brock, Donahue, Simonyan (2018), Large Scale GAN Training for High Fidelity Natural Image
    Synthesis, arXiv:1809.11096, who trained generators with the off-diagonal form so that their
    latents could be truncated; the full form is the orthogonal regularization of Brock, Lim,
    Ritchie, Weston (2016), Neural Photo Editing with Introspective Adversarial Networks.

    ``R = sum_l ||W_l W_l^T o (1 - I)||_F^2`` with the rows of ``W_l`` (out, in * kernel) as the
    filters of output units, and ``sum_l ||W_l W_l^T - I||_F^2`` in the full form. The rows of a
    layer with more outputs than inputs cannot all be orthogonal; there it spreads them out.

    The form and the axis are those of the paper's released port (BigGAN-PyTorch). That code adds
    ``2 (W W^T o (1 - I)) W`` to the gradient, which is half the gradient of the penalty in the
    paper; here the gradient is the whole one, so its strength of 1e-4 is 5e-5 here. The default
    of 1e-4 is the paper's ``beta``, from memory.

    Args:
        strength: ``beta``, at least 0.
        form: ``"off_diagonal"`` leaves the norms of filters free; ``"full"`` pulls them to one.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers. Embeddings are left out.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the penalty to the loss of every micro-batch. Equal to rounding.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, ``form`` is none of the two, or no parameter is
            chosen.

    Note:
        Over ranks: replica; nothing is communicated. Under ``ddp_reg`` each rank computes its
        share of the layers, under ``ddp`` every rank all of them. Cost per optimizer step:
        two matrix products a layer, of ``n m min(n, m)`` multiplications each for a matrix (n, m);
        the smaller of the two Gram matrices is used.

        The sum runs over all pairs of filters, so wide layers are held harder than narrow ones.
        It hurts where filters should resemble each other, as in a classifier's last layer with
        similar classes. Under manual optimization it acts on the weights of each optimizer that
        steps; name a generator's weights with ``parameters="generator"``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import OrthogonalRegularizer
        >>> trainer = L.Trainer(callbacks=[OrthogonalRegularizer(1e-4)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Large Scale GAN Training for High Fidelity Natural Image Synthesis",
            "Brock et al.",
            2018,
            "1809.11096",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(orthogonal_regularizer)
    explanation: ClassVar[str] = "makes the weight vectors of a layer's units orthogonal"

    def __init__(
        self,
        strength: float | Schedule = 1e-4,
        *,
        form: Form = "off_diagonal",
        parameters: str | ParameterSelection | None = None,
        mode: Mode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="OrthogonalRegularizer(1e-4)")
        if form not in _FORMS:
            raise ArgumentError(
                self,
                f"`form` must be one of {', '.join(_FORMS)}, got {form!r}",
                cure='OrthogonalRegularizer(form="off_diagonal")',
            )
        self.form = form

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack([orthogonal_regularizer(m, self.form) for m in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The penalty and the gradient of each weight, from one Gram matrix."""
        values, gradients = [], []
        for matrix in matrices:
            value, gram = _value_and_gram(matrix, self.form)
            values.append(value)
            gradients.append(_gradient(matrix, gram, self.form))
        return torch.stack(values), gradients

    def cost(self, weight: Tensor) -> float:
        """Multiplications of one product with the smaller Gram matrix."""
        rows, columns = weight.shape[0], weight[0].numel()
        return float(rows * columns * min(rows, columns))


def _is_wide(matrix: Tensor) -> bool:
    """Whether the Gram matrix of rows is the smaller one."""
    return matrix.shape[0] <= matrix.shape[1]


def _value_and_gram(matrix: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """The penalty, and ``W W^T`` less its target (wide) or ``W^T W`` (tall)."""
    if _is_wide(matrix):
        gram = matrix @ matrix.T
        target = torch.eye(len(gram)).to(gram) if form == "full" else gram.diag().diag()
        gram = gram - target
        return gram.square().sum(), gram
    # ||W W^T||_F = ||W^T W||_F, so that a vocabulary of rows needs no matrix of all its pairs.
    gram = matrix.T @ matrix
    squares = matrix.square().sum(1)
    if form == "full":
        return gram.square().sum() - 2 * squares.sum() + len(matrix), gram
    return gram.square().sum() - squares.square().sum(), gram


def _gradient(matrix: Tensor, gram: Tensor, form: Form) -> Tensor:
    if _is_wide(matrix):
        return 4 * (gram @ matrix)
    target = 1.0 if form == "full" else matrix.square().sum(1, keepdim=True)
    return 4 * (matrix @ gram - target * matrix)
