"""Single weights by chance: what every method has to be better than."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.calibrate.stats import InputStats
from nybble.prune.base import Floats, Sparse, number
from nybble.prune.random_units import draw

__all__ = ["RandomWeights"]


@dataclass(frozen=True)
class RandomWeights(Sparse):
    """Weights drawn by lot go: the baseline.

    Paper: "The Unreasonable Effectiveness of Random Pruning", arXiv 2202.02643, on why a baseline
    of this kind must be reported.

    Formula: scores are uniform random numbers.

    What differs here: the share is the same in each row, and nothing is trained afterwards.

    Parameters
    ----------
    seed
        Which weights.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("seed", self.seed, 0, 2**63, whole=True)

    def score(
        self, name: str, weights: Floats, inputs: InputStats | None, fisher: Floats | None
    ) -> Floats:
        """Return random numbers."""
        return draw(name, self.seed).random(weights.shape, dtype=np.float32)
