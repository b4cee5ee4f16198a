"""Where skipping saves time: measured once for a model's shape on a machine, and kept.

Times of parts serve all thresholds; what all that pays makes of whole tokens belongs to those it
was measured with, and is kept in a file of its own, unless it was too scattered to tell anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
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
    file, whole = times.path(info, "skipping"), times.path(info, f"skipping {_digest(sparsity)}")
    known, tokens = _stored(file), _stored(whole)
    try:
        found = sparsity.probe(model, json.dumps({**known, **tokens}) if known else None)
    except ArgumentError:  # a damaged file
        known, tokens, found = {}, {}, sparsity.probe(model)
    if found is None:
        return
    now = json.loads(found)
    told = {"speedup": now.pop("speedup")}
    # What a busy machine could not tell is asked again another time.
    kept = tokens if now.pop("scattered", False) else told
    for place, before, after in ((file, known, _with(known, now)), (whole, tokens, kept)):
        if after != before:
            times.store(place, after)


def _stored(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(times.stored(file))
    return {}


def _digest(sparsity: _nybble.Sparsity) -> str:
    """Return what tells these thresholds from others."""
    digest = hashlib.sha256()
    for neurons, *others in sparsity.thresholds():
        digest.update(b"" if neurons is None else neurons.tobytes())
        digest.update(json.dumps(others).encode())
    return digest.hexdigest()[:24]


def _with(known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return times that were found, and those known of what was not looked for this time."""
    before = known.get("inputs") or [None] * len(found["inputs"])
    pairs = zip(found["inputs"], before, strict=True)
    neurons = found["neurons"] or known.get("neurons")
    return {"neurons": neurons, "inputs": [now or earlier for now, earlier in pairs]}
