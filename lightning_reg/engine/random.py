"""Random numbers that depend on a seed and a position, never on what was drawn before."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterable
from typing import Any

import torch


def stream_seed(seed: int, *keys: int | str) -> int:
    """A seed of 63 bits for the stream that ``keys`` name; the same on every machine.

    Args:
        seed: the seed of the run.
        keys: whatever tells streams apart: a technique's name, a step, a rank.
    """
    # Types are part of what is hashed, and a separator that repr escapes stands between the keys,
    # so that ("1", 2), (1, 2) and ("1, 2",) are three streams.
    text = "\n".join(repr(int(k) if isinstance(k, bool) else k) for k in (seed, *keys))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(device: torch.device | str, seed: int, *keys: int | str) -> torch.Generator:
    """A fresh generator on ``device`` at the start of the stream that ``keys`` name."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, *keys))


def base_seed(default: int = 0) -> int:
    """The seed that ``seed_everything`` left in the environment, or ``default``."""
    text = os.environ.get("PL_GLOBAL_SEED", "")
    try:
        return int(text)
    except ValueError:
        return default


def rng_state(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """The state of every global generator that a training step may draw from.

    Args:
        devices: accelerators whose generators count; the CPU's always does.

    Returns:
        Tensors and primitives, fit for a checkpoint that is loaded with ``weights_only``.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    accelerators = {str(d): torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
    if accelerators:
        state["cuda"] = accelerators
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        # Without numpy in the process nothing can draw from it, and importing it costs.
        kind, words, position, has_gauss, gauss = numpy.random.get_state()
        table = torch.from_numpy(words.astype("int64"))
        state["numpy"] = (kind, table, int(position), int(has_gauss), float(gauss))
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Go on from a state that :func:`rng_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    for device, generator in state.get("cuda", {}).items():
        torch.cuda.set_rng_state(generator.cpu(), device)
    if "numpy" in state:
        import numpy

        kind, table, position, has_gauss, cached = state["numpy"]
        words = table.cpu().numpy().astype("uint32")
        numpy.random.set_state((kind, words, position, has_gauss, cached))


def reseed_torch(seed: int, devices: Iterable[torch.device] = ()) -> None:
    """Start torch's global generators of the CPU and of accelerators anew; no others."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
