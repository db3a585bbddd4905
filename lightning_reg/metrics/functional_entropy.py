"""How much each input modality moves a classifier's prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import AdditiveMetric, evaluate
from lightning_reg.metrics.inputs import high_precision

__all__ = [
    "FunctionalEntropy",
    "FunctionalFisherInformation",
    "functional_entropy",
    "functional_fisher_information",
    "perturbed_cross_entropy",
]


def perturbed_cross_entropy(
    model: Callable[..., Tensor],
    modalities: Sequence[Tensor],
    *,
    sigma: float,
    draws: int = 10,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The function whose entropy is measured, and its squared gradients, one modality at a time.

    With ``z_m ~ N(x_m, sigma^2 I)`` in place of modality m, the others left as they are:
    ``f_m(z) = -sum_y p(y | x) log p(y | z)`` and ``||grad_{z_m} f_m(z)||^2``.

    Args:
        model: from the modalities to logits (N, C), each row from its own sample: with batch
            normalization in ``eval`` mode.
        modalities: M float tensors (N, ...), embeddings where an input is discrete.
        sigma: the noise's standard deviation, in units of the input.
        draws: how many draws are made of each modality.
        generator: where the noise comes from; the global generator without.

    Returns:
        ``values`` (M, S, N) and ``squared_gradients`` (M, S, N), both detached.

    Example:
        >>> import torch
        >>> x, y = torch.randn(5, 3), torch.randn(5, 2)
        >>> model = lambda a, b: torch.cat([a, b], 1)
        >>> values, squares = perturbed_cross_entropy(model, [x, y], sigma=0.1, draws=4)
        >>> values.shape, squares.shape
        (torch.Size([2, 4, 5]), torch.Size([2, 4, 5]))
    """
    if not sigma > 0 or draws < 1:
        raise ArgumentError(
            "perturbed_cross_entropy",
            f"`sigma` must be above 0 and `draws` at least 1, got {sigma!r} and {draws!r}",
            cure="sigma=0.1, draws=10",
        )
    # Also under the inference mode of validation, whose tensors autograd cannot save.
    with torch.inference_mode(False):
        inputs = [m.detach().clone() for m in modalities]
        with torch.no_grad():
            reference = model(*inputs).softmax(1)
        pairs = [
            [_one_draw(model, inputs, m, reference, sigma, generator) for _ in range(draws)]
            for m in range(len(inputs))
        ]
    values = torch.stack([torch.stack([value for value, _ in row]) for row in pairs])
    squares = torch.stack([torch.stack([square for _, square in row]) for row in pairs])
    return values, squares


def functional_entropy(
    values: Tensor, squared_gradients: Tensor, *, num_modalities: int, validate_args: bool = True
) -> Tensor:
    r"""The functional entropy ``E[f log f] - E[f] log E[f]`` of each modality.

    Over the draws of each sample, and then the mean over samples. 0 if a modality does not move
    the prediction.

    Args:
        values: (M, S, N) ``f`` of S draws for each of N samples, positive; see
            :func:`perturbed_cross_entropy`.
        squared_gradients: (M, S, N) the squared norms of its gradients.
        num_modalities: M.
        validate_args: check values, which costs a host sync.

    Returns:
        (M,) float64 (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> values = torch.tensor([[[1.0], [3.0]]])  # one modality, two draws, one sample
        >>> functional_entropy(values, torch.zeros(1, 2, 1), num_modalities=1)
        tensor([0.2616], dtype=torch.float64)
    """
    metric = FunctionalEntropy(num_modalities=num_modalities, validate_args=validate_args)
    value: Tensor = evaluate(metric, values, squared_gradients)
    return value


def functional_fisher_information(
    values: Tensor, squared_gradients: Tensor, *, num_modalities: int, validate_args: bool = True
) -> Tensor:
    r"""The functional Fisher information ``E[||grad f||^2 / f]`` of each modality.

    By the log-Sobolev inequality ``sigma^2 / 2`` times this bounds the functional entropy from
    above, for Gaussian noise of standard deviation ``sigma``. Each draw's gradient is divided by
    its own ``f``, as in the paper; the official code (itaigat/removing-bias-in-multi-modal-
    classifiers@f76416c, ``regularization.py``) divides by the mean of ``f`` over the batch, which
    weights samples that are hard for the model as if they were easy, and whose bound does not
    hold for each sample.

    Args:
        values: (M, S, N) ``f`` of S draws for each of N samples, positive; see
            :func:`perturbed_cross_entropy`.
        squared_gradients: (M, S, N) the squared norms of its gradients.
        num_modalities: M.
        validate_args: check values, which costs a host sync.

    Returns:
        (M,) float64 (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> values, squares = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]])
        >>> functional_fisher_information(values, squares, num_modalities=1)
        tensor([2.5000], dtype=torch.float64)
    """
    metric = FunctionalFisherInformation(num_modalities=num_modalities, validate_args=validate_args)
    value: Tensor = evaluate(metric, values, squared_gradients)
    return value


class _ModalityMetric(AdditiveMetric):
    """What both metrics of modalities count; in a collection they share the update."""

    papers = (
        Paper(
            "Removing Bias in Multi-modal Classifiers: Regularization by Maximizing Functional "
            "Entropies",
            "Gat et al.",
            2020,
            "2010.10802",
        ),
    )
    plot_lower_bound = 0.0
    entropy_total: Tensor
    fisher_total: Tensor
    count: Tensor

    def __init__(self, *, num_modalities: int, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        whole = isinstance(num_modalities, int) and not isinstance(num_modalities, bool)
        if not whole or num_modalities < 1:
            raise ArgumentError(
                self,
                f"`num_modalities` must be a whole number from 1, got {num_modalities!r}",
                cure="num_modalities=2",
            )
        self.num_modalities = num_modalities
        self.validate_args = validate_args
        self.add_total("entropy_total", num_modalities)
        self.add_total("fisher_total", num_modalities)
        self.add_count("count")

    def update_settings(self) -> tuple[Any, ...]:
        """The same for both metrics."""
        return ("modalities", self.num_modalities, self.validate_args)

    def update(self, values: Tensor, squared_gradients: Tensor) -> None:
        """Count one batch.

        Args:
            values: (M, S, N) ``f`` of S draws for each of N samples, positive.
            squared_gradients: (M, S, N) the squared norms of its gradients.

        Raises:
            ArgumentError: if shapes or values are not these.
        """
        self._check(values, squared_gradients)
        f, squares = high_precision(values.detach()), high_precision(squared_gradients.detach())
        valid = (torch.isfinite(f) & torch.isfinite(squares)).all(1).all(0)
        f, squares = f[..., valid], squares[..., valid]
        if self.validate_args and f.numel() and float(f.min()) <= 0:
            raise ArgumentError(
                self,
                f"the function must be positive, got {float(f.min()):.4g}",
                cure="values.clamp_min(1e-12)",
            )
        mean = f.mean(1)
        entropy = torch.xlogy(f, f).mean(1) - torch.xlogy(mean, mean)
        fisher = (squares / f).mean(1)
        self.invalid = self.invalid + (~valid).sum()
        self.entropy_total = self.entropy_total + entropy.sum(1).to(self.entropy_total)
        self.fisher_total = self.fisher_total + fisher.sum(1).to(self.fisher_total)
        self.count = self.count + valid.sum()

    def _check(self, values: Tensor, squared_gradients: Tensor) -> None:
        good = values.ndim == 3 and values.shape[0] == self.num_modalities
        good = good and values.shape == squared_gradients.shape and values.shape[1] > 0
        if not good or not (values.is_floating_point() and squared_gradients.is_floating_point()):
            raise ArgumentError(
                self,
                f"needs float values and squared gradients ({self.num_modalities}, S, N), got "
                f"shapes {tuple(values.shape)} and {tuple(squared_gradients.shape)}",
                cure="metric.update(*perturbed_cross_entropy(model, inputs, sigma=0.1))",
            )


class FunctionalEntropy(_ModalityMetric):
    """The functional entropy of a prediction under noise in each input modality.

    Gat et al., Removing Bias in Multi-modal Classifiers: Regularization by Maximizing Functional
    Entropies, 2020. See :func:`functional_entropy`. A modality whose entropy is far below the
    others' is one that the model does not use. The state is 2 M float64 sums (float32 on MPS) and
    a count.

    Args:
        num_modalities: M.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        Biased towards 0 with few draws, by about ``Var f / (2 S E f)``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import FunctionalEntropy
        >>> metric = FunctionalEntropy(num_modalities=1)
        >>> metric.update(torch.tensor([[[1.0], [3.0]]]), torch.zeros(1, 2, 1))
        >>> metric.compute()
        tensor(0.2616, dtype=torch.float64)
    """

    function = staticmethod(functional_entropy)

    def value(self) -> Tensor:
        """(M,) the means over everything that was counted."""
        return self.entropy_total / self.count


class FunctionalFisherInformation(_ModalityMetric):
    """The functional Fisher information of a prediction in each input modality.

    Gat et al., Removing Bias in Multi-modal Classifiers: Regularization by Maximizing Functional
    Entropies, 2020. See :func:`functional_fisher_information`. The state is that of
    :class:`FunctionalEntropy`.

    Args:
        num_modalities: M.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import FunctionalFisherInformation
        >>> metric = FunctionalFisherInformation(num_modalities=1)
        >>> metric.update(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]]))
        >>> metric.compute()
        tensor(2.5000, dtype=torch.float64)
    """

    function = staticmethod(functional_fisher_information)

    def value(self) -> Tensor:
        """(M,) the means over everything that was counted."""
        return self.fisher_total / self.count


def _one_draw(
    model: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    modality: int,
    reference: Tensor,
    sigma: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    x = inputs[modality]
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        moved = (x + sigma * noise).requires_grad_()
        given = [*inputs[:modality], moved, *inputs[modality + 1 :]]
        values = -(reference * model(*given).log_softmax(1)).sum(1)
        (gradient,) = torch.autograd.grad(values.sum(), moved)
    return values.detach(), gradient.flatten(1).square().sum(1)
