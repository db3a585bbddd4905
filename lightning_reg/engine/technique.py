"""What every technique declares of itself, callback or mixin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from lightning_reg.engine.paper import Paper

Semantics = Literal["replica", "global", "local"]


class Technique:
    """Declarations that the catalogue lists and the contract holds a technique to.

    Attributes:
        papers: what it implements.
        semantics: over ranks. ``"replica"``: acts on replicated state, the same on every rank;
            ``"global"``: N ranks with batch B equal one process with the joint batch, in value
            and gradient; ``"local"``: per rank by definition of the method.
        needs: the signals that it reads (``"logits"``, ``"targets"``, ``"features"``, ...).
        exemptions: checks of the contract that cannot hold, each with the reason that a user is
            told; the names are those of ``lightning_reg.testing.CHECKS``.
        sharded: whether it is right where FSDP2 shards weights over ranks. ``None``: yes, unless it
            acts on weights or their gradients. One that depends on an argument says yes here, and
            refuses the others in ``validate``.
        function: the technique's mathematics as a pure tensor function.
    """

    papers: ClassVar[tuple[Paper, ...]] = ()
    semantics: ClassVar[Semantics] = "replica"
    needs: ClassVar[tuple[str, ...]] = ()
    exemptions: ClassVar[Mapping[str, str]] = {}
    sharded: ClassVar[bool | None] = None
    function: ClassVar[Callable[..., Any] | None] = None
