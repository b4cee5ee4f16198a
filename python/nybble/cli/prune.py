"""``nybble prune``: a model with parts of it taken out, in floats."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from nybble.compress.report import Report


def _ratio(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        msg = f"{value} is not a share of at least 0 and below 1."
        raise typer.BadParameter(msg)
    return value


def prune(
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
    method: Annotated[
        str,
        typer.Option("--method", metavar="NAME", help="A name that `nybble methods` lists."),
    ] = "refit",
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            metavar="SHARE",
            callback=_ratio,
            help="Share of the layers' parameters to remove, or of each matrix where single "
            "weights go.",
            show_default="the method's",
        ),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            "--units",
            metavar="KIND",
            help="What may go, for methods that remove units: kv, head, neuron, hidden (channels "
            "of the residual stream). May be repeated.",
            show_default="the method's",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            metavar="N:M",
            help="For methods that take out single weights: of each M neighbours N stay (2:4).",
            show_default="unstructured",
        ),
    ] = None,
    recovery: Annotated[
        str | None,
        typer.Option(
            "--recovery",
            metavar="NAME",
            help="What is trained afterwards: a name that `nybble methods` lists.",
            show_default="nothing",
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
            show_default="16384",
        ),
    ] = None,
    calibration_images: options.CalibrationImages = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="S", min=0, help="Which parts of it.", show_default="0"),
    ] = None,
    overwrite: options.Overwrite = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Take units or single weights out of a model; what is left stays in floats.

    To quantize as well, name the method under `prune` in a recipe for `nybble compress`.
    """
    from nybble.cli import output
    from nybble.compress import compress as work

    path = options.open_path(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"name": method}
    if ratio is not None:
        settings["ratio"] = ratio
    settings.update(_units(units))
    if pattern is not None:
        settings["pattern"] = pattern
    if recovery is not None:
        settings["recovery"] = recovery
    recipe = {"prune": settings, "weights": {"bits": 16}, "activations": {"bits": 16}}
    report = work(
        path,
        out,
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


def _units(kinds: list[str] | None) -> dict[str, Any]:
    """Return the settings that choose some kinds of units and no others."""
    if not kinds:
        return {}
    heads = [kind for kind in kinds if kind in ("kv", "head")]
    for kind in kinds:
        if kind not in ("kv", "head", "neuron", "hidden"):
            msg = f"--units: {kind!r} is none of kv, head, neuron, hidden."
            raise typer.BadParameter(msg)
    if len(set(heads)) > 1:
        msg = "--units: kv and head divide the same heads: one of them."
        raise typer.BadParameter(msg)
    return {
        "attention": heads[0] if heads else "none",
        "mlp": "neuron" in kinds,
        "hidden": "hidden" in kinds,
    }


def report_table(report: "Report", out: Path) -> "Table":
    """Make the short table that ends a pruning."""
    from nybble.cli import output
    from nybble.cli.compress import calibration_rows, prune_rows

    before, after = output.size(report.size_before), output.size(report.size_after)
    rows = [
        ("folder", str(out)),
        ("size", f"{before} -> {after}"),
        ("parameters", output.count(report.parameters)),
        *prune_rows(report),
        ("time", output.seconds(report.seconds)),
    ]
    rows += calibration_rows(report)
    rows += [("note", note) for note in report.notes]
    return output.pairs("", rows)
