"""Evaluation text from a file: plain, gzipped, or JSON lines.

``.jsonl`` files have one object a line; of texts it is ``{"text": row}``, and the rows are joined
with two newlines, which is how WikiText's perplexity is usually taken. A final ``.gz`` means gzip
for either kind.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nybble.errors import ArgumentError, FileError, FormatError, MissingFileError

#: Most characters that are read: a small compressed file can hold any amount.
MAX_CHARS = 1 << 30

_BLOCK = 1 << 20


def read_text(path: str | Path) -> str:
    """Return the text of a ``.txt``, ``.jsonl``, ``.txt.gz`` or ``.jsonl.gz`` file.

    Parameters
    ----------
    path
        The file. Any ending other than ``.jsonl`` and ``.gz`` is read as plain text.

    Raises
    ------
    FormatError
        If it is not UTF-8, not gzip, or a line is not an object with a text; the line is named.
    ArgumentError
        If it holds more than :data:`MAX_CHARS` characters.
    """
    path = Path(path)
    if _is_lines(path):
        return "\n\n".join(_text(path, number, row) for number, row in read_rows(path))
    parts: list[str] = []
    total = 0
    with _reading(path) as file:
        while block := file.read(_BLOCK):
            total += len(block)
            _check_size(path, total)
            parts.append(block)
    return "".join(parts)


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give the objects of a ``.jsonl`` or ``.jsonl.gz`` file with the numbers of their lines.

    Empty lines are passed over; lines count from 1. Nothing is read behind the last row asked for.

    Raises
    ------
    FormatError
        If it is not UTF-8, not gzip, or a line is not a JSON object; the line is named.
    ArgumentError
        If it holds more than :data:`MAX_CHARS` characters.
    """
    path = Path(path)
    number = total = 0
    with _reading(path) as file:
        # One line can be as long as the file: the limit keeps a damaged one out of the memory.
        while line := file.readline(MAX_CHARS):
            number += 1
            total += len(line)
            _check_size(path, total)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                msg = f"{path}: line {number}: expected a JSON object, found: {error}"
                raise FormatError(msg) from error
            if not isinstance(row, dict):
                found = type(row).__name__
                msg = f"{path}: line {number}: expected a JSON object, found {found}"
                raise FormatError(msg)
            yield number, row


def _text(path: Path, number: int, row: dict[str, Any]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        msg = f'{path}: line {number}: expected {{"text": "..."}}, found keys {sorted(row)}'
        raise FormatError(msg)
    return text


def _check_size(path: Path, chars: int) -> None:
    if chars > MAX_CHARS:
        msg = f"{path}: expected at most {MAX_CHARS} characters, found more"
        raise ArgumentError(msg)


def _is_lines(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1:] == [".jsonl"]


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """Open a file for reading; what goes wrong in the block is told with its name."""
    try:
        with _open(path) as file:
            yield file
    except UnicodeDecodeError as error:
        msg = f"{path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}"
        raise FormatError(msg) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        msg = f"{path}: expected gzip data, found: {error}"
        raise FormatError(msg) from error
    except FileNotFoundError as error:
        msg = f"{path}: no such file"
        raise MissingFileError(msg) from error
    except OSError as error:
        msg = f"{path}: {error.strerror or error}"
        raise FileError(msg) from error


def _open(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
