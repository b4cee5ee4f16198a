"""Adapt-Pruner: a little at a time, measured anew each time, more where layers do less."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.prune.allocate import Additive, Allocator, Kept, by_shares
from nybble.prune.base import Criterion, Structured, number
from nybble.prune.evidence import Lens
from nybble.prune.graph import UnitGraph
from nybble.prune.llm_pruner import Taylor

__all__ = ["AdaptPruner"]


@dataclass(frozen=True)
class AdaptPruner(Structured):
    """Heads and neurons go in many small steps; layers that change their inputs less lose more.

    Paper: "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training",
    arXiv 2502.03460.

    Formula, in each of ``steps`` steps, with the states before and after layer ``l``::

        I_l = -mean cos(h_in, h_out),  centred and divided by the largest magnitude
        s_l = clip(s_l + ratio / steps - A I_l, 0, 0.99)

    and inside a layer the units with the least ``sum |w g|``, all of it measured on the model as
    the step before has left it.

    Defaults: ``amplitude`` 0.02, the paper's ``A``, for 50 steps; with other numbers of steps what
    they add up to stays the same (``A * 50 / steps`` a step). ``steps`` is 10, not 50: each takes a
    forward and a backward pass over the text.

    What differs here: their training between the stages is left out. Units come back in no step. A
    step that would take more of a layer than its floor allows takes less, and the next layers more.

    Parameters
    ----------
    steps
        How many times a share is removed.
    amplitude
        The paper's ``A``.
    """

    steps: int = 10
    amplitude: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        number("amplitude", self.amplitude, 0, 1)
        number("steps", self.steps, 1, 1000, whole=True)

    @property
    def criterion(self) -> Criterion:
        """The Taylor series."""
        return Taylor("first", "sum")

    @property
    def allocator(self) -> Allocator:
        """What differs between layers."""
        return Additive(self.amplitude * 50 / self.steps)

    def keep(self, graph: UnitGraph, lens: Lens) -> Kept:
        """Return the units that stay after all steps."""
        groups = graph.of(*self.kinds)
        target = self.share(graph, groups)
        self.limits.check(groups, target)
        rule = Additive(self.amplitude * 50 / self.steps)
        shares = np.zeros(len(graph.layers))
        kept: Kept = {group.name: np.arange(group.size) for group in groups}
        for step in range(1, self.steps + 1):
            evidence = lens.evidence({"gradient", "blocks"}, kept)
            offsets = rule.offsets(evidence.cosines)
            shares = np.clip(shares + target / self.steps + offsets, 0, 0.99)
            # Where shares are cut off at 0, the others would remove too much in the mean.
            wanted = target * step / self.steps
            shares *= wanted / max(shares.mean(), 1e-12)
            scores = self.criterion.scores(groups, evidence)
            of = {g.name: float(shares[g.layer]) for g in groups if g.layer is not None}
            kept = by_shares(groups, scores, of, self.limits, kept)
        lens.release()
        return kept
