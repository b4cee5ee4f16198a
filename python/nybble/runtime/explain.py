"""Draw which patches of an image survive each pruning layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from nybble.runtime.encoder import ImageEncoder
    from nybble.runtime.images import Picture
    from nybble.tokens import PatchMethod

__all__ = ["Stage", "explain", "stages"]

_SIDE = 320
"""Least width of a panel in pixels."""
_COLUMNS = 4
_CAPTION = 22
_GAP = 8
_GONE = ((0.86, 0.24, 0.5), 0.8)
"""The colour that patches get which left, and how much of it: one that pictures seldom have."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is left behind a pruning layer.

    Parameters
    ----------
    layer
        The layer, counted from 0.
    tokens
        Tokens left, without learned ones.
    owners
        For each patch, row by row, the token that holds it; -1 for one that left.
    """

    layer: int
    tokens: int
    owners: npt.NDArray[np.int64]


def stages(
    model: ImageEncoder, pixels: npt.NDArray[np.float32], tokens: PatchMethod
) -> list[Stage]:
    """Return what is left of an image behind each pruning layer.

    Parameters
    ----------
    model
        The encoder.
    pixels
        One prepared image, ``[1, channels, height, width]``.
    tokens
        The method. It is run once for each of its layers, with those up to it.

    Raises
    ------
    NybbleError
        For a method that does not fit the model.
    """
    import numpy as np

    fields: Any = dataclasses.fields(tokens)  # type: ignore[arg-type]  # every method has some
    lists = {field.name: getattr(tokens, field.name) for field in fields}
    lists = {
        name: value
        for name, value in lists.items()
        if name in ("layers", "keep", "similar", "r") and isinstance(value, (list, tuple))
    }
    found = []
    for number, layer in enumerate(tokens.layers, 1):
        part: Any = dataclasses.replace(
            tokens,  # type: ignore[type-var]
            **{name: value[:number] for name, value in lists.items()},
        )
        done = model.encode(pixels, tokens=part)
        assert done.owners is not None  # as of every call with tokens
        owners = done.owners[0].astype(np.int64)
        owners[owners == np.iinfo(np.uint32).max] = -1
        left = done.tokens.shape[1] - int(model.info["learned_tokens"])
        found.append(Stage(layer, left, owners))
    return found


def explain(
    model: ImageEncoder,
    image: Picture,
    tokens: PatchMethod,
    *,
    size: int | tuple[int, int] | None = None,
) -> tuple[Image.Image, list[Stage]]:
    """Return a picture of the image and of what each pruning layer leaves, and those stages.

    Patches that left are red. Patches that were merged into one token have their common mean
    colour.

    Parameters
    ----------
    model
        The encoder.
    image
        The image.
    tokens
        The method.
    size
        As for :meth:`ImageEncoder.preprocess`.

    Raises
    ------
    NybbleError
        For an image that cannot be read and a method that does not fit the model.
    """
    import numpy as np
    from PIL import Image

    pixels = model.preprocess(image, size)
    plain = dataclasses.replace(model.processor_for(size), rescale=1 / 255, mean=None, std=None)
    seen = np.moveaxis(plain(image), 0, 2)
    high, wide = model.info["patch"]
    grid = (pixels.shape[2] // high, pixels.shape[3] // wide)
    found = stages(model, pixels, tokens)
    patches = grid[0] * grid[1]
    panels = [(f"{grid[0]} x {grid[1]} patches", seen)]
    panels += [
        (
            f"behind layer {stage.layer}: {stage.tokens} of {patches}",
            _painted(seen, stage.owners, grid, (high, wide)),
        )
        for stage in found
    ]
    factor = max(1, -(-_SIDE // seen.shape[1]))
    side = (seen.shape[1] * factor, seen.shape[0] * factor)
    pictures = [
        (
            caption,
            Image.fromarray((values * 255).round().astype(np.uint8)).resize(
                side, Image.Resampling.NEAREST
            ),
        )
        for caption, values in panels
    ]
    return _sheet(pictures), found


def _painted(
    seen: npt.NDArray[np.float32],
    owners: npt.NDArray[np.int64],
    grid: tuple[int, int],
    patch: tuple[int, int],
) -> npt.NDArray[np.float32]:
    """Return the image with patches that left in red, and merged ones in their mean colour."""
    import numpy as np

    (rows, cols), (high, wide) = grid, patch
    cut = seen.reshape(rows, high, cols, wide, 3).transpose(0, 2, 1, 3, 4)
    patches = cut.reshape(rows * cols, high, wide, 3).copy()
    colour, share = _GONE
    patches[owners < 0] *= 1 - share
    patches[owners < 0] += share * np.array(colour, np.float32)
    shared, counts = np.unique(owners[owners >= 0], return_counts=True)
    for owner in shared[counts > 1]:
        members = owners == owner
        patches[members] = patches[members].mean(axis=(0, 1, 2))
    joined = patches.reshape(rows, cols, high, wide, 3).transpose(0, 2, 1, 3, 4)
    painted: npt.NDArray[np.float32] = joined.reshape(rows * high, cols * wide, 3)
    return painted


def _sheet(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put pictures with captions side by side."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = panels[0][1].size
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    step = (width + _GAP, height + _CAPTION + _GAP)
    sheet = Image.new("RGB", (columns * step[0] + _GAP, lines * step[1] + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for index, (caption, picture) in enumerate(panels):
        left = _GAP + index % columns * step[0]
        top = _GAP + index // columns * step[1]
        draw.text((left, top), caption, "black", font)
        sheet.paste(picture, (left, top + _CAPTION))
    return sheet
