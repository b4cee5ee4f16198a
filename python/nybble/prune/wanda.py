"""Wanda: weights by magnitude times the size of their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.calibrate.stats import InputStats
from nybble.prune.base import Floats, Sparse

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda(Sparse):
    """In each row the weights go whose product with the size of their input is smallest.

    Paper: "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695.

    Formula, with the calibration inputs ``X``::

        S_ij = |W_ij| ||X_j||_2

    ranked inside each row, or in each row among neighbours with a pattern. Linears are pruned in
    order: each sees the inputs that the pruned ones before it give.

    Defaults: half of each row, as in the paper; the authors look at 128 sequences of C4 at the
    model's context, here at the recipe's calibration text.

    What differs here: a layer's later linears see its pruned earlier ones, where the authors take
    all its inputs first. Of equal scores the first go, so that exactly the share goes. The variant
    that stops at a share of a row's summed score is left out.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Sizes of the inputs."""
        return frozenset({"moments"})

    def score(
        self, name: str, weights: Floats, inputs: InputStats | None, fisher: Floats | None
    ) -> Floats:
        """Return the products."""
        assert inputs is not None  # they are needed
        return np.abs(weights) * inputs.size.astype(np.float32)
