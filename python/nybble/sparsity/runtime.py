"""Where skipping neurons saves time: measured once for a model's shape on a machine, and kept."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError
from nybble.speculate import times

if TYPE_CHECKING:
    from nybble import _nybble

__all__ = ["probe"]


def probe(model: _nybble.Model, info: Mapping[str, Any], sparsity: _nybble.Sparsity) -> None:
    """Prepare what pays, by times known from an earlier process or measured now.

    Parameters
    ----------
    model
        The model.
    info
        What it says of itself.
    sparsity
        What it takes for zero.
    """
    file = times.path(info, "skipping")
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(times.stored(file))
    try:
        found = sparsity.probe(model, json.dumps(known) if known else None)
    except ArgumentError:  # a damaged file
        known, found = {}, sparsity.probe(model)
    if found is None:
        return
    kept = _with(known, json.loads(found))
    if kept != known:
        times.store(file, kept)


def _with(known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return times that were found, and those known of what was not looked for this time."""
    before = known.get("inputs") or [None] * len(found["inputs"])
    pairs = zip(found["inputs"], before, strict=True)
    neurons = found["neurons"] or known.get("neurons")
    return {"neurons": neurons, "inputs": [now or earlier for now, earlier in pairs]}
