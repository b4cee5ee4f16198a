"""``nybble sweep``: recipes that prune, over several ratios, in one table and one plot."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli import options


def _ratios(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < ratio < 1 for ratio in found):
        msg = f"{text!r} is not a list of shares above 0 and below 1, as in 0.1,0.2."
        raise typer.BadParameter(msg, param_hint="--ratios")
    return found


def sweep(
    source: options.ModelArgument,
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help="Recipes with a key prune: YAML files, or names `nybble methods` lists.",
            show_default=False,
        ),
    ],
    text: Annotated[
        Path,
        typer.Option(
            "--text", metavar="FILE", help="Measure perplexity on it.", show_default=False
        ),
    ],
    ratios: Annotated[
        str, typer.Option("--ratios", metavar="R,R,...", help="Shares to remove.")
    ] = "0.1,0.2,0.3",
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Where results are noted; a sweep that was stopped goes on from them.",
            show_default=False,
        ),
    ] = Path("sweep"),
    calibration: options.Calibration = None,
    context: Annotated[
        int, typer.Option("--context", "-c", min=2, help="Tokens a window of the text.")
    ] = 1024,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=2, help="Use only the first N tokens of the text."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw them, as .png, .svg or .pdf."),
    ] = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Compress a model by several recipes and ratios and measure each, and each without pruning."""
    from nybble.bench import sweep as work
    from nybble.cli import output
    from nybble.eval.plot import check

    path = options.open_path(source)
    if plot is not None:
        check(plot)  # now, not when hours are spent
    todo = work.points(recipes, _ratios(ratios))
    settings = work.Settings(
        text=text,
        calibration=tuple(calibration or ()),
        context=context,
        max_tokens=max_tokens,
        threads=threads,
    )

    def say(name: str, ratio: float, number: int, count: int) -> None:
        if not quiet:
            output.note(f"{number + 1} of {count}: {name}, ratio {ratio:g}")

    records = work.run(path, todo, out, settings, progress=not quiet, on_point=say)
    if plot is not None:
        work.draw(records, plot, f"{path.name}, {records[0]['windows']} windows of {context}")
    if as_json:
        output.emit_json({"source": str(path), "points": records})
        return
    output.show(_table(records))


def _table(records: list[dict[str, Any]]) -> Any:
    from nybble.cli import output

    columns = ("recipe", "ratio", "achieved", "perplexity", "parameters", "size", "pp", "tg")
    table = output.grid("Sweep", columns, right=range(1, len(columns)))
    for record in records:
        achieved = record["achieved"]
        output.add(
            table,
            record["recipe"],
            f"{record['ratio']:g}",
            "" if achieved is None else f"{achieved['share_of_layers']:.3f}",
            f"{record['perplexity']:.2f}",
            output.count(record["parameters"]),
            output.size(record["bytes"]),
            output.rate(record["prefill"]),
            output.rate(record["decode"]),
        )
    return table
