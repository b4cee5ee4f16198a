"""Scores of one group brought to the scale of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.prune.base import Criterion, Doubles, one_of, standardised
from nybble.prune.evidence import Evidence
from nybble.prune.graph import Group

__all__ = ["Normalised"]

HOW = ("mean", "standard", "l2", "max")


@dataclass(frozen=True)
class Normalised(Criterion):
    """A criterion whose scores are made comparable between groups, for a global ranking.

    Parameters
    ----------
    criterion
        What gives the scores.
    how
        They are divided by their ``mean``, the root of the mean of their squares (``l2``),
        or their ``max``; or, ``standard``, centred and divided by their standard deviation.
    """

    criterion: Criterion
    how: str = "mean"

    def __post_init__(self) -> None:
        one_of("how", self.how, HOW)

    @property
    def needs(self) -> frozenset[str]:
        """What the criterion needs."""
        return self.criterion.needs

    def score(self, group: Group, evidence: Evidence) -> Doubles:
        """Return the scores on their new scale."""
        scores = self.criterion.score(group, evidence)
        if self.how == "standard":
            return standardised(scores)
        size = np.abs(scores)
        if self.how == "l2":
            scale = float(np.sqrt(np.square(size).mean()))
        else:
            scale = float(size.mean() if self.how == "mean" else size.max())
        return scores / scale if scale > 0 else scores
