"""The forms in which speed results are written: Markdown, CSV, JSON, JSON lines.

The column names are those other engines' bench tools print, so that results can lie in one table.
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

#: What ``-o`` accepts.
FORMATS = ("table", "md", "csv", "json", "jsonl")


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as CSV with a header; lists become JSON."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: json.dumps(value) if isinstance(value, (list, dict)) else value
                    for key, value in row.items()
                }
            )
    return out.getvalue()


def jsonl_text(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def markdown_text(columns: Sequence[str], cells: Sequence[Sequence[str]], right: set[int]) -> str:
    """Write a Markdown table with its columns padded to equal width."""
    widths = [max(len(row[index]) for row in [columns, *cells]) for index in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + (":" if index in right else "-") for index, width in enumerate(widths)
    ]
    return "\n".join([line(columns), line(rule), *(line(row) for row in cells)]) + "\n"
