"""``nybble methods``: what compression can do, and where it comes from."""

import dataclasses
import inspect
from typing import Any

from nybble.cli import options


def methods(as_json: options.Json = False) -> None:
    """List the compression methods with their papers and defaults, and the recipes."""
    from nybble.cli import output

    found = [
        {**describe(name, cls, kind), "needs": _needs(cls, kind)} for kind, name, cls in _known()
    ]
    recipes = _recipes()
    if as_json:
        output.emit_json({"methods": found, "recipes": recipes})
        return
    table = output.grid(
        "Methods", ("name", "kind", "what it does", "paper", "needs", "defaults"), right=()
    )
    for entry in found:
        defaults = ", ".join(f"{name}={value}" for name, value in entry["defaults"].items())
        output.add(
            table,
            entry["name"],
            entry["kind"],
            entry["summary"],
            entry["paper"],
            ", ".join(entry["needs"]) or "nothing",
            defaults or "no settings",
        )
    known = output.grid("Recipes (for compress --recipe)", ("name", "what it does"), right=())
    for recipe in recipes:
        output.add(known, recipe["name"], recipe["summary"])
    output.show(table, known)


def describe(name: str, cls: type[Any], kind: str) -> dict[str, Any]:
    """Describe a method by its class: its docstring and the defaults of its fields."""
    doc = inspect.getdoc(cls) or ""
    lines = doc.splitlines()
    return {
        "name": name,
        "kind": kind,
        "summary": lines[0] if lines else "",
        "paper": _paragraph(lines, "Paper:"),
        "defaults": {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if field.default is not dataclasses.MISSING
        },
    }


def _paragraph(lines: list[str], start: str) -> str:
    """Return the first sentence or so of the paragraph that begins with ``start``."""
    words: list[str] = []
    for line in lines:
        if line.startswith(start) or words:
            if not line.strip():
                break
            words.append(line.removeprefix(start).strip())
    return " ".join(words).split(". ")[0].rstrip(".")


def _recipes() -> list[dict[str, str]]:
    from nybble.compress.recipe import shipped

    return [{"name": name, "summary": summary} for name, summary in shipped().items()]


def _needs(cls: type[Any], kind: str) -> list[str]:
    """Name what it takes besides the weights; a fold looks at activations, if only their ranges."""
    if kind == "activation sparsity":
        return ["calibration text"]
    if kind == "pruning":
        method = cls()
        shown = "calibration text" if method.gradients else "calibration text or images"
        return [shown, "torch"] if method.reads_text else []
    calibrated = kind in ("fold", "tuning", "recovery") or (kind == "quantization" and cls().needs)
    return ["calibration text", "torch"] if calibrated else []


def _known() -> list[tuple[str, str, type[Any]]]:
    from nybble import prune, quant, sparsity, tokens

    families = (
        ("quantization", quant.METHODS),
        ("fold", quant.FOLDS),
        ("tuning", quant.TUNINGS),
        ("pruning", prune.METHODS),
        ("recovery", prune.RECOVERIES),
        ("activation sparsity", sparsity.METHODS),
        ("token reduction", tokens.METHODS),
    )
    return [(kind, name, cls) for kind, known in families for name, cls in known.items()]
