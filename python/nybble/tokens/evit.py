"""EViT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nybble.tokens.patches import PatchMethod

__all__ = ["EViT"]


@dataclass(frozen=True)
class EViT(PatchMethod):
    """The patches that the class token attends to stay; the others become one token.

    Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations
    (Liang et al., ICLR 2022, arXiv 2202.07800), without its fine-tuning. Between attention and
    feed-forward block of a pruning layer::

        s(j) = mean over heads of A_h(class, j)
        merged = sum over the other patches of s(j) x(j)

    The weights of the merged token are not normalised, as in the official code.

    Parameters
    ----------
    layers, keep
        Pruning layers, counted from 0, and the share that stays: those of the paper's DeiT-S.
    fuse
        Whether the others are merged; else they leave.
    """

    layers: Sequence[int] = (3, 6, 9)
    keep: float | Sequence[float] = 0.7
    fuse: bool = True

    def budget(self) -> tuple[float | Sequence[float], int | Sequence[int]]:
        """Return the shares that stay."""
        return self.keep, 0

    def method(self) -> dict[str, Any]:
        """Return the method as the core reads it."""
        return {"class_row": {"fuse": self.fuse}}
