"""Reads a model a few rows at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nybble import _nybble
from nybble.compress.plan import Item, Shapes
from nybble.errors import UnsupportedError
from nybble.quant.base import Floats

__all__ = ["Source"]

_MAPPED = 1 << 30
"""Bytes read before the files are opened anew. Pages of a mapped file count as this process's
memory once they were touched, and nothing else gives those of a whole model back."""


class Source:
    """An open checkpoint.

    Parameters
    ----------
    path
        A Hugging Face folder or a GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        self._checkpoint = _nybble.Checkpoint.open(str(path))
        self.kind = self._checkpoint.kind
        self.config: dict[str, Any] = json.loads(self._checkpoint.config())
        if self.config.get("quantization_config"):
            message = f"{path}: a quantized model is not supported: compress the original"
            raise UnsupportedError(message)
        self.tensors: Shapes = self._checkpoint.tensors()

    def plan(self) -> dict[str, Any]:
        """Return what there is to compress and what the model needs."""
        plan: dict[str, Any] = json.loads(self._checkpoint.plan())
        return plan

    def gguf_metadata(self) -> dict[str, Any]:
        """Return a GGUF file's metadata."""
        return self._checkpoint.gguf_metadata()

    def rows(self, item: Item, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` of an item, in the shape in which it is written."""
        if not item.transposed:
            return self._rows(item.tensor, start, stop)
        # The file has inputs as rows. All of them are read, in pieces, for a few of the outputs.
        _, inputs = item.shape
        step = max(1, (8 << 20) // max(1, item.shape[0]))
        out = np.empty((stop - start, inputs), dtype=np.float32)
        for first in range(0, inputs, step):
            last = min(first + step, inputs)
            out[:, first:last] = self._rows(item.tensor, first, last)[:, start:stop].T
        return out

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Return rows of a tensor as it is stored; one of one dimension is one row."""
        return self._rows(name, start, stop)

    def _rows(self, tensor: str, start: int, stop: int | None) -> Floats:
        if self._read > _MAPPED:
            self._checkpoint = _nybble.Checkpoint.open(str(self.path))
            self._read = 0
        rows = self._checkpoint.read(tensor, start, stop)
        self._read += rows.nbytes
        return rows
