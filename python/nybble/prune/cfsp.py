"""CFSP: a share for each layer by how much it turns its inputs, neurons by what they contribute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.prune.allocate import Allocator, Sigmoid
from nybble.prune.base import Criterion, Doubles, Structured, number, one_of
from nybble.prune.evidence import Evidence
from nybble.prune.flap import columns, read_by
from nybble.prune.graph import Group

__all__ = ["Cfsp", "Contribution"]


@dataclass(frozen=True)
class Contribution(Criterion):
    """A neuron's weights, each matrix relative to its sum, times how large the neuron is."""

    @property
    def needs(self) -> frozenset[str]:
        """Sizes of the inputs of the last linear."""
        return frozenset({"moments"})

    def score(self, group: Group, evidence: Evidence) -> Doubles:
        """Return the products."""
        linear, part = read_by(group)
        inputs = evidence.inputs[linear]
        a = inputs.size / np.sqrt(max(inputs.count, 1))
        down = np.abs(columns(evidence, part)) * a
        total = down.mean(axis=0) / max(down.sum(), 1e-300)
        for other in group.slices:
            if other.role == "out" and other.tensor.endswith(".weight"):
                weight = np.asarray(evidence.weight(other.tensor), dtype=np.float64)
                rows = np.abs(np.moveaxis(weight, other.axis, 0))
                total = total + rows.mean(axis=1) / max(rows.sum(), 1e-300)
        return np.asarray(a * total)


@dataclass(frozen=True)
class Cfsp(Structured):
    """Neurons with the least contribution go, more of them in layers that change their inputs less.

    Paper: "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation
    Information", arXiv 2409.13199.

    Formula, with the inputs ``x`` of the down projection and the states before and after layer
    ``b``::

        I_b   = mean over tokens of arccos(cos(h_in, h_out)) / pi
        keep_b ~ sigmoid(slope z(I_b)), scaled to the budget
        a_j   = sqrt(mean x_j^2)
        S_j   = a_j mean_i(|Wdown_ij| a_j / sum + |Wup_ji| / sum + |Wgate_ji| / sum)

    each matrix divided by its own sum.

    Defaults: neurons alone, as in the paper. The authors divide sums over tokens by 10000, a choice
    of units; here importance is standardised and ``slope`` says how much it matters.

    What differs here: kept neurons are multiples of 32 in place of 128, which GPUs like; their
    recovery by LoRA is left out.

    Parameters
    ----------
    slope
        How much layers differ; 0 treats all alike.
    """

    attention: str = "none"
    slope: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("slope", self.slope, 0, 100)
        one_of("attention", self.attention, ("none",))

    @property
    def criterion(self) -> Criterion:
        """The fine step."""
        return Contribution()

    @property
    def allocator(self) -> Allocator:
        """The coarse step."""
        return Sigmoid(self.slope)
