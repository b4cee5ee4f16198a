"""Evaluation text from a file: plain, gzipped, or JSON lines.

``.jsonl`` files have one object ``{"text": row}`` a line; the rows are joined with two newlines,
which is how WikiText's perplexity is usually taken. A final ``.gz`` means gzip for either kind.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

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
    parts: list[str] = []
    total = 0
    separator = "\n\n" if _is_lines(path) else ""
    try:
        with _open(path) as file:
            for part in _rows(file, path) if separator else _blocks(file):
                total += len(part) + len(separator)
                if total > MAX_CHARS:
                    msg = f"{path}: expected at most {MAX_CHARS} characters, found more"
                    raise ArgumentError(msg)
                parts.append(part)
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
    return separator.join(parts)


def _is_lines(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1:] == [".jsonl"]


def _open(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _blocks(file: TextIO) -> Iterator[str]:
    while block := file.read(_BLOCK):
        yield block


def _rows(file: TextIO, path: Path) -> Iterator[str]:
    number = 0
    # One line can be as long as the file: the limit keeps a damaged one from filling the memory.
    while line := file.readline(MAX_CHARS):
        number += 1
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            msg = f"{path}: line {number}: expected a JSON object, found: {error}"
            raise FormatError(msg) from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
            msg = f'{path}: line {number}: expected {{"text": "..."}}, found {found}'
            raise FormatError(msg)
        yield text
