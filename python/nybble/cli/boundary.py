"""Where exceptions end: what a user sees and what the shell gets.

Everything a user can cause is a :class:`~nybble.errors.NybbleError` whose message stands alone: it
is shown as one line, without a traceback. ``NYBBLE_DEBUG=1`` shows the traceback as well. Any other
exception is a defect of nybble and says so.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

#: Exit codes besides 0 and the 2 that typer gives to a wrong command line.
FAILURE = 1
INTERRUPTED = 130
READER_GONE = 141

P = ParamSpec("P")
R = TypeVar("R")


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("NYBBLE_DEBUG", "") not in ("", "0")


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the exceptions of a command into a message on stderr and an exit code."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()  # a closed pipe shows here at the latest
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            silence_stdout()
            raise typer.Exit(READER_GONE) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            report(error)
            raise typer.Exit(FAILURE) from None
        return result

    return guarded


def report(error: Exception) -> None:
    """Say on stderr what went wrong."""
    from nybble.errors import NybbleError

    if debugging():
        traceback.print_exc()
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}"
    elif isinstance(error, NybbleError):
        text = " ".join(str(error).split())
    elif isinstance(error, MemoryError):
        text = "not enough memory"
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())} (a defect of nybble"
        text += ")" if debugging() else "; NYBBLE_DEBUG=1 shows where)"
    complain(text)


def complain(text: str) -> None:
    """Print one error line on stderr."""
    label = "\033[1;31merror:\033[0m" if _coloured() else "error:"
    print(f"{label} {_printable(text)}", file=sys.stderr, flush=True)


def silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail once more."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # a test's stdout has no descriptor
        pass


def _coloured() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


def _printable(text: str) -> str:
    """Escape control characters: parts of a message come out of files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
