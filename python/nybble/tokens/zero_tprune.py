"""Zero-TPrune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nybble.tokens.patches import PatchMethod

__all__ = ["ZeroTPrune"]


@dataclass(frozen=True)
class ZeroTPrune(PatchMethod):
    """Tokens vote with their attention; those with a twin leave first, then the least important.

    Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained
    Transformers (Wang et al., CVPR 2024, arXiv 2305.17328). There is no public official code; this
    follows the paper. Behind a pruning layer, with ``A_h`` the attention of head ``h``::

        s_h <- transpose(A_h) s_h, several times (weighted PageRank)
        s(i) = sqrt(mean of s_h(i)^2 over the heads with v_min <= Var(s_h) <= v_max)

    I': a vote that only orders the tokens. S: the less important half is compared with the more
    important one (cosine of the keys of all heads side by side), and the ``similar`` tokens with
    the closest match leave; nothing is merged. I: a vote among those left, of which the best stay.

    Where it helps depends on the model. On a ViT for CIFAR-10 (6 layers, 64 patches, 500 images,
    35 % of the arithmetic less, schedules searched alike, ``python -m benches.vision.tokens``) it
    is worse than chance: 61.6 % right beside 65.6 (difference -4.0, 95 % from -6.7 to -1.2), where
    dense has 67.0, attention received 64.2, EViT 63.6, and ToMe 67.0. Importance says little
    there: what leaving out a single patch changes (divergence of the classes, 50 images) has a rank
    correlation of -0.01 to 0.16 with this score, layer by layer, and of at most 0.26 with the class
    token's row or the attention received; on DINOv2 the background leaves first, as in the paper
    (``nybble explain``).

    Not stated in the paper, and chosen here: scores have mean 1 before the variance is taken; where
    no head passes all are heard; the second vote begins with the scores of the first, what it gives
    to tokens that left is lost, and the sum is brought back to 1; votes end early once they change
    by less than 1e-3; class and register tokens vote and are voted for, but are no candidates.

    Parameters
    ----------
    layers, keep
        Pruning layers, counted from 0, and the share of the tokens left by the S stage that stays.
        The defaults are those for DeiT-S, 12 layers; a schedule for another model is to be
        searched for.
    similar
        Tokens that an S stage removes, one number for all layers or one for each, never more than
        half; 10 in the paper's DeiT-S.
    iterations
        Steps of a vote; ``None`` for the paper's number by depth, as
        :func:`nybble.score.pagerank_iterations` has it.
    class_start
        Whether the class token begins a vote with a score sqrt(N) times the others' (the paper's
        variant "a").
    variances
        Least and largest variance of a head that is heard.
    """

    layers: Sequence[int] = (1, 3, 6, 9)
    keep: float | Sequence[float] = (1.0, 0.9, 0.8, 0.7)
    similar: int | Sequence[int] = 10
    iterations: int | None = None
    class_start: bool = False
    variances: tuple[float, float] = (0.01, 0.7)

    def budget(self) -> tuple[float | Sequence[float], int | Sequence[int]]:
        """Return the shares that stay, and how many tokens S stages remove."""
        return self.keep, self.similar

    def method(self) -> dict[str, Any]:
        """Return the method as the core reads it."""
        return {
            "zero_tprune": {
                "iterations": self.iterations,
                "class_start": self.class_start,
                "variances": list(self.variances),
            }
        }
