"""``nybble compress``: a smaller folder out of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence


def _one_of(choices: "Sequence[int]") -> Any:
    def check(value: int | None) -> int | None:
        if value is not None and value not in choices:
            msg = f"{value} is not one of {', '.join(map(str, choices))}."
            raise typer.BadParameter(msg)
        return value

    return check


def compress(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A Hugging Face folder, a GGUF file, or the name of a pulled model.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="DIR", help="The folder to write.", show_default=False
        ),
    ],
    weights: Annotated[
        int,
        typer.Option(
            "--weights", metavar="4|8|16", callback=_one_of((4, 8, 16)), help="Bits a weight."
        ),
    ] = 4,
    activations: Annotated[
        int,
        typer.Option(
            "--activations",
            metavar="8|16",
            callback=_one_of((8, 16)),
            help="Bits of the activations; 16 leaves them in float.",
        ),
    ] = 8,
    group: Annotated[
        int,
        typer.Option(
            "--group",
            metavar="32|64|128",
            callback=_one_of((32, 64, 128)),
            help="Weights that share a scale.",
        ),
    ] = 32,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Whether a group's grid is centred on zero, or has a zero point of its own.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE|NAME",
            help="What to do to which part; `nybble methods` lists the names.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it exists.")
    ] = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Compress a model into a folder that `nybble run` and others read.

    The folder appears when everything is written and checked; an interrupted run leaves nothing
    under its name.
    """
    from nybble.cli import output
    from nybble.compress import compress as work

    report = work(
        options.open_path(source),
        out,
        weights=weights,
        activations=activations,
        group=group,
        symmetric=symmetric,
        recipe=recipe,
        overwrite=overwrite,
        threads=threads,
        progress=not quiet,
    )
    if as_json:
        output.emit_json({"out": str(out), **report.to_json()})
    else:
        output.show(report_table(report, out))


def report_table(report: Any, out: Path) -> Any:
    """Make the short table that ends a compression."""
    from nybble.cli import output

    raise NotImplementedError
