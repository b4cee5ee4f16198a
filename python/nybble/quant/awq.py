"""AWQ: weights of salient channels are made larger before they are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from nybble.quant.base import Floats, Scheme, within
from nybble.quant.fold import Fold, Pair, rounded_by_range

if TYPE_CHECKING:
    from nybble.calibrate.stats import InputStats

__all__ = ["Awq"]


@dataclass(frozen=True)
class Awq(Fold):
    """The input channels with large activations are given finer steps, as far as that pays.

    Paper: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    arXiv 2306.00978.

    Formula, for the mean magnitudes ``m_j`` of the input channels::

        s     = m^alpha, divided by sqrt(max s * min s)
        alpha = argmin over a grid of [0, 1] of || Q(W diag(s)) diag(s)^-1 X - W X ||^2

    Defaults: 20 steps of the grid, the paper's.

    What differs: the error is taken over all calibration tokens, through the second moments of
    ``X``, not over a sample; the search rounds by plain range, the weights are then rounded by the
    recipe's method, so ``weights: {method: rtn}`` is the paper's (whose search of clipped ranges is
    part of ``rtn``), and ``gptq`` goes further. Values are rescaled with grouped queries as well.
    """

    steps: int = 20
    rounds_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        within("awq: steps", self.steps, 1, 1000, int)

    @property
    def needs(self) -> frozenset[str]:
        """The inputs' second moments."""
        return frozenset({"gram"})

    def factors(
        self, pair: Pair, weights: Sequence[Floats], inputs: InputStats, scheme: Scheme
    ) -> npt.NDArray[Any]:
        """Return ``s``; see :meth:`nybble.quant.fold.Fold.factors`."""
        shared = pair.merged(np.ones(len(pair.columns)), np.add)
        means = np.maximum(pair.merged(inputs.mean, np.add) / shared, 1e-4)
        gram = (inputs.gram / max(inputs.count, 1)).astype(np.float32)
        best, least = np.ones(len(means)), np.inf
        for step in range(self.steps):
            candidate = means ** (step / self.steps)
            candidate /= np.sqrt(candidate.max() * candidate.min())
            scale = candidate[pair.columns].astype(np.float32)
            error = 0.0
            for weight in weights:
                off = rounded_by_range(weight * scale, scheme) / scale - weight
                error += float(np.vdot(off @ gram, off))
            if error < least:
                best, least = candidate, error
        return best
