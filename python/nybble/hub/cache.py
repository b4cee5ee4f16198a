"""The folder where pulled models are kept; a model enters it whole or not at all.

::

    <cache>/models/<name>/nybble-pull.json     what was pulled, from where, with size and hash of
    every file <cache>/models/<name>/...                  the files themselves
    <cache>/models/.<name>.tmp-<pid>-<n>/      a pull under way

``<cache>`` is ``NYBBLE_CACHE``, else ``XDG_CACHE_HOME/nybble``, else ``~/.cache/nybble``. A folder
without its record does not count as pulled.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.hub.errors import PullError

#: Name of the record inside a pulled model's folder.
RECORD = "nybble-pull.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_CHUNK = 1 << 20
_counter = itertools.count()


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Pulled:
    """A model in the cache.

    Parameters
    ----------
    name
        The name it was asked for by.
    folder
        Its folder in the cache.
    entry
        The file to open, for a model that is one file; empty when the folder itself is the model.
    source
        ``"hub"`` or ``"package"``.
    origin
        Repository and commit, or the packages.
    files
        Every file, by name.
    cached
        Whether it had been there before.
    """

    name: str
    folder: Path
    entry: str
    source: str
    origin: str
    files: dict[str, FileRecord]
    cached: bool

    @property
    def path(self) -> Path:
        """What to hand to ``compress``, ``run`` and the others."""
        return self.folder / self.entry if self.entry else self.folder

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Return the description that ``--json`` prints."""
        return {
            "name": self.name,
            "path": str(self.path),
            "source": self.source,
            "origin": self.origin,
            "cached": self.cached,
            "bytes": self.size,
            "files": {
                name: {"bytes": record.size, "sha256": record.sha256}
                for name, record in self.files.items()
            },
        }


def cache_dir() -> Path:
    """Return the cache folder; it need not exist yet."""
    if own := os.environ.get("NYBBLE_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "nybble"
    return Path.home() / ".cache" / "nybble"


def is_name(name: str) -> bool:
    """Whether ``name`` has the form of a short name or of an ``org/name`` id."""
    return _NAME.fullmatch(name) is not None


def folder_of(name: str) -> Path:
    """Return the folder in which a model of that name is kept."""
    if not is_name(name):
        msg = f"{name!r} is not the name of a model: expected a short name or org/name"
        raise PullError(msg)
    return cache_dir() / "models" / name.replace("/", "--")


def find(name: str) -> Pulled | None:
    """Return the pulled model of that name if it is complete, judged by the size of every file."""
    folder = folder_of(name)
    record = _read_record(folder)
    if record is None or record.name != name:
        return None
    for file, expected in record.files.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != expected.size:
            return None
    return record


def damaged(pulled: Pulled, *, progress: bool = False) -> list[str]:
    """Return the files whose hash is not the recorded one."""
    return [
        file
        for file, expected in pulled.files.items()
        if hash_file(pulled.folder / file, progress=progress) != expected.sha256
    ]


def hash_file(path: Path, *, progress: bool = False) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        bar(path.stat().st_size, f"check {path.name}", on=progress) as advance,
    ):
        while block := file.read(_CHUNK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


class _Bar:
    """A byte counter that may or may not be shown."""

    def __init__(self, total: int, label: str, *, on: bool) -> None:
        self._tqdm: Any = None
        if on:
            from tqdm import tqdm

            self._tqdm = tqdm(
                total=total,
                desc=label,
                unit="B",
                unit_scale=True,
                unit_divisor=1000,
                leave=False,
                dynamic_ncols=True,
            )

    def __call__(self, count: int) -> None:
        if self._tqdm is not None:
            self._tqdm.update(count)

    def close(self) -> None:
        if self._tqdm is not None:
            self._tqdm.close()


@contextlib.contextmanager
def bar(total: int, label: str, *, on: bool) -> Iterator[_Bar]:
    """Show a progress bar of bytes on stderr if ``on``; call the value with the bytes done."""
    shown = _Bar(total, label, on=on)
    try:
        yield shown
    finally:
        shown.close()


@contextlib.contextmanager
def staging(name: str, size: int) -> Iterator[Path]:
    """Give a temporary folder beside the final one, with room for ``size`` bytes."""
    final = folder_of(name)
    parent = final.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clean_stale(parent)
        free = shutil.disk_usage(parent).free
        if free < size:
            msg = f"{parent}: {size / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
            raise PullError(msg)
        folder = parent / f".{final.name}.tmp-{os.getpid()}-{next(_counter)}"
        folder.mkdir()
    except OSError as error:
        raise PullError(_os_message(error, parent)) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, pulled: Pulled) -> None:
    """Write the record, make everything durable, and rename the staged folder to its final name."""
    final = pulled.folder
    record = {
        "version": 1,
        "name": pulled.name,
        "entry": pulled.entry,
        "source": pulled.source,
        "origin": pulled.origin,
        "files": {n: {"size": r.size, "sha256": r.sha256} for n, r in pulled.files.items()},
    }
    try:
        # The record comes last: a folder without it is unfinished.
        (staged / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _sync(staged / name for name in (*pulled.files, RECORD, "."))
        if final.exists():
            # Damaged or being replaced: out of the way in one step, so that no half-removed folder
            # has the name.
            old = staged.with_name(f"{staged.name}-old")
            final.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        staged.rename(final)
        _sync([final.parent])
    except OSError as error:
        raise PullError(_os_message(error, final)) from error


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _os_message(error: OSError, path: Path) -> str:
    return f"{error.filename or path}: {error.strerror or error}"


def _clean_stale(parent: Path) -> None:
    """Remove what pulls of processes that no longer run left behind."""
    for path in parent.glob(".*.tmp-*"):
        match = re.search(r"\.tmp-(\d+)-\d+(?:-old)?$", path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _read_record(folder: Path) -> Pulled | None:
    """Read a folder's record; one that is not well formed counts as absent."""
    try:
        data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = {
            str(name): FileRecord(int(entry["size"]), str(entry["sha256"]))
            for name, entry in data["files"].items()
        }
        entry = str(data["entry"])
        pulled = Pulled(
            name=str(data["name"]),
            folder=folder,
            entry=entry,
            source=str(data["source"]),
            origin=str(data["origin"]),
            files=files,
            cached=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    named = [*files, *([entry] if entry else [])]
    if not files or any(Path(name).name != name for name in named):
        return None
    return pulled
