"""TEAL: magnitudes of the inputs of all linears."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.sparsity.base import Seen, SparsityMethod, Thresholds, allocation, quantile, share

__all__ = ["Teal"]


@dataclass(frozen=True)
class Teal(SparsityMethod):
    """Take the smallest values of every linear's input for zero.

    Paper: Training-Free Activation Sparsity in Large Language Models (TEAL, arXiv 2408.14690).

    Formula, with ``F`` the distribution of ``|x|`` of an input over calibration tokens and its
    channels::

        s(x_i) = 0 where |x_i| <= t,    F(t) = p

    Parameters
    ----------
    sparsity
        The paper's ``p``: the share of each input that is 0; 0.4 to 0.5 there.
    allocate
        ``uniform`` for the same sparsity in all layers, ``greedy`` for shares that differ so that
        the predictions change least (:mod:`nybble.sparsity.allocate`).

    What differs here: every input of a layer has the same share; the paper's greedy allocation,
    which gives those of a block different ones, is left out for one among layers (``allocate``),
    which was measured with CHESS alone. What queries, keys and
    values read is one input with one threshold, as is what gate and up read. All tokens are cut,
    those of a prompt included; the paper spares the first half of prompts. Columns of
    zeros are skipped where a measurement finds that faster, which is where most inputs are 0.
    """

    sparsity: float = 0.5
    allocate: str = "uniform"

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        allocation(self.allocate)

    def fit(self, seen: Seen) -> Thresholds:
        """Return the thresholds of a layer."""
        read = {**seen.inputs, "down": seen.inner}
        limits = {name: quantile(np.abs(x), self.sparsity) for name, x in read.items()}
        return Thresholds(None, limits)
