"""What is written down: a line a model and recipe, and the table that compares them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from nybble.bench.report import csv_text, markdown_text

__all__ = ["COLUMNS", "merge", "read", "table"]

COLUMNS = (
    "model",
    "engine",
    "recipe",
    "bits_per_weight",
    "calibration_tokens",
    "calibration_seed",
    "windows",
    "context",
    "perplexity",
    "stderr",
    "seconds",
    "date",
    "version",
    "machine",
    "note",
)
_KEY = ("model", "engine", "recipe", "calibration_tokens", "calibration_seed", "windows", "context")

#: WikiText-2 perplexities of Agile-Quant, arXiv 2312.05693: the main table, and for 4-bit
#: activations the one of devices. That and the rows with pruned tokens count the surviving tokens
#: only; the others are not affected.
PAPER = {
    "OPT-125M": {
        "f32": 27.65,
        "w4a16-g128": 37.28,
        "w4a16-gptq": 31.12,
        "agile-quant-8": 31.52,
        "agile-quant-4": 36.95,
    },
    "BLOOM-560M": {"f32": 22.42, "w4a16-gptq": 24.03, "agile-quant-8": 24.01},
    "LLaMA-7B": {
        "f32": 5.68,
        "w4a16-g128": 6.29,
        "w4a16-gptq": 5.85,
        "agile-quant-8": 6.16,
        "agile-quant-4": 8.81,
    },
}


def read(file: Path) -> list[dict[str, str]]:
    """Read a CSV; an absent one has no rows."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def merge(file: Path, row: Mapping[str, object]) -> None:
    """Write a row; the one that measured the same before gives way."""
    new = {name: str(row[name]) for name in COLUMNS}
    same = [new[name] for name in _KEY]
    rows = [old for old in read(file) if [old[name] for name in _KEY] != same]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(csv_text([*rows, new]), encoding="utf-8")


def table(rows: Sequence[Mapping[str, str]], order: Sequence[str]) -> str:
    """Return a Markdown table: a line a recipe, a column a model, ours and then the paper's.

    Each cell has the perplexity and what it is above the float model's of the same windows.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys((row["engine"], row["recipe"]) for row in rows))
    names.sort(key=lambda name: order.index(name[1]) if name[1] in order else len(order))
    lines = []
    for engine, recipe in names:
        line = [recipe if engine == "nybble" else f"{engine}: {recipe}"]
        for model in models:
            of = [row for row in rows if row["model"] == model]
            found = [row for row in of if (row["engine"], row["recipe"]) == (engine, recipe)]
            line.append(_cell(found[-1], of) if found else "")
        for paper in PAPER.values():
            value = paper.get(recipe) if engine == "nybble" else None
            line.append("" if value is None else _percent(value, paper["f32"]))
        lines.append(line)
    header = ["recipe", *models, *(f"paper: {name}" for name in PAPER)]
    return markdown_text(header, lines, set(range(1, len(header))))


def _cell(row: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    of = ("windows", "context", "engine")
    floats = [r for r in rows if r["recipe"] == "f32" and all(r[k] == row[k] for k in of)]
    base = float(floats[-1]["perplexity"]) if floats else None
    return _percent(float(row["perplexity"]), base)


def _percent(value: float, base: float | None) -> str:
    if base is None or value == base:
        return f"{value:.2f}"
    return f"{value:.2f} ({100 * (value / base - 1):+.1f} %)"
