"""How long scores of tokens take: microseconds for a small encoder's attention.

Usage::

    python benches/score.py [--threads 2] [--rounds 30] [--csv FILE]

Random attention of 6 heads of 197, 257, 577 and 1370 tokens, and features of 384 columns. The bound
of PageRank is memory: a step reads the whole attention once, which is shown as GB/s. "On a graph"
is on the small form in which the run-time's attention leaves it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nybble import score

HEADS, WIDTH = 6, 384


def microseconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of a call, after a first one."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def jobs(n: int, threads: int) -> dict[str, Callable[[], object]]:
    """What is timed with `n` tokens."""
    numbers = np.random.default_rng(n)
    weights = np.exp(2 * numbers.standard_normal((HEADS, n, n), dtype=np.float32))
    attention = weights / weights.sum(axis=2, keepdims=True)
    features = numbers.standard_normal((n, WIDTH), dtype=np.float32)
    ranks = score.pagerank(attention).scores
    half = n // 2

    def steps(count: int) -> Callable[[], object]:
        return lambda: score.pagerank(attention, iterations=count, tolerance=0, threads=threads)

    graph = score.AttentionGraph(attention, threads=threads)

    def voted(**settings: Any) -> Callable[[], object]:
        return lambda: score.pagerank(graph, threads=threads, **settings)

    return {
        "graph of a matrix": lambda: score.AttentionGraph(attention, threads=threads),
        "pagerank on a graph, 1 step": voted(iterations=1, tolerance=0),
        "pagerank on a graph, 5 steps": voted(iterations=5, tolerance=0),
        "pagerank on a graph, to 1e-3": voted(tolerance=1e-3),
        "pagerank, 1 step": steps(1),
        "pagerank, 5 steps": steps(5),
        "pagerank, 30 steps": steps(30),
        "pagerank, to 1e-3": lambda: score.pagerank(attention, tolerance=1e-3, threads=threads),
        "received": lambda: score.received(attention, threads=threads),
        "class row": lambda: score.query_row(attention),
        "head filter and emphasis": lambda: score.emphasise(ranks, score.informative_heads(ranks)),
        "best matches, half to half": lambda: score.best_matches(
            features[:half], features[half:], threads=threads
        ),
        "bipartite, 16 pairs": lambda: score.bipartite(features, 16, threads=threads),
        "top half": lambda: score.top_k(ranks[0], half),
    }


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description="Time scores of tokens.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows = []
    for n in (197, 257, 577, 1370):
        for name, work in jobs(n, arguments.threads).items():
            rows.append((n, name, microseconds(work, arguments.rounds)))
            rate = ""
            if name == "pagerank, 1 step":
                rate = f"  ({HEADS * n * n * 4 / rows[-1][2] / 1e3:.1f} GB/s)"
            print(f"{n:5}  {name:28} {rows[-1][2]:9.1f} us{rate}", flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("tokens", "work", "microseconds"))
            writer.writerows((n, name, f"{value:.1f}") for n, name, value in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
