"""Neurons that do next to nothing are skipped: one file a paper, one line here for each.

A method finds a layer's thresholds on calibration text (:meth:`SparsityMethod.fit`); values at or
below them count as 0, in prompts as in new tokens. A recipe's ``sparsity`` names one, and the
thresholds are stored beside the weights. For an open model :func:`find` gives those of all layers,
from what :func:`observe` sees; they can be tried with ``nybble.load(path, sparsity=...)``.

Which values are zero is part of the model. Where skipping them saves time is measured on the
machine, once for a model and kept; elsewhere they are multiplied like any others, with the same
result in all bits.
"""

from __future__ import annotations

from nybble.registry import Registry
from nybble.sparsity.allocate import find
from nybble.sparsity.base import (
    Seen,
    SparsityMethod,
    Thresholds,
    observe,
    write,
)
from nybble.sparsity.cats import Cats
from nybble.sparsity.chess import Chess
from nybble.sparsity.teal import Teal

__all__ = [
    "METHODS",
    "Cats",
    "Chess",
    "Seen",
    "SparsityMethod",
    "Teal",
    "Thresholds",
    "find",
    "observe",
    "write",
]

METHODS: Registry[SparsityMethod] = Registry(
    "sparsity method",
    cats=Cats,
    chess=Chess,
    teal=Teal,
)
"""Every method by the name recipes use."""
