"""FLAP: units whose inputs hardly vary go, and a bias stands in for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nybble.prune.allocate import Allocator, Global
from nybble.prune.base import Criterion, Doubles, Structured, one_of, standardised
from nybble.prune.compensate import COMPENSATORS, Compensator
from nybble.prune.evidence import Evidence, per_unit
from nybble.prune.graph import Group, Slice

__all__ = ["Flap", "Fluctuation", "read_by"]

METRICS = ("wifv", "ifv", "wifn")


def read_by(group: Group) -> tuple[str, Slice]:
    """Return the linear that reads what a group's units give, and where."""
    for part in group.slices:
        if part.role == "in":
            return part.tensor.removesuffix(".weight"), part
    message = f"{group.name}: no linear reads its units"
    raise ValueError(message)  # only asked for heads and neurons


def columns(evidence: Evidence, part: Slice) -> Doubles:
    """Return the weights that a slice's linear reads with, inputs along the last axis."""
    return np.moveaxis(np.asarray(evidence.weight(part.tensor), dtype=np.float64), part.axis, -1)


@dataclass(frozen=True)
class Fluctuation(Criterion):
    """How much the inputs of the next linear vary, times what it weighs them with.

    Parameters
    ----------
    metric
        ``wifv``: ``Var(x_j) ||W_:,j||^2``; ``ifv``: the variance alone; ``wifn``:
        ``mean_i |W_ij| ||x_j||``, Wanda's product.
    """

    metric: str = "wifv"

    @property
    def needs(self) -> frozenset[str]:
        """Variances of the inputs."""
        return frozenset({"moments"})

    def channels(self, group: Group, evidence: Evidence) -> Doubles:
        """Return the score of each input of the linear that reads the units."""
        linear, part = read_by(group)
        inputs, weights = evidence.inputs[linear], columns(evidence, part)
        if self.metric == "ifv":
            return inputs.variance
        if self.metric == "wifn":
            return np.asarray(np.abs(weights).mean(axis=0) * inputs.size)
        return np.asarray(inputs.variance * np.square(weights).sum(axis=0))

    def score(self, group: Group, evidence: Evidence) -> Doubles:
        """Return the sum over a unit's inputs."""
        _, part = read_by(group)
        return per_unit(part, self.channels(group, evidence), group.size)


@dataclass(frozen=True)
class Flap(Structured):
    """Heads and neurons whose outputs vary least, over all layers, become a bias.

    Paper: "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    arXiv 2312.11983.

    Formula, for input ``j`` of the linear that ends a block, with calibration inputs ``x``::

        S_j = Var(x_j) ||W_:,j||^2                      (WIFV)
        z_j = (S_j - mean S) / std S                    in each layer, attention and neurons apart
        b   = W_:,gone mean(x_gone)                     added to the linear

    Heads have the mean of their inputs' ``z``. All heads and neurons are ranked together, each
    weighing as many parameters as it has, and the lowest go (the paper's AL-AM).

    Defaults: WIFV, a global ranking, the bias, as in the paper; ``ratio`` 0.2, its smallest. In
    attention ``S`` is squared before it is standardised, as in the authors' code.

    What differs here: variances are those of all calibration tokens (their running variance gives
    the first sample none and mixes old and new means). With grouped queries a unit is a key and
    value head with all its query heads, which the paper does not treat. Neurons stay in multiples
    of 32, and every layer keeps a tenth of its units.

    Parameters
    ----------
    metric
        ``wifv``, ``ifv`` or ``wifn`` (:class:`Fluctuation`).
    compensate
        ``bias``, or another of :data:`nybble.prune.compensate.COMPENSATORS`.
    """

    metric: str = "wifv"
    compensate: str = "bias"

    propagate: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("metric", self.metric, METRICS)
        COMPENSATORS.lookup(self.compensate)

    @property
    def criterion(self) -> Criterion:
        """WIFV of channels, standardised before they are added up."""
        return _Standardised(self.metric)

    @property
    def allocator(self) -> Allocator:
        """All units together."""
        return Global()

    @property
    def compensator(self) -> Compensator:
        """The bias."""
        return COMPENSATORS.lookup(self.compensate)()


@dataclass(frozen=True)
class _Standardised(Fluctuation):
    def score(self, group: Group, evidence: Evidence) -> Doubles:
        _, part = read_by(group)
        values = self.channels(group, evidence)
        z = standardised(np.square(values) if group.kind != "neuron" else values)
        return per_unit(part, z, group.size) / part.counts(group.size)
