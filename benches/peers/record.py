"""Write results down: one CSV a machine and day, and the tables on the screen."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.bench import machine
from nybble.bench.report import csv_text, markdown_text

#: What makes two records the same measurement, of which the later one counts.
_KEY = ("model", "engine", "format", "test", "n_threads")
_LISTS = ("samples_ts", "memory_bandwidth_samples_gbs")
_INTEGERS = (
    "weight_bits",
    "weight_bytes",
    "n_prompt",
    "n_gen",
    "n_threads",
    "peak_rss",
)
_FLOATS = ("median_ts", "avg_ts", "stddev_ts", "memory_bandwidth_gbs", "others_cpus")


def cpu_folder(isa: str) -> str:
    """Return the results folder's name: the CPU's own name seldom says which one it is."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    parts = [machine.cpu_name()]
    if "cpu family" in fields and "model" in fields:
        parts.append(f"family {fields['cpu family']} model {fields['model']}")
    parts.append(isa)
    return "-".join("".join(c if c.isalnum() else " " for c in " ".join(parts).lower()).split())


def machine_text() -> str:
    """Describe the machine in a line."""
    total = machine.memory()["total"]
    parts = [
        f"{machine.cpus()} CPUs",
        f"{total / 2**30:.0f} GiB" if total else "memory unknown",
        f"{platform.system()} {platform.release()} {platform.machine()}",
        f"Python {platform.python_version()}",
    ]
    if (pages := machine.huge_pages()) is not None:
        parts.append(f"huge pages {pages}")
    if any("hypervisor" in line for line in _flags()):
        parts.append("virtual")
    return ", ".join(parts)


def _flags() -> Iterable[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.startswith("flags")]


def merge(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows into the file; of those in it, the ones measured again give way."""
    new = {tuple(str(row[key]) for key in _KEY) for row in rows}
    old = read(file) if file.exists() else []
    kept = [row for row in old if tuple(str(row[key]) for key in _KEY) not in new]
    file.parent.mkdir(parents=True, exist_ok=True)
    if rows:
        file.write_text(csv_text([*kept, *(dict(row) for row in rows)]), encoding="utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a file with their types."""
    found: list[dict[str, Any]] = []
    with file.open(encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            row: dict[str, Any] = dict(line)
            row |= {key: int(row[key]) for key in _INTEGERS}
            row |= {key: float(row[key]) for key in _FLOATS}
            row |= {key: json.loads(row[key]) for key in _LISTS}
            found.append(row)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: a line an engine and format, a column a test and thread count."""
    columns = sorted(
        {(row["n_threads"], row["test"]) for row in rows},
        key=lambda column: (-column[0], column[1].startswith("tg")),
    )
    lines: dict[tuple[str, str], dict[tuple[int, str], Mapping[str, Any]]] = {}
    for row in rows:
        line = lines.setdefault((row["engine"], row["format"]), {})
        line[row["n_threads"], row["test"]] = row
    header = ["engine", "format", "weights MB"]
    header += [f"{test}, {threads}t" for threads, test in columns]
    header += ["peak MB", "memory GB/s"]
    cells = []
    for (engine, form), line in lines.items():
        some = list(line.values())
        cells.append(
            [
                engine,
                form,
                f"{some[0]['weight_bytes'] / 1e6:.0f}",
                *(_speed(line.get(column)) for column in columns),
                f"{max(row['peak_rss'] for row in some) / 1e6:.0f}",
                " ".join(f"{value:.1f}" for value in _bandwidths(some)),
            ]
        )
    return markdown_text(header, cells, set(range(2, len(header))))


def _bandwidths(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return one reading a thread count, in the order of the columns."""
    found = {row["n_threads"]: row["memory_bandwidth_gbs"] for row in rows}
    return [found[threads] for threads in sorted(found, reverse=True)]


def _speed(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['median_ts']:.1f} ± {row['stddev_ts']:.1f}"
