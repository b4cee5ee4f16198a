"""Magnitude of whole units: the L2 norm of all weights that go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nybble.prune.base import Criterion, Doubles, Structured
from nybble.prune.evidence import Evidence, per_unit
from nybble.prune.graph import Group

__all__ = ["Magnitude", "MagnitudeUnits"]


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The L2 norm of all weights of a unit."""

    def score(self, group: Group, evidence: Evidence) -> Doubles:
        """Return the norms."""
        total = np.zeros(group.size)
        for part in group.weights:
            values = np.square(np.asarray(evidence.weight(part.tensor), dtype=np.float64))
            along = np.moveaxis(values, part.axis, 0).reshape(values.shape[part.axis], -1)
            total += per_unit(part, along.sum(axis=1), group.size)
        return np.sqrt(total)


@dataclass(frozen=True)
class MagnitudeUnits(Structured):
    """Heads and neurons with the smallest weights go, as many in each layer.

    Paper: "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, for convolutions; for
    coupled units as in LLM-Pruner's baseline, arXiv 2305.11627.

    Formula: ``S_u = sqrt(sum over the unit's weights w^2)``, ranked within each layer's heads and
    neurons.

    What differs here: nothing is trained afterwards.
    """

    scores_hidden: ClassVar[bool] = True

    @property
    def criterion(self) -> Criterion:
        """The norm."""
        return Magnitude()
