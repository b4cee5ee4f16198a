"""ToMe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nybble.tokens.patches import PatchMethod

__all__ = ["ToMe"]


@dataclass(frozen=True)
class ToMe(PatchMethod):
    """Patches that are alike become one: nothing is dropped.

    Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023, arXiv 2210.09461), used without
    training as in the paper. Between attention and feed-forward block of a layer, tokens in even
    places are each compared with those in odd places, by the cosine of their keys' mean over heads;
    the ``r`` most similar pairs are merged, and where several go into one token, all of them::

        x(j) = sum over the merged i of size(i) x(i) / sum of size(i)
        A    = softmax(q k^T / sqrt(d) + log size)      (proportional attention)

    What differs here: the tokens that are left keep the order of their places in the image, so that
    which are compared in the next layer differs from the released code, which puts those merged
    into behind the others. Poolings that read all tokens (a mean, SigLIP's attention) count each as
    often as its size, but not those of a transformers model under :func:`nybble.tokens.apply`.

    Parameters
    ----------
    layers
        The merging layers, counted from 0; in the paper all, which are 12 in a small or base ViT.
    r
        Patches that a layer removes, one number for all layers or one for each, never more than
        half. The paper's ViT-S runs with 13 of 196 in each layer.
    proportional
        Whether a token's key counts as many times as patches were merged into it.
    """

    layers: Sequence[int] = tuple(range(12))
    r: int | Sequence[int] = 13
    proportional: bool = True

    def budget(self) -> tuple[float | Sequence[float], int | Sequence[int]]:
        """Return that all stay but those merged."""
        return 1.0, self.r

    def method(self) -> dict[str, Any]:
        """Return the method as the core reads it."""
        return {"tome": {"proportional": self.proportional}}
