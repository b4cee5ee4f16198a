"""What several tokens in one pass cost, measured once for a model's shape on a machine and kept.

The file is a convenience: where it cannot be written, or is damaged, the measurement (well below a
second for small models) is made again in the next process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["differ", "path", "read", "store", "stored", "write"]

_MAX_BYTES = 1 << 16
_NOTABLE = 0.05


def _folder() -> Path:
    from nybble.hub.cache import cache_dir

    return cache_dir() / "times"


def path(info: Mapping[str, Any], kind: str = "rows") -> Path:
    """Return the file of a model's shape: all that its speed depends on, and nothing else.

    Parameters
    ----------
    info
        What the model says of itself.
    kind
        What is measured.
    """
    from nybble import __version__
    from nybble.bench.machine import cpu_name

    names = ("layers", "hidden", "heads", "kv_heads", "vocab", "parameters", "weight_bytes")
    shape = {name: info[name] for name in (*names, "kv_type", "kernels", "threads")}
    named = [] if kind == "rows" else [kind]
    key = json.dumps([__version__, cpu_name(), shape, *named], sort_keys=True)
    return _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def read(info: Mapping[str, Any]) -> list[tuple[int, float]] | None:
    """Return rows and seconds measured earlier, if there are any.

    Parameters
    ----------
    info
        What the model says of itself.
    """
    try:
        points = stored(path(info))["rows"]
        return [(int(rows), float(seconds)) for rows, seconds in points]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def differ(kept: list[tuple[int, float]] | None, found: list[tuple[int, float]]) -> bool:
    """Tell whether what is kept should be replaced: other rows, or other costs beside one row's.

    Parameters
    ----------
    kept, found
        Rows and seconds; `kept` is ``None`` where nothing is.
    """
    if kept is None or [rows for rows, _ in kept] != [rows for rows, _ in found]:
        return True
    return any(
        abs(now / found[0][1] - before / kept[0][1]) > _NOTABLE * before / kept[0][1]
        for (_, before), (_, now) in zip(kept, found, strict=True)
    )


def write(info: Mapping[str, Any], times: list[tuple[int, float]]) -> None:
    """Keep rows and seconds for later processes, if the cache folder can be written.

    Parameters
    ----------
    info
        What the model says of itself.
    times
        Rows computed together, and seconds.
    """
    store(path(info), {"rows": times})


def stored(file: Path) -> Any:
    """Return what a file of times holds.

    Raises
    ------
    OSError, ValueError
        When it cannot be read.
    """
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(file)
    return json.loads(file.read_text(encoding="utf-8"))


def store(file: Path, times: object) -> None:
    """Write a file of times, if the cache folder can be written."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as part:
                json.dump(times, part)
            Path(name).replace(file)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
