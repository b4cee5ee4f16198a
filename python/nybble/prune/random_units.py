"""Units by chance: what every method has to be better than."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nybble.prune.base import Criterion, Doubles, Structured, number
from nybble.prune.evidence import Evidence
from nybble.prune.graph import Group

__all__ = ["Chance", "RandomUnits", "draw"]


def draw(name: str, seed: int) -> np.random.Generator:
    """Return a source of numbers that a name and a seed decide."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class Chance(Criterion):
    """Random numbers.

    Parameters
    ----------
    seed
        Which.
    """

    seed: int = 0

    def score(self, group: Group, evidence: Evidence) -> Doubles:
        """Return them."""
        return draw(group.name, self.seed).random(group.size)


@dataclass(frozen=True)
class RandomUnits(Structured):
    """Heads and neurons drawn by lot go, as many in each layer: the baseline.

    Paper: "The Unreasonable Effectiveness of Random Pruning", arXiv 2202.02643, on why a baseline
    of this kind must be reported.

    Formula: scores are uniform random numbers.

    What differs here: nothing is trained afterwards.

    Parameters
    ----------
    seed
        Which units.
    """

    seed: int = 0

    scores_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number("seed", self.seed, 0, 2**63, whole=True)

    @property
    def criterion(self) -> Criterion:
        """Chance."""
        return Chance(self.seed)
