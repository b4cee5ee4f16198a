"""CATS: one threshold a layer, a percentile of the gate's activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.sparsity.base import Seen, SparsityMethod, Thresholds, allocation, quantile, share

__all__ = ["Cats"]


@dataclass(frozen=True)
class Cats(SparsityMethod):
    """Skip the neurons whose gate is among a layer's smallest.

    Paper: CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models
    (arXiv 2404.08763).

    Formula, with ``F`` the distribution of ``|SiLU(x W_gate)|`` over calibration tokens and all
    neurons of a layer::

        t = min {t : F(t) >= k},    neuron i is 0 where |SiLU(x W_gate)_i| <= t

    Parameters
    ----------
    sparsity
        The paper's ``k``: the share of neurons that is skipped. It reports 0.5, 0.7 and 0.9.
    allocate
        ``uniform`` for the same sparsity in all layers, ``greedy`` for shares that differ so that
        the predictions change least (:mod:`nybble.sparsity.allocate`).

    What differs here: percentiles are exact ones of a sample of tokens, not of a histogram of some
    2000 bins; the model is calibrated as it is rounded; models without a gate are taken by the
    values of their activation function; and no weights are tuned afterwards.
    """

    sparsity: float = 0.5
    allocate: str = "uniform"

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        allocation(self.allocate)

    def fit(self, seen: Seen) -> Thresholds:
        """Return the thresholds of a layer."""
        size = np.abs(seen.act)
        threshold = quantile(size, self.sparsity)
        neurons = np.full(size.shape[1], threshold, dtype=np.float32)
        return Thresholds(neurons, active=float((size > neurons).mean()))
