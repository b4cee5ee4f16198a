"""Channels while a network is traced: which of them are one unit, and which must stay.

Every axis of a parameter that a module gives or reads along has numbers of its own, one for each
index. What flows between modules carries these numbers along its axes. Where two meet, as in a sum,
their numbers are united; what must not change is held, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Axes", "Channels", "Ids", "Seen"]

Ids = npt.NDArray[np.int64]
"""The number of the unit that each index of an axis belongs to."""
Axes = Sequence["Ids | None"]
"""Those of all axes of a tensor; ``None`` for axes that are no channels."""


@dataclass(frozen=True)
class Seen:
    """A value that flows through the network.

    Parameters
    ----------
    value
        What it is for the example inputs.
    axes
        For a tensor, its axes.
    sizes
        For a tensor's shape, the axes it tells the lengths of.
    counted
        For a number, channels that were counted for it.
    """

    value: Any
    axes: Axes = ()
    sizes: Axes | None = None
    counted: Ids | None = None

    def ids(self) -> Iterable[Ids]:
        """Return all channels that it depends on the number of."""
        for ids in (*self.axes, *(self.sizes or ()), self.counted):
            if ids is not None:
                yield ids


@dataclass
class Channels:
    """Sets of channels that stay or go together."""

    _parent: list[int] = field(default_factory=list)
    _held: dict[int, str] = field(default_factory=dict)

    def new(self, count: int) -> Ids:
        """Return numbers that were not used before."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, one: int) -> int:
        """Return the number that stands for the set of this one."""
        root = one
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[one] != root:
            self._parent[one], one = root, self._parent[one]
        return root

    def unite(self, some: Ids, others: Ids) -> None:
        """Let channels at the same places stay or go together."""
        for one, other in zip(some.tolist(), others.tolist(), strict=True):
            first, second = sorted((self.find(one), self.find(other)))
            if first != second:
                self._parent[second] = first
                if second in self._held:
                    self._held.setdefault(first, self._held.pop(second))

    def hold(self, ids: Ids | None, why: str) -> None:
        """Let channels stay."""
        for one in () if ids is None else np.unique(ids).tolist():
            self._held.setdefault(self.find(one), why)

    def held(self, one: int) -> str | None:
        """Return why a channel stays; ``None`` when it may go."""
        return self._held.get(self.find(one))
