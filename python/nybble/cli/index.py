"""``nybble index``: texts to draft from."""

import time
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import options


def index(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Text files: .txt, .jsonl with a text a line, or either with .gz.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="The model whose tokens the texts are cut into.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The file to write.", show_default=False),
    ],
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Make a datastore of texts for `nybble run --draft-index`.

    What followed the same words in these texts is guessed to follow now; guesses are checked, so
    the texts make answers faster where they resemble them, and never change any.
    """
    import nybble.runtime
    from nybble.cli import output
    from nybble.eval.text import read_text
    from nybble.speculate import build

    start = time.perf_counter()
    language_model = nybble.runtime.load_language(options.open_path(model), 1)
    tokens = build(language_model, (read_text(text) for text in texts), out)
    seconds, size = time.perf_counter() - start, out.stat().st_size
    if as_json:
        found = {"path": str(out), "tokens": tokens, "bytes": size, "seconds": seconds}
        output.emit_json(found)
    elif not quiet:
        output.note(f"{out}: {tokens} tokens, {output.size(size)}, in {seconds:.1f} s")
