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

    Where it helps depends on the model (``python -m benches.vision.tokens``, 35 % of the arithmetic
    less, schedules searched alike for each method, 95 % intervals beside chance at the same cost).
    DINOv2-S, overlap of saliency maps with dense on 48 ImageNet samples, 6 schedules a search::

        zero_tprune   0.803   +0.038 [+0.008, +0.070]
        chance        0.765
        received      0.773   +0.008 [-0.011, +0.027]
        evit          0.633   -0.132 [-0.197, -0.067]
        tome          0.936   +0.171 [+0.137, +0.206]

    A ViT for CIFAR-10 (6 layers, 64 patches), 500 images, 67.0 % right if dense, 60 schedules a
    search::

        zero_tprune   61.6 %   -4.0 [-6.7, -1.2]
        chance        65.6 %
        received      64.2 %   -1.4 [-4.4, +1.6]
        evit          63.6 %   -2.0 [-4.7, +0.6]
        tome          67.0 %   +1.4 [-0.4, +3.2]

    On that one importance says little: how much the classes change when a single patch is left out
    has, layer by layer, a rank correlation of -0.01 to 0.16 with this score (50 images), and of at
    most 0.26 with the class token's row or the attention received. The paper loses 0.4 points with
    DeiT-S at 35 % less.

    Not stated in the paper, and chosen here: scores have mean 1 before the variance is taken; where
    no head passes all are heard; the second vote begins with the scores of the first, what it gives
    to tokens that left is lost, and the sum is brought back to 1; votes end early once they change
    by less than 1e-3, and are extrapolated to get there sooner; class and register tokens vote and
    are voted for, but are no candidates.

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
    extrapolate
        Whether votes go on from what the last steps lead to (:func:`nybble.score.pagerank`) and not
        from what the last one made, as in the paper. In layer 2 of DINOv2-S at 518 pixels most
        heads settle in about 10 steps instead of more than 30.
    variances
        Least and largest variance of a head that is heard.
    """

    layers: Sequence[int] = (1, 3, 6, 9)
    keep: float | Sequence[float] = (1.0, 0.9, 0.8, 0.7)
    similar: int | Sequence[int] = 10
    iterations: int | None = None
    class_start: bool = False
    extrapolate: bool = True
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
                "extrapolate": self.extrapolate,
                "variances": list(self.variances),
            }
        }
