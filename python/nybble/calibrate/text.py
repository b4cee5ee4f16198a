"""Calibration text: windows of tokens, drawn from files by a seed.

Files are read as :func:`nybble.eval.text.read_text` reads them. The text is cut into pieces of some
thousand characters; pieces are encoded in an order that the seed decides, and each gives one window
of ``context`` tokens from its beginning. Where that is not enough pieces give what else they hold.
No token is taken twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.errors import ArgumentError
from nybble.eval.text import read_text

__all__ = ["CalibrationSet", "draw"]

_CHARS_PER_TOKEN = 8  # more than nearly any text has, so that a piece holds a window


@dataclass(frozen=True)
class CalibrationSet:
    """The tokens a model is calibrated with.

    Parameters
    ----------
    windows
        Token ids ``[windows, context]``.
    files
        Names (not paths) of the files and the SHA-256 of their text.
    seed
        What decided the windows.
    """

    windows: npt.NDArray[np.int64]
    files: dict[str, str]
    seed: int

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids: the set's identity."""
        shape = f"{self.windows.shape}".encode()
        return hashlib.sha256(shape + self.windows.astype("<i8").tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return what a report says about it."""
        count, context = self.windows.shape
        return {
            "sha256": self.digest,
            "tokens": count * context,
            "windows": count,
            "context": context,
            "seed": self.seed,
            "files": self.files,
        }


def draw(
    paths: Sequence[Path], tokenizer: Any, *, tokens: int, context: int, seed: int
) -> CalibrationSet:
    """Draw windows from text files.

    Parameters
    ----------
    paths
        Files of text.
    tokenizer
        A :class:`nybble.runtime.tokenizer.Tokenizer`.
    tokens
        How many tokens are wanted. Rounded up to whole windows; if the files hold fewer, all of
        them are used.
    context
        Tokens a window.
    seed
        Which windows.

    Raises
    ------
    ArgumentError
        When a number is out of its range, or the text does not fill a single window.
    FormatError
        When a file is not text.
    """
    for name, value, least in (("tokens", tokens, 1), ("context", context, 2), ("seed", seed, 0)):
        if value < least:
            message = f"calibration {name}: expected at least {least}, found {value}"
            raise ArgumentError(message)
    if not paths:
        message = "calibration: expected a text file, found none"
        raise ArgumentError(message)
    texts = {str(path): read_text(path) for path in paths}
    files = {
        Path(name).name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()
    }
    size = _CHARS_PER_TOKEN * context
    pieces = [
        text[start : start + size] for text in texts.values() for start in range(0, len(text), size)
    ]
    wanted = -(-tokens // context)
    order = np.random.default_rng(seed).permutation(len(pieces))
    first: list[list[int]] = []
    spare: list[list[int]] = []
    found = 0
    for index in order:
        ids = tokenizer.encode(pieces[index], add_special_tokens=False)
        found = max(found, len(ids))
        whole = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
        first += whole[:1]
        spare += whole[1:]
        if len(first) == wanted:
            break
    windows = (first + spare)[:wanted]
    if not windows:
        names = ", ".join(str(path) for path in paths)
        message = f"{names}: expected text of at least {context} tokens, found {found}"
        raise ArgumentError(message)
    return CalibrationSet(np.array(windows, dtype=np.int64), files, seed)
