"""How fast is an image encoder here, beside other engines, and with patches left out?

Usage::

    python -m benches.vision.speed --onnx vit_s_focus.onnx [--data DATA] [--python OTHER/bin/python]
        [--rounds 5] [--sizes 224,518] [--batches 1,8] [--arms TEXT,TEXT] [--quick]

DINOv2-S, out of the ONNX file (see :mod:`benches.vision.models`), computes the same images to their
last hidden states in every engine: nybble (f32, w8a8, w7a7, w4a8, and w8a8 with 35 % of the
arithmetic pruned at random, by Zero-TPrune and by ToMe), PyTorch (f32, bf16), ONNX Runtime (f32,
dynamic int8) and OpenVINO (f32, bf16, int8 by NNCF). Each is a process of its own; they take turns,
so what else happens on the machine happens to all. Medians over the rounds are printed, times are
kept in ``--work`` as they are measured, and the same command goes on where it was interrupted. With
``--csv`` the medians are written there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from benches.peers.record import machine_text
from benches.peers.rounds import Worker, WorkerError
from benches.vision.engines import ARMS, Arm
from benches.vision.models import dinov2_saliency
from benches.vision.parity import pictures

import nybble

REDUCTION = 0.35
ZERO = "nybble w8a8 zero_tprune"
Key = tuple[str, int, int]


class Times:
    """Nanoseconds by arm, size and batch, and those in which patches were chosen, in a file."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[Key, list[int]] = {}
        self.choosing: dict[Key, list[int]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        if not rows or rows[0] != header:
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            rows = [header]
        for arm, size, batch, nanoseconds, choosing in rows[1:]:
            self._append((arm, size, batch), nanoseconds, choosing)

    def _append(self, key: Key, nanoseconds: int, choosing: int | None) -> None:
        self.found.setdefault(key, []).append(nanoseconds)
        if choosing is not None:
            self.choosing.setdefault(key, []).append(choosing)

    def add(self, key: Key, nanoseconds: int, choosing: int | None) -> None:
        """Keep a time, and the part of it in which patches were chosen."""
        self._append(key, nanoseconds, choosing)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([*key, nanoseconds, choosing]) + "\n")


def prepared(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return the float32 folder and the file of prepared images."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    source = work / "dinov2"
    if not source.exists():
        dinov2_saliency(arguments.onnx, source)
    file = work / f"pixels-{'images' if arguments.data else 'noise'}.npz"
    if not file.exists():
        model = nybble.load(source)
        arrays = {}
        for size in (224, 518):
            if arguments.data:
                archive = arguments.data / "vision" / "imagenet_sample_200.zip"
                some = [image for _, image in pictures(archive, "", 16)]
                arrays[str(size)] = model.preprocess(some, size)
            else:
                numbers = np.random.default_rng(size)
                arrays[str(size)] = numbers.standard_normal((16, 3, size, size), dtype=np.float32)
        np.savez(file, **arrays)
    return source, file


def measure(arguments: argparse.Namespace) -> tuple[Times, dict[str, str]]:
    """Take turns until every arm has its rounds."""
    source, pixels = prepared(arguments)
    keys = [(size, batch) for size in arguments.sizes for batch in arguments.batches]
    arms = [arm for arm in ARMS if any(part in arm.name for part in arguments.arms)]
    header = {"nybble": nybble.__version__, "threads": arguments.threads, "pixels": pixels.name}
    times = Times(arguments.work / "times.jsonl", header)
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}

    def missing(arm: Arm, key: tuple[int, int], rounds: int) -> bool:
        return len(times.found.get((arm.name, *key), [])) < rounds

    def start(arm: Arm) -> Worker:
        python = sys.executable if arm.engine == "nybble" else arguments.python
        task = {
            "arm": arm.name,
            "source": str(source),
            "work": str(arguments.work),
            "pixels": str(pixels),
            "threads": arguments.threads,
            "reduction": REDUCTION,
            "sizes": arguments.sizes,
        }
        log = arguments.work / "logs" / f"{arm.name.replace(' ', '-')}.log"
        worker = Worker(
            [json.dumps(task)], log, python, arguments.threads, "benches.vision.engines"
        )
        worker.answer(arguments.timeout)
        return worker

    try:
        for number in range(1, arguments.rounds + 1):
            for arm in arms:
                todo = [key for key in keys if missing(arm, key, number)]
                if not todo or arm.name in failed:
                    continue
                try:
                    if arm.name not in workers:
                        workers[arm.name] = start(arm)
                        for size, batch in keys:
                            question = {"size": size, "batch": batch, "warm": True}
                            workers[arm.name].ask(question, arguments.timeout)
                    for size, batch in todo:
                        question = {"size": size, "batch": batch, "warm": False}
                        answer = workers[arm.name].ask(question, arguments.timeout)
                        key = (arm.name, size, batch)
                        times.add(key, answer["nanoseconds"], answer["choosing"])
                except WorkerError as error:
                    failed[arm.name] = str(error)
                    print(f"{arm.name}: {error}", file=sys.stderr, flush=True)
            print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return times, failed


def table(times: Times, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print images a second and what the bars are about; return the rows."""
    rows = []
    for size in arguments.sizes:
        for batch in arguments.batches:
            speeds = {
                arm: batch / (statistics.median(found) / 1e9)
                for (arm, s, b), found in times.found.items()
                if (s, b) == (size, batch)
            }
            print(f"\n{size} pixels, {batch} at a time: images a second")
            for arm, speed in speeds.items():
                count = len(times.found[arm, size, batch])
                print(f"  {arm:28} {speed:8.2f}   ({count} rounds)")
                rows.append({"arm": arm, "size": size, "batch": batch, "images_per_s": speed})
            peers = {arm: speed for arm, speed in speeds.items() if not arm.startswith("nybble")}
            best = max(peers, key=lambda arm: peers[arm], default="")
            for form in ("w8a8", "w7a7"):
                if best and (ours := speeds.get(f"nybble {form}")):
                    print(f"  {form} beside the best peer ({best}): {ours / peers[best]:.2f}")
            ours = speeds.get("nybble w8a8")
            zero = speeds.get(ZERO)
            choosing = times.choosing.get((ZERO, size, batch))
            if ours and zero and choosing:
                print(f"  Zero-TPrune beside dense: {zero / ours:.2f}")
                share = statistics.median(choosing) / 1e9 * ours / batch
                print(f"  scoring and selection, of the dense forward: {share:.1%}")
    return rows


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description="Time an image encoder beside other engines.")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    work = Path(tempfile.gettempdir()) / "nybble-vision-speed"
    add = parser.add_argument
    add("--onnx", type=Path, required=True, help="the DINOv2 saliency model")
    add("--data", type=Path, help="the folder with vision/; without it images are noise")
    add("--work", type=Path, default=work, help="for models and times (%(default)s)")
    add("--python", default=sys.executable, help="interpreter with the other engines")
    add("--arms", type=lambda text: text.split(","), default=[""], help="parts of arms' names")
    add("--sizes", type=numbers, default=[224, 518])
    add("--batches", type=numbers, default=[1, 8])
    add("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("-r", "--rounds", type=int, default=5)
    add("--timeout", type=float, default=900, help="seconds for opening, or for a turn")
    add("--quick", action="store_true", help="one round of 224 pixels: does every engine run?")
    add("--csv", type=Path, help="write the medians there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.sizes, arguments.batches = 1, [224], [1]
    times, failed = measure(arguments)
    print(f"{machine_text()}; nybble {nybble.__version__}, {arguments.threads} threads")
    rows = table(times, arguments)
    for arm, reason in failed.items():
        print(f"{arm} failed: {reason}")
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["arm", "size", "batch", "images_per_s"])
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
