"""Solves for an item-to-item model in which no item may explain itself (EASE)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step, UnsupportedError
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.closed_form_readout import ClosedFormReadout, Moments

__all__ = ["ZeroDiagonalRidge", "zero_diagonal_ridge"]


def zero_diagonal_ridge(gram: Tensor, ridge: float) -> Tensor:
    """``argmin_B ||X - X B||_F^2 + lambda ||B||_F^2`` with ``diag(B) = 0``.

    ``B_ij = -P_ij / P_jj`` for ``i != j``, with ``P = (X^T X + lambda I)^-1``: column ``j`` is the
    ridge regression of item ``j`` on all others.

    Args:
        gram: ``X^T X`` (n, n).
        ridge: ``lambda``, above 0.

    Returns:
        ``B`` (n, n).
    """
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram + ridge * identity)
    inverse = torch.cholesky_inverse(factor)
    b: Tensor = (inverse / -inverse.diagonal()).where(identity == 0, 0.0)
    return b


class ZeroDiagonalRidge(ClosedFormReadout):
    """Solves for an item-to-item model in which no item may explain itself (EASE).

    Steck (2019), Embarrassingly Shallow Autoencoders for Sparse Data, arXiv:1905.03375.

    Scores of all items for a user with interactions ``x`` are ``x B``, with ``B`` the solution of
    ``min ||X - X B||_F^2 + lambda ||B||_F^2`` under ``diag(B) = 0``. The zero diagonal is the
    regularization: without it ``B`` would be the identity, shrunk. In closed form ``B_ij = -P_ij /
    P_jj`` with ``P = (X^T X + lambda I)^-1``. A square layer of the module, ``scores =
    layer(x)``, is set to it (``layer.weight = B^T``) at the end of an epoch, from the inputs of
    the epoch's steps: one epoch is all that it takes.

    The formula is confirmed against uos-vision/cotegory-ai, model/ease.py, and others that divide
    the columns of ``P`` by its negative diagonal; code of the author was not found.

    Args:
        strength: the share of the way from the layer's weights to ``B``, in [0, 1].
        layer: the name of the layer, an ``nn.Linear(n, n, bias=False)``.
        ridge: ``lambda``, above 0, in the units of ``X^T X``, so it grows with the number of
            users. The paper finds hundreds for data of 10^5 users; 500 is a common default.
        every: epochs from one solution to the next.
        signals: where ``inputs`` are: the interactions ``X`` (B, n), dense or sparse.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, ``layer`` is no linear layer, or the
            rows do not fit it.
        UnsupportedError: if the layer is not square, or has a bias.

    Note:
        Over ranks: global; the Gram matrices of all ranks are summed and solved once, for one
        all-reduce of ``2 n^2`` numbers a micro-batch. Cost: a Gram matrix a micro-batch, an
        inverse (n, n) an epoch, both in float64; memory for 3 n^2 numbers. Tens of thousands of
        items are the limit. The log shows the mean squared residual of a user. A run that ends
        inside an epoch (``max_steps``) leaves the layer as it is.

        A model that consists of nothing else needs one epoch and no optimizer
        (``configure_optimizers`` returns ``None``). In one process its ``training_step`` may return
        ``None`` too; over ranks Lightning asks for a loss. It hurts where items are more than
        users by far and ``ridge`` is small.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ZeroDiagonalRidge
        >>> ease = ZeroDiagonalRidge(layer="items", ridge=500.0)
        >>> trainer = L.Trainer(callbacks=[ease], max_epochs=1, logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Embarrassingly Shallow Autoencoders for Sparse Data", "Steck", 2019, "1905.03375"),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    function: ClassVar[Callable[..., Any] | None] = staticmethod(zero_diagonal_ridge)
    explanation: ClassVar[str] = "solves for an item-to-item layer with a zero diagonal"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        layer: str = "items",
        ridge: float = 500.0,
        every: int = 1,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layer=layer, every=every, signals=signals, name=name)
        cure = "ZeroDiagonalRidge(ridge=500.0)"
        check_range(self, "ridge", ridge, 0, float("inf"), low_open=True, high_open=True, cure=cure)
        self.ridge = ridge

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer that cannot be ``B``."""
        super().validate(trainer, pl_module)
        linear = self.linear(pl_module)
        if linear.in_features != linear.out_features or linear.bias is not None:
            raise UnsupportedError(
                self,
                f"solves for a square layer without a bias, and `{self.layer}` is {linear}",
                cure=f"self.{self.layer} = nn.Linear(items, items, bias=False)",
            )

    def rows(self, step: Step) -> tuple[Tensor, Tensor]:
        """Interactions, which explain themselves."""
        given: Tensor = step.inputs
        rows = given if given.layout == torch.strided else given.to_dense()
        return rows, rows

    def solve(self, moments: Moments) -> Tensor:
        """``B`` in the layout of a layer."""
        return zero_diagonal_ridge(moments.gram, self.ridge).T
