"""``nybble eval``: perplexity of a model on a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import options

if TYPE_CHECKING:
    from nybble.eval import Perplexity


def evaluate(
    model: options.ModelArgument,
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            metavar="FILE",
            help='The text: .txt or .jsonl of {"text": ...} lines, either of them also as .gz.',
            show_default=False,
        ),
    ],
    context: Annotated[int, typer.Option("--context", "-c", min=2, help="Tokens a window.")] = 1024,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=2,
            help="Use only the first N tokens of the text.",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    kv: options.Kv = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure the perplexity of a model on a text.

    The text is encoded without a begin token and cut into windows that do not overlap; the rows of
    a JSON lines file are joined with two newlines. MODEL may be a float folder, a compressed one or
    a GGUF file: all take the same path, so their figures compare.
    """
    import nybble
    from nybble.cli import output
    from nybble.eval import perplexity, read_text

    content = read_text(text)
    language_model = nybble.load(options.open_path(model), threads, kv=kv)
    with output.token_bar("eval", on=not quiet) as bar:
        result = perplexity(
            language_model,
            content,
            context=context,
            max_tokens=max_tokens,
            on_window=lambda done, total, value: bar.update(done, total, f"perplexity {value:.3f}"),
        )
    if as_json:
        output.emit_json({"model": str(language_model.path), "text": str(text), **result.to_json()})
    else:
        output.show(output.pairs("", _rows(result)))


def _rows(result: "Perplexity") -> list[tuple[str, str]]:
    from nybble.cli import output

    def spread(value: float | None) -> str:
        return "" if value is None else f" ± {value:.3f}"

    rows: list[tuple[str, Any]] = [
        ("perplexity", f"{result.perplexity:.3f}{spread(result.perplexity_stderr)}"),
        ("bits per byte", "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"),
        ("bits per token", f"{result.bits_per_token:.4f}"),
        (
            "tokens",
            f"{output.count(result.predicted_tokens)} predicted in {result.windows} "
            f"windows of {result.context}",
        ),
        ("speed", f"{output.rate(result.tokens_per_second)}, {output.seconds(result.seconds)}"),
    ]
    return rows
