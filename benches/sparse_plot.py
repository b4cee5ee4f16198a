"""Draw the crossover curves of ``cargo bench --bench sparse``: speed-up against sparsity.

``python benches/sparse_plot.py FILE.csv FILE.png``
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    """Draw one panel for each place that weights come from."""
    source, target = (Path(name) for name in sys.argv[1:3])
    with source.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    titles = {"l3": "weights in L3", "dram": "weights from memory"}
    places = [place for place in titles if any(row["weights"] == place for row in rows)]
    figure, panels = plt.subplots(1, len(places), figsize=(5.5 * len(places), 4), sharey=True)
    styles = {"32/32": "-", "64/128": "--", "32/0": ":"}
    for panel, place in zip([panels] if len(places) == 1 else panels, places, strict=True):
        shapes = list(dict.fromkeys(row["shape"] for row in rows))
        for number, shape in enumerate(shapes):
            for groups, style in styles.items():
                own = [
                    row
                    for row in rows
                    if (row["shape"], row["weights"]) == (shape, place)
                    and f"{row['group_up']}/{row['group_down']}" == groups
                ]
                if own:
                    panel.plot(
                        [int(row["sparsity"]) for row in own],
                        [float(row["speedup"]) for row in own],
                        style,
                        color=f"C{number}",
                        label=f"{shape}, groups {groups.replace('/0', '/row')}",
                    )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_title(titles[place])
        panel.set_xlabel("neurons skipped, %")
        panel.set_ylim(0, 4)
        panel.legend(fontsize=7)
    figure.axes[0].set_ylabel("times the dense 4-bit block")
    threads = ", ".join(sorted({row["threads"] for row in rows}))
    figure.suptitle(f"Feed-forward block of one token, {rows[0]['isa']}, {threads} thread(s)")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
