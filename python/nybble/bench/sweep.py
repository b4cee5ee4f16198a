"""Sweeps: recipes that prune, over several ratios, each measured the same way.

A point is a recipe at a ratio; ratio 0 is the recipe without its pruning, which is what a pruned
model has to be worth more than. Each point is compressed, measured (perplexity, size, speed), noted
in ``sweep.json`` and removed: a sweep that is stopped goes on behind the last point that is noted.
Speeds of different points are measured at different times; beside each stands how fast memory was
read in that minute.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.bench import speed
from nybble.compress import files, pipeline
from nybble.compress.recipe import Recipe, read
from nybble.errors import ArgumentError, ConfigError, FileError
from nybble.eval.perplexity import perplexity
from nybble.eval.plot import check
from nybble.runtime.files import read_json

__all__ = ["Settings", "draw", "points", "run"]

FILE = "sweep.json"
VERSION = 1
_MAX_JSON = 64 << 20


@dataclass(frozen=True)
class Settings:
    """What is done to each point.

    Parameters
    ----------
    text
        The text of the perplexity.
    calibration
        Text files that recipes look at, if they do.
    context, max_tokens
        Tokens of a window, and of the text; ``None`` for all of it.
    prompt, gen, repeats
        Tokens of the speed tests, and how often each is run.
    threads
        Threads to use.
    """

    text: Path
    calibration: tuple[Path, ...] = ()
    context: int = 1024
    max_tokens: int | None = None
    prompt: int = 512
    gen: int = 64
    repeats: int = 3
    threads: int | None = None


def points(recipes: Sequence[str], ratios: Sequence[float]) -> list[tuple[str, float, Recipe]]:
    """Return name, ratio and recipe of each point, those without pruning first.

    Parameters
    ----------
    recipes
        Names of shipped recipes, or YAML files.
    ratios
        Shares to remove.

    Raises
    ------
    ArgumentError
        When a ratio is out of its range, or there is nothing to do.
    ConfigError
        When a recipe does not prune, or its method takes no ratio.
    """
    if not recipes or not ratios:
        message = f"sweep: expected recipes and ratios, found {len(recipes)} and {len(ratios)}"
        raise ArgumentError(message)
    dense: dict[str, tuple[str, float, Recipe]] = {}
    pruned = []
    for name in recipes:
        recipe = read(name)
        if recipe.prune is None:
            message = f"recipe {name}: expected a key prune, found none: there is nothing to sweep"
            raise ConfigError(message)
        named = recipe.prune
        settings = {"name": named} if isinstance(named, str) else dict(named)
        short = Path(name).stem
        plain = dataclasses.replace(recipe, prune=None)
        dense.setdefault(plain.to_yaml(), (f"{short} without pruning", 0.0, plain))
        for ratio in ratios:
            one = dataclasses.replace(recipe, prune={**settings, "ratio": ratio})
            pruned.append((short, ratio, one))
    return [*dense.values(), *pruned]


def run(
    source: Path,
    todo: Sequence[tuple[str, float, Recipe]],
    out: Path,
    settings: Settings,
    *,
    progress: bool = True,
    on_point: Callable[[str, float, int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Measure points, or take what an earlier run has noted.

    Parameters
    ----------
    source
        The model.
    todo
        What :func:`points` gives.
    out
        A folder for ``sweep.json`` and, while a point is measured, its model.
    settings
        What is done to each.
    progress
        Show progress bars.
    on_point
        Called before each point with its name, its ratio, its number and the number of all.

    Returns
    -------
    list of dict
        A record each: ``recipe``, ``ratio``, ``perplexity``, ``parameters``, ``bytes``,
        ``prefill`` and ``decode`` in tokens/s, ``bandwidth`` in bytes/s, ``achieved``, ``seconds``.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(out)) from None
    noted: dict[str, Any] = read_json(out / FILE, _MAX_JSON, {}).get("points", {})
    shown = {str(file): files.digest(file, lambda: False) for file in _texts(settings)}
    records = []
    for number, (name, ratio, recipe) in enumerate(todo):
        key = _key(source, recipe, settings, shown)
        if key not in noted:
            on_point(name, ratio, number, len(todo))
            noted[key] = {
                "recipe": name,
                "ratio": ratio,
                **_measure(source, recipe, out / f"point-{key}", settings, progress=progress),
            }
            text = json.dumps({"sweep_version": VERSION, "points": noted}, indent=1) + "\n"
            part = out / f"{FILE}.part"
            files.write_text(part, text)
            part.replace(out / FILE)
        records.append(noted[key])
    return records


def _texts(settings: Settings) -> list[Path]:
    return [settings.text, *settings.calibration]


def _key(source: Path, recipe: Recipe, settings: Settings, shown: Mapping[str, str]) -> str:
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files.weight_files(source)
    ]
    rest = {k: v for k, v in dataclasses.asdict(settings).items() if isinstance(v, int)}
    facts = [weights, recipe.to_yaml(), rest, sorted(shown.values())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _measure(
    source: Path, recipe: Recipe, folder: Path, settings: Settings, *, progress: bool
) -> dict[str, Any]:
    from nybble.runtime import load

    report = pipeline.run(
        source,
        folder,
        recipe,
        calibration=settings.calibration if recipe.needs_calibration() else (),
        overwrite=True,
        threads=settings.threads,
        progress=progress,
    )
    try:
        model = load(folder, settings.threads, draft="off")
        found = perplexity(
            model,
            settings.text,
            context=min(settings.context, model.context),
            max_tokens=settings.max_tokens,
        )
        tests = speed.combinations([settings.prompt], [settings.gen])
        bandwidth = speed.bandwidth(settings.threads)
        times = speed.measure(model, tests, repeats=settings.repeats)
        rates = [float(record["avg_ts"]) for record in times]
        del model
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "perplexity": found.perplexity,
        "perplexity_stderr": found.perplexity_stderr,
        "windows": found.windows,
        "parameters": report.parameters,
        "bytes": report.size_after,
        "prefill": rates[0],
        "decode": rates[1],
        "bandwidth": bandwidth,
        "achieved": None if report.prune is None else report.prune["achieved"],
        "seconds": report.seconds,
    }


def draw(records: Sequence[Mapping[str, Any]], file: Path, title: str = "") -> None:
    """Draw perplexity over size and over speed, a line a recipe.

    Parameters
    ----------
    records
        What :func:`run` gives.
    file
        Where to; the ending says in which format.
    title
        What stands above.

    Raises
    ------
    UnsupportedError
        If matplotlib is not installed, or does not know the file's ending.
    FileError
        If the file cannot be written.
    """
    check(file)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes_of = (("bytes", "size, MB", 1e-6), ("decode", "decode, tokens/s", 1.0))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    try:
        for axis, (key, label, unit) in zip(axes, axes_of, strict=True):
            for name in dict.fromkeys(record["recipe"] for record in records):
                mine = [record for record in records if record["recipe"] == name]
                mine.sort(key=lambda record: record["ratio"])
                across = [record[key] * unit for record in mine]
                dense = len(mine) == 1 and mine[0]["ratio"] == 0
                style = "k*" if dense else "o-"
                axis.plot(across, [r["perplexity"] for r in mine], style, label=name)
                for x, record in zip(across, mine, strict=True):
                    if not dense:
                        axis.annotate(f"{record['ratio']:g}", (x, record["perplexity"]), fontsize=7)
            axis.set_xlabel(label)
            axis.set_yscale("log")
            axis.grid(visible=True, which="both", alpha=0.2)
        axes[0].set_ylabel("perplexity")
        axes[0].legend(fontsize=8)
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        figure.savefig(file, dpi=120)
    except OSError as error:
        message = f"{file}: {error.strerror or error}"
        raise FileError(message) from error
    finally:
        plt.close(figure)
