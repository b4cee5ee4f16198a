"""Chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nybble.tokens.patches import PatchMethod

__all__ = ["RandomPatches"]


@dataclass(frozen=True)
class RandomPatches(PatchMethod):
    """Patches leave at random: what any other method has to beat.

    Between attention and feed-forward block of a pruning layer.

    Parameters
    ----------
    layers, keep
        Pruning layers, counted from 0, and the share that stays; EViT's, for comparison.
    seed
        Of the choice, which also depends on the layer and on the image's place in the call.
    """

    layers: Sequence[int] = (3, 6, 9)
    keep: float | Sequence[float] = 0.7
    seed: int = 0

    def budget(self) -> tuple[float | Sequence[float], int | Sequence[int]]:
        """Return the shares that stay."""
        return self.keep, 0

    def method(self) -> dict[str, Any]:
        """Return the method as the core reads it."""
        return {"random": {"seed": self.seed}}
