"""SmoothQuant: outliers of activations move into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from nybble.quant.base import Floats, Scheme, within
from nybble.quant.fold import Fold, Pair

if TYPE_CHECKING:
    from nybble.calibrate.stats import InputStats

__all__ = ["SmoothQuant"]


@dataclass(frozen=True)
class SmoothQuant(Fold):
    """Channels with large activations are made smaller, their weights larger, half each.

    Paper: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
    Models", arXiv 2211.10438.

    Formula, for input channel ``j``::

        s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)

    activations are divided by ``s_j`` at the norm before them, weights multiplied.

    Defaults: ``alpha = 0.5``, the paper's.

    What differs: nothing for the norms, which are all the paper rescales.
    """

    alpha: float = 0.5
    kinds: ClassVar[tuple[str, ...]] = ("norm",)

    def __post_init__(self) -> None:
        within("smoothquant: alpha", self.alpha, 0, 1)

    def factors(
        self,
        pair: Pair,
        weights: Sequence[Floats],
        inputs: InputStats,
        scheme: Scheme,  # not looked at
    ) -> npt.NDArray[Any]:
        """Return ``s_j``; see :meth:`nybble.quant.fold.Fold.factors`."""
        activations = pair.merged(inputs.largest.astype(np.float64), np.maximum)
        columns = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
        columns = pair.merged(columns.astype(np.float64), np.maximum)
        # A channel that is never used, or read by no weight, has nothing to move.
        dead = (activations <= 1e-5) | (columns <= 1e-5)
        activations, columns = np.where(dead, 1.0, activations), np.where(dead, 1.0, columns)
        factors: npt.NDArray[Any] = activations**self.alpha / columns ** (1 - self.alpha)
        return factors
