"""``nybble bench``: how fast a model runs here."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from rich.table import Table


def _lengths(text: str) -> list[int]:
    """Parse ``512`` or ``128,512``."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < 0 or max(values) > 1 << 24:
        msg = f"{text!r} is not a length, or several with commas between."
        raise typer.BadParameter(msg)
    return values


def _check_lengths(text: str) -> str:
    _lengths(text)
    return text


def _check_format(text: str | None) -> str | None:
    from nybble.bench.report import FORMATS

    if text is not None and text not in FORMATS:
        msg = f"{text!r} is not one of {', '.join(FORMATS)}."
        raise typer.BadParameter(msg)
    return text


def bench(
    model: options.ModelArgument,
    prompt: Annotated[
        str,
        typer.Option(
            "-p",
            "--n-prompt",
            metavar="N[,N]",
            callback=_check_lengths,
            help="Prompt lengths; 0 leaves this test out.",
        ),
    ] = "512",
    gen: Annotated[
        str,
        typer.Option(
            "-n",
            "--n-gen",
            metavar="N[,N]",
            callback=_check_lengths,
            help="Numbers of new tokens; 0 leaves this test out.",
        ),
    ] = "128",
    repeats: Annotated[
        int, typer.Option("-r", "--repeats", min=1, max=1000, help="Timed runs of each test.")
    ] = 5,
    depth: Annotated[
        str,
        typer.Option(
            "-d",
            "--depth",
            metavar="N[,N]",
            callback=_check_lengths,
            help="Tokens that are in the cache already.",
        ),
    ] = "0",
    threads: options.Threads = None,
    kv: options.Kv = None,
    prune_tokens: options.PruneTokens = None,
    prune_by: options.PruneBy = options.Criterion.START,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="WAY[,WAY]",
            help="With --prompts: ways of drafting to compare with plain decoding (none): auto, or "
            "sources with + between (recycle, suffix, ngram, random), and :paper or :N behind them "
            "for a tree of that shape or size.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Answer these questions (Spec-Bench's JSON lines) instead, with and without "
            "drafts.",
            show_default=False,
        ),
    ] = None,
    per_task: Annotated[
        int | None,
        typer.Option(
            "--per-task",
            min=1,
            help="With --prompts: take only so many questions of each task.",
            show_default=False,
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="table|md|csv|json|jsonl",
            callback=_check_format,
            help="Form of the results.",
            show_default="table",
        ),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure speed: pp512 is a prompt of 512 tokens, tg128 are 128 tokens one by one.

    Every test runs once to warm up and is then timed -r times; the tokens are always the same ones.
    The memory bandwidth is measured in the same minute and printed, since decoding is bound by it.
    """
    import nybble.runtime
    from nybble.bench import (
        add_bandwidth,
        bandwidth,
        combinations,
        machine,
        measure,
        measure_drafts,
        read_questions,
        report,
    )
    from nybble.cli import output

    if as_json and output_format not in (None, "json"):
        msg = f"--json contradicts -o {output_format}."
        raise typer.BadParameter(msg, param_hint="--json")
    form = "json" if as_json else output_format or "table"
    if (draft is None) != (prompts is None) or (per_task is not None and prompts is None):
        msg = "--draft and --prompts belong together, and --per-task to them."
        raise typer.BadParameter(msg, param_hint="--draft")
    if prompts is not None:
        questions = read_questions(prompts, per_task)
        ways = [way.strip() for way in (draft or "").split(",")]
        for way in ways:
            options.drafts(way)
        language_model = nybble.runtime.load_language(options.open_path(model), threads, kv=kv)
        with output.token_bar("bench", on=not quiet, unit="question") as bar:
            records = measure_drafts(
                language_model,
                ways,
                questions,
                max_new_tokens=max(_lengths(gen)),
                on_step=lambda name, done, total: bar.update(done, total, name),
            )
        _show_drafts(records, form)
        return
    todo = combinations(_lengths(prompt), _lengths(gen), _lengths(depth))
    if not todo:
        msg = "-p and -n are both 0: there is nothing to measure."
        raise typer.BadParameter(msg, param_hint="-p")
    path = options.open_path(model)
    before = 0.0
    if machine.reset_peak_rss():  # else the buffer it reads would count as the model's memory
        before = bandwidth(threads)
        machine.reset_peak_rss()
    tokens = options.token_policy(prune_tokens, prune_by)
    language_model = nybble.runtime.load_language(path, threads, kv=kv, tokens=tokens)
    with output.token_bar("bench", on=not quiet, unit="run") as bar:
        records = measure(
            language_model,
            todo,
            repeats=repeats,
            on_step=lambda name, done, total: bar.update(done, total, name),
        )
    add_bandwidth(records, max(before, bandwidth(language_model.info["threads"])))
    if _written(records, form):
        return
    if form == "md":
        sys.stdout.write(
            report.markdown_text(_COLUMNS, [_cells(r) for r in records], set(_FIGURES))
        )
        output.show("", _surroundings(records[0]))
    else:
        output.show(_table(records), "", _surroundings(records[0]))


def _written(records: list[dict[str, Any]], form: str) -> bool:
    """Write records in a form for programs, if it is one."""
    from nybble.bench import report
    from nybble.cli import output

    if form == "json":
        output.emit_json({"results": records})
    elif form in ("csv", "jsonl"):
        sys.stdout.write({"csv": report.csv_text, "jsonl": report.jsonl_text}[form](records))
    else:
        return False
    return True


_DRAFT_COLUMNS = ("draft", "task", "answers", "tok/s", "plain tok/s", "speedup", "tokens a pass")
_DRAFT_FIGURES = (2, 3, 4, 5, 6)


def _show_drafts(records: list[dict[str, Any]], form: str) -> None:
    """Print what speculation was worth."""
    from nybble.bench import report
    from nybble.cli import output

    rows = [
        [
            record["draft"],
            record["task"],
            str(record["answers"]),
            f"{record['tokens_per_second']:.1f}",
            f"{record['plain_tokens_per_second']:.1f}",
            f"{record['speedup'] or 0:.2f}x",
            f"{record['mean_accepted'] or 0:.2f}",
        ]
        for record in records
    ]
    if _written(records, form):
        return
    if form == "md":
        sys.stdout.write(report.markdown_text(_DRAFT_COLUMNS, rows, set(_DRAFT_FIGURES)))
    else:
        table = output.grid("", _DRAFT_COLUMNS, right=_DRAFT_FIGURES)
        for row in rows:
            output.add(table, *row)
        output.show(table)


_COLUMNS = (
    "model",
    "size",
    "params",
    "weights",
    "kernel",
    "threads",
    "test",
    "tok/s",
    "of bandwidth",
)

_FIGURES = (1, 2, 5, 7, 8)


def _cells(record: dict[str, Any]) -> list[str]:
    from nybble.cli import output

    return [
        f"{record['model_type']} {Path(record['model_filename']).name}",
        output.size(record["model_size"]),
        f"{record['model_n_params'] / 1e6:.1f} M",
        record["weight_scheme"],
        record["kernel"],
        str(record["n_threads"]),
        record["test"],
        f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}",
        "-" if (share := record["bandwidth_share"]) is None else f"{share:.0%}",
    ]


def _table(records: list[dict[str, Any]]) -> "Table":
    from nybble.cli import output

    table = output.grid("", _COLUMNS, right=_FIGURES)
    for record in records:
        output.add(table, *_cells(record))
    return table


def _surroundings(record: dict[str, Any]) -> str:
    """Return the line that tells under which circumstances the figures were taken."""
    from nybble.cli import output

    return (
        f"{record['build']} | {record['cpu_info']} | {record['isa']} | "
        f"memory read at {record['memory_bandwidth'] / 1e9:.1f} GB/s with "
        f"{record['n_threads']} thread{'s' if record['n_threads'] > 1 else ''} | "
        f"peak memory {output.size(record['peak_rss'])}"
    )
