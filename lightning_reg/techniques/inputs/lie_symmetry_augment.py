"""Moves solutions of a differential equation along its symmetries, which makes other solutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import full_precision
from lightning_reg.mechanisms.batch_transform import BatchTransform, Transformed

__all__ = ["LieSymmetryAugment", "lie_symmetry"]

Equation = Literal["kdv", "burgers", "ks", "heat"]
Targets = Literal["invariant", "field"]
_TARGETS = ("invariant", "field")


@dataclass(frozen=True)
class _Symmetries:
    """What leaves an equation as it is, besides shifts in time and space.

    Attributes:
        scaling: ``(a, b, c)`` of ``x -> l^a x, t -> l^b t, u -> l^c u``; ``None``: there is none.
        galilean: ``x -> x + v t, u -> u + v``.
        amplitude: ``u -> m u``, of a linear equation.
    """

    scaling: tuple[int, int, int] | None
    galilean: bool
    amplitude: bool


_EQUATIONS = {
    "kdv": _Symmetries((1, 3, -2), galilean=True, amplitude=False),
    "burgers": _Symmetries((1, 2, -1), galilean=True, amplitude=False),
    "ks": _Symmetries(None, galilean=True, amplitude=False),
    "heat": _Symmetries((1, 2, 0), galilean=False, amplitude=True),
}


def lie_symmetry(
    field: Tensor,
    equation: Equation,
    *,
    length: float,
    dt: float,
    start: Tensor,
    shift: Tensor,
    velocity: Tensor,
    log_scale: Tensor,
    amplitude: Tensor,
    window: int | None = None,
) -> Tensor:
    """``u'(t, x) = m l^c u(t_0 + t / l^b, (x - s - v t) / l^a) + v``, a solution if ``u`` is one.

    With ``l = exp(log_scale)`` and ``(a, b, c)`` = (1, 3, -2) for Korteweg-de Vries
    ``u_t + u u_x + u_xxx = 0``, (1, 2, -1) for Burgers ``u_t + u u_x = nu u_xx`` and (1, 2, 0) for
    heat ``u_t = nu u_xx``: scalings under which the coefficients stay what they are.
    Kuramoto-Sivashinsky, ``u_t + u u_x + u_xx + u_xxxx = 0``, has none. Space is evaluated by the
    Fourier series, exact for what the grid resolves; time by cubic interpolation.

    Args:
        field: ``u``, (B, ..., T, X): T times ``dt`` apart, X points of one period of x.
        equation: ``"kdv"``, ``"burgers"``, ``"ks"`` or ``"heat"``.
        length: the period of x.
        dt: the time between two rows.
        start: ``t_0``, (B,), at least 0.
        shift: ``s``, (B,).
        velocity: ``v``, (B,); 0 for heat.
        log_scale: (B,); 0 for Kuramoto-Sivashinsky.
        amplitude: ``m``, (B,); 1 but for heat.
        window: the number of rows that come out; default T. ``t_0 + (window - 1) dt / l^b`` may
            not be behind the last row that goes in.

    Returns:
        (B, ..., window, X). Where ``l`` is not 1 its period is ``l^a length``, of which the grid
        shows a part, or more than one.
    """
    a, b, c = _EQUATIONS[equation].scaling or (0, 0, 0)
    rows, points = field.shape[-2:]
    times = torch.arange(window or rows, dtype=field.dtype, device=field.device) * dt
    scale = log_scale.to(times).exp()
    start, shift, velocity, amplitude = (v.to(times) for v in (start, shift, velocity, amplitude))
    moments = (start[:, None] + times / scale[:, None] ** b) / dt
    u = _at_times(field.reshape(len(field), -1, rows, points), moments)
    place = torch.arange(points, dtype=times.dtype, device=field.device) * (length / points)
    moved = shift[:, None] + velocity[:, None] * times
    u = _at_places(u, place, moved, scale**-a, length)
    factor = amplitude * scale**c
    new = factor[:, None, None, None] * u + velocity[:, None, None, None]
    return new.reshape(*field.shape[:-2], len(times), points)


def _at_times(u: Tensor, moments: Tensor) -> Tensor:
    """Rows of u (B, C, T, X) at moments (B, W) in [0, T - 1], between rows by a cubic."""
    rows, nodes = u.shape[2], min(4, u.shape[2])
    first = (moments.floor() - 1).clamp(0, rows - nodes)
    weights = _lagrange(moments - first, nodes)
    index = first.long()[:, :, None] + torch.arange(nodes, device=u.device)
    batch = torch.arange(len(u), device=u.device)[:, None, None]
    picked = u.movedim(1, 2)[batch, index]
    return torch.einsum("bwncx,bwn->bcwx", picked, weights)


def _lagrange(position: Tensor, nodes: int) -> Tensor:
    """Weights (..., nodes) of the nodes 0, 1, ... at positions (...)."""
    columns = []
    for i in range(nodes):
        others = [(position - j) / (i - j) for j in range(nodes) if j != i]
        columns.append(math.prod(others, start=torch.ones_like(position)))
    return torch.stack(columns, -1)


def _at_places(u: Tensor, place: Tensor, moved: Tensor, stretch: Tensor, length: float) -> Tensor:
    """The Fourier series of u (B, C, W, X) at ``stretch (x - moved)``.

    Args:
        u: on one period.
        place: (X,) the points x.
        moved: (B, W).
        stretch: (B,).
        length: the period.
    """
    points = u.shape[-1]
    modes = torch.arange(points // 2 + 1, dtype=place.dtype, device=u.device)
    waves = stretch[:, None] * (2 * math.pi / length) * modes
    # Every mode but the mean, and the one at the grid's limit, stands for its conjugate too.
    counts = torch.full_like(modes, 2.0)
    counts[0] = 1.0
    if points % 2 == 0:
        counts[-1] = 1.0
    turned = counts * torch.exp(-1j * waves[:, None, :] * moved[:, :, None])
    spectrum = torch.fft.rfft(u) / points * turned[:, None]
    basis = torch.exp(1j * waves[:, :, None] * place)
    return torch.einsum("bcwk,bkx->bcwx", spectrum, basis).real


class LieSymmetryAugment(BatchTransform):
    """Augments fields that solve a differential equation by the equation's own symmetries.

    Mialon, Garrido, Lawrence, Rehman, LeCun, Kiani (2023), Self-Supervised Learning with Lie
    Symmetries for Partial Differential Equations, arXiv:2307.05432.

    Lie point symmetries take solutions to solutions: shifts in time and space, the Galilean boost
    ``x -> x + v t, u -> u + v``, scalings. Each sample is moved by an element of the group with
    strengths that are drawn evenly. For invariant tasks (the coefficients of the equation, a
    representation for them) targets stay; for time stepping, where targets are the field's
    continuation, they move along (``targets="field"``). In the paper two views of a sample, moved
    differently, feed VICReg: :meth:`view` makes a second one for your step.

    Confirmed with official code: the generators of Korteweg-de Vries and Kuramoto-Sivashinsky and
    the shift by Fourier series with brandstetter-johannes/LPSDA@2a7c425 (Brandstetter et al.,
    2022; ``common/augmentation.py``, whose boosts have the other sign), the form of scalings and
    boosts with facebookresearch/SSLForPDEs@6d3b323 (``transformations.py``, Navier-Stokes). The
    coordinates of grid points are moved there, and go into the network as channels; here, where
    networks see fields only, the moved solution is evaluated on the grid that was there. The group
    element is a product of one scaling, one boost and one shift, in place of a Lie-Trotter series:
    all of the group is reached either way. Symmetries of Burgers and heat are checked against
    exact solutions, not against code.

    Args:
        equation: ``"kdv"``, ``"burgers"``, ``"ks"`` or ``"heat"``; see ``lie_symmetry`` for their
            forms. A viscosity ``nu`` is unchanged by every symmetry here.
        length: the period of x.
        dt: the time between two rows of the field.
        shift: the largest shift in space as a share of the period, in [0, 1]: drawn from
            ``[-shift / 2, shift / 2]``; 1 is any. Default 1.
        velocity: ``v`` is drawn from ``[-velocity, velocity]``; 0 for heat.
        scale: ``log l`` is drawn from ``[-scale, scale]``, as far as there are rows: with
            ``window=None`` from ``[0, scale]``, since a slower evolution needs rows behind the
            last one. 0 for Kuramoto-Sivashinsky.
        amplitude: ``log m`` is drawn from ``[-amplitude, amplitude]``; heat alone.
        window: the rows that come out; fewer than go in leave room for shifts in time and for
            slower evolutions. ``None`` keeps all.
        targets: ``"invariant"`` leaves targets alone; ``"field"``: they are (B, ..., T', X), the
            rows behind the inputs.
        probability: of moving a sample, in [0, 1], or a :class:`Schedule`; 0 turns it off.
        signals: where ``inputs`` (and ``targets``) are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if an argument is outside its range, or the equation has no such symmetry.
        RegularizationError: in the first step, if inputs are not fields (B, ..., T, X) of floats,
            are shorter than ``window``, or targets do not continue them.

    Note:
        Rows lie along the last dimension but one, points of a full period (without its end)
        along the last; channels between move alike, each a solution of its own. Over ranks: local;
        each rank draws for its own samples. A second pass (SAM) sees the same fields. The logged
        value is the share of samples that were moved. Cost: two Fourier sums, ``T X^2 / 2``
        products a sample.

        It hurts tasks that a symmetry changes: the mean of u under a boost, absolute position
        under a shift. A scaled field is not periodic on the grid any more: leave ``scale`` at 0
        for networks that count on periodic borders (circular padding, Fourier layers).

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LieSymmetryAugment
        >>> technique = LieSymmetryAugment("kdv", length=128.0, dt=0.2, velocity=0.4, scale=0.1)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Self-Supervised Learning with Lie Symmetries for Partial Differential Equations",
            "Mialon et al.",
            2023,
            "2307.05432",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "targets"})
    writes: ClassVar[frozenset[str]] = frozenset({"inputs", "targets"})
    exclusive: ClassVar[frozenset[str]] = frozenset()
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch draws its own symmetries",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(lie_symmetry)
    explanation: ClassVar[str] = "moves fields along the symmetries of their equation"

    def __init__(
        self,
        equation: Equation,
        *,
        length: float,
        dt: float,
        shift: float = 1.0,
        velocity: float = 0.0,
        scale: float = 0.0,
        amplitude: float = 0.0,
        window: int | None = None,
        targets: Targets = "invariant",
        probability: float | Schedule = 1.0,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, per="sample", signals=signals, name=name)
        cure = 'LieSymmetryAugment("kdv", length=128.0, dt=0.2, velocity=0.4)'
        if equation not in _EQUATIONS:
            problem = f"`equation` must be one of {', '.join(_EQUATIONS)}, got {equation!r}"
            raise ArgumentError(self, problem, cure=cure)
        check_range(self, "length", length, 0, low_open=True, cure=cure)
        check_range(self, "dt", dt, 0, low_open=True, cure=cure)
        check_range(self, "shift", shift, 0, 1, cure=cure)
        has = _EQUATIONS[equation]
        for argument, value, there in (
            ("velocity", velocity, has.galilean),
            ("scale", scale, has.scaling is not None),
            ("amplitude", amplitude, has.amplitude),
        ):
            check_range(self, argument, value, 0, cure=cure)
            if value > 0 and not there:
                problem = f"{equation!r} has no symmetry for `{argument}`, got {value!r}"
                raise ArgumentError(self, problem, cure=f'LieSymmetryAugment("{equation}", ...)')
        if window is not None and (not isinstance(window, int) or window < 1):
            problem = f"`window` must be a whole number from 1 or None, got {window!r}"
            raise ArgumentError(self, problem, cure=cure)
        if targets not in _TARGETS or (targets == "field" and window is not None):
            problem = f"`targets` must be 'invariant', or 'field' without a window, got {targets!r}"
            raise ArgumentError(self, problem, cure=cure)
        self.equation: Equation = equation
        self.length, self.dt, self.window, self.targets = length, dt, window, targets
        self.shift, self.velocity, self.scale, self.amplitude = shift, velocity, scale, amplitude

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """Move the chosen fields, and their continuation."""
        whole, rows = inputs, inputs.shape[-2]
        if self.targets == "field":
            whole = torch.cat([inputs, self._continuation(inputs, step)], dim=-2)
        moved = self._moved(whole, chosen, generator)
        if self.targets == "field":
            step.targets = moved[..., rows:, :]
            moved = moved[..., :rows, :]
        return Transformed(moved, chosen.float().mean())

    def view(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Another view (B, ..., window, X) of fields (B, ..., T, X), every one of them moved.

        Args:
            inputs: the fields.
            generator: on the CPU; by default torch's own, as for dropout in your step.
        """
        chosen = torch.ones(len(inputs), dtype=torch.bool)
        return self._moved(inputs, chosen, generator)

    def _moved(self, inputs: Tensor, chosen: Tensor, generator: torch.Generator | None) -> Tensor:
        window = self._window(inputs)
        draws = torch.rand(5, len(inputs), generator=generator, dtype=torch.float64)
        even = torch.where(chosen, 2 * draws - 1, 0.0)
        low = self._lowest_scale(inputs.shape[-2], window)
        log_scale = torch.where(chosen, low + (self.scale - low) * draws[2], 0.0)
        # What the window leaves of the rows, in time.
        _, b, _ = _EQUATIONS[self.equation].scaling or (0, 0, 0)
        slack = (inputs.shape[-2] - 1) - (window - 1) * torch.exp(-b * log_scale)
        start = torch.where(chosen, draws[4], 0.0) * slack.clamp_min(0) * self.dt
        new = lie_symmetry(
            full_precision(inputs),
            self.equation,
            length=self.length,
            dt=self.dt,
            start=start,
            shift=even[0] * self.shift * self.length / 2,
            velocity=even[1] * self.velocity,
            log_scale=log_scale,
            amplitude=torch.exp(even[3] * self.amplitude),
            window=window,
        )
        kept = inputs[..., :window, :]
        mask = chosen.to(inputs.device).view(-1, *[1] * (inputs.ndim - 1))
        # Bit for bit where nothing was moved, which a Fourier series would round.
        return torch.where(mask, new.to(inputs.dtype), kept)

    def _lowest_scale(self, rows: int, window: int) -> float:
        """The smallest log l whose window still lies within the rows."""
        scaling = _EQUATIONS[self.equation].scaling
        if scaling is None or window <= 1:
            return -self.scale
        return -min(self.scale, math.log((rows - 1) / (window - 1)) / scaling[1])

    def _window(self, inputs: Tensor) -> int:
        rows = inputs.shape[-2] if inputs.ndim > 2 else 0
        window = rows if self.window is None else self.window
        if not 1 <= window <= rows:
            raise RegularizationError(
                self,
                f"moves fields (B, ..., T, X) with {window or 'some'} rows or more, got inputs "
                f"{tuple(inputs.shape)}",
                cure='signals=Signals(inputs="batch.<key of the fields>")',
            )
        return window

    def _continuation(self, inputs: Tensor, step: Step) -> Tensor:
        targets = step.targets
        fits = isinstance(targets, Tensor) and targets.ndim == inputs.ndim
        if not fits or targets.shape[:-2] + targets.shape[-1:] != (
            inputs.shape[:-2] + inputs.shape[-1:]
        ):
            shown = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise RegularizationError(
                self,
                f"moves targets along with inputs {tuple(inputs.shape)}, whose further rows they "
                f"have to be, got {shown}",
                cure='LieSymmetryAugment(..., targets="invariant")',
            )
        found: Tensor = targets.to(inputs)
        return found
