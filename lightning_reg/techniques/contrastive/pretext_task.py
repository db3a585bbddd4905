"""Has the network's features tell how an image was turned, or how its pieces were shuffled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Communicator, Paper, Technique
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.random import base_seed, stream
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

__all__ = [
    "PretextTaskMixin",
    "jigsaw_permutations",
    "jigsaw_pieces",
    "pretext_task_loss",
    "quarter_turns",
]

_NAME = "PretextTaskMixin"
_CURE = 'self.add_pretext_task(in_features=512, task="rotation", strength=0.3)'
_CANDIDATES = 4000

Task = Literal["rotation", "jigsaw"]
Turns = Literal["all", "one"]
_TASKS = ("rotation", "jigsaw")
_TURNS = ("all", "one")


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Images turned by ``90 k`` degrees against the clock, exactly.

    Args:
        images: (B, C, H, H).
        turns: ``k``, (B,) integers from 0 to 3.

    Returns:
        (B, C, H, H), the same pixels.
    """
    every = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return every[turns, torch.arange(len(images), device=images.device)]


def jigsaw_pieces(images: Tensor, orders: Tensor, grid: int) -> Tensor:
    """The pieces of each image in another order: place ``i`` holds piece ``orders[b, i]``.

    Args:
        images: (B, C, H, W); rows and columns that do not fill a piece are cut off.
        orders: (B, g g), permutations of the pieces, which are counted row by row.
        grid: ``g``, pieces along each side.

    Returns:
        (B, g g, C, h, w) with ``h = H // g``, ``w = W // g``.
    """
    height, width = (side // grid for side in images.shape[-2:])
    cut = images[..., : height * grid, : width * grid]
    pieces = cut.unflatten(3, (grid, width)).unflatten(2, (grid, height))
    # (B, C, g, h, g, w) to one piece after another.
    pieces = pieces.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shuffled: Tensor = pieces[torch.arange(len(images), device=images.device)[:, None], orders]
    return shuffled


def jigsaw_permutations(count: int, pieces: int) -> Tensor:
    """Permutations that are far from each other: each differs from those before in many places.

    Greedy: of the candidates (all permutations, or the same 4000 random ones where there are more)
    the one whose smallest Hamming distance to those chosen already is largest.

    Args:
        count: how many, at most ``pieces!``.
        pieces: the length of each.

    Returns:
        (count, pieces), the first in order.
    """
    if math.factorial(pieces) <= _CANDIDATES:
        candidates = torch.tensor(list(itertools.permutations(range(pieces))))
    else:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(_CANDIDATES, pieces, generator=generator).argsort(1)
        candidates = torch.cat([torch.arange(pieces)[None], drawn])
    chosen = [0]
    nearest = (candidates != candidates[0]).sum(1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (candidates != candidates[chosen[-1]]).sum(1))
    return candidates[chosen]


def pretext_task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy ``-log softmax(z)_k`` of what was done to each image.

    Args:
        logits: ``z``, (N, K), of the auxiliary head.
        labels: ``k``, (N,), the turn or the number of the permutation.

    Returns:
        (N,) in nats.
    """
    return F.cross_entropy(logits, labels, reduction="none")


class _JigsawHead(nn.Module):
    """One layer for every piece, then one for all of them together."""

    def __init__(
        self, in_features: int, pieces: int, classes: int, hidden: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.piece = _layer(in_features, hidden[0], dropout)
        self.puzzle = _layer(pieces * hidden[0], hidden[1], dropout)
        self.classes = nn.Linear(hidden[1], classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K) of features (B, g g, in_features)."""
        logits: Tensor = self.classes(self.puzzle(self.piece(features).flatten(1)))
        return logits


class PretextTaskMixin(Technique, _Base):
    """Adds a self-supervised task to any loss: tell the rotation, or solve the jigsaw.

    Kinakh, Taran, Voloshynovskiy (2021), ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets.

    ``L + strength * CE(head(f(T_k x)), k)``: the encoder ``f`` sees transformed images, and a small
    head has to tell which transform it was, so that features keep where things are. With
    ``task="rotation"`` the transforms are quarter turns, with ``"jigsaw"`` the ``g x g`` pieces of
    an image, each brought to the size of the image and encoded by itself, in one of K orders. The
    paper adds it to a contrastive loss on two views; any loss will do. Head and transforms are no
    part of inference.

    Confirmed with the official code (vkinakh/scatsimclr@7630b12, ``src/trainer/
    pretext_task_trainer.py``, ``config_pretext.yaml``): the sum with a weight of 0.3, all four
    turns of each image, 3 x 3 pieces in 35 orders, heads of 512 and 128 (rotation) or of 512 a
    piece and 4096 (jigsaw) hidden units with dropout 0.5. There the orders come from a file, in
    which two differ in 3 of 9 places at least; here they are computed, and differ in 7.
    Pieces and turned images are augmented there once more; here your encoder may.

    Args (of :meth:`add_pretext_task`, called at the end of ``__init__``):
        in_features: the width of the encoder's features.
        task: ``"rotation"`` (square images) or ``"jigsaw"``.
        strength: the multiplier, at least 0; 0 turns it off.
        turns: of ``"rotation"``: ``"all"`` four of each image, or ``"one"`` at random.
        grid: of ``"jigsaw"``: ``g``, from 2.
        permutations: of ``"jigsaw"``: K, from 2 to ``(g g)!``.
        hidden: the widths of the head's two hidden layers; default: the official ones.
        dropout: of the head, in [0, 1).

    Raises:
        ArgumentError: if an argument is outside its range, images do not fit the task, or the
            encoder's features do not fit the head.

    Note:
        Logged are the mean loss, ``reg/pretext_task``, and the share of right answers,
        ``reg/pretext_task_accuracy``, over all ranks. Over ranks: local in what is drawn (orders,
        random turns: one stream a rank; the head's dropout is torch's own); with all four turns
        and without dropout N ranks equal one process with the joint batch. In training only:
        otherwise the loss comes back as it is. Cost: the encoder on four more images a sample
        (``"all"``), one (``"one"``), or ``g g`` pieces. BatchNorm in the encoder counts turned
        images too.

        It hurts where the transform is part of the label or of no meaning: digits 6 and 9, images
        from above, textures. Classes that look the same when turned cap the accuracy.

    Example:
        >>> import torch, lightning as L
        >>> from lightning_reg import PretextTaskMixin
        >>> class Net(PretextTaskMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
        ...         self.head = torch.nn.Linear(16, 4)
        ...         self.add_pretext_task(in_features=16)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         loss = torch.nn.functional.cross_entropy(self.head(self.encoder(x)), y)
        ...         return self.pretext(loss, self.encoder, x)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "ScatSimCLR: self-supervised contrastive learning with pretext task regularization "
            "for small-scale datasets",
            "Kinakh et al.",
            2021,
            None,
        ),
    )
    semantics: ClassVar[Semantics] = "local"
    function: ClassVar[Callable[..., Any] | None] = staticmethod(pretext_task_loss)
    exemptions: ClassVar[Mapping[str, str]] = {}

    pretext_head: nn.Module
    pretext_orders: Tensor

    def add_pretext_task(
        self,
        in_features: int,
        *,
        task: Task = "rotation",
        strength: float = 0.3,
        turns: Turns = "all",
        grid: int = 3,
        permutations: int = 35,
        hidden: Sequence[int] | None = None,
        dropout: float = 0.5,
    ) -> None:
        """Make the auxiliary head; see the class."""
        check_range(_NAME, "strength", strength, 0, math.inf, high_open=True, cure=_CURE)
        check_range(_NAME, "dropout", dropout, 0, 1, high_open=True, cure=_CURE)
        _check_choice("task", task, _TASKS)
        _check_choice("turns", turns, _TURNS)
        check_range(_NAME, "grid", grid, 2, cure=_CURE)
        pieces = grid * grid
        check_range(_NAME, "permutations", permutations, 2, math.factorial(pieces), cure=_CURE)
        widths = list(hidden if hidden is not None else _widths(task))
        if len(widths) != 2 or min(widths) < 1:
            raise ArgumentError(
                _NAME, f"`hidden` must be two widths from 1, got {hidden!r}", cure=_CURE
            )
        if task == "jigsaw":
            head: nn.Module = _JigsawHead(in_features, pieces, permutations, widths, dropout)
            orders = jigsaw_permutations(permutations, pieces)
        else:
            layers = [
                _layer(in_features, widths[0], dropout),
                _layer(widths[0], widths[1], dropout),
            ]
            head, orders = nn.Sequential(*layers, nn.Linear(widths[1], 4)), torch.arange(4)
        # A head that takes no part would be an unused parameter to DDP.
        self.pretext_head = head.requires_grad_(strength != 0)
        self.register_buffer("pretext_orders", orders, persistent=False)
        self._pretext_settings = (task, strength, turns, grid)

    def pretext(self, loss: Tensor, encoder: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """The loss with that of the pretext task on this batch.

        Args:
            loss: yours, a scalar with its graph.
            encoder: from images (N, C, H, W) to features (N, in_features).
            images: (B, C, H, W) of floats.

        Returns:
            The loss to return from ``training_step``, or to ``manual_backward``.
        """
        task, strength, turns, grid = self._settings()
        if strength == 0 or not self.training:
            return loss
        if task == "rotation":
            logits, labels = self._rotation(encoder, images, turns)
        else:
            logits, labels = self._jigsaw(encoder, images, grid)
        with torch.autocast(images.device.type, enabled=False):
            value = pretext_task_loss(full_precision(logits), labels).mean()
        self._log_pretext(value, (logits.detach().argmax(1) == labels).float().mean())
        return loss + strength * value

    def _rotation(
        self, encoder: Callable[[Tensor], Tensor], images: Tensor, turns: Turns
    ) -> tuple[Tensor, Tensor]:
        if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
            raise ArgumentError(
                _NAME,
                f"turns square images (B, C, H, H), got {tuple(images.shape)}",
                cure='self.add_pretext_task(in_features=512, task="jigsaw")',
            )
        size, device = len(images), images.device
        if turns == "all":
            labels = torch.arange(4, device=device).repeat_interleave(size)
            images = images.repeat(4, 1, 1, 1)
        else:
            labels = torch.randint(4, (size,), generator=self._generator()).to(device)
        logits: Tensor = self.pretext_head(self._features(encoder, quarter_turns(images, labels)))
        return logits, labels

    def _jigsaw(
        self, encoder: Callable[[Tensor], Tensor], images: Tensor, grid: int
    ) -> tuple[Tensor, Tensor]:
        if images.ndim != 4 or min(images.shape[-2:]) < grid:
            raise ArgumentError(
                _NAME,
                f"cuts images (B, C, H, W) into {grid} x {grid} pieces, got {tuple(images.shape)}",
                cure='self.add_pretext_task(in_features=512, task="jigsaw", grid=2)',
            )
        count = len(self.pretext_orders)
        draws = torch.randint(count, (len(images),), generator=self._generator())
        labels = draws.to(images.device)
        pieces = jigsaw_pieces(images, self.pretext_orders[labels], grid)
        large = F.interpolate(pieces.flatten(0, 1), images.shape[-2:], mode="bilinear")
        features = self._features(encoder, large).unflatten(0, pieces.shape[:2])
        logits: Tensor = self.pretext_head(features)
        return logits, labels

    def _features(self, encoder: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        features = encoder(images).flatten(1)
        first = next(m for m in self.pretext_head.modules() if isinstance(m, nn.Linear))
        if features.shape[1] != first.in_features:
            raise ArgumentError(
                _NAME,
                f"has a head for {first.in_features} features, and the encoder gives "
                f"{features.shape[1]}",
                cure=f"self.add_pretext_task(in_features={features.shape[1]})",
            )
        return features

    def _generator(self) -> torch.Generator:
        """The stream of this micro-batch and rank, so that a second pass sees the same."""
        trainer = self.__dict__.get("_trainer")
        position = (0, 0, 0)
        if trainer is not None:
            loop = trainer.fit_loop
            position = (int(trainer.current_epoch), int(loop.batch_idx), int(trainer.global_rank))
        return stream("cpu", base_seed(), "pretext_task", *position)

    def _settings(self) -> tuple[Task, float, Turns, int]:
        settings = self.__dict__.get("_pretext_settings")
        if settings is None:
            problem = "`pretext` was called on a module without a pretext task"
            raise ArgumentError(_NAME, problem, cure=_CURE)
        found: tuple[Task, float, Turns, int] = settings
        return found

    def _log_pretext(self, value: Tensor, accuracy: Tensor) -> None:
        trainer = self.__dict__.get("_trainer")
        if trainer is None or not trainer._logger_connector.should_update_logs:
            return
        pair = torch.stack([value.detach(), accuracy.to(value)])
        pair = Communicator.of(trainer).reduce(pair, "mean")
        self.log("reg/pretext_task", pair[0])
        self.log("reg/pretext_task_accuracy", pair[1])


def _layer(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout))


def _widths(task: Task) -> tuple[int, int]:
    return (512, 128) if task == "rotation" else (512, 4096)


def _check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        problem = f"`{argument}` must be one of {', '.join(choices)}, got {value!r}"
        raise ArgumentError(_NAME, problem, cure=_CURE)
