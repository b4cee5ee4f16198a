"""Options that several verbs share, declared once so that they behave the same everywhere."""

import enum
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nybble.speculate import Drafts
    from nybble.tokens import TokenPolicy


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        msg = f"{value} is not a finite number."
        raise typer.BadParameter(msg)
    return value


def _share(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        msg = f"{value} is not a share of at least 0 and below 1."
        raise typer.BadParameter(msg)
    return value


class Criterion(str, enum.Enum):
    """By what tokens of prompts may be chosen."""

    START = "start"
    RECEIVED = "received"
    RANDOM = "random"


class KvType(str, enum.Enum):
    """How keys and values may be kept."""

    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a GGUF file, or the name of a pulled model.",
        show_default=False,
    ),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        metavar="TEXTFILE|IMAGES",
        help="Text for the methods that look at some; for an image encoder images: files, a folder "
        "or a zip archive. May be given several times.",
        show_default=False,
    ),
]
CalibrationImages = Annotated[
    int | None,
    typer.Option(
        "--calibration-images",
        metavar="N",
        min=1,
        help="For an image encoder, how many images.",
        show_default="the recipe's, 64 without one",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        min=1,
        max=512,
        help="Threads; without it NYBBLE_THREADS, else every CPU this process may use.",
        show_default=False,
    ),
]
Kv = Annotated[
    KvType | None,
    typer.Option(
        "--kv",
        help="Keys and values; without it f16 for quantized models, else f32.",
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no notes.")]
ContextLimit = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        min=1,
        help="Most tokens to hold, prompt and answer together; without it the model's own limit.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option("-n", "--max-tokens", min=0, help="Most new tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        max=100.0,
        callback=_finite,
        help="0 takes the likeliest token every time; higher is more varied.",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k", min=0, help="Sample among the K likeliest tokens; 0 for all.", show_default=False
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        callback=_finite,
        help="Sample among the likeliest tokens that together have this probability.",
        show_default=False,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        callback=_finite,
        help="Leave out tokens less likely than this share of the likeliest one.",
        show_default=False,
    ),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(
        "--repeat-penalty",
        min=0.01,
        max=100.0,
        callback=_finite,
        help="Divide the scores of recent tokens by this; 1 is off.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        max=(1 << 64) - 1,
        help="Seed of the sampling; the same seed gives the same text.",
        show_default=False,
    ),
]

PruneTokens = Annotated[
    float | None,
    typer.Option(
        "--prune-tokens",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        callback=_share,
        help="Leave out tokens of prompts layer by layer, until this share of them (below 1) is "
        "gone; 0 also turns off what the folder says. Lossy.",
        show_default=False,
    ),
]
PruneBy = Annotated[
    Criterion,
    typer.Option(
        "--prune-by",
        help="With --prune-tokens, leave out those that give the first token the least attention "
        "(start), that get the least (received), or any.",
    ),
]


Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="SOURCES",
        help="Guess several tokens ahead and check them together; the text stays the same. auto "
        "where it is faster here; off; or sources with commas between: recycle, suffix, ngram.",
    ),
]


DraftIndex = Annotated[
    Path | None,
    typer.Option(
        "--draft-index",
        metavar="FILE",
        help="Guess from these texts too; `nybble index` makes the file.",
        show_default=False,
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        metavar="MODEL",
        help="Guess with this small model of the same vocabulary too.",
        show_default=False,
    ),
]


def drafts(text: str, index: Path | None = None, model: str | None = None) -> "Drafts | str":
    """Return what --draft and its companions mean to ``nybble.load``."""
    from nybble.errors import ArgumentError
    from nybble.speculate import parse

    try:
        settings = parse(text)
    except ArgumentError as error:
        raise typer.BadParameter(str(error), param_hint="--draft") from None
    if index is None and model is None:
        return text
    if settings is None:
        msg = "is off, but there are drafts to use."
        raise typer.BadParameter(msg, param_hint="--draft")
    more = [name for name, given in (("retrieval", index), ("model", model)) if given is not None]
    return replace(
        settings,
        sources=(*more, *(source for source in settings.sources if source not in more)),
        index=None if index is None else str(index),
        model=None if model is None else str(open_path(model)),
    )


def token_policy(share: float | None, by: Criterion) -> "TokenPolicy | str | None":
    """Return what --prune-tokens and --prune-by mean to ``nybble.load``."""
    from nybble.tokens import TokenPolicy

    if not share:
        return None if share is None else "off"
    return TokenPolicy(share, by.value)


def open_path(source: str) -> Path:
    """Return the path of a MODEL argument: a path, or the name of a pulled model."""
    from nybble.hub import resolve

    return resolve(source)
