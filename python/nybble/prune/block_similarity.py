"""Layers that leave their inputs nearly as they are go as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.prune.allocate import Allocator, Global
from nybble.prune.base import Criterion, Doubles, Structured, one_of
from nybble.prune.evidence import Evidence
from nybble.prune.graph import Group

__all__ = ["BlockInfluence", "BlockSimilarity"]


@dataclass(frozen=True)
class BlockInfluence(Criterion):
    """How far a layer turns what passes through it."""

    @property
    def needs(self) -> frozenset[str]:
        """States before and after the layers."""
        return frozenset({"blocks"})

    def score(self, group: Group, evidence: Evidence) -> Doubles:
        """Return ``1 - cos``."""
        assert group.layer is not None  # layers belong to one
        return np.array([1 - evidence.cosines[group.layer]])


@dataclass(frozen=True)
class BlockSimilarity(Structured):
    """Layers whose outputs are most like their inputs are dropped.

    Paper: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    arXiv 2403.03853.

    Formula: ``BI_l = 1 - mean over tokens of cos(h_in, h_out)``; the layers with the least go.

    Defaults: none but ``ratio``, which is met as nearly as whole layers allow.

    What differs here: nothing.
    """

    attention: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("attention", self.attention, ("none",))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Layers."""
        return ("layer",)

    @property
    def criterion(self) -> Criterion:
        """Their influence."""
        return BlockInfluence()

    @property
    def allocator(self) -> Allocator:
        """All layers together."""
        return Global()
