"""LLM-Pruner: units by the first terms of a Taylor series of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from nybble.prune.base import Criterion, Doubles, Structured, number, one_of
from nybble.prune.evidence import Evidence, per_unit
from nybble.prune.graph import Group

__all__ = ["LlmPruner", "Taylor"]

ORDERS = ("vector", "first", "second", "mixed")
REDUCTIONS = ("sum", "mean", "max", "prod", "first")


@dataclass(frozen=True)
class Taylor(Criterion):
    """How much the loss would change, to first or second order, if a unit's weights were zero.

    Parameters
    ----------
    order
        ``first``: ``sum |w g|``; ``vector``: ``|sum w g|``; ``second``: ``sum w^2 F`` with the
        diagonal Fisher information ``F``; ``mixed``: ``sum |w g - w^2 F / 2|``.
    reduce
        How the coupled tensors' values become one: ``sum``, ``mean``, ``max``, ``prod`` or
        ``first``.
    """

    order: str = "first"
    reduce: str = "sum"

    @property
    def needs(self) -> frozenset[str]:
        """Gradients, squared ones for the second order."""
        return {
            "vector": frozenset({"gradient"}),
            "first": frozenset({"gradient"}),
            "second": frozenset({"fisher"}),
            "mixed": frozenset({"gradient", "fisher"}),
        }[self.order]

    def score(self, group: Group, evidence: Evidence) -> Doubles:
        """Return the reduced change of the loss."""
        found = []
        for part in group.weights:
            weight = np.asarray(evidence.weight(part.tensor), dtype=np.float64)
            change = self._change(weight, part.tensor, evidence)
            along = np.moveaxis(change, part.axis, 0).reshape(weight.shape[part.axis], -1)
            values = per_unit(part, along.sum(axis=1), group.size)
            found.append(np.abs(values) if self.order == "vector" else values)
        if self.reduce == "first":
            return np.asarray(found[0])
        how: Any = {"sum": np.sum, "mean": np.mean, "max": np.max, "prod": np.prod}[self.reduce]
        return np.asarray(how(np.stack(found), axis=0))

    def _change(self, weight: Doubles, tensor: str, evidence: Evidence) -> Doubles:
        if self.order == "second":
            return np.square(weight) * evidence.fisher[tensor]
        first = weight * evidence.gradient[tensor]
        if self.order == "vector":
            return first
        if self.order == "mixed":
            return np.abs(first - 0.5 * np.square(weight) * evidence.fisher[tensor])
        return np.abs(first)


@dataclass(frozen=True)
class LlmPruner(Structured):
    """Coupled heads and neurons that matter least to the loss go, not in the outermost layers.

    Paper: "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv 2305.11627.

    Formula, with the gradient ``g`` of the loss over a few samples, for all weights ``w`` of the
    tensors that a unit has part in::

        I_u = sum |w g|       (element, first order)

    Defaults: ``order: first``, ``reduce: sum``, one step, the same share in each of the layers from
    ``first`` to ``last``, which are the authors' blocks 4 to 29 of 32 as shares of the depth; so
    ``ratio`` 0.2 of all layers is 25 % of those. Their 10 sequences of 64 tokens of BookCorpus are
    here the recipe's calibration text.

    What differs here: the mean gradient of all windows of the text; what the steps of a layer round
    away is made up for in the next one. With ``hidden: true`` (the authors' channel mode, there
    without the units of layers) channels of the residual stream are units, too.

    Parameters
    ----------
    order, reduce
        See :class:`Taylor`.
    first, last
        Shares of the depth before and from which on layers stay as they are.
    """

    order: str = "first"
    reduce: str = "sum"
    first: float = 4 / 32
    last: float = 30 / 32

    scores_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("order", self.order, ORDERS)
        one_of("reduce", self.reduce, REDUCTIONS)
        number("first", self.first, 0, 1)
        number("last", self.last, self.first, 1)

    @property
    def criterion(self) -> Criterion:
        """The Taylor series."""
        return Taylor(self.order, self.reduce)

    def select(self, groups: list[Group], depth: int) -> list[Group]:
        """Return those of the layers that may be pruned, and what runs through all."""
        inside = range(round(self.first * depth), round(self.last * depth))
        return [group for group in groups if group.layer is None or group.layer in inside]
