"""What the verbs print with: tables, figures with units, notes, one JSON object."""

import json
import math
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Width of tables that go into a file or a pipe, where there is no terminal to fit.
_PIPE_WIDTH = 160


def stdout() -> Console:
    """Return the console for data."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """Return the console for everything beside the data."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH, highlight=False)


def note(text: str) -> None:
    """Print a sentence on stderr."""
    stderr().print(Text(text, style="dim"), soft_wrap=True)


def show(*parts: Any) -> None:
    """Print tables or lines on stdout; text is taken as it is, without markup."""
    console = stdout()
    with console.capture() as captured:
        for index, part in enumerate(parts):
            if isinstance(part, str):
                console.print(Text(part), soft_wrap=True)
                continue
            if index and not (isinstance(parts[index - 1], str) and not parts[index - 1]):
                console.print()
            # The title on a line of its own: rich would fold it to the width of the table.
            if isinstance(part, Table) and part.title:
                console.print(part.title, soft_wrap=True)
                part.title = None
            console.print(part)
    # Tables are padded to a rectangle: in a file those spaces only get in the way.
    for line in captured.get().splitlines():
        print(line.rstrip())


def emit_json(value: Any) -> None:
    """Print one JSON object on stdout; NaN and infinities, which JSON lacks, become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def clean(text: str) -> str:
    """Escape what is not printable: names out of a file must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Make a table of two columns, names and values."""
    table = grid(title, ("", ""), right=())
    table.show_header = False
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(clean(value)))
    return table


def add(table: Table, *cells: str) -> None:
    """Add a row of plain texts: no markup, nothing that is not printable."""
    table.add_row(*(Text(clean(cell)) for cell in cells))


def grid(title: str, columns: Iterable[str], *, right: Iterable[int]) -> Table:
    """Make an empty table; the columns numbered in ``right`` hold figures."""
    from rich import box

    figures = set(right)
    table = Table(
        title=Text(clean(title), style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        show_edge=False,
    )
    for index, column in enumerate(columns):
        table.add_column(
            Text(column), justify="right" if index in figures else "left", overflow="fold"
        )
    return table


def size(count: float | None) -> str:
    """Write a number of bytes with three figures: ``98.4 MB`` (a megabyte is 1,000,000 bytes)."""
    if count is None:
        return "unknown"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            break
        value /= 1000
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"


def rate(value: float | None, unit: str = "tok/s") -> str:
    """Write a speed: ``204 tok/s``, ``16.4 tok/s``."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{0 if value >= 99.5 else 1 if value >= 9.95 else 2}f} {unit}"


def seconds(value: float) -> str:
    """Write a duration: ``1.2 s``, ``3 min 20 s``."""
    if value < 60:
        return f"{value:.{1 if value >= 1 else 2}f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s"


def count(value: int) -> str:
    """Write a count: ``134,515,008``."""
    return f"{value:,}"


class TokenBar:
    """A progress bar on stderr, with a remark behind it."""

    def __init__(self, label: str, *, on: bool, unit: str) -> None:
        self._label = label
        self._on = on
        self._unit = unit
        self._bar: Any = None

    def update(self, done: int, total: int, remark: str = "") -> None:
        """Show that ``done`` of ``total`` are done."""
        if not self._on:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                desc=self._label,
                unit=self._unit,
                unit_scale=self._unit == "tok",
                dynamic_ncols=True,
                leave=False,
            )
        self._bar.set_postfix_str(remark, refresh=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> "TokenBar":
        """Return the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def token_bar(label: str, *, on: bool, unit: str = "tok") -> TokenBar:
    """Make a progress bar; it appears with its first update."""
    return TokenBar(label, on=on, unit=unit)


class TextWriter:
    """Writes a model's text to stdout as it comes.

    On a terminal control characters other than newline and tab are left out: a model's text should
    not be able to move the cursor or rename the window. Into a pipe or file the text goes
    unchanged.
    """

    def __init__(self) -> None:
        self._filter = sys.stdout.isatty()
        self._last = "\n"

    def write(self, piece: str) -> None:
        """Write a piece and flush it."""
        if self._filter:
            piece = "".join(c for c in piece if c in "\n\t" or not _is_control(c))
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
            self._last = piece[-1]

    def end(self) -> None:
        """Make sure that the text ends with a newline."""
        if self._last != "\n":
            self.write("\n")


def _is_control(char: str) -> bool:
    return ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0
