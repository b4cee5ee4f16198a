"""Options that several verbs share, declared once so that they behave the same everywhere."""

import enum
import math
from pathlib import Path
from typing import Annotated

import typer


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        msg = f"{value} is not a finite number."
        raise typer.BadParameter(msg)
    return value


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


def open_path(source: str) -> Path:
    """Return the path of a MODEL argument: a path, or the name of a pulled model."""
    from nybble.hub import resolve

    return resolve(source)
