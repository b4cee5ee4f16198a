"""Compression: a model in, a smaller folder out.

The package can be called: ``nybble.compress(source, out)`` is :func:`compress`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.compress.recipe import Recipe
    from nybble.compress.report import Report

__all__ = ["compress"]


def compress(
    source: str | Path,
    out: str | Path,
    *,
    weights: int | None = None,
    activations: int | None = None,
    group: int | None = None,
    symmetric: bool | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    calibration: str | Path | Sequence[str | Path] = (),
    calibration_tokens: int | None = None,
    calibration_images: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Compress a model into a folder that the run-time, and other tools, read.

    Parameters
    ----------
    source
        A Hugging Face folder (safetensors) or a GGUF file.
    out
        The folder to make. It appears when everything is written and checked; a run that fails or
        is killed leaves nothing under its name.
    weights
        Bits a weight: 4, 7, 8, or 16 to leave them in float. Without it the recipe's, 4 without
        one.
    activations
        Bits of the inputs of linears: 8, or 16 to leave them in float. Default 8.
    group
        Weights that share a scale: 32, 64 or 128. Default 32.
    symmetric
        Whether a group's steps are centred on zero or have a zero point of their own. Without it,
        8-bit weights are symmetric and 4-bit ones are not.
    recipe
        More precise wishes; see :mod:`nybble.compress.recipe`. The options above come before it.
    calibration
        Text files for methods that look at what the model does with text: plain text or JSON lines,
        either in gzip. For an image encoder images: files, folders or zip archives of them. The
        model is not shown more of them than the next options say.
    calibration_tokens
        How many tokens of them. Without it the recipe's; 16384 without one.
    calibration_images
        How many images. Without it the recipe's; 64 without one.
    seed
        Which parts of them. Without it the recipe's; 0 without one.
    overwrite
        Replace `out` if it holds a model.
    threads
        Threads to use; the result does not depend on it.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    Report
        What became of every tensor; the folder has it as ``report.json``.

    Raises
    ------
    ArgumentError
        When an option is out of its range, source and output are the same, or there are fewer
        images than asked for, or none.
    UnsupportedError
        When the recipe needs calibration and torch or transformers are not installed.
    ConfigError
        When the recipe says something unknown, or the model contradicts its own configuration.
    FormatError
        When a file of the source is damaged or a weight is not finite.
    FileError
        When the system refuses to read or write a file; the message names it.
    """
    from nybble.compress import pipeline
    from nybble.compress.recipe import read

    wanted = read(recipe).with_options(
        weights, activations, group, symmetric, calibration_tokens, calibration_images, seed
    )
    texts = [calibration] if isinstance(calibration, (str, Path)) else calibration
    return pipeline.run(
        Path(source),
        Path(out),
        wanted,
        calibration=[Path(text) for text in texts],
        overwrite=overwrite,
        threads=threads,
        progress=progress,
    )


class _Callable(ModuleType):
    """A module of the name of its one function, so that both ``import`` and a call work."""

    __call__ = staticmethod(compress)


# `import nybble.compress` would otherwise hide the function that `nybble.compress` is as well.
sys.modules[__name__].__class__ = _Callable
