"""One linear of 8-bit weights and activations: nybble's kernel beside torch's dynamic quantization.

128 rows through a square matrix, one scale a channel, in turns::

    python benches/linear.py [--rows 128] [--threads 2] [--rounds 5] [--csv FILE]

nybble's part is the Rust bench ``roofline`` (so that no model is around it), torch's is
``torch.ao.quantization.quantize_dynamic`` of one ``Linear``. Times of torch include rounding the
input, a thousandth of the work. Needs torch and cargo.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def torch_seconds(linear: torch.nn.Module, x: torch.Tensor, repeats: int) -> float:
    """The median time of one multiplication."""
    times = []
    with torch.inference_mode():
        linear(x)
        for _ in range(repeats):
            start = time.perf_counter()
            linear(x)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def torch_linear(side: int) -> torch.nn.Module:
    """A linear with int8 weights, a scale a channel, and inputs rounded as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it moves to another package
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        model = torch.nn.Sequential(torch.nn.Linear(side, side, bias=False))
        return quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig})


def nybble_rates(rows: int, threads: int, quick: bool) -> dict[str, float]:
    """Billions of multiplications a second of every tier, and of the best tier's peak."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roofline.csv"
        command = ["cargo", "bench", "-q", "-p", "nybble", "--bench", "roofline", "--"]
        command += ["--csv", str(path), "--filter", "w8a8", "--rows", str(rows)]
        command += ["--quick"] if quick else []
        environment = {**os.environ, "NYBBLE_THREADS": str(threads)}
        subprocess.run(command, cwd=HERE.parent, env=environment, check=True, capture_output=True)
        with path.open() as file:
            found = [row for row in csv.DictReader(file) if row["group"] == row["side"]]
    return {row["isa"]: float(row["gmac_s"]) for row in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small matrix, once")
    parser.add_argument("--csv", type=Path, help="where to write every round")
    args = parser.parse_args()
    side = 256 if args.quick else 4096
    torch.set_num_threads(args.threads)
    linear, x = torch_linear(side), torch.randn(args.rows, side)
    rounds: list[dict[str, float]] = []
    for _ in range(1 if args.quick else args.rounds):
        rates = nybble_rates(args.rows, args.threads, args.quick)
        rates["torch"] = args.rows * side * side / torch_seconds(linear, x, 20) / 1e9
        rounds.append(rates)
        print("  ".join(f"{name} {rate:.1f}" for name, rate in rates.items()), flush=True)
    print(f"\n{args.rows} x {side} x {side}, {args.threads} threads, billions of products a second")
    medians = {name: statistics.median(rates[name] for rates in rounds) for name in rounds[0]}
    for name, rate in medians.items():
        print(f"{name:12} {rate:8.1f}   {rate / medians['torch']:.2f} of torch {torch.__version__}")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["round", *rounds[0]])
            writer.writeheader()
            writer.writerows({"round": i, **rates} for i, rates in enumerate(rounds))


if __name__ == "__main__":
    main()
