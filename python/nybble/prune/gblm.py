"""GBLM-Pruner: Wanda's product and that of weights with their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.calibrate.stats import InputStats
from nybble.prune.base import Floats, Sparse, number, one_of

__all__ = ["Gblm"]


@dataclass(frozen=True)
class Gblm(Sparse):
    """In each row the weights go that are small next to their inputs and their gradients.

    Paper: "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
    arXiv 2311.04902.

    Formula, with the calibration inputs ``X`` and the gradients ``g_s`` of single samples of the
    unpruned model::

        S_ij = |W_ij| ||X_j||_2 + alpha |W_ij| G_ij,    G = sqrt(sum_s g_s^2)

    ranked inside each row, or among neighbours with a pattern. Gradients of samples are squared
    before they are added: their mean would cancel.

    Defaults: ``alpha`` 100 and the l2 norm, as in the paper.

    What differs here: as in :class:`nybble.prune.wanda.Wanda`; the l1 norm is left out.

    Parameters
    ----------
    alpha
        Weight of the gradients.
    activations
        Whether the first term is there; without it, the paper's variant by gradients alone.
    """

    alpha: float = 100.0
    activations: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number("alpha", self.alpha, 0, 1e9)
        one_of("activations", self.activations, (True, False))

    @property
    def needs(self) -> frozenset[str]:
        """Sizes of the inputs."""
        return frozenset({"moments"} if self.activations else ())

    @property
    def gradients(self) -> bool:
        """They are."""
        return True

    def score(
        self, name: str, weights: Floats, inputs: InputStats | None, fisher: Floats | None
    ) -> Floats:
        """Return the sum of the products."""
        assert fisher is not None  # it is needed
        size: Floats = np.float32(self.alpha) * np.sqrt(fisher)
        if inputs is not None and self.activations:
            size = size + inputs.size.astype(np.float32)
        return np.abs(weights) * size
