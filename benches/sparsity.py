"""Tokens a second and perplexity of a model whose neurons are skipped, beside the same model dense.

Thresholds are found on one half of the text and judged on the other. Speeds are of one token at a
time behind a short prompt; dense and sparse take turns, of which either is first every other time.
A row has the medians of the speeds, and as ``ratio`` the median of the turns' ratios, with their
quarters; without rounds only perplexities::

    python benches/sparsity.py MODEL TEXT --csv FILE [--tokens 8192] [--threads 2] [--rounds 9]
        [--allocate uniform|greedy] [--methods cats,chess,teal] [--shares 0.3,0.5,0.7]
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import nybble
from nybble.bench.machine import cpu_name
from nybble.calibrate.text import draw
from nybble.eval import perplexity, read_text
from nybble.sparsity import METHODS, find, observe

_NEW = 48


def _turns(
    model: nybble.LanguageModel, prompt: list[int], rounds: int
) -> tuple[dict[str, Any], list[list[float]]]:
    """Return metrics, and of each turn tokens a second, dense and sparse."""
    handle, metrics, turns = model._sparsity, {}, []
    for turn in range(rounds + 1):
        found = [0.0, 0.0]
        for sparse in (0, 1) if turn % 2 else (1, 0):
            model._sparsity = handle if sparse else None
            result = model.generate(prompt, _NEW, ignore_end=True)
            found[sparse] = result.metrics["decode_tokens"] / result.metrics["decode_seconds"]
            metrics = result.metrics.get("sparsity") or metrics
        turns.append(found)
    model._sparsity = handle
    return metrics, turns[1:]  # the first warms up


def _speeds(
    model: nybble.LanguageModel, prompt: list[int], rounds: int
) -> tuple[list[str], dict[str, Any]]:
    """Return the columns of what is skipped and how fast that is, and metrics; or empty ones."""
    if not rounds:
        return [""] * 8, {}
    handle = model._sparsity
    assert handle is not None
    metrics, turns = _turns(model, prompt, rounds)
    medians = [statistics.median(turn[key] for turn in turns) for key in (0, 1)]
    quarters = statistics.quantiles([b / a for a, b in turns], n=4, method="inclusive")
    low, ratio, high = (f"{quarter:.3f}" for quarter in quarters)
    speeds = [f"{median:.1f}" for median in medians]
    skipped = [str(handle.sparse_layers()), str(handle.sparse_linears())]
    return [*skipped, *speeds, ratio, low, high, f"{handle.bytes() / 1e6:.1f}"], metrics


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--allocate", default="uniform")
    parser.add_argument("--methods", default="cats,chess,teal")
    parser.add_argument("--shares", default="0.3,0.5,0.7")
    given = parser.parse_args()
    model = nybble.load(given.model, given.threads, draft="off", sparsity="off")
    text = read_text(given.text)
    judged, shown = text[: len(text) // 2], text[len(text) // 2 :]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(shown)
        file.flush()
        drawn = draw([Path(file.name)], model.tokenizer, tokens=16384, context=512, seed=0)
    seen = observe(model.raw, drawn.windows)

    def surprise() -> float:
        return perplexity(model, judged, max_tokens=given.tokens).perplexity

    prompt = model.tokenizer.encode(judged[:600])
    dense_surprise = surprise()
    head = (
        "model,cpu,threads,method,allocate,sparsity,tokens,perplexity,rise_percent,inactive_neurons,"
        "sparse_layers,layers,sparse_linears,dense_tok_s,tok_s,ratio,ratio_low,"
        "ratio_high,bundle_mb,measured"
    )
    with given.csv.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not given.csv.stat().st_size:
            writer.writerow(head.split(","))
        for name in given.methods.split(","):
            for share in map(float, given.shares.split(",")):
                settings = {"name": name, "sparsity": share, "allocate": given.allocate}
                method = METHODS.make(settings, "sparsity")
                model.sparsify("off")
                thresholds = find(method, model.raw, drawn.windows, seen=seen, progress=True)
                model.sparsify(thresholds, probe=given.rounds > 0)
                found = surprise()
                speeds, metrics = _speeds(model, prompt, given.rounds)
                active = float(np.mean([layer.active for layer in thresholds]))
                inactive = metrics.get("inactive_neurons")
                row = [
                    given.model.name,
                    cpu_name(),
                    model.info["threads"],
                    name,
                    given.allocate,
                    share,
                    given.tokens,
                    f"{found:.3f}",
                    f"{100 * (found / dense_surprise - 1):.2f}",
                    f"{1 - active if inactive is None else inactive:.3f}",
                    speeds[0],
                    model.info["layers"],
                    *speeds[1:],
                    time.strftime("%Y-%m-%d"),
                ]
                print(*row, flush=True)
                writer.writerow(row)
                file.flush()
    print(f"dense perplexity {dense_surprise:.3f}")


if __name__ == "__main__":
    main()
