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
    file = times.path(info, "sparsity")
    known = None
    with contextlib.suppress(OSError, ValueError):
        known = json.dumps(times.stored(file))
    try:
        found = sparsity.probe(model, known)
    except ArgumentError:  # a damaged file
        known, found = None, sparsity.probe(model)
    if known is None and found is not None:
        times.store(file, json.loads(found))
