"""Multiplies images with random masks whose distribution a small network learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    ParameterUpdate,
    RegularizationError,
    Schedule,
    Signals,
    Step,
)
from lightning_reg.engine.criterion import as_distribution, flatten, mixed, soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.random import base_seed, stream_seed
from lightning_reg.engine.step import full_precision
from lightning_reg.mechanisms.batch_transform import BatchTransform, Transformed
from lightning_reg.mechanisms.own_network import OwnNetwork

__all__ = ["LearnedNoiseMask", "beta_log_density", "noise_mask"]

# exp() of them: Beta distributions between a spike at both ends and a deviation of 0.02.
_LOG_LOW, _LOG_HIGH = -3.0, 6.0
_EDGE = 1e-6


def noise_mask(
    grid: Tensor, height: int, width: int, kernel: int = 13, sigma: float = 6.0
) -> Tensor:
    """A mask on a coarse grid, brought to the size of the image and blurred.

    Nearest-neighbour upsampling, then a Gaussian blur whose borders are reflected.

    Args:
        grid: (B, g, g), in [0, 1].
        height: of the image.
        width: of the image.
        kernel: the side of the blur's window in pixels, odd; 1 does not blur.
        sigma: its standard deviation in pixels.

    Returns:
        (B, 1, H, W), in [0, 1].
    """
    mask = F.interpolate(grid.unsqueeze(1), (height, width))
    if kernel == 1:
        return mask
    reach = kernel // 2
    offsets = torch.arange(-reach, reach + 1, dtype=grid.dtype, device=grid.device)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    weights = weights / weights.sum()
    padded = F.pad(mask, [reach] * 4, mode="reflect")
    rows = F.conv2d(padded, weights.view(1, 1, 1, -1))
    return F.conv2d(rows, weights.view(1, 1, -1, 1))


def beta_log_density(log_alpha: Tensor, log_beta: Tensor, mask: Tensor) -> Tensor:
    """``sum_j log Beta(m_j; exp(a_j), exp(b_j))``, the log-density of each sample's mask.

    REINFORCE descends ``-(R - baseline) * log p``, with the reward a constant.

    Args:
        log_alpha: ``a``, (B, G).
        log_beta: ``b``, (B, G).
        mask: ``m``, (B, G), in (0, 1); no gradient flows.

    Returns:
        (B,).
    """
    alpha, beta = log_alpha.exp(), log_beta.exp()
    m = mask.detach()
    normalizer = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return ((alpha - 1) * m.log() + (beta - 1) * torch.log1p(-m) - normalizer).sum(1)


def _policy(channels: int, grid: int) -> nn.Module:
    """Two strided convolutions and a linear map, whose first answer is 0 for every image."""
    last = nn.Linear(32 * 16, 2 * grid * grid)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        last,
    )


class LearnedNoiseMask(BatchTransform):
    """Multiplies each image with a noise mask, drawn from what a policy network makes of it.

    Yavuz, Yang (2024), Policy Gradient-Driven Noise Mask, arXiv:2406.14568.

    A policy network gives log-concentrations ``(a, b)`` for each cell of a ``g x g`` grid,
    smoothed as ``0.9 base + 0.1 policy(x)`` with ``base`` a slow average of what it says; a mask
    is drawn from ``Beta(exp a, exp b)``, upsampled, blurred, and multiplied with the image. The
    policy is trained by REINFORCE, with its own optimizer: it descends
    ``-(R - baseline) sum_j log Beta(m_j)``, where ``R = -CE`` is the reward of a sample for its
    mask and the baseline an average of rewards. The policy serves to "heat" a model, which is then
    fine-tuned without masks: give a Schedule that ends at 0,
    ``probability=StepSchedule([1.0, 0.0], [0.9], by="progress")``. Nothing of it is left in the
    model.

    Confirmed with the official code (ogrenenmakine/Policy-Gradient-Driven-Noise-Mask@ece96ae,
    ``_policy_gradient/``): the smoothing with 0.9 and 0.99, exponentials as concentrations, masks
    by multiplication, nearest upsampling and the blur; grid 64, kernel 13, sigma 6 for images of
    224; SGD with a tenth of the classifier's rate of 0.1, momentum 0.9, weight decay 1e-4. There
    one loss, the batch's mean cross-entropy times the log of the sum of the cells' densities,
    trains both networks, so that the classifier's own loss is weighted by a log-density of either
    sign. We follow the paper's REINFORCE instead: the classifier keeps its loss, each sample its
    own reward, and the log-density of a mask is the sum over its cells; the baseline, which
    changes no gradient in the mean, is ours, and so is the default network (there: a ResNet-10
    and two perceptrons).

    Args:
        probability: of masking a batch, in [0, 1], or a :class:`Schedule`; 0 turns the technique
            off. Default 1, as in the paper.
        grid: ``g``, cells along each side.
        kernel: the side of the blur's window in pixels, odd; 1 does not blur.
        sigma: its standard deviation in pixels, above 0.
        channels: of the images, for the default network.
        policy: a network from images (B, C, H, W) to (B, 2 g g), the ``a`` of all cells before the
            ``b``. It needs no DDP around it. Without BatchNorm: replicas see other batches.
        lr: of the policy's SGD, above 0.
        momentum: of the policy's SGD.
        weight_decay: of the policy's SGD.
        decay: the share of ``base`` in the concentrations, in [0, 1).
        average: the share of the past in ``base`` and in the baseline, in [0, 1).
        signals: where ``inputs``, ``targets`` and ``logits`` are.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if inputs are no images of floats, have other
            channels or are smaller than the blur, or there is not one class label a sample.

    Note:
        ``reg/learned_noise_mask`` logs the mean of ``1 - m``, what is taken away, and
        ``reg/learned_noise_mask_reward`` the mean reward. Over ranks: local; each rank draws for
        its own samples, and the policy steps on the mean gradient of all of them, so that it is the
        same everywhere. Under accumulation the policy steps once per optimizer step, on all
        micro-batches. A second pass (SAM) sees the same masks and gives no reward. A batch that is
        not finite trains nothing. State: the policy, its optimizer, ``base``, the baseline.

        Cost: forward and backward of the policy; one reduction of its gradients and a host sync
        per optimizer step.

        It hurts small images, of which a blurred mask dims everything alike, and trainings that
        underfit. The loss on masked images is what the policy lowers: left alone for long it
        learns masks that hide little.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LearnedNoiseMask
        >>> technique = LearnedNoiseMask(grid=8, kernel=5, sigma=2.0)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Policy Gradient-Driven Noise Mask", "Yavuz and Yang", 2024, "2406.14568"),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "targets", "logits")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs"})
    writes: ClassVar[frozenset[str]] = frozenset({"inputs"})
    exclusive: ClassVar[frozenset[str]] = frozenset()
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch draws its own masks",
    }
    # The policy is whole on every rank, and no weight of the module is touched.
    sharded: ClassVar[bool | None] = True
    function: ClassVar[Callable[..., Any] | None] = staticmethod(beta_log_density)
    image: ClassVar[bool] = True
    explanation: ClassVar[str] = "multiplies images with masks that a small network learns to draw"

    def __init__(
        self,
        probability: float | Schedule = 1.0,
        *,
        grid: int = 64,
        kernel: int = 13,
        sigma: float = 6.0,
        channels: int = 3,
        policy: nn.Module | None = None,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        decay: float = 0.9,
        average: float = 0.99,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, signals=signals, name=name)
        cure = "LearnedNoiseMask(grid=64, kernel=13, sigma=6.0)"
        for argument, value in (("grid", grid), ("kernel", kernel), ("channels", channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problem = f"`{argument}` must be a whole number from 1, got {value!r}"
                raise ArgumentError(self, problem, cure=cure)
        if kernel % 2 == 0:
            raise ArgumentError(self, f"`kernel` must be odd, got {kernel}", cure=cure)
        if policy is not None and not isinstance(policy, nn.Module):
            problem = f"`policy` must be a torch module, got {type(policy).__name__}"
            raise ArgumentError(self, problem, cure=cure)
        check_range(self, "sigma", sigma, 0, low_open=True, cure=cure)
        check_range(self, "lr", lr, 0, low_open=True, cure=cure)
        check_range(self, "momentum", momentum, 0, 1, high_open=True, cure=cure)
        check_range(self, "weight_decay", weight_decay, 0, cure=cure)
        check_range(self, "decay", decay, 0, 1, high_open=True, cure=cure)
        check_range(self, "average", average, 0, 1, high_open=True, cure=cure)
        self.grid, self.kernel, self.sigma, self.channels = grid, kernel, sigma, channels
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.decay, self.average, self.policy = decay, average, policy
        self._own: OwnNetwork | None = None
        self._base: Tensor | None = None
        self._baseline: Tensor | None = None
        self._loaded: dict[str, Any] | None = None

    # ------------------------------------------------------------------ phases

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the policy, or go on with that of a checkpoint or of an earlier fit."""
        if self._own is None:
            self._own = self._made()
            cells = 2 * self.grid * self.grid
            generator = torch.Generator().manual_seed(self._seed("base"))
            self._base = torch.rand(1, cells, generator=generator)
        if self._loaded is not None:
            self._own.load_state_dict(self._loaded["own"])
            self._base, self._baseline = self._loaded["base"], self._loaded["baseline"]
            self._loaded = None
        assert self.pipeline is not None
        self._own.share(self.pipeline.comm)

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """Draw the masks, and keep them with the graph of their distribution."""
        assert self._own is not None
        assert self._base is not None
        self._check_images(inputs)
        said = self._own(full_precision(inputs))
        self._check_policy(said, len(inputs))
        self._base = self._base.to(said)
        smooth = self.decay * self._base + (1 - self.decay) * said
        logs = smooth.clamp(_LOG_LOW, _LOG_HIGH)
        rng = generator if inputs.device == generator.device else step.rng(self)
        cells = _draw(logs.detach(), rng)
        step.kept[self.name] = (said.detach(), logs, cells)
        grid = cells.view(-1, self.grid, self.grid)
        height, width = inputs.shape[-2:]
        mask = noise_mask(grid, height, width, self.kernel, self.sigma)
        return Transformed(inputs * mask.to(inputs), 1 - mask.mean())

    def penalty(self, step: Step) -> None:
        """Phase 4: the reward of each mask; adds nothing to the loss."""
        if step.is_rerun or self.name not in step.kept:
            return
        said, logs, cells = step.kept.pop(self.name)
        reward = -self._losses(step, len(said)).to(said)
        # In the first step: what a sample has more than others of its rank.
        baseline = reward.mean() if self._baseline is None else self._baseline.to(reward)
        log_alpha, log_beta = logs.chunk(2, dim=1)
        density = beta_log_density(log_alpha, log_beta, cells)
        assert self._own is not None
        count = torch.ones_like(reward).sum()
        sums = torch.cat([torch.stack([count, reward.sum()]), said.sum(0)])
        self._own.collect(-((reward - baseline) * density).sum(), sums)

    def project(self, update: ParameterUpdate) -> None:
        """Phase 8: the policy's own step, and the averages."""
        assert self._own is not None
        assert self._base is not None
        with torch.enable_grad():
            sums = self._own.step(update.comm)
        if sums is None:
            return
        means = sums[1:] / sums[0]
        # Here, and not where rewards are found: not every rank has masks in every micro-batch.
        update.log(self, means[0], "reward", joint=True)
        self._base = torch.lerp(means[1:], self._base.to(means), self.average)
        past = means[0] if self._baseline is None else self._baseline.to(means)
        self._baseline = torch.lerp(means[0], past, self.average)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The policy, its optimizer and the averages; all empty before training starts."""
        own = None if self._own is None else self._own.state_dict()
        base, baseline = (t if t is None else t.cpu() for t in (self._base, self._baseline))
        return {**super().state_dict(), "own": own, "base": base, "baseline": baseline}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until training starts."""
        super().load_state_dict(state_dict)
        self._loaded = state_dict if state_dict["own"] is not None else None

    # ------------------------------------------------------------------ internals

    def _made(self) -> OwnNetwork:
        network = self.policy
        if network is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed("policy"))
                network = _policy(self.channels, self.grid)
        return OwnNetwork(network, self._optimizer, sums=2 + 2 * self.grid * self.grid)

    def _optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        decay = self.weight_decay
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=decay)

    def _seed(self, what: str) -> int:
        return stream_seed(base_seed(), self.name, what)

    def _losses(self, step: Step, size: int) -> Tensor:
        """The cross-entropy (B,) of each sample, with labels as they were mixed."""
        logits, targets = step.logits.detach(), step.targets
        if isinstance(targets, Tensor) and logits.ndim == 2 and len(targets) == size:
            rows, labels = flatten(logits, targets)
            if len(rows) == size:
                distribution = mixed(step, as_distribution(labels, rows))
                return soft_cross_entropy(rows, distribution)
        raise RegularizationError(
            self,
            f"rewards each of {size} images by its cross-entropy, which needs logits (B, C) and "
            f"one label a sample, got logits {tuple(logits.shape)}",
            cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
        )

    def _check_images(self, inputs: Tensor) -> None:
        reach = self.kernel // 2
        if inputs.ndim != 4 or min(inputs.shape[-2:]) <= reach:
            raise RegularizationError(
                self,
                f"blurs masks over {self.kernel} pixels, for images (B, C, H, W) of more than "
                f"{reach} pixels a side, got inputs {tuple(inputs.shape)}",
                cure="LearnedNoiseMask(grid=8, kernel=3, sigma=1.0)",
            )
        if self.policy is None and inputs.shape[1] != self.channels:
            raise RegularizationError(
                self,
                f"made a policy for images of {self.channels} channels, got {inputs.shape[1]}",
                cure=f"LearnedNoiseMask(channels={inputs.shape[1]})",
            )

    def _check_policy(self, said: Tensor, size: int) -> None:
        wanted = (size, 2 * self.grid * self.grid)
        if tuple(said.shape) != wanted:
            raise RegularizationError(
                self,
                f"needs {wanted} numbers from its policy, got {tuple(said.shape)}",
                cure=f"torch.nn.Linear(width, {wanted[1]}) at the end of `policy`",
            )


def _draw(logs: Tensor, generator: torch.Generator) -> Tensor:
    """Masks (B, G) from Beta(exp a, exp b), for log-concentrations (B, 2 G); a half where NaN."""
    # Rejection sampling of NaN would never end.
    concentration = logs.nan_to_num(0.0).exp()
    gamma = torch._standard_gamma(concentration, generator=generator)
    one, other = gamma.chunk(2, dim=1)
    return (one / (one + other)).nan_to_num(0.5).clamp(_EDGE, 1 - _EDGE)
