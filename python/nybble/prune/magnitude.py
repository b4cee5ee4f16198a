"""Magnitude of single weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nybble.calibrate.stats import InputStats
from nybble.prune.base import Floats, Sparse

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(Sparse):
    """The smallest weights of each matrix go.

    Paper: "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626;
    as a baseline for language models as in Wanda's code, arXiv 2306.11695.

    Formula: ``S_ij = |W_ij|``, ranked in the whole matrix, or among neighbours with a pattern.

    Defaults: half of each matrix, the share that papers compare at.

    What differs here: of equal weights the first go, so that exactly the share goes.
    """

    among: ClassVar[str] = "all"

    def score(
        self, name: str, weights: Floats, inputs: InputStats | None, fisher: Floats | None
    ) -> Floats:
        """Return the magnitudes."""
        return np.abs(weights)
