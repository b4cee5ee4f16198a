"""The files beside the weights: which belong to a model, and how they get into the new folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nybble.errors import FileError, FormatError
from nybble.runtime.files import read_json
from nybble.runtime.tokenizer import Tokenizer, from_gguf

__all__ = ["copy_companions", "digest", "rebuild_companions", "weight_files", "write_text"]

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files copied as they are. No other name is ever taken from a model's folder."""

_MAX_JSON = 256 << 20
_PIECE = 8 << 20


def weight_files(source: Path) -> list[Path]:
    """Return the files that hold a model's weights, and its configuration."""
    if not source.is_dir():
        return [source]
    index = source / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        table = read_json(index, _MAX_JSON).get("weight_map", {})
        names = sorted({Path(str(name)).name for name in table.values()})
    return [source / name for name in (*names, "config.json")]


def digest(path: Path, stop: Callable[[], bool]) -> str:
    """Return the SHA-256 of a file; an empty text when `stop` says to give up."""
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                if stop():
                    return ""
                total.update(piece)
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(path)) from None
    return total.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file; an error names it."""
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(path)) from None


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the settings beside the weights; return the names of what was there."""
    copied = []
    for name in COMPANIONS:
        file = _contained(source, name)
        if file is None:
            continue
        try:
            shutil.copyfile(file, target / name)
        except OSError as error:
            where = error.filename2 or error.filename or str(target / name)
            raise FileError(error.errno, error.strerror, str(where)) from None
        copied.append(name)
    return copied


def _contained(folder: Path, name: str) -> Path | None:
    """Return a regular file of the folder, a link only if it stays inside.

    In the hub's cache a folder is ``<repository>/snapshots/<revision>`` and its files are links
    into ``<repository>/blobs``; those are inside as well.
    """
    file = folder / name
    if not file.is_file():
        return None
    if not file.is_symlink():
        return file
    root, real = folder.resolve(), file.resolve()
    inside = [root]
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
        inside.append(blobs)
    if not any(real.is_relative_to(place) for place in inside):
        message = f"{file}: expected a file of the folder, found a link to {real}"
        raise FormatError(message)
    return real


def rebuild_companions(
    metadata: dict[str, Any], config: dict[str, Any], where: str, target: Path
) -> list[str]:
    """Write the tokenizer of a GGUF file, and generation settings out of its configuration."""
    tokenizer = from_gguf(metadata, where)
    try:
        names = tokenizer.save(target)
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(error.filename or target)) from None
    write_text(
        target / "generation_config.json",
        json.dumps(_generation(tokenizer, config), indent=2) + "\n",
    )
    return [*names, "generation_config.json"]


def _generation(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    ends = sorted(tokenizer.end_ids)
    settings = {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }
    return {name: value for name, value in settings.items() if value is not None}
