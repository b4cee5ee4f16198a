"""``python -m benches.recipes``: compress with every recipe, measure perplexity, write it down.

Every finished row is in the CSV at once, and a row that is there is not made again: a run that was
stopped goes on. Calibration and evaluation read the files of ``--data``: WikiText-2's validation
text for evaluation, Wikipedia and C4 for calibration (``text/``, ``calib/``), stories for the model
that writes those.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benches.peers.record import cpu_folder, machine_text
from benches.recipes import table
from benches.recipes.models import MODELS, Prepared

import nybble
from nybble import _nybble
from nybble.calibrate.text import draw
from nybble.compress.recipe import Recipe, read
from nybble.eval import perplexity
from nybble.eval.perplexity import text_tokens
from nybble.runtime.tokenizer import from_folder

_RTN = {"bits": 4, "group": 128}
_FOUR = {"bits": 4, "strategy": "group"}

#: A recipe by the name the table has for it; ``None`` is the model as it is.
RECIPES: dict[str, Any] = {
    "f32": None,
    "w8a8": "w8a8",
    "w8a8-smoothquant": "w8a8-smoothquant",
    "w8a8-static": {"weights": {"bits": 8}, "activations": {"strategy": "tensor"}},
    "w4a16": "w4a16",
    "w4a8": "w4a8",
    "w4a16-g128": {"weights": _RTN, "activations": {"bits": 16}},
    "w4a16-awq": "w4a16-awq",
    "w4a16-gptq": "w4a16-gptq",
    "w4a8-gptq": {"weights": {**_RTN, "method": "gptq"}},
    "w4a16-tuned": "w4a16-tuned",
    "w4a8-tuned": "w4a8-tuned",
    "agile-quant-8": "agile-quant-8",
    "w4a4": {"weights": {"bits": 4, "group": 32}, "activations": _FOUR},
    "agile-quant-4 without TRIP": "agile-quant-4",
    "agile-quant-4": "agile-quant-4",
}


def _row(
    name: str, of: Prepared, model: str, work: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Compress and measure."""
    began = time.perf_counter()
    folder, tokens, bits = of.folder, 0, 32.0
    if RECIPES[name] is not None:
        recipe = _recipe(name, of.context)
        folder = work / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        text: dict[str, Any] = {}
        if recipe.needs_calibration():
            tokens = options.calibration_tokens
            text = {"calibration": of.calibration, "calibration_tokens": tokens}
            text["seed"] = options.seed
        report = nybble.compress(
            of.folder, folder, recipe=recipe, threads=options.threads, progress=False, **text
        )
        bits = report.bits_per_weight
    seconds = time.perf_counter() - began
    found = perplexity(
        nybble.load(folder, threads=options.threads),
        of.text,
        context=of.context,
        max_tokens=options.max_tokens,
    )
    if RECIPES[name] is not None and not options.keep:
        shutil.rmtree(folder)
    return {
        "model": model,
        "engine": "nybble",
        "recipe": name,
        "bits_per_weight": f"{bits:.2f}",
        "calibration_tokens": tokens,
        "calibration_seed": options.seed if tokens else "",
        "windows": found.windows,
        "context": of.context,
        "perplexity": f"{found.perplexity:.4f}",
        "stderr": f"{found.perplexity_stderr or 0:.3f}",
        "seconds": f"{seconds:.0f}",
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "version": _nybble.version(),
        "machine": machine_text(),
        "note": options.note,
    }


def _recipe(name: str, context: int) -> Recipe:
    recipe = read(RECIPES[name])
    folds = () if name.endswith("without TRIP") else recipe.folds
    calibration = dataclasses.replace(recipe.calibration, context=context)
    return dataclasses.replace(recipe, folds=folds, calibration=calibration)


def _export(of: Prepared, file: Path, options: argparse.Namespace) -> None:
    """Write the windows themselves, for programs that are to have the same ones."""
    text = draw(
        of.calibration,
        from_folder(of.folder),
        tokens=options.calibration_tokens,
        context=of.context,
        seed=options.seed,
    )
    model = nybble.load(of.folder, threads=options.threads)
    ids = text_tokens(model, of.text, options.max_tokens)
    whole = len(ids) // of.context * of.context
    evaluation = np.array(ids[:whole], dtype=np.int64).reshape(-1, of.context)
    np.savez(file, calibration=text.windows, evaluation=evaluation)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.recipes",
        description="Perplexity of every recipe on real models. Finished rows are not made again.",
    )
    add = parser.add_argument
    add("--models", type=_words, default=list(MODELS), help=f"of {', '.join(MODELS)} (all)")
    add("--recipes", type=_words, default=list(RECIPES), help=f"of {', '.join(RECIPES)} (all)")
    data = os.environ.get("NYBBLE_DATA")
    add("--data", type=Path, default=data, help="folder of the texts (default: $NYBBLE_DATA)")
    add("--calibration-tokens", type=int, default=24576, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the calibration text (0)")
    add("--max-tokens", type=int, default=8192, metavar="N", help="to evaluate on (%(default)s)")
    add("-t", "--threads", type=int, metavar="N", help="threads (default: all CPUs)")
    work = Path(tempfile.gettempdir()) / "recipes-work"
    add("--work", type=Path, default=work, help="folder for models (%(default)s)")
    results = (
        Path(__file__).parents[1] / "results" / cpu_folder(json.loads(_nybble.doctor())["best"])
    )
    add("--out", type=Path, default=results / "recipes.csv", help="the CSV (%(default)s)")
    add("--note", default="", help="what the record should say about the circumstances")
    add("--keep", action="store_true", help="keep the compressed folders")
    add("--export", action="store_true", help="write the windows of tokens to --work, and stop")
    add("--table", action="store_true", help="print the table of what is there, and stop")
    return parser


def main() -> int:
    """Run the tool."""
    parser = _parser()
    options = parser.parse_args()
    for name, known in (("models", MODELS), ("recipes", RECIPES)):
        for word in getattr(options, name):
            if word not in known:
                parser.error(f"--{name}: expected some of {', '.join(known)}, found {word!r}")
    if options.table:
        print(table.table(table.read(options.out), list(RECIPES)))
        return 0
    if options.data is None:
        parser.error("--data or NYBBLE_DATA is needed")
    for model in options.models:
        work = options.work / model
        work.mkdir(parents=True, exist_ok=True)
        prepared = MODELS[model](options.data, work)
        if options.export:
            _export(prepared, work / "windows.npz", options)
            print(work / "windows.npz")
            continue
        for recipe in options.recipes:
            if _there(options, model, recipe):
                continue
            row = _row(recipe, prepared, model, work, options)
            table.merge(options.out, row)
            print(f"{model} {recipe}: {row['perplexity']} ({row['seconds']} s)", flush=True)
    if not options.export:
        print(table.table(table.read(options.out), list(RECIPES)))
    return 0


def _there(options: argparse.Namespace, model: str, recipe: str) -> bool:
    """Whether a row was made, with this much text."""
    needs = RECIPES[recipe] is not None and bool(read(RECIPES[recipe]).needs_calibration())
    tokens = str(options.calibration_tokens) if needs else "0"
    seed = str(options.seed) if needs else ""
    return any(
        (row["model"], row["engine"], row["recipe"]) == (model, "nybble", recipe)
        and (row["calibration_tokens"], row["calibration_seed"]) == (tokens, seed)
        and int(row["windows"]) == -(-options.max_tokens // int(row["context"]))
        for row in table.read(options.out)
    )


if __name__ == "__main__":
    sys.exit(main())
