"""A picture of several models side by side: a panel for every figure, a bar for every model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nybble.errors import FileError, MissingFileError, UnsupportedError
from nybble.eval.compare import Measured

_FIRST = "#33475b"
_OTHERS = "#b3261e"
#: Panels in a row.
_ACROSS = 3

#: A figure and its error; ``None`` for the reference, which is not compared with itself.
_Entry: TypeAlias = tuple[float, float | None] | None


@dataclass(frozen=True)
class _Panel:
    """One figure of all models."""

    title: str
    unit: str
    values: Sequence[_Entry]
    digits: int = 2
    chance: float | None = None


def check(file: str | Path) -> None:
    """Make sure that a picture can be written, before there is anything to draw.

    Raises
    ------
    UnsupportedError
        If matplotlib is not installed, or does not know the file's ending.
    MissingFileError
        If the folder the file should be in does not exist.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        msg = "a plot needs matplotlib, which is not installed: pip install 'nybble[eval]'"
        raise UnsupportedError(msg) from error
    file = Path(file)
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.lower().lstrip(".") not in known:
        msg = f"{file}: expected one of the endings {', '.join(known)}, found {file.suffix!r}"
        raise UnsupportedError(msg)
    if not file.parent.is_dir():
        msg = f"{file.parent}: no such folder"
        raise MissingFileError(msg)


def draw(models: Sequence[Measured], file: str | Path, title: str = "", foot: str = "") -> None:
    """Write the picture; the first model is drawn in grey, what is compared with it in red.

    Parameters
    ----------
    models
        What was measured, at least one model.
    file
        Where to; the ending says in which format (``.png``, ``.svg``, ``.pdf``).
    title, foot
        What stands above and below.

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

    panels = _panels(models)
    across = min(_ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(4.1 * across + 1.2, (0.32 * len(models) + 1.0) * down + 0.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    try:
        for axis, panel in zip(axes.flat, panels, strict=False):
            _bars(axis, panel)
        for axis in list(axes.flat)[len(panels) :]:
            axis.axis("off")
        for axis in axes[:, 0]:
            axis.set_yticks(range(len(models)), [model.name for model in models])
            axis.set_ylim(len(models) - 0.4, -0.6)  # the first model on top
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        figure.supxlabel(foot, fontsize=8, color="#555555", x=0.01, ha="left")
        figure.savefig(file, dpi=120)
    except OSError as error:
        msg = f"{file}: {error.strerror or error}"
        raise FileError(msg) from error
    finally:
        plt.close(figure)


def _panels(models: Sequence[Measured]) -> list[_Panel]:
    found: list[_Panel] = []
    values: list[_Entry]
    texts = [model.perplexity for model in models]
    if any(texts):
        values = [None if p is None else (p.perplexity, p.perplexity_stderr) for p in texts]
        found.append(_Panel("perplexity", "lower is better", values))
    near = [model.agreement for model in models]
    if any(near):
        values = [None if a is None else (a.kl, a.kl_stderr) for a in near]
        found.append(_Panel("KL from the reference", "nats a token", values, 4))
        values = [None if a is None else _percent(a.top1, a.top1_stderr) for a in near]
        found.append(_Panel("same likeliest token", "% of tokens", values, 1))
    for index, task in enumerate(models[0].accuracy):
        scores = [model.accuracy[index] for model in models]
        values = [_percent(score.value, score.stderr) for score in scores]
        unit = f"% of {task.items} questions (dotted: chance)"
        found.append(_Panel(f"{task.task}, {task.metric}", unit, values, 1, 100 * task.chance))
    values = [(model.bytes_on_disk / 1e6, None) for model in models]
    found.append(_Panel("size on disk", "MB", values, 1))
    values = [(model.tokens_per_second, None) for model in models]
    found.append(_Panel("speed of the evaluation", "tokens a second", values, 0))
    return found


def _percent(share: float, error: float | None) -> _Entry:
    return 100 * share, None if error is None else 100 * error


def _bars(axis: Any, panel: _Panel) -> None:
    ends = [value + (error or 0) for value, error in filter(None, panel.values)]
    longest = max(ends, default=1.0) or 1.0
    for place, entry in enumerate(panel.values):
        if entry is None:
            axis.text(0, place, " reference", va="center", fontsize=8, color="#888888")
            continue
        value, error = entry
        axis.barh(place, value, 0.72, color=_OTHERS if place else _FIRST)
        if error:
            axis.plot([value - error, value + error], [place] * 2, color="#111111", linewidth=0.9)
        text = f"{value:.{panel.digits}f}"
        axis.text(value + (error or 0) + longest * 0.015, place, text, va="center", fontsize=8)
    if panel.chance is not None:
        axis.axvline(panel.chance, color="#888888", linestyle=":", linewidth=1.2)
    axis.set_xlim(0, longest * 1.18)
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_xlabel(panel.unit, fontsize=8)
    axis.tick_params(axis="y", labelsize=9, length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#e5e5e5")
    axis.set_axisbelow(True)
