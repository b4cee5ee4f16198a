"""Calibration images: drawn by a seed from files, folders and zip archives.

Only the images that are drawn are decoded. They are prepared as the run-time prepares them
(:mod:`nybble.runtime.images`), which is as transformers does.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.errors import ArgumentError, FileError, FormatError, MissingFileError
from nybble.runtime.images import ImageProcessor, decode

__all__ = ["ENDINGS", "ImageSet", "draw", "is_images"]

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Ends of the names of image files in folders and archives; other files there are passed over."""

_MAX_FILE = 1 << 28  # bytes of one image file

Floats = npt.NDArray[np.float32]
_Found = tuple[str, Callable[[], bytes]]


@dataclass(frozen=True)
class ImageSet:
    """The images an encoder is calibrated with.

    Parameters
    ----------
    windows
        Prepared images ``[images, channels, height, width]``.
    files
        Names (not paths) of the files and the SHA-256 of what is in them.
    seed
        What decided the images.
    """

    windows: Floats
    files: dict[str, str]
    seed: int

    @property
    def digest(self) -> str:
        """SHA-256 of the prepared images: the set's identity."""
        shape = f"{self.windows.shape}".encode()
        return hashlib.sha256(shape + self.windows.astype("<f4").tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return what a report says about it."""
        images, _, height, width = self.windows.shape
        return {
            "sha256": self.digest,
            "images": images,
            "size": [height, width],
            "seed": self.seed,
            "files": self.files,
        }


def is_images(path: Path) -> bool:
    """Say whether a path is of images and not of text: a folder, an archive, or an image file."""
    return path.is_dir() or path.suffix.lower() in (*ENDINGS, ".zip")


def draw(
    paths: Sequence[Path], processor: ImageProcessor, *, images: int, seed: int, patch: int = 1
) -> ImageSet:
    """Draw images.

    Parameters
    ----------
    paths
        Image files; folders, which are searched with all folders in them; zip archives.
    processor
        How they are prepared.
    images
        How many.
    seed
        Which.
    patch
        What divides their sides once they are prepared.

    Raises
    ------
    ArgumentError
        When a path is of something else, there are fewer images, or they cannot be encoded
        together.
    FormatError
        When an archive or a drawn image is damaged.
    FileError
        When the system refuses to read one.
    """
    for name, value, least in (("images", images, 1), ("seed", seed, 0)):
        if value < least:
            message = f"calibration {name}: expected at least {least}, found {value}"
            raise ArgumentError(message)
    found = [one for path in paths for one in _found(path)]
    names = ", ".join(str(path) for path in paths)
    if len(found) < images:
        message = f"{names}: expected {images} images to calibrate with, found {len(found)}"
        raise ArgumentError(message)
    drawn = np.random.default_rng(seed).permutation(len(found))[:images]
    files, prepared = {}, []
    for index in np.sort(drawn):
        name, read = found[index]
        data = read()
        files[name] = hashlib.sha256(data).hexdigest()
        prepared.append(processor(decode(data, name)))
        shape, first = prepared[-1].shape[1:], prepared[0].shape[1:]
        if shape != first or any(side % patch for side in shape):
            message = f"{name}: expected an image that is prepared to the size of the others, in "
            message += f"patches of {patch}; found {shape[0]} x {shape[1]}, the first "
            message += f"{first[0]} x {first[1]}"
            raise ArgumentError(message)
    return ImageSet(np.stack(prepared), files, seed)


def _found(path: Path) -> list[_Found]:
    """Return names of images in a path, and how to read them."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        chosen = [file for file in inside if _is_image(file)]
        if not chosen:
            message = f"{path}: expected a folder with images ({', '.join(ENDINGS)}), found "
            message += f"{len(inside)} files and no image among them"
            raise ArgumentError(message)
        return [(f"{path.name}/{f.relative_to(path).as_posix()}", _reader(f)) for f in chosen]
    if path.suffix.lower() == ".zip":
        return _archived(path)
    if not path.exists():
        message = f"{path}: no such file"
        raise MissingFileError(message)
    if not _is_image(path):
        message = f"{path}: expected images for an image encoder (files, a folder or a zip archive "
        message += f"of them), found a file that ends in {path.suffix or 'nothing'}"
        raise ArgumentError(message)
    return [(path.name, _reader(path))]


def _is_image(path: Path | PurePosixPath) -> bool:
    # What begins with a dot is not a picture, but what some systems write beside one.
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            size = path.stat().st_size
            if size > _MAX_FILE:
                raise _large(path, size)
            return path.read_bytes()
        except OSError as error:
            raise FileError(error.errno, error.strerror, str(path)) from None

    return read


def _archived(path: Path) -> list[_Found]:
    def read(name: str) -> bytes:
        try:
            with zipfile.ZipFile(path) as archive:
                size = archive.getinfo(name).file_size
                if size > _MAX_FILE:
                    raise _large(path / name, size)
                return archive.read(name)  # at most the size that was just looked at
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            message = f"{path}: {name}: expected a whole file, found a damaged one ({error})"
            raise FormatError(message) from None
        except RuntimeError as error:
            message = f"{path}: {name}: expected a file without a password ({error})"
            raise FormatError(message) from None
        except OSError as error:
            raise FileError(error.errno, error.strerror, str(path)) from None

    try:
        with zipfile.ZipFile(path) as archive:
            inside = sorted({entry.filename for entry in archive.infolist() if not entry.is_dir()})
    except FileNotFoundError as error:
        raise MissingFileError(error.errno, error.strerror, str(path)) from None
    except zipfile.BadZipFile:
        message = f"{path}: expected a zip archive, found something else"
        raise FormatError(message) from None
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(path)) from None
    chosen = [name for name in inside if _is_image(PurePosixPath(name))]
    if not chosen:
        message = f"{path}: expected an archive with images ({', '.join(ENDINGS)}), found "
        message += f"{len(inside)} files and no image among them"
        raise ArgumentError(message)
    return [(f"{path.name}/{name}", lambda name=name: read(name)) for name in chosen]  # type: ignore[misc]


def _large(where: Path, size: int) -> FormatError:
    return FormatError(f"{where}: expected at most {_MAX_FILE} bytes, found {size}")
