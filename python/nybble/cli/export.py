"""``nybble export``: a model in floats for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import options


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A Hugging Face folder of float weights, as `nybble prune` writes it, or the name "
            "of a pulled model.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="The file, if its name ends in .gguf, or the folder to write.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="gguf|hf",
            help="llama.cpp's format, or a folder for transformers' own classes.",
            show_default="by the name of PATH",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="How a GGUF file holds matrices: f32, f16, bf16, q8_0 or q4_0.",
        ),
    ] = "f16",
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Write a model for other programs: a GGUF file, or a plain Hugging Face folder.

    Of pruned models those can be written whose shape the format can say. A GGUF file may have
    layers of different shapes if the model is a Llama, a plain folder may not.
    """
    from nybble.cli import output
    from nybble.compress import export as work

    if to not in (None, "gguf", "hf"):
        msg = f"--to: {to!r} is neither gguf nor hf."
        raise typer.BadParameter(msg)
    form = to or ("gguf" if out.suffix == ".gguf" else "hf")
    path = options.open_path(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    notes = []
    if form == "gguf":
        notes = work.to_gguf(path, out, kind, overwrite=overwrite, progress=not quiet)
    else:
        work.to_folder(path, out, overwrite=overwrite)
    names = [out] if form == "gguf" else sorted(out.iterdir())
    size = sum(file.stat().st_size for file in names)
    if as_json:
        output.emit_json({"out": str(out), "format": form, "bytes": size, "notes": notes})
    else:
        rows = [("gguf" if form == "gguf" else "folder", str(out)), ("size", output.size(size))]
        output.show(output.pairs("", [*rows, *(("note", note) for note in notes)]))
