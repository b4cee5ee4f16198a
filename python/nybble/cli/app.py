"""The command line: the verbs, ``--version``, and :func:`main`.

A verb's file declares its options and imports what it needs when it runs, so ``nybble --help`` and
a mistyped option answer without loading the runtime.
"""

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from nybble.cli import (
    bench,
    chat,
    compress,
    demo,
    doctor,
    evaluate,
    export,
    index,
    inspect,
    methods,
    prune,
    pull,
    run,
    sweep,
    vision,
)
from nybble.cli.boundary import INTERRUPTED, READER_GONE, silence_stdout, verb

app = typer.Typer(
    name="nybble",
    help="Make transformers small and run them fast on the CPU you have.",
    epilog="`nybble demo` fetches a small model, compresses it and lets it write.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

# One line a verb, in the order in which one meets them.
app.command("demo")(verb(demo.demo))
app.command("pull")(verb(pull.pull))
app.command("compress")(verb(compress.compress))
app.command("prune")(verb(prune.prune))
app.command("export")(verb(export.export))
app.command("run")(verb(run.run))
app.command("chat")(verb(chat.chat))
app.command("classify")(verb(vision.classify))
app.command("embed")(verb(vision.embed))
app.command("explain")(verb(vision.explain))
app.command("tune-tokens")(verb(vision.tune_tokens))
app.command("eval")(verb(evaluate.evaluate))
app.command("sweep")(verb(sweep.sweep))
app.command("index")(verb(index.index))
app.command("bench")(verb(bench.bench))
app.command("inspect")(verb(inspect.inspect))
app.command("methods")(verb(methods.methods))
app.command("doctor")(verb(doctor.doctor))


def _print_version(value: bool) -> None:
    if value:
        from nybble import __version__

        print(f"nybble {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Make transformers small and run them fast on the CPU you have."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Parameters
    ----------
    arguments
        What stands behind the program's name; ``sys.argv`` without it.
    """
    for stream in (sys.stdout, sys.stderr):
        # An old terminal that cannot show a character gets a question mark, not a failure.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="nybble")
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    else:
        code = 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        return READER_GONE
    return code if isinstance(code, int) else int(code is not None)
