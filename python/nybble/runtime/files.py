"""Reads the small text files beside the weights, with a limit on their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nybble.errors import FileError, FormatError, MissingFileError

__all__ = ["MAX_CONFIG", "read_json", "read_text"]

MAX_CONFIG = 16 << 20
"""Most bytes of a configuration file."""


def read_text(path: Path, limit: int) -> str:
    """Return the text of a file of at most `limit` bytes.

    Raises
    ------
    FormatError
        When the file is larger, or is not UTF-8.
    FileError
        When it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise MissingFileError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(path)) from None
    if len(data) > limit:
        message = f"{path}: expected at most {limit} bytes, found more"
        raise FormatError(message)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        message = f"{path}: expected UTF-8 text, found other bytes at {error.start}"
        raise FormatError(message) from None


def read_json(path: Path, limit: int, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes.

    Parameters
    ----------
    path
        The file.
    limit
        Most bytes it may have.
    missing
        What to return when there is no such file; without it that is an error.

    Raises
    ------
    FormatError
        When the file is not JSON, or no object.
    FileError
        When it cannot be read.
    """
    if missing is not None and not path.exists():
        return dict(missing)
    try:
        value = json.loads(read_text(path, limit))
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        message = f"{path}: expected JSON: {error}"
        raise FormatError(message) from None
    if not isinstance(value, dict):
        message = f"{path}: expected a JSON object, found {type(value).__name__}"
        raise FormatError(message)
    return value
