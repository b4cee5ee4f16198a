"""Image files to the numbers an encoder reads, as transformers' image processors make them.

:func:`open_image` decodes with Pillow and refuses what is no single picture of a sane size.
:class:`ImageProcessor` is what ``preprocessor_config.json`` says: resize, crop, rescale, normalise,
with the arithmetic of the Pillow variants of transformers' processors, to the bit. (Its torchvision
variants, the default where torchvision is installed, resize a little differently.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from math import ceil
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from nybble.errors import (
    ArgumentError,
    ConfigError,
    FileError,
    FormatError,
    MissingFileError,
    NybbleError,
    UnsupportedError,
)
from nybble.runtime.files import read_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image as PilImage

    Picture: TypeAlias = "str | PathLike[str] | PilImage | npt.NDArray[np.uint8]"

__all__ = ["FILE", "MAX_PIXELS", "ImageProcessor", "decode", "open_image"]

FILE = "preprocessor_config.json"
MAX_PIXELS = 89_478_485
"""Most pixels of an image: Pillow's own limit, a quarter of a GiB of RGB."""

_MAX_CONFIG = 1 << 20
_MAX_SIDE = 1 << 14
#: Modes whose pixels are more than 8 bits and would be cut off at 255.
_DEEP = ("I", "F")


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        message = "decoding images needs Pillow: pip install 'nybble[vision]'"
        raise UnsupportedError(message) from None
    return PIL


def open_image(image: Picture) -> PilImage:
    """Return an image in RGB.

    Parameters
    ----------
    image
        A file's path; a Pillow image; or an array of 8-bit values, ``[height, width, 3]`` or, for
        grey, ``[height, width]``.

    Returns
    -------
    PIL.Image.Image
        In RGB. A file is turned the way its EXIF data say. Transparency is laid over white, as
        transformers does. CMYK is converted without colour profiles, as Pillow does.

    Raises
    ------
    FormatError
        For a file that is damaged, no image, an animation or of several pages, or larger than
        :data:`MAX_PIXELS`.
    ArgumentError
        For an array of another type or shape, or anything else.
    UnsupportedError
        For more than 8 bits a channel, or without Pillow.
    """
    pillow = _pillow()
    if isinstance(image, pillow.Image.Image):
        return _rgb(image, "image")
    if isinstance(image, (str, PathLike)):
        path = Path(fspath(image))
        return _from_file(path, str(path))
    import numpy as np

    if not isinstance(image, np.ndarray):
        message = (
            f"image: expected a path, a Pillow image or an array, found {type(image).__name__}"
        )
        raise ArgumentError(message)
    grey = image.ndim == 2
    if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and image.shape[2] == 3)):
        message = (
            "image: expected 8-bit values of shape [height, width, 3] or [height, width], "
            f"found {image.dtype} {list(image.shape)}"
        )
        raise ArgumentError(message)
    if image.size == 0:
        message = f"image: expected at least one pixel, found shape {list(image.shape)}"
        raise ArgumentError(message)
    return _rgb(pillow.Image.fromarray(np.ascontiguousarray(image)), "image")


def decode(data: bytes, name: str) -> PilImage:
    """Return the image in the bytes of a file, as :func:`open_image` does.

    Parameters
    ----------
    data
        What the file holds.
    name
        What messages call it.
    """
    return _from_file(BytesIO(data), name)


def _from_file(file: Path | BytesIO, where: str) -> PilImage:
    pillow = _pillow()
    with warnings.catch_warnings():
        # Of sizes, which are looked at below before any pixel is decoded, and of oddities in
        # metadata, which either do no harm or end in an error.
        warnings.simplefilter("ignore")
        try:
            opened = pillow.Image.open(file)
        except FileNotFoundError as error:
            raise MissingFileError(error.errno, error.strerror, where) from None
        except pillow.UnidentifiedImageError:
            message = f"{where}: expected an image that Pillow reads, found something else"
            raise FormatError(message) from None
        except pillow.Image.DecompressionBombError:
            message = f"{where}: expected at most {MAX_PIXELS} pixels, found far more"
            raise FormatError(message) from None
        except MemoryError:
            raise
        except Exception as error:  # decoders raise many kinds of them
            if isinstance(error, OSError) and error.errno is not None:
                raise FileError(error.errno, error.strerror, where) from None
            raise _broken(where, error) from None
        with opened:
            _check_size(opened.size, where)
            try:
                frames = getattr(opened, "n_frames", 1)
                # A camera's MPO is one picture, with a second view or a preview behind it.
                if frames == 1 or opened.format == "MPO":
                    opened.load()
                    return _rgb(pillow.ImageOps.exif_transpose(opened), where)
            except (NybbleError, MemoryError):
                raise
            except Exception as error:  # decoders raise many kinds of them
                raise _broken(where, error) from None
    message = (
        f"{where}: expected one image, found {frames} frames or pages; "
        "open the one that is meant with Pillow and pass that"
    )
    raise FormatError(message)


def _broken(where: str, error: Exception) -> FormatError:
    return FormatError(f"{where}: expected a whole image, found a damaged one ({error})")


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if not 0 < width * height <= MAX_PIXELS:
        message = f"{where}: expected 1 to {MAX_PIXELS} pixels, found {width} x {height}"
        raise FormatError(message)


def _rgb(image: PilImage, where: str) -> PilImage:
    pillow = _pillow()
    _check_size(image.size, where)
    if image.mode.split(";")[0] in _DEEP:
        message = (
            f"{where}: pixels of mode {image.mode} are not supported: scale them to 8 bits a "
            "channel, as the model expects them"
        )
        raise UnsupportedError(message)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = pillow.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.Image.alpha_composite(white, image)
    converted: PilImage = image.convert("RGB")
    return converted


@dataclass(frozen=True)
class ImageProcessor:
    """How pixels are prepared; each step is left out where its field is ``None``.

    Parameters
    ----------
    resize
        Height and width, or one number for the shorter side.
    resample
        Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5
        Hamming.
    crop
        Height and width of the middle that is kept; what is missing is black.
    rescale
        Factor on values from 0 to 255.
    mean, std
        Of each channel: ``(value - mean) / std``.
    """

    resize: int | tuple[int, int] | None = (224, 224)
    resample: int = 2
    crop: tuple[int, int] | None = None
    rescale: float | None = 1 / 255
    mean: tuple[float, float, float] | None = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] | None = (0.5, 0.5, 0.5)

    @classmethod
    def from_folder(cls, folder: Path) -> ImageProcessor:
        """Read a model folder's ``preprocessor_config.json``.

        Raises
        ------
        MissingFileError
            When there is none.
        ConfigError
            When it says something that is not understood.
        """
        path = folder / FILE
        return cls.from_config(read_json(path, _MAX_CONFIG), str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = FILE) -> ImageProcessor:
        """Read the settings of an image processor of transformers.

        Parameters
        ----------
        config
            Its configuration: ``size``, ``image_mean`` and so on.
        where
            What messages call it.
        """
        read = _Settings(config, where)
        processor = cls(
            resize=read.resize() if read.flag("do_resize") else None,
            resample=read.number("resample", 2, range(6)),
            crop=read.crop() if read.flag("do_center_crop", default=False) else None,
            rescale=read.factor() if read.flag("do_rescale") else None,
            mean=read.channels("image_mean") if read.flag("do_normalize") else None,
            std=read.channels("image_std") if read.flag("do_normalize") else None,
        )
        if read.flag("do_pad", default=False):
            read.problem("do_pad", "false", "true")
        if processor.std is not None and not all(processor.std):
            read.problem("image_std", "numbers other than 0", processor.std)
        return processor

    def at(self, height: int, width: int) -> ImageProcessor:
        """Return the same for results of another size; a margin that is cropped grows with it."""
        if self.crop is None:
            return replace(self, resize=(height, width))
        crop, resize = self.crop, self.resize
        if isinstance(resize, int):
            resize = max(round(resize * height / crop[0]), round(resize * width / crop[1]))
        elif resize is not None:
            resize = (round(resize[0] * height / crop[0]), round(resize[1] * width / crop[1]))
        return replace(self, resize=resize, crop=(height, width))

    def __call__(self, image: Picture) -> npt.NDArray[np.float32]:
        """Prepare one image.

        Returns
        -------
        Values of shape ``[3, height, width]``.

        Raises
        ------
        NybbleError
            As :func:`open_image` does.
        """
        import numpy as np

        picture = open_image(image)
        if self.resize is not None:
            height, width = self._resized(picture.height, picture.width)
            _check_size((width, height), "image, resized")
            picture = picture.resize((width, height), resample=self.resample)
        pixels = np.asarray(picture)
        if self.crop is not None:
            pixels = _cropped(pixels, self.crop)
        # All that follows is a function of one byte.
        table = np.arange(256, dtype=np.float64)[:, None].repeat(3, axis=1)
        if self.rescale is not None:
            table *= self.rescale
        values = table.astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(numbers, np.float32) for numbers in (self.mean, self.std))
            values = ((values - mean) / std).astype(np.float32, copy=False)
        planes = [values[:, channel][pixels[..., channel]] for channel in range(3)]
        return np.stack(planes).astype(np.float32, copy=False)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize
        short = int(self.resize or 1)
        if width <= height:
            return int(short * height / width), short
        return short, int(short * width / height)


def _cropped(pixels: npt.NDArray[np.uint8], crop: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return the middle; where the image is smaller, with black around it."""
    import numpy as np

    short = [max(0, wanted - found) for wanted, found in zip(crop, pixels.shape, strict=False)]
    if any(short):
        # Odd rests go before the image here and behind it below, as in transformers.
        sides = [(ceil(rest / 2), rest // 2) for rest in short]
        pixels = np.pad(pixels, [*sides, (0, 0)])
    top, left = ((found - wanted) // 2 for wanted, found in zip(crop, pixels.shape, strict=False))
    return pixels[top : top + crop[0], left : left + crop[1]]


class _Settings:
    """Reads a processor's configuration."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def problem(self, key: str, expected: str, found: object) -> NoReturn:
        message = f"{self.where}: {key}: expected {expected}, found {found!r:.80}"
        raise ConfigError(message)

    def flag(self, key: str, *, default: bool = True) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(key, "true or false", value)
        return bool(value)

    def number(self, key: str, default: int, accepted: range) -> int:
        value = self.config.get(key)
        if value is None:
            return default
        if type(value) is not int or value not in accepted:
            self.problem(key, f"{accepted.start} to {accepted.stop - 1}", value)
        return int(value)

    def side(self, key: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= _MAX_SIDE:
            self.problem(key, f"a side from 1 to {_MAX_SIDE}", value)
        return value

    def _sides(self, key: str, *, square: bool) -> int | tuple[int, int]:
        value = self.config.get(key)
        if isinstance(value, Mapping):
            value = {name: side for name, side in value.items() if side is not None}
            if set(value) == {"height", "width"}:
                return self.side(key, value["height"]), self.side(key, value["width"])
            if set(value) == {"shortest_edge"}:
                return self.side(key, value["shortest_edge"])
        elif type(value) is int:
            side = self.side(key, value)
            return (side, side) if square else side
        self.problem(key, "height and width, or shortest_edge", value)

    def resize(self) -> int | tuple[int, int]:
        # One number is the shorter side for processors that crop, as CLIP's oldest files have it.
        return self._sides("size", square=not self.flag("do_center_crop", default=False))

    def crop(self) -> tuple[int, int]:
        sides = self._sides("crop_size", square=True)
        if isinstance(sides, int):
            self.problem("crop_size", "height and width", self.config.get("crop_size"))
        return sides

    def factor(self) -> float:
        value = self.config.get("rescale_factor", 1 / 255)
        if not _is_number(value) or value <= 0:
            self.problem("rescale_factor", "a positive number", value)
        return float(value)

    def channels(self, key: str) -> tuple[float, float, float]:
        value = self.config.get(key)
        if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
            self.problem(key, "three numbers", value)
        red, green, blue = map(float, value)
        return red, green, blue


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6
