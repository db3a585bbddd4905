"""Trains against robustly scaled noise in a few hidden layers, chosen by their signal to noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.seen import kind_of
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.forward_noise import OWN_NOISE, ActivationNoise
from lightning_reg.mechanisms.output_penalty import LogitRows

__all__ = ["NoiseFiT", "noise_fit", "noise_fit_scale", "noise_fit_snr"]

Choose = Literal["largest", "lowest"]
_CHOOSE = ("largest", "lowest")
_EPS = 1e-6
_LARGEST_FACTOR = 5.0


def noise_fit_scale(hidden: Tensor, noise_std: float = 0.1, beta: float = 0.1) -> Tensor:
    """The standard deviation of the noise on each entry of a hidden state.

    ``sigma_ti = s std(h) MAD_t exp(-beta |h_ti - med_t| / MAD_t) min(5, exp(Var_t / mean Var))``
    with the median, the median absolute deviation and the variance of each token over its features,
    and ``std(h)`` over the whole tensor: entries far from their token's median get less, tokens of
    a large variance more.

    Args:
        hidden: ``h``, (..., d), ``d`` at least 2; no gradient flows through the scale.
        noise_std: ``s``.
        beta: how fast the noise falls with the distance from the median.

    Returns:
        (..., d), at least 0; 0 where all entries of a token are equal to 0.
    """
    h = hidden.detach()
    median = h.median(-1, keepdim=True).values
    distance = (h - median).abs()
    mad = distance.median(-1, keepdim=True).values
    mad = torch.maximum(mad, _EPS * h.norm(dim=-1, keepdim=True))
    variance = h.var(-1, keepdim=True)
    factor = torch.exp(variance / (variance.mean() + _EPS)).clamp_max(_LARGEST_FACTOR)
    return noise_std * h.std() * mad * torch.exp(-beta * distance / (mad + _EPS)) * factor


def noise_fit_snr(hidden: Tensor, noise_std: float = 0.1, beta: float = 0.1) -> Tensor:
    """``SNR = mean |h| / E mean |h~ - h|``, of the noise that :func:`noise_fit_scale` would give.

    The expectation is exact: ``E |N(0, sigma^2)| = sigma sqrt(2 / pi)``.

    Args:
        hidden: ``h``, (..., d).
        noise_std: ``s``.
        beta: see :func:`noise_fit_scale`.

    Returns:
        A scalar, above 0.
    """
    noise = noise_fit_scale(hidden, noise_std, beta).mean() * math.sqrt(2 / math.pi)
    return hidden.detach().abs().mean() / (noise + _EPS)


def noise_fit(
    clean: Tensor,
    first: Tensor,
    second: Tensor,
    alpha: float = 0.5,
    consistency: float = 0.1,
    temperature: float = 1.0,
) -> Tensor:
    """``((1 - a) (KL(p || p_1) + KL(p || p_2)) / 2 + l KL(p_2 || p_1)) T^2 / a`` of each row.

    ``p``, ``p_1``, ``p_2`` are the softmax of the logits over ``T``. The first argument of each
    divergence is detached.

    Args:
        clean: (N, C) logits without noise.
        first: (N, C) logits under one draw of the noise.
        second: (N, C) logits under another.
        alpha: ``a``, the share of the plain loss, in (0, 1].
        consistency: ``l``, at least 0.
        temperature: ``T``, above 0.

    Returns:
        (N,) in nats, at least 0.
    """
    log_p, log_1, log_2 = (
        F.log_softmax(logits / temperature, dim=-1) for logits in (clean, first, second)
    )
    soft = (_divergence(log_p, log_1) + _divergence(log_p, log_2)) / 2
    apart = _divergence(log_2, log_1)
    return temperature**2 * ((1 - alpha) * soft + consistency * apart) / alpha


def _divergence(target: Tensor, log_q: Tensor) -> Tensor:
    target = target.detach()
    # A class that is masked with -inf has no share in the target.
    difference = (target - log_q).masked_fill(target == -torch.inf, 0.0)
    return (target.exp() * difference).sum(-1)


class NoiseFiT(ActivationNoise, LogitRows):
    """Soft cross-entropy and consistency under adaptive noise in selected layers (NoiseFiT).

    Khadangi, Sartipi, Tchappi, Bahmani (2025), Noise Augmented Fine Tuning for Mitigating
    Hallucinations in Large Language Models, arXiv:2504.03302.

    In the first step the ``k`` of the given layers with the largest (or lowest) signal-to-noise
    ratio are chosen for good. Every step is then run twice more with noise ``h~ = h + sigma N`` on
    their outputs, with ``sigma`` from :func:`noise_fit_scale`, and the paper's loss
    ``a CE + (1 - a) (KL(p || p_1) + KL(p || p_2)) / 2 + l KL(p_2 || p_1)`` is trained, here divided
    by ``a``, so that your loss (cross-entropy or other) keeps its factor of 1 beside other
    techniques, and strength 0 is a run without noise.

    Confirmed with the official code (akhadangi/NoiseFiT@48c61c8): scale and layer selection of
    ``NoiseFiT_v1_manual_snr.py`` (``s = 0.1``, ``beta = 0.1``, ``k = 3``, ``a = 0.5``,
    ``l = 0.1``; ten draws estimate the ratio there, here it is exact), the loss of ``NoiseFiT.py``,
    its second version, which detaches the targets and scales with the temperature everywhere. We
    do not follow the first version in two things: its hook multiplies by ``s`` twice (which makes
    the noise ten times weaker than that by which it chose the layers), and its noise scale has a
    gradient. It measures the ratio in eval mode, before training; here it is the first training
    step, with your dropout.

    Args:
        strength: the multiplier of all but your own loss, at least 0, or a Schedule.
        layers: names of the submodules to choose from, usually all blocks of a transformer,
            ``[f"model.layers.{i}" for i in range(32)]``. A block may return a tuple whose first
            item is the hidden state (..., d).
        k: how many of them get noise.
        choose: ``"largest"`` ratio (robust layers) or ``"lowest"``.
        noise_std: ``s``, above 0.
        beta: at least 0; 0 gives all features of a token the same noise.
        alpha: ``a``, in (0, 1].
        consistency: ``l``, at least 0.
        temperature: ``T``, above 0.
        ignore_index: positions with this integer label are left out; ``None`` keeps all.
        class_dim: where the classes lie in logits of more than two dimensions.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs, checkpoints and random streams.

    Attributes:
        selected: the layers that were chosen; empty before the first step.

    Raises:
        ArgumentError: if an argument is outside its range, or a layer is not there.
        UnsupportedError: with manual optimization; if your step cannot be run again.
        RegularizationError: in the first step, if an output is no tensor (..., d).

    Note:
        ``reg/noise_fit`` logs the divergences, divided by ``a``. Over ranks: local; every rank
        draws for its own samples and takes its own ``std(h)``, the mean of the loss counts each
        position once over all ranks, and all ranks choose the layers by their mean ratio. The
        choice is saved with the checkpoint. Your dropout is replayed in the noisy runs, so that
        the noise is the only difference. Cost: two more forward passes, whose backward is part of
        the one backward; three graphs in memory.

        Labels of a causal language model that are shifted inside the model mark the position
        before the one that is predicted: with padding on the right the mask is off by one
        position at its end. Pass shifted logits and labels with ``signals`` if that matters.

        It hurts where the task needs what the noise hides: small models on precise targets.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import NoiseFiT
        >>> technique = NoiseFiT(layers=["blocks.0", "blocks.1", "blocks.2"], k=2)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Noise Augmented Fine Tuning for Mitigating Hallucinations in Large Language Models",
            "Khadangi et al.",
            2025,
            "2504.03302",
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    reads: ClassVar[frozenset[str]] = frozenset({"features", "logits"})
    writes: ClassVar[frozenset[str]] = frozenset({"losses"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"adversarial_inputs", "weight_perturbation"})
    exemptions: ClassVar[Mapping[str, str]] = OWN_NOISE
    takes_tuples: ClassVar[bool] = True
    sharded: ClassVar[bool | None] = True
    function: ClassVar[Callable[..., Any] | None] = staticmethod(noise_fit)
    explanation: ClassVar[str] = "runs the step twice more with noise in the chosen layers"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        layers: str | Sequence[str],
        k: int = 3,
        choose: Choose = "largest",
        noise_std: float = 0.1,
        beta: float = 0.1,
        alpha: float = 0.5,
        consistency: float = 0.1,
        temperature: float = 1.0,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            layers=layers,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        cure = 'NoiseFiT(layers=["blocks.0", "blocks.1", "blocks.2"], k=2)'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= len(self.layers):
            problem = f"`k` must be a whole number from 1 to {len(self.layers)} (layers), got {k!r}"
            raise ArgumentError(self, problem, cure=cure)
        if choose not in _CHOOSE:
            problem = f"`choose` must be one of {', '.join(_CHOOSE)}, got {choose!r}"
            raise ArgumentError(self, problem, cure=cure)
        check_range(self, "noise_std", noise_std, 0, low_open=True, cure=cure)
        check_range(self, "beta", beta, 0, cure=cure)
        check_range(self, "alpha", alpha, 0, 1, low_open=True, cure=cure)
        check_range(self, "consistency", consistency, 0, cure=cure)
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        self.k, self.choose = k, choose
        self.noise_std, self.beta = noise_std, beta
        self.alpha, self.consistency, self.temperature = alpha, consistency, temperature
        self.selected: list[str] = []

    # ------------------------------------------------------------------ phases

    def forward_context(self, step: Step) -> AbstractContextManager[Any]:
        """Phase 2: no noise but in the passes of :meth:`perturb`, which set it themselves."""
        return nullcontext()

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        """Phase 5: two noisy passes, and how far their predictions are from the clean ones."""
        targets, clean = step.find("targets"), step.logits
        if not self.selected:
            self._select(step)
        if not self.selected:
            return total
        generator = step.rng(self)
        noisy = [self._noisy_logits(step, generator) for _ in range(2)]
        plain, first, second = (self._rows(logits, targets) for logits in (clean, *noisy))
        values = noise_fit(plain, first, second, self.alpha, self.consistency, self.temperature)
        value = step.comm.mean(values)
        step.log(self, value.detach(), joint=True)
        return total + step.strength(self) * value

    def restore(self) -> None:
        """Nothing is left to be put back after the backward."""

    def change(self, layer: str, output: Any) -> Any:
        """Noise in the chosen layers alone."""
        return super().change(layer, output) if layer in self.selected else output

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The hidden state with its noise, in the type that it has."""
        hidden = full_precision(output)
        noise = torch.randn(
            hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype
        )
        scale = noise_fit_scale(hidden, self.noise_std, self.beta)
        return output + (noise * scale).to(output.dtype)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The layers that were chosen."""
        return {**super().state_dict(), "selected": list(self.selected)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep to the layers that were chosen."""
        super().load_state_dict(state_dict)
        self.selected = list(state_dict["selected"])

    # ------------------------------------------------------------------ internals

    def _noisy_logits(self, step: Step, generator: torch.Generator) -> Tensor:
        self._now = (step, generator)
        try:
            return step.rerun(lambda: step.asked_by(self).logits)
        finally:
            self._now = None
            step.asked_by(self)

    def _select(self, step: Step) -> None:
        """Rank the layers of the first step, unless one of them is not finite on any rank."""
        hidden = [self._hidden(step, layer) for layer in self.layers]
        own = torch.stack([noise_fit_snr(h, self.noise_std, self.beta) for h in hidden])
        ratios = step.comm.reduce(own, "mean")
        if bool(torch.isfinite(ratios).all()):
            best = ratios.topk(self.k, largest=self.choose == "largest").indices.tolist()
            self.selected = [self.layers[i] for i in sorted(best)]

    def _hidden(self, step: Step, layer: str) -> Tensor:
        calls = step.records.get(layer, [])
        output = calls[0] if calls else None
        hidden = output[0] if isinstance(output, tuple) and output else output
        if len(calls) != 1 or not isinstance(hidden, Tensor) or hidden.ndim < 2:
            raise RegularizationError(
                self,
                f"needs {layer!r} to be called once a step and to return hidden states (..., d), "
                f"and saw {len(calls)} calls" + (f", {kind_of(calls[0])}" if calls else ""),
                cure='NoiseFiT(layers=["<blocks that training_step calls once>"])',
            )
        return full_precision(hidden)
