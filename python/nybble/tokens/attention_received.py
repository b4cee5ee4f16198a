"""Attention received."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nybble.tokens.patches import PatchMethod

__all__ = ["AttentionReceived"]


@dataclass(frozen=True)
class AttentionReceived(PatchMethod):
    """The patches that get most attention stay: the plainest score, which needs no class token.

    Between attention and feed-forward block of a pruning layer ``s(j) = mean over heads and queries
    of A_h(i, j)``, as in LTMP and FoPru (arXiv 2411.14164); the others leave.

    Parameters
    ----------
    layers, keep
        Pruning layers, counted from 0, and the share that stays; EViT's, for comparison.
    """

    layers: Sequence[int] = (3, 6, 9)
    keep: float | Sequence[float] = 0.7

    def budget(self) -> tuple[float | Sequence[float], int | Sequence[int]]:
        """Return the shares that stay."""
        return self.keep, 0

    def method(self) -> dict[str, Any]:
        """Return the method as the core reads it."""
        return {"received": {}}
