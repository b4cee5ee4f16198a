"""The models of the table: where their weights come from, and which text they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benches.off_grid import off_grid
from benches.recipes import llama2c

from nybble.hub import pull

__all__ = ["MODELS", "Prepared"]

_STORIES = 80  # of those in the file the first are for evaluation


@dataclass(frozen=True)
class Prepared:
    """A model that can be compressed, and its text.

    Parameters
    ----------
    folder
        A Hugging Face folder.
    calibration, text
        Files to calibrate with and to evaluate on.
    context
        Tokens a window, of both.
    """

    folder: Path
    calibration: tuple[Path, ...]
    text: Path
    context: int


def _published(name: str, data: Path, work: Path) -> Prepared:
    """A model that is only to be had quantized: off its grid, so that rounding again costs."""
    folder = work / "source"
    if not folder.is_dir():
        off_grid(pull(name), folder)
    calibration = (data / "calib" / "exl2_wiki.utf8.gz", data / "calib" / "exl2_c4.utf8.gz")
    return Prepared(folder, calibration, data / "text" / "wikitext2_raw_valid.jsonl.gz", 1024)


def _smollm2(data: Path, work: Path) -> Prepared:
    return _published("smollm2-135m-instruct", data, work)


def _qwen(data: Path, work: Path) -> Prepared:
    return _published("qwen2.5-coder-0.5b-instruct", data, work)


def _stories(data: Path, work: Path) -> Prepared:
    """A true float model, on stories like those it was trained with."""
    folder, text, calibration = (work / name for name in ("source", "text.txt", "calibration.txt"))
    if not folder.is_dir():
        models = data / "models"
        llama2c.convert(models / "stories260K.bin", models / "stories260K_tok512.bin", folder)
    raw = (data / "calib" / "exl2_tiny.utf8").read_text(encoding="utf-8")
    stories = [story for part in raw.split("<|endoftext|>") if (story := part.strip())]
    text.write_text("\n".join(stories[:_STORIES]), encoding="utf-8")
    calibration.write_text("\n".join(stories[_STORIES:]), encoding="utf-8")
    return Prepared(folder, (calibration,), text, 256)


#: By the name the table has for them.
MODELS = {
    "SmolLM2-135M": _smollm2,
    "Qwen2.5-Coder-0.5B": _qwen,
    "stories260K": _stories,
}
