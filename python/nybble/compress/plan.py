"""What becomes of each tensor, decided before the first of them is read.

The plan knows name, type and size of everything that will be written, so headers are written first,
sizes are compared with the limits of a file, and mistakes in a recipe show at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from nybble.compress.recipe import Recipe
from nybble.errors import ConfigError
from nybble.formats.compressed_tensors import Module, entries, quantization_config
from nybble.quant.base import Scheme
from nybble.registry import unknown

__all__ = ["BYTES", "Entry", "Item", "Plan", "Shapes", "make"]

Entry = tuple[str, str, tuple[int, ...]]
"""Name, type and shape of a tensor to write."""
Shapes = Mapping[str, tuple[str, Sequence[int]]]
"""Type and shape of the source's tensors."""

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8}
TIED_HEAD = "lm_head"
"""What every family calls its head; a tied one has no tensor of its own to take the name from."""


@dataclass(frozen=True)
class Item:
    """One tensor of the source and what it becomes.

    Parameters
    ----------
    name
        The module's path for what is quantized, else the tensor's name.
    tensor
        The tensor's name in the source.
    role
        What it is for; see :class:`nybble.compress.report.TensorReport`.
    shape
        The shape it is written in.
    scheme
        How it is quantized; ``None`` for floats.
    dtype
        The float type it is written in, if it is not quantized.
    stored
        The type it has in the source.
    transposed
        Whether the source has rows and columns exchanged.
    note
        Why it differs from what was asked for.
    """

    name: str
    tensor: str
    role: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    dtype: str
    stored: str
    transposed: bool = False
    note: str = ""

    def entries(self) -> list[Entry]:
        """Return what is written for it."""
        if self.scheme is None:
            return [(self.tensor, self.dtype, self.shape)]
        rows, cols = self.shape
        return entries(self.name, rows, cols, self.scheme)

    @property
    def size(self) -> int:
        """Bytes of it in the file."""
        return sum(BYTES[dtype] * prod(shape) for _, dtype, shape in self.entries())

    @property
    def weights(self) -> int:
        """Number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """All tensors, in the order in which they are worked on."""

    family: str
    items: tuple[Item, ...]
    modules: tuple[Module, ...]
    tied: bool
    left_out: tuple[str, ...]

    def quantization_config(self) -> dict[str, Any] | None:
        """Return the configuration's section; ``None`` when nothing is quantized."""
        if all(module.scheme is None for module in self.modules):
            return None
        return quantization_config(self.modules, [TIED_HEAD] if self.tied else [])

    def shards(self, limit: int) -> list[list[Item]]:
        """Distribute the items over files of at most `limit` bytes, in order.

        What belongs to one module stays together; one that is larger than a file has its own.
        """
        shards: list[list[Item]] = [[]]
        size = 0
        for item in self.items:
            if shards[-1] and size + item.size > limit:
                shards.append([])
                size = 0
            shards[-1].append(item)
            size += item.size
        return shards


def make(plan: Mapping[str, Any], tensors: Shapes, recipe: Recipe, kind: str) -> Plan:
    """Decide what becomes of each tensor of a model.

    Parameters
    ----------
    plan
        What the checkpoint says there is (:meth:`nybble._nybble.Checkpoint.plan`).
    tensors
        The tensors that are really there.
    recipe
        What to do.
    kind
        ``folder`` or ``gguf``.

    Raises
    ------
    ConfigError
        When tensors are missing or have other shapes, or a pattern of the recipe fits nothing.
    """
    planner = _Planner(tensors, recipe, kind)
    linears, embeddings = plan["linears"], plan["embeddings"]
    # A model that reads images has no tables.
    first = [table["module"] for table in embeddings[:1]]
    planner.select([*(linear["module"] for linear in linears), *first], tied=plan["tied"])
    for table in embeddings[:1]:
        planner.embedding(table)
    for table in embeddings[1:]:
        planner.position(table)
    for linear in linears:
        planner.linear(linear)
    planner.rest(plan["tensors"])
    if planner.problems:
        shown = planner.problems[:20]
        more = len(planner.problems) - len(shown)
        raise ConfigError("; ".join(shown) + (f"; and {more} more" if more else ""))
    needed = {item.tensor for item in planner.items}
    return Plan(
        family=plan["family"],
        items=tuple(planner.items),
        modules=tuple(planner.modules),
        tied=plan["tied"],
        left_out=tuple(name for name in tensors if name not in needed),
    )


class _Planner:
    def __init__(self, tensors: Shapes, recipe: Recipe, kind: str) -> None:
        self.tensors = tensors
        self.recipe = recipe
        self.kind = kind
        self.items: list[Item] = []
        self.modules: list[Module] = []
        self.problems: list[str] = []
        self.ignored: set[str] = set()

    def select(self, modules: Sequence[str], *, tied: bool) -> None:
        """Find the modules that the recipe's patterns name."""
        for pattern in self.recipe.ignore:
            fitting = [module for module in modules if _fits(pattern, module)]
            if not fitting and tied and _fits(pattern, TIED_HEAD):
                fitting = [modules[-1]]  # leaving the head alone means leaving its matrix alone
            if not fitting:
                raise ConfigError("recipe: ignore: " + unknown("module", pattern, modules[-40:]))
            self.ignored.update(fitting)

    def linear(self, linear: Mapping[str, Any]) -> None:
        name, role = linear["module"], linear["role"]
        self._matrix(name, role, "Linear", linear, self.recipe.linear_scheme(role))
        if linear["bias"]:
            self._float(f"{name}.bias", "other", (linear["rows"],))

    def embedding(self, table: Mapping[str, Any]) -> None:
        wanted = self.recipe.matrix_scheme(self.recipe.embedding)
        self._matrix(table["module"], "embedding", "Embedding", table, wanted)

    def position(self, table: Mapping[str, Any]) -> None:
        """Positions are added, one row a token: not worth rounding, and not a product's input."""
        self.modules.append(Module(table["module"], "Embedding", None))
        shape = (table["rows"], table["cols"])
        self._float(f"{table['module']}.weight", "position", shape)

    def rest(self, names: Sequence[str]) -> None:
        have = {item.tensor for item in self.items}
        for name in names:
            if name not in have:
                self._float(name, "other", None)

    def _matrix(
        self, name: str, role: str, kind: str, spec: Mapping[str, Any], wanted: Scheme | None
    ) -> None:
        rows, cols = spec["rows"], spec["cols"]
        if name in self.ignored:
            wanted = None
        scheme = wanted and wanted.fitted(cols)
        self.modules.append(Module(name, kind, scheme))
        transposed = bool(spec.get("transposed", False))
        shape = (cols, rows) if transposed else (rows, cols)
        if scheme is None or wanted is None:
            self._float(f"{name}.weight", role, shape)
            return
        note = ""
        if scheme.group != wanted.group:
            now = "one scale a row" if scheme.group is None else f"groups of {scheme.group}"
            note = f"{now}: groups of {wanted.group} do not divide {cols} columns"
        if stored := self._stored(f"{name}.weight", shape):
            source, size = f"{name}.weight", (rows, cols)
            item = Item(name, source, role, size, scheme, "", stored, transposed, note)
            self.items.append(item)

    def _float(self, tensor: str, role: str, shape: tuple[int, ...] | None) -> None:
        if stored := self._stored(tensor, shape):
            found = tuple(self.tensors[tensor][1])
            dtype = self._float_type(stored, matrix=len(found) > 1)
            self.items.append(Item(tensor, tensor, role, found, None, dtype, stored))

    def _float_type(self, stored: str, *, matrix: bool) -> str:
        if not matrix:
            # What a fold or a tuning makes of a gain or a bias need not be a number of 16 bits.
            changed = self.recipe.folds or self.recipe.tuning is not None
            return stored if stored in ("F16", "BF16") and not changed else "F32"
        if self.recipe.floats != "auto":
            return self.recipe.floats.upper()
        if stored in ("F16", "BF16"):
            return stored
        return "F16" if self.kind == "gguf" else "BF16"

    def _stored(self, tensor: str, shape: tuple[int, ...] | None) -> str | None:
        if tensor not in self.tensors:
            self.problems.append(f"{tensor}: expected a tensor of this name, found none")
            return None
        stored, found = self.tensors[tensor]
        if shape is not None and tuple(found) != shape:
            self.problems.append(f"{tensor}: expected shape {list(shape)}, found {list(found)}")
            return None
        return stored


def _fits(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], module) is not None
        except re.error as error:
            message = f"recipe: ignore: {pattern!r} is not a regular expression: {error}"
            raise ConfigError(message) from None
    return fnmatchcase(module, pattern)
