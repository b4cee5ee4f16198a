"""``nybble compress``: a smaller folder out of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from nybble.compress.report import Report


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
        typer.Option("--out", "-o", metavar="DIR", help="The folder to write.", show_default=False),
    ],
    weights: Annotated[
        int | None,
        typer.Option(
            "--weights",
            metavar="4|7|8|16",
            callback=_one_of((4, 7, 8, 16)),
            help="Bits a weight; 16 leaves them in float.",
            show_default="the recipe's, 4 without one",
        ),
    ] = None,
    activations: Annotated[
        int | None,
        typer.Option(
            "--activations",
            metavar="4|7|8|16",
            callback=_one_of((4, 7, 8, 16)),
            help="Bits of the activations; 16 leaves them in float.",
            show_default="the recipe's, 8 without one",
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            "--group",
            metavar="32|64|128",
            callback=_one_of((32, 64, 128)),
            help="Weights that share a scale.",
            show_default="the recipe's, 32 without one",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Whether a group's steps are centred on zero, or have a zero point of their own.",
            show_default="asymmetric for 4 bits, symmetric for 8",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE|NAME",
            help="What to do to which part: a YAML file, or a name `nybble methods` lists.",
            show_default=False,
        ),
    ] = None,
    calibration: options.Calibration = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            "--calibration-tokens",
            metavar="N",
            min=1,
            help="How many tokens of it.",
            show_default="the recipe's, 16384 without one",
        ),
    ] = None,
    calibration_images: options.CalibrationImages = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="S",
            min=0,
            help="Which parts of it.",
            show_default="the recipe's, 0 without one",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
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

    path = options.open_path(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    report = work(
        path,
        out,
        weights=weights,
        activations=activations,
        group=group,
        symmetric=symmetric,
        recipe=recipe,
        calibration=calibration or (),
        calibration_tokens=calibration_tokens,
        calibration_images=calibration_images,
        seed=seed,
        overwrite=overwrite,
        threads=threads,
        progress=not quiet,
    )
    if as_json:
        output.emit_json({"out": str(out), **report.to_json()})
    else:
        output.show(report_table(report, out))


def report_table(report: "Report", out: Path) -> "Table":
    """Make the short table that ends a compression."""
    from nybble.cli import output

    schemes: dict[str, int] = {}
    for tensor in report.tensors:
        if len(tensor.shape) > 1:
            schemes[tensor.scheme] = schemes.get(tensor.scheme, 0) + tensor.size
    kinds = sorted(schemes, key=lambda scheme: -schemes[scheme])
    ratio = report.size_after / report.size_before if report.size_before else 1.0
    before, after = output.size(report.size_before), output.size(report.size_after)
    rows = [
        ("folder", str(out)),
        ("size", f"{before} -> {after} ({ratio:.0%})"),
        ("bits a weight", f"{report.bits_per_weight:.2f} over {output.count(report.parameters)}"),
        ("matrices", ", ".join(f"{kind}: {output.size(schemes[kind])}" for kind in kinds)),
        ("error", f"{report.mean_error():.2e} of the linears' squared weights, on average"),
        ("time", output.seconds(report.seconds)),
    ]
    rows += prune_rows(report)
    rows += calibration_rows(report)
    rows += [("note", note) for note in report.notes]
    if report.left_out:
        rows.append(("left out", f"{len(report.left_out)} tensors that the model does not need"))
    return output.pairs("", rows)


def calibration_rows(report: "Report") -> list[tuple[str, str]]:
    """Say what was looked at, if anything was."""
    if report.calibration is None:
        return []
    shown = report.calibration
    what = f"{shown['images']} images" if "images" in shown else f"{shown['tokens']} tokens"
    return [("calibration", f"{what}, seed {shown['seed']}")]


def prune_rows(report: "Report") -> list[tuple[str, str]]:
    """Say what was taken out, if anything was."""
    if report.prune is None:
        return []
    found = report.prune["achieved"]
    text = f"{found['share_of_layers']:.1%} of the layers' parameters, "
    text += f"{found['share_of_model']:.1%} of all, by {report.prune['method']}"
    if found["zeros"]:
        text += f"; {found['zeros']} of them are zeros in place"
    rows = [("pruned", text)]
    if (recovery := report.prune.get("recovery")) is not None:
        loss = recovery["loss"]
        text = f"{loss['before']:.4f} -> {loss['after']:.4f} nats a token by {recovery['method']}, "
        text += f"on {loss['held_out_tokens']} tokens held out of {recovery['text']['tokens']}"
        rows.append(("recovered", text))
    return rows
