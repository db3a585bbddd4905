"""Fits the classifier anew on balanced samples of Gaussians that wrong labels do not reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.optional import require
from lightning_reg.mechanisms.head_refit import Data, Head, HeadRefit, HeadRows

__all__ = [
    "ClassGaussianCalibration",
    "calibrated_gaussians",
    "class_gaussians",
    "gaussian_features",
    "mahalanobis_outliers",
]

Outliers = Literal["lof", "mahalanobis", "none"]
_OUTLIERS = ("lof", "mahalanobis", "none")


def class_gaussians(
    features: Tensor, labels: Tensor, num_classes: int, diagonal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance (over ``n_k``, not ``n_k - 1``) of each class, and its count.

    Args:
        features: (N, d).
        labels: (N,) class indices.
        num_classes: ``K``.
        diagonal: variances alone.

    Returns:
        (K, d), (K, d, d) or (K, d) with ``diagonal``, and (K,); zeros for a class without rows.
    """
    counts = torch.bincount(labels, minlength=num_classes).to(features)
    some = counts.clamp_min(1)
    means = features.new_zeros(num_classes, features.shape[1]).index_add(0, labels, features)
    means = means / some.unsqueeze(1)
    centred = features - means[labels]
    if diagonal:
        sums = torch.zeros_like(means).index_add(0, labels, centred.square())
        return means, sums / some.unsqueeze(1), counts
    own = [centred[labels == k] for k in range(num_classes)]
    covariances = torch.stack([rows.t() @ rows for rows in own]) / some.view(-1, 1, 1)
    return means, covariances, counts


def calibrated_gaussians(
    means: Tensor,
    covariances: Tensor,
    counts: Tensor,
    neighbours: int = 3,
    gamma: float = 0.3,
    alpha: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Gaussians of rare classes that borrow from the nearest classes with more samples.

    ``mu'_k = gamma_k sum_m omega_m mu_m + (1 - gamma_k) mu_k`` and ``Sigma'_k = gamma_k sum_m
    omega_m Sigma_m + (1 - gamma_k) Sigma_k + alpha I`` over the ``neighbours`` classes ``m`` of
    more samples whose means are nearest to ``mu_k``, with ``omega_m = n_m / sum n`` and
    ``gamma_k = gamma (1 - n_k / max n)``: a class with the most samples borrows nothing.

    Args:
        means: (K, d).
        covariances: (K, d, d), or (K, d) variances.
        counts: (K,) ``n_k``.
        neighbours: how many classes are borrowed from, at most.
        gamma: in [0, 1].
        alpha: at least 0.

    Returns:
        Means and covariances, of the same shapes.
    """
    new_means, new_covariances = means.clone(), covariances.clone()
    for k, count in enumerate(counts.tolist()):
        richer = torch.where(counts > count)[0]
        if len(richer) == 0:
            continue
        distances = (means[richer] - means[k]).norm(dim=1)
        donors = richer[distances.argsort()[:neighbours]]
        omega = counts[donors] / counts[donors].sum()
        share = gamma * (1 - count / float(counts.max()))
        new_means[k].lerp_(torch.tensordot(omega, means[donors], 1), share)
        new_covariances[k].lerp_(torch.tensordot(omega, covariances[donors], 1), share)
    if covariances.ndim == 2:
        return new_means, new_covariances + alpha
    eye = torch.eye(means.shape[1], dtype=means.dtype, device=means.device)
    return new_means, new_covariances + alpha * eye


def gaussian_features(
    mean: Tensor, covariance: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """``count`` draws (count, d) from a Gaussian with covariance (d, d), or variances (d,)."""
    shape = (count, len(mean))
    noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
    if covariance.ndim == 1:
        return mean + noise * covariance.sqrt()
    # Not by Cholesky, which a covariance of fewer rows than dimensions does not have.
    values, vectors = torch.linalg.eigh(covariance)
    drawn: Tensor = mean + noise * values.clamp_min(0).sqrt() @ vectors.t()
    return drawn


def mahalanobis_outliers(features: Tensor, share: float, steps: int = 20) -> Tensor:
    """The ``share`` of rows farthest from the Gaussian that is fitted to the others.

    Concentration steps as in the minimum covariance determinant: from medians and median absolute
    deviations on, keep the rows that are nearest in Mahalanobis distance, and fit again, until
    the same ones are kept. A tenth of the mean variance on the diagonal keeps the covariance
    regular where rows are few.

    Args:
        features: (n, d).
        share: in [0, 0.5].
        steps: the most steps.

    Returns:
        (n,) a mask of ``floor(share n)`` rows.
    """
    kept_count = len(features) - math.floor(share * len(features))
    centre = features.median(0).values
    spread = (features - centre).abs().median(0).values.square()
    floor = spread.mean().clamp_min(torch.finfo(features.dtype).tiny)
    precision = torch.diag(1 / (spread + 0.1 * floor))
    kept = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    for _ in range(steps):
        away = features - centre
        distances = (away @ precision * away).sum(1)
        now = torch.zeros_like(kept)
        now[distances.argsort(stable=True)[:kept_count]] = True
        if torch.equal(now, kept):
            break
        kept = now
        centre = features[kept].mean(0)
        inner = features[kept] - centre
        covariance = inner.t() @ inner / kept_count
        ridge = 0.1 * covariance.diagonal().mean() + torch.finfo(features.dtype).tiny
        eye = torch.eye(len(centre), dtype=features.dtype, device=features.device)
        precision = torch.linalg.pinv(covariance + ridge * eye, hermitian=True)
    return ~kept


def _lof_outliers(features: Tensor, share: float) -> Tensor:
    """The ``share`` of rows in the sparsest surroundings (local outlier factor)."""
    number = math.floor(share * len(features))
    mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    if number == 0 or len(features) < 3:
        return mask
    neighbors = require(
        "sklearn.neighbors", "calibration", 'ClassGaussianCalibration(outliers="lof")'
    )
    factor = neighbors.LocalOutlierFactor(n_neighbors=min(20, len(features) - 1))
    scores = torch.as_tensor(factor.fit(features.cpu().numpy()).negative_outlier_factor_)
    mask[scores.argsort(stable=True)[:number].to(mask.device)] = True
    return mask


class ClassGaussianCalibration(HeadRefit):
    """Fits the classifier again on features that robust class Gaussians make up (RCAL).

    Zhang, Zhao, Yao, Yuan, Huang (2022), When Noisy Labels Meet Long Tail Dilemmas: A
    Representation Calibration Method.

    When training ends, features of the training set are taken, and in each class: outliers are
    removed, which wrong labels put there (``outliers``); mean and covariance are fitted to the
    rest; those of rare classes borrow from the nearest classes that have more samples
    (:func:`calibrated_gaussians`); and as many features are drawn from the Gaussian as the class
    lacks to the largest one. The classifier is then fitted on what was kept together with what
    was drawn, all classes having equally many.

    The steps are those of the abstract; the formulas of the borrowing are from memory of the paper
    and not checked against code: its weights ``omega`` and ``gamma_k``, which shrinks with the
    class's count, are ours, as are the defaults. The paper works on features of unsupervised
    contrastive pretraining, which wrong labels have not touched, and its second part holds the
    features of each sample close to those while the network trains: start from an encoder that
    was pretrained without labels (``DecoupledContrastive``, ``VICReg``), and add
    ``PreviousTaskDistillation(1.0, target="features", layer="encoder", from_start=True)``.

    Args:
        head: the name of the classifier, an ``nn.Linear`` whose input are the features.
        outliers: ``"lof"``: the local outlier factor, as in the paper (needs scikit-learn);
            ``"mahalanobis"``: the distance to a robust Gaussian; ``"none"``.
        contamination: the share of each class that is removed, in [0, 0.5].
        gamma: how much a class without samples borrows, in [0, 1].
        neighbours: how many classes it borrows from.
        alpha: added to the variances, at least 0, in the unit of the squared features.
        diagonal: variances without covariances, for wide features.
        max_per_class: the most features that are drawn for a class; ``None`` for no limit.
        data: what the features are taken of: ``"train"``, or ``"validation"``.
        dataloader: data of its own in place of that.
        weight_decay: of the classifier in the fit; L2-penalized logistic regression.
        max_iter: the most iterations of the fit; 0 leaves the head as training left it.
        signals: where ``inputs``, ``logits`` and ``targets`` are.
        name: the name in messages.

    Attributes:
        means: (K, d) of the calibrated Gaussians, after a fit.
        covariances: (K, d, d), or (K, d).
        outliers_removed: how many rows were left out.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: if ``head`` is no plain linear layer, or the training data cannot be gone
            through a second time.

    Note:
        The second stage runs in ``on_fit_end``: checkpoints that were written before hold the old
        head, ``trainer.save_checkpoint`` afterwards the new one. Over ranks: global; features of
        all ranks are gathered, every rank makes the same draws, and the head is that of rank 0.
        Training itself does not change. Cost: one pass over the data; N x d float64 numbers on
        every rank; a neighbour search in each class for ``"lof"``; an eigendecomposition of d x d
        a class (none with ``diagonal``); a logistic regression on at most K x max n rows.

        It hurts where classes have several modes, whose Gaussian lies between them.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ClassGaussianCalibration
        >>> calibration = ClassGaussianCalibration(head="head", contamination=0.2)
        >>> trainer = L.Trainer(callbacks=[calibration], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "When Noisy Labels Meet Long Tail Dilemmas: A Representation Calibration Method",
            "Zhang et al.",
            2022,
            None,
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(calibrated_gaussians)
    explanation: ClassVar[str] = "fits the classifier on balanced draws from class Gaussians"

    def __init__(
        self,
        *,
        head: str,
        outliers: Outliers = "lof",
        contamination: float = 0.2,
        gamma: float = 0.3,
        neighbours: int = 3,
        alpha: float = 0.1,
        diagonal: bool = False,
        max_per_class: int | None = None,
        data: Data = "train",
        dataloader: Any = None,
        weight_decay: float = 1e-4,
        max_iter: int = 100,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            head=head,
            data=data,
            dataloader=dataloader,
            weight_decay=weight_decay,
            max_iter=max_iter,
            signals=signals,
            name=name,
        )
        cure = 'ClassGaussianCalibration(head="head", outliers="lof", contamination=0.2)'
        if outliers not in _OUTLIERS:
            raise ArgumentError(
                self,
                f"`outliers` must be one of {', '.join(_OUTLIERS)}, got {outliers!r}",
                cure=cure,
            )
        check_range(self, "contamination", contamination, 0, 0.5, cure=cure)
        check_range(self, "gamma", gamma, 0, 1, cure=cure)
        check_range(self, "neighbours", neighbours, 1, cure=cure)
        check_range(self, "alpha", alpha, 0, cure=cure)
        if max_per_class is not None:
            check_range(self, "max_per_class", max_per_class, 0, cure=cure)
        self.outliers: Outliers = outliers
        self.contamination = contamination
        self.gamma = gamma
        self.neighbours = int(neighbours)
        self.alpha = alpha
        self.diagonal = diagonal
        self.max_per_class = max_per_class
        self.means: Tensor | None = None
        self.covariances: Tensor | None = None
        self.outliers_removed = 0

    def new_head(self, rows: HeadRows, head: Head) -> Head:
        """Fitted on clean rows and on draws, of each class equally many."""
        classes = len(head.weight)
        clean = rows.of(~self._outliers(rows, classes))
        self.outliers_removed = len(rows.labels) - len(clean.labels)
        means, covariances, counts = class_gaussians(
            clean.features, clean.labels, classes, self.diagonal
        )
        self.means, self.covariances = calibrated_gaussians(
            means, covariances, counts, self.neighbours, self.gamma, self.alpha
        )
        drawn, labels = self._draws(counts)
        features = torch.cat([clean.features, drawn])
        joined = torch.cat([clean.labels, labels])
        return self.fitted(HeadRows(features, joined, features[:, :0]), head)

    def _draws(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """What each class lacks to the largest one; nothing for a class without any sample."""
        assert self.means is not None
        assert self.covariances is not None
        lacking = torch.where(counts > 0, counts.max() - counts, 0.0).long()
        if self.max_per_class is not None:
            lacking = lacking.clamp_max(self.max_per_class)
        generator = self.generator()
        numbers = lacking.tolist()
        drawn = [
            gaussian_features(mean, covariance, number, generator)
            for mean, covariance, number in zip(self.means, self.covariances, numbers, strict=True)
        ]
        classes = torch.arange(len(numbers), device=counts.device)
        return torch.cat(drawn), classes.repeat_interleave(lacking)

    def _outliers(self, rows: HeadRows, classes: int) -> Tensor:
        mask = torch.zeros_like(rows.labels, dtype=torch.bool)
        if self.outliers == "none":
            return mask
        find = _lof_outliers if self.outliers == "lof" else mahalanobis_outliers
        for k in range(classes):
            own = torch.where(rows.labels == k)[0]
            if len(own):
                mask[own[find(rows.features[own], self.contamination)]] = True
        return mask
