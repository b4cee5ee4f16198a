"""``nybble eval``: how good a model is, alone or beside others."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from nybble.cli.output import TokenBar
    from nybble.eval import Accuracy, Agreement, Perplexity
    from nybble.eval.compare import Measured

#: The text where none is named, below the folder that ``NYBBLE_DATA`` names.
_TEXT = "text/wikitext2_raw_valid.jsonl.gz"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="A model folder, a GGUF file, or the name of a pulled model; several with "
            "--compare.",
            show_default=False,
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help='Measure perplexity on it: .txt or .jsonl of {"text": ...} lines, either of them '
            "also as .gz. With --compare and no --task, WikiText-2 in the folder NYBBLE_DATA "
            "names.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", "-c", min=2, help="Tokens a window.")] = 1024,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens",
            min=1,
            help="Tokens of each window that are a prompt, computed in one go and not predicted.",
        ),
    ] = 1,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=2,
            help="Use only the first N tokens of the text.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Measure accuracy on a multiple-choice task, arc_easy for example; may be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="The questions of the one --task, .jsonl or .jsonl.gz; without it the task's file "
            "in the folder NYBBLE_DATA names.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Use only the first N questions of a task.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Measure several models and show them side by side."),
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="Compare the predictions on the text with this model's: divergence and agreement. "
            "With --compare the first model, if no other is named and the vocabularies are equal.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the comparison: .png, .svg or .pdf; needs the eval extra.",
            show_default=False,
        ),
    ] = None,
    ppl_sparsity: Annotated[
        float | None,
        typer.Option(
            "--ppl-sparsity",
            metavar="PERCENT",
            min=0.001,
            max=1000.0,
            help="Find the activation sparsity that raises the perplexity on --text by so much.",
            show_default=False,
        ),
    ] = None,
    sparsity_method: Annotated[
        str,
        typer.Option(
            "--sparsity-method",
            metavar="NAME",
            help="With --ppl-sparsity, how thresholds are found: cats, chess or teal.",
        ),
    ] = "chess",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="With --ppl-sparsity, the text they are found on; without it that of --text.",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    kv: options.Kv = None,
    prune_tokens: options.PruneTokens = None,
    prune_by: options.PruneBy = options.Criterion.START,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure how good models are: perplexity, agreement with another model, accuracy.

    The text is encoded without a begin token and cut into windows that do not overlap; the rows of
    a JSON lines file are joined with two newlines. Questions are asked as lm-evaluation-harness
    asks them, without examples. MODEL may be a float folder, a compressed one or a GGUF file: all
    take the same path, so their figures compare.
    """
    from nybble.anatomy import describe
    from nybble.cli import output
    from nybble.eval.compare import compare as measure
    from nybble.eval.plot import check, draw
    from nybble.eval.tasks import find, locate
    from nybble.tokens import TokenPolicy

    if len(models) > 1 and not compare:
        msg = "several models need --compare."
        raise typer.BadParameter(msg, param_hint="MODEL")
    for name, given in (("--plot", plot), ("--compare", compare or None)):
        if given is not None and len(models) < 2:
            msg = "there is only one model: nothing to compare."
            raise typer.BadParameter(msg, param_hint=name)
    if data is not None and len(tasks or []) != 1:
        msg = "the file of one task: exactly one --task must be given with it."
        raise typer.BadParameter(msg, param_hint="--data")
    policy = options.token_policy(prune_tokens, prune_by)
    if prune_tokens and not tasks and prompt_tokens < (least := TokenPolicy.min_prompt):
        msg = f"only prompts are pruned: needs --prompt-tokens of at least {least}."
        raise typer.BadParameter(msg, param_hint="--prune-tokens")
    if text is None and (reference is not None or not tasks):
        text = _known_text() if compare else None
        if text is None:
            msg = "not given, so there is nothing to measure" + (
                "." if reference is None else ": --reference compares predictions on a text."
            )
            raise typer.BadParameter(msg, param_hint="--text")
        if not quiet:
            output.note(f"text: {text}")
    if ppl_sparsity is not None:
        if compare or tasks or text is None:
            msg = "measures one model on one --text, without --compare and --task."
            raise typer.BadParameter(msg, param_hint="--ppl-sparsity")
        _sparsity(
            models[0],
            text,
            ppl_sparsity,
            sparsity_method,
            calibration,
            context=context,
            max_tokens=max_tokens,
            threads=threads,
            kv=kv,
            quiet=quiet,
            as_json=as_json,
        )
        return
    if plot is not None:
        check(plot)  # rather now than after all has been measured
    chosen = [find(name) for name in dict.fromkeys(tasks or [])]
    files = [(task, locate(task) if data is None else data) for task in chosen]
    paths = [options.open_path(model) for model in models]
    against = None if reference is None else options.open_path(reference)
    if compare and against is None and text is not None:
        if len({describe(path)["vocab"] for path in paths}) == 1:
            against = paths[0]
        elif not quiet:
            output.note("predictions are not compared: the models have different vocabularies")
    with _Progress(on=not quiet, named=len(paths) > 1) as progress:
        found = measure(
            paths,
            text=text,
            tasks=files,
            reference=against,
            context=context,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            limit=limit,
            threads=threads,
            kv=kv,
            tokens=policy,
            on_step=progress.step,
        )
    if as_json:
        facts = _facts(found, text, against) if compare else _fact(found[0], text, against)
        output.emit_json(facts)
    elif compare:
        output.show(_table(found, against), "", *_remarks(found, text, against))
    else:
        output.show(output.pairs("", _rows(found[0])))
    if plot is not None:
        draw(found, plot, "", "\n".join(_remarks(found, text, against)))
        if not quiet:
            output.note(f"plot: {plot}")


def _sparsity(
    name: str,
    text: Path,
    percent: float,
    method: str,
    calibration: Path | None,
    *,
    context: int,
    max_tokens: int | None,
    threads: int | None,
    kv: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Search the sparsity that costs so much perplexity, and show it."""
    from nybble.calibrate.text import draw
    from nybble.cli import output
    from nybble.eval import ppl_sparsity
    from nybble.runtime import load
    from nybble.sparsity import METHODS

    chosen = METHODS.make(method, "sparsity")
    path = options.open_path(name)
    model = load(path, threads, kv=kv, draft="off")
    size = min(512, model.context)
    shown = draw([calibration or text], model.tokenizer, tokens=16384, context=size, seed=0)
    with output.token_bar("search", on=not quiet, unit="step") as bar:
        found = ppl_sparsity(
            model,
            text,
            shown.windows,
            percent,
            method=chosen,
            context=context,
            max_tokens=max_tokens,
            on_step=lambda done, total, value: bar.update(done, total, f"perplexity {value:.3f}"),
        )
    if as_json:
        output.emit_json({"model": str(path), "text": str(text), **found.to_json()})
        return
    rise = 100 * (found.perplexity / found.dense_perplexity - 1)
    rows = [
        (f"PPL-{percent:g}% sparsity", f"{100 * found.sparsity:.1f} % by {found.method}"),
        ("perplexity", f"{found.perplexity:.3f}, {rise:+.2f} %"),
        ("without", f"{found.dense_perplexity:.3f}"),
        ("tokens", output.count(found.tokens)),
    ]
    output.show(output.pairs("", rows))


def _known_text() -> Path | None:
    folder = os.environ.get("NYBBLE_DATA")
    return Path(folder) / _TEXT if folder else None


class _Progress:
    """A bar for each thing that is measured, one after the other."""

    def __init__(self, *, on: bool, named: bool) -> None:
        self._on = on
        self._named = named
        self._now: tuple[str, str] | None = None
        self._bar: TokenBar | None = None

    def step(self, name: str, what: str, done: int, total: int, remark: str) -> None:
        """Show how far one of them is."""
        from nybble.cli import output

        if (name, what) != self._now or self._bar is None:
            self.__exit__()
            self._now = name, what
            text = what in ("text", "agreement")
            label = "eval" if what == "text" else what
            label = f"{name} {label}" if self._named else label
            self._bar = output.token_bar(label, on=self._on, unit="tok" if text else "question")
        self._bar.update(done, total, remark)

    def __enter__(self) -> "_Progress":
        """Return the progress."""
        return self

    def __exit__(self, *reason: object) -> None:
        """Remove the present bar."""
        if self._bar is not None:
            self._bar.__exit__(*reason)


def _fact(found: "Measured", text: Path | None, against: Path | None) -> dict[str, Any]:
    """Return the JSON of one model; a text's figures stand at the top, as there is but one."""
    facts: dict[str, Any] = {"model": str(found.path)}
    if found.perplexity is not None:
        facts |= {"text": str(text), **found.perplexity.to_json()}
    if found.agreement is not None:
        facts |= {"reference": str(against), "agreement": found.agreement.to_json()}
    if found.accuracy:
        facts["tasks"] = [part.to_json() for part in found.accuracy]
    return facts


def _facts(found: "Sequence[Measured]", text: Path | None, against: Path | None) -> dict[str, Any]:
    return {
        "text": None if text is None else str(text),
        "reference": None if against is None else str(against),
        "models": [model.to_json() for model in found],
    }


def _spread(value: float | None, digits: int) -> str:
    return "" if value is None else f" ± {value:.{digits}f}"


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}{_spread(None if error is None else 100 * error, 1)} %"


def _rows(found: "Measured") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if found.perplexity is not None:
        rows += _text_rows(found.perplexity)
    if found.agreement is not None:
        rows += _agreement_rows(found.agreement)
    for part in found.accuracy:
        rows += _task_rows(part)
    return rows


def _text_rows(result: "Perplexity") -> list[tuple[str, str]]:
    from nybble.cli import output

    prompts = f" behind prompts of {result.prompt_tokens}" if result.prompt_tokens > 1 else ""
    return [
        ("perplexity", f"{result.perplexity:.3f}{_spread(result.perplexity_stderr, 3)}"),
        ("bits per byte", "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"),
        ("bits per token", f"{result.bits_per_token:.4f}"),
        (
            "tokens",
            f"{output.count(result.predicted_tokens)} predicted in {result.windows} "
            f"windows of {result.context}{prompts}",
        ),
        ("speed", f"{output.rate(result.tokens_per_second)}, {output.seconds(result.seconds)}"),
    ]


def _agreement_rows(result: "Agreement") -> list[tuple[str, str]]:
    reference = result.reference.perplexity
    return [
        (
            "KL",
            f"{result.kl:.5f}{_spread(result.kl_stderr, 5)} nats a token, "
            f"the largest {result.kl_max:.2f}",
        ),
        ("same top token", _percent(result.top1, result.top1_stderr)),
        (
            "loss",
            f"{result.loss_difference:+.5f}{_spread(result.loss_difference_stderr, 5)} nats a "
            f"token beside the reference, whose perplexity is {reference:.3f}",
        ),
    ]


def _task_rows(result: "Accuracy") -> list[tuple[str, str]]:
    from nybble.cli import output

    figures = f"acc {_percent(result.acc, result.acc_stderr)}"
    if result.acc_norm is not None:
        figures += f", acc_norm {_percent(result.acc_norm, result.acc_norm_stderr)}"
    cut = f", {result.truncated} of them cut on the left" if result.truncated else ""
    return [
        (result.task, f"{figures} (chance {100 * result.chance:.1f} %)"),
        (
            "",
            f"{output.count(result.items)} questions{cut}, {output.seconds(result.seconds)}, "
            f"{output.rate(result.tokens_per_second)}",
        ),
    ]


def _table(found: "Sequence[Measured]", against: Path | None) -> "Table":
    from nybble.cli import output

    head = ["model", "size", "bits/weight"]
    if found[0].perplexity is not None:
        head += ["perplexity", "bits/byte"]
    if against is not None:
        head += ["KL", "same top"]
    head += [f"{part.task} {part.metric}" for part in found[0].accuracy]
    head.append("speed")
    table = output.grid("", head, right=range(1, len(head)))
    for model in found:
        cells = [model.name, output.size(model.bytes_on_disk), f"{model.bits_per_weight:.2f}"]
        if model.perplexity is not None:
            part = model.perplexity
            cells.append(f"{part.perplexity:.3f}{_spread(part.perplexity_stderr, 3)}")
            cells.append("-" if part.bits_per_byte is None else f"{part.bits_per_byte:.4f}")
        if against is not None:
            near = model.agreement
            cells += (
                ["reference", "-"]
                if near is None
                else [
                    f"{near.kl:.4f}{_spread(near.kl_stderr, 4)}",
                    _percent(near.top1, near.top1_stderr),
                ]
            )
        cells += [_percent(score.value, score.stderr) for score in model.accuracy]
        cells.append(output.rate(model.tokens_per_second))
        output.add(table, *cells)
    return table


def _remarks(found: "Sequence[Measured]", text: Path | None, against: Path | None) -> list[str]:
    """Return the lines below the table: on what the figures were taken."""
    from nybble.cli import output

    lines = []
    first = found[0].perplexity
    if first is not None and text is not None:
        prompts = f", prompts of {first.prompt_tokens}" if first.prompt_tokens > 1 else ""
        lines.append(
            f"Perplexity on {output.clean(text.name)}: {output.count(first.tokens)} tokens in "
            f"windows of {first.context}{prompts}."
        )
    if against is not None:
        lines.append(
            f"KL in nats a token, and the share of tokens with the same likeliest one: against "
            f"{output.clean(against.name)}."
        )
    if found[0].accuracy:
        parts = [f"{part.task} {output.count(part.items)}" for part in found[0].accuracy]
        lines.append(f"Questions: {', '.join(parts)}.")
        cut = sum(part.truncated for model in found for part in model.accuracy)
        if cut:
            lines.append(f"{output.count(cut)} questions were cut on the left to fit the context.")
    lines.append("± is one standard error.")
    return lines
