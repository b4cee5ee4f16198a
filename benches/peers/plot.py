"""Draw the results: a panel for every test and thread count, a bar for every engine and format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS = {4: "#b3261e", 8: "#dd6a5f", 16: "#f0b0a9"}
_OTHERS = {4: "#33475b", 8: "#7b8fa3", 16: "#c3ccd5"}
_LABELS = {4: "4-bit weights", 8: "8-bit", 16: "16 or 32-bit float"}


def draw(rows: Sequence[Mapping[str, Any]], file: Path, title: str, foot: str) -> None:
    """Write a PNG; rows of one engine stay together, the engines in the order they come."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    bars = list(dict.fromkeys((row["engine"], row["format"]) for row in rows))
    places = _places([engine for engine, _ in bars])
    threads = sorted({row["n_threads"] for row in rows}, reverse=True)
    tests = sorted({row["test"] for row in rows}, key=lambda test: test.startswith("tg"))
    height = 0.22 * (max(places) + 1) + 0.7
    figure, panels = plt.subplots(
        len(threads),
        len(tests),
        figsize=(5.2 * len(tests) + 1.8, height * len(threads) + 1.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for count, line in zip(threads, panels, strict=True):
        for test, panel in zip(tests, line, strict=True):
            chosen = {
                (row["engine"], row["format"]): row
                for row in rows
                if row["n_threads"] == count and row["test"] == test
            }
            _panel(panel, chosen, bars, places)
            what = "prompt" if test.startswith("pp") else "generation"
            unit = "thread" if count == 1 else "threads"
            panel.set_title(f"{what} ({test}), {count} {unit}", fontsize=11, loc="left")
        line[0].set_yticks(places, [f"{engine}  {form}" for engine, form in bars])
        line[0].set_ylim(max(places) + 0.7, -0.7)  # the first engine on top
        for label, (engine, _) in zip(line[0].get_yticklabels(), bars, strict=True):
            if engine == "nybble":
                label.set(color=_OURS[4], fontweight="bold")
    for panel in panels[-1]:
        panel.set_xlabel("tokens a second, median (line: slowest to fastest run)", fontsize=9)
    used = {_shade(row["weight_bits"]) for row in rows}
    figure.legend(
        handles=[Patch(color=_OTHERS[bits], label=_LABELS[bits]) for bits in sorted(used)]
        + [Patch(color=_OURS[4], label="nybble, in the same shades")],
        loc="outside upper right",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    figure.get_layout_engine().set(h_pad=0.1)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(foot, fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _places(engines: Sequence[str]) -> list[float]:
    """Return where the bars are: half a bar of space between two engines."""
    found, at, last = [], 0.0, None
    for engine in engines:
        at += 0.6 if last not in (None, engine) else 0.0
        found.append(at)
        at, last = at + 1, engine
    return found


def _shade(bits: int) -> int:
    return 4 if bits <= 4 else 8 if bits <= 8 else 16


def _panel(
    panel: Any,
    rows: Mapping[tuple[str, str], Mapping[str, Any]],
    bars: Sequence[tuple[str, str]],
    places: Sequence[float],
) -> None:
    longest = max((max(row["samples_ts"]) for row in rows.values()), default=1.0)
    for bar, place in zip(bars, places, strict=True):
        row = rows.get(bar)
        if row is None:
            panel.text(0, place, " no result", va="center", fontsize=8, color="#888888")
            continue
        colours = _OURS if bar[0] == "nybble" else _OTHERS
        panel.barh(place, row["median_ts"], 0.82, color=colours[_shade(row["weight_bits"])])
        low, high = min(row["samples_ts"]), max(row["samples_ts"])
        panel.plot([low, high], [place, place], color="#111111", linewidth=0.9)
        panel.text(
            high + longest * 0.01,
            place,
            f"{row['median_ts']:.0f}" if row["median_ts"] >= 10 else f"{row['median_ts']:.1f}",
            va="center",
            fontsize=8,
            fontweight="bold" if bar[0] == "nybble" else "normal",
        )
    panel.set_xlim(0, longest * 1.1)
    panel.tick_params(axis="y", labelsize=9, length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.grid(axis="x", color="#e5e5e5")
    panel.set_axisbelow(True)
