"""What can be removed from a model: units, and the slices of tensors that go with each.

A :class:`Group` is a row of units of one kind in one place: the neurons of a layer, its query
heads, the layer as a whole. Removing a unit removes, in every :class:`Slice` of its group, some
indices along one axis; all slices of a unit go together, or the model means something else.
Everything that chooses, masks or cuts works on this description alone and knows no family of
models.

:func:`transformer` makes the graph of every decoder and image encoder that nybble reads, from what
the checkpoint says of its parts; :func:`nybble.prune.networks.trace` that of other torch modules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.errors import ArgumentError, UnsupportedError
from nybble.registry import unknown

__all__ = [
    "CHANNEL",
    "KINDS",
    "Builder",
    "Group",
    "LayerParts",
    "Norms",
    "Slice",
    "UnitGraph",
    "transformer",
]

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Keep = Mapping[str, "Sequence[int] | npt.NDArray[np.int64]"]
"""Units that stay, by the names of their groups; a group without an entry stays whole."""

KINDS = {
    "kv": "a key and value head with all its query heads",
    "head": "a query head; a key and value head goes with the last of those that read it",
    "neuron": "a neuron of a feed-forward block",
    "attention": "a layer's attention",
    "mlp": "a layer's feed-forward block",
    "layer": "a layer",
    "hidden": "a channel of the residual stream",
}
"""Kinds of units in transformers."""

CHANNEL = "channel"
"""The kind of unit in other networks: a channel, with all that is added to it and reads it."""

ROLES = ("out", "in", "norm", "whole", "statistic")
"""What a slice's indices are: what a module gives or reads, channels of a norm, all of it, or what
a norm has counted, which is no parameter."""


@dataclass(frozen=True)
class Slice:
    """Where the units of a group are in one tensor.

    Parameters
    ----------
    tensor
        Its name.
    axis
        The axis they lie along.
    units
        The unit that each index of the axis belongs to; -1 for none of the group's. Indices behind
        the last belong to none either.
    role
        One of :data:`ROLES`.
    """

    tensor: str
    axis: int
    units: tuple[int, ...]
    role: str

    @staticmethod
    def regular(tensor: str, axis: int, units: int, width: int, role: str, start: int = 0) -> Slice:
        """Return a slice of `units` runs of `width` indices each, from `start` on."""
        of = [-1] * start + [unit for unit in range(units) for _ in range(width)]
        return Slice(tensor, axis, tuple(of), role)

    def counts(self, size: int) -> npt.NDArray[np.int64]:
        """Return how many indices each of the group's `size` units has."""
        of = np.asarray(self.units)
        return np.bincount(of[of >= 0], minlength=size)


@dataclass(frozen=True)
class Group:
    """Units of one kind in one place.

    Parameters
    ----------
    name
        Unique in the graph, ``layers.3.neuron``.
    kind
        One of :data:`KINDS` in a transformer.
    size
        Number of units.
    slices
        Where they are.
    layer
        The layer they belong to; ``None`` for what runs through all layers.
    follows
        A group whose units decide about these, and for each of its units the unit here: one stays
        as long as any of those that point at it does.
    cost
        Parameters that one unit has.
    """

    name: str
    kind: str
    size: int
    slices: tuple[Slice, ...]
    layer: int | None = None
    follows: tuple[str, tuple[int, ...]] | None = None
    cost: int = 0

    @property
    def weights(self) -> tuple[Slice, ...]:
        """The slices of parameters."""
        return tuple(part for part in self.slices if part.role != "statistic")


@dataclass(frozen=True)
class LayerParts:
    """A transformer's layer as its saved shape describes it.

    Parameters
    ----------
    prefix
        Its path, ``model.layers.3``.
    queries
        Query heads of each key and value head.
    head_dim
        Width of a head.
    inner
        Neurons.
    out, down
        Paths of the linears that end attention and the feed-forward block.
    """

    prefix: str
    queries: tuple[int, ...]
    head_dim: int
    inner: int
    out: str
    down: str


@dataclass(frozen=True)
class Norms:
    """How norms over the residual stream are kept the same when it becomes narrower.

    Zeros in a vector of ``d`` values count in its mean square, removed values do not. With ``n``
    left, gains times ``sqrt(d / n)`` and an epsilon times ``d / n`` give what zeros would give.

    Parameters
    ----------
    gains
        Names of the gains over the residual stream.
    plus_one
        Whether they are stored less one.
    """

    gains: frozenset[str] = frozenset()
    plus_one: bool = False


@dataclass(frozen=True)
class UnitGraph:
    """All groups of a model.

    Parameters
    ----------
    groups
        By name, in the order of the forward pass.
    shapes
        Shapes of the tensors, by name.
    layers
        The layers of a transformer; empty for other networks.
    norms
        What a change of the residual stream's width does to norms.
    statistics
        The tensors that are no parameters.
    whole
        What has no units although it might have, and why, by the module's path.
    """

    groups: Mapping[str, Group]
    shapes: Mapping[str, tuple[int, ...]]
    layers: tuple[LayerParts, ...] = ()
    norms: Norms = field(default_factory=Norms)
    statistics: frozenset[str] = frozenset()
    whole: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors' names and shapes: what a plan for the model is bound to."""
        text = json.dumps(sorted((name, list(shape)) for name, shape in self.shapes.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def of(self, *kinds: str) -> list[Group]:
        """Return the groups of some kinds that decide for themselves.

        Raises
        ------
        ArgumentError
            When there is none of a kind.
        """
        known = {group.kind for group in self.groups.values() if group.follows is None}
        for kind in kinds:
            if kind not in known:
                raise ArgumentError(unknown("kind of unit in this model", kind, known))
        return [g for g in self.groups.values() if g.kind in kinds and g.follows is None]

    def parameters(self, tensors: Iterable[str] | None = None) -> int:
        """Return the number of parameters of some tensors, without names of all."""
        names = set(self.shapes) if tensors is None else set(tensors)
        return sum(prod(self.shapes[name]) for name in names - self.statistics)

    def complete(self, keep: Keep) -> dict[str, npt.NDArray[np.int64]]:
        """Check which units stay, and add what follows from it.

        Raises
        ------
        ArgumentError
            When a group is not known, or an index is not one of its units.
        """
        full: dict[str, npt.NDArray[np.int64]] = {}
        for name, units in keep.items():
            if name not in self.groups:
                raise ArgumentError(unknown("group of units", name, self.groups))
            size = self.groups[name].size
            kept = np.asarray(units, dtype=np.int64).reshape(-1)
            rising = (np.diff(kept) > 0).all()
            if not rising or (kept.size and not 0 <= kept[0] <= kept[-1] < size):
                message = (
                    f"{name}: expected rising indices below {size}, found {kept.tolist()!r:.80}"
                )
                raise ArgumentError(message)
            full[name] = kept
        for group in self.groups.values():
            if group.follows is not None and group.follows[0] in full:
                leader, points = group.follows
                full[group.name] = np.unique(np.asarray(points, dtype=np.int64)[full[leader]])
        return full

    def kept_axes(self, keep: Keep) -> dict[str, dict[int, Bools]]:
        """Return which indices of which axes of which tensors stay; whole axes are not listed."""
        axes: dict[str, dict[int, Bools]] = {}
        for name, units in self.complete(keep).items():
            group = self.groups[name]
            # The last entry answers for -1, indices that belong to no unit.
            kept = np.zeros(group.size + 1, dtype=bool)
            kept[units] = kept[-1] = True
            if kept.all():
                continue
            for part in group.slices:
                length = self.shapes[part.tensor][part.axis]
                stays = axes.setdefault(part.tensor, {}).setdefault(
                    part.axis, np.ones(length, dtype=bool)
                )
                stays[: len(part.units)] &= kept[np.asarray(part.units)]
        return axes

    def parameters_left(self, keep: Keep, tensors: Iterable[str] | None = None) -> int:
        """Return how many parameters a cut leaves of some tensors, without names of all."""
        axes = self.kept_axes(keep)
        names = set(self.shapes) if tensors is None else set(tensors)
        total = 0
        for name in names - self.statistics:
            left = [
                int(axes[name][axis].sum()) if axis in axes.get(name, {}) else length
                for axis, length in enumerate(self.shapes[name])
            ]
            total += prod(left)
        return total


class Builder:
    """Collects groups and what each unit costs.

    Parameters
    ----------
    shapes
        Shapes of the tensors; slices of others are left out.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.groups: dict[str, Group] = {}

    def add(
        self,
        name: str,
        kind: str,
        size: int,
        slices: Iterable[Slice],
        layer: int | None,
        follows: tuple[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Add a group."""
        present = tuple(part for part in slices if part.tensor in self.shapes)
        cost = 0
        for part in present:
            if part.role == "statistic":
                continue
            shape = self.shapes[part.tensor]
            cost += part.units.count(0) * prod(shape) // max(shape[part.axis], 1)
        self.groups[name] = Group(name, kind, size, present, layer, follows, cost)


def transformer(
    plan: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    kinds: Sequence[str] = ("kv", "neuron"),
) -> UnitGraph:
    """Make the graph of a decoder or an image encoder.

    Parameters
    ----------
    plan
        What its parts are (:meth:`nybble._nybble.Checkpoint.plan`).
    shapes
        Shapes of its tensors by name.
    kinds
        Which units are wanted, of :data:`KINDS`. ``kv`` and ``head`` are two ways to divide the
        same tensors: one of them.

    Raises
    ------
    ArgumentError
        When a kind is not known, or two exclude each other.
    UnsupportedError
        When the family cannot lose units of a kind without becoming another function.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ArgumentError(unknown("kind of unit", kind, KINDS))
    if "kv" in kinds and "head" in kinds:
        message = "units: expected kv or head, found both: they divide the same tensors"
        raise ArgumentError(message)
    used = _used(plan, shapes)
    build = Builder(used)
    linears = {linear["module"]: linear for linear in plan["linears"]}
    layers = []
    for index, layer in enumerate(plan["layers"]):
        layers.append(_layer(build, plan, layer, linears, index, kinds))
    norms = Norms()
    if "hidden" in kinds:
        norms = _hidden(build, plan, linears)
    return UnitGraph(build.groups, used, tuple(layers), norms)


def _used(
    plan: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    names = {f"{table['module']}.weight" for table in plan["embeddings"]}
    for linear in plan["linears"]:
        names.update((f"{linear['module']}.weight", f"{linear['module']}.bias"))
    names.update(plan["tensors"])
    return {name: tuple(shape) for name, shape in shapes.items() if name in names}


def _layer(
    build: Builder,
    plan: Mapping[str, Any],
    layer: Mapping[str, Any],
    linears: Mapping[str, Mapping[str, Any]],
    index: int,
    kinds: Sequence[str],
) -> LayerParts:
    attention, mlp = layer["attention"], layer["mlp"]
    heads, kv_heads, dim = (attention[key] for key in ("heads", "kv_heads", "head_dim"))
    share = heads // kv_heads
    name = f"layers.{index}"
    rows = _rows(linears)
    inner = linears[mlp["down"]]["cols"]
    out, down = attention["out"], mlp["down"]
    prefix = out[: out.index(f".{index}.") + len(f".{index}")]
    if {"kv", "head"} & set(kinds):
        if plan["family"] == "bloom":
            message = "bloom: the bias of a head's attention depends on its number among all heads:"
            message += " without some of them the others would attend otherwise; cut neurons"
            raise UnsupportedError(message)
        columns = _columns(linears, out)
        if attention["layout"] != "separate":
            fused = attention["qkv"][0]
            if attention["layout"] == "stacked":
                starts = [0, heads * dim, 2 * heads * dim]
                parts = [s for start in starts for s in rows(fused, heads, dim, start)]
            else:
                parts = rows(fused, heads, 3 * dim)
            kind = "kv" if "kv" in kinds else "head"
            build.add(f"{name}.{kind}", kind, heads, [*parts, *columns(heads, dim)], index)
        elif "kv" in kinds or share == 1:
            q, k, v = attention["qkv"]
            parts = [
                *rows(q, kv_heads, share * dim),
                *rows(k, kv_heads, dim),
                *rows(v, kv_heads, dim),
                *columns(kv_heads, share * dim),
            ]
            kind = "kv" if "kv" in kinds else "head"
            build.add(f"{name}.{kind}", kind, kv_heads, parts, index)
        else:
            q, k, v = attention["qkv"]
            parts = [*rows(q, heads, dim), *columns(heads, dim)]
            build.add(f"{name}.head", "head", heads, parts, index)
            points = tuple(head // share for head in range(heads))
            parts = [*rows(k, kv_heads, dim), *rows(v, kv_heads, dim)]
            build.add(f"{name}.read", "kv", kv_heads, parts, index, (f"{name}.head", points))
    if "neuron" in kinds:
        makers = [linear for linear in (mlp["gate"], mlp["up"]) if linear]
        parts = [part for linear in makers for part in rows(linear, inner, 1)]
        build.add(
            f"{name}.neuron", "neuron", inner, [*parts, *_columns(linears, down)(inner, 1)], index
        )
    _blocks(build, plan, layer, index, prefix, kinds)
    return LayerParts(prefix, (share,) * kv_heads, dim, inner, out, down)


def _rows(linears: Mapping[str, Mapping[str, Any]]) -> Any:
    def rows(linear: str, units: int, width: int, start: int = 0) -> list[Slice]:
        axis = 1 if linears[linear]["transposed"] else 0
        return [
            Slice.regular(f"{linear}.weight", axis, units, width, "out", start),
            Slice.regular(f"{linear}.bias", 0, units, width, "out", start),
        ]

    return rows


def _columns(linears: Mapping[str, Mapping[str, Any]], linear: str) -> Any:
    axis = 0 if linears[linear]["transposed"] else 1

    def columns(units: int, width: int) -> list[Slice]:
        return [Slice.regular(f"{linear}.weight", axis, units, width, "in")]

    return columns


def _blocks(
    build: Builder,
    plan: Mapping[str, Any],
    layer: Mapping[str, Any],
    index: int,
    prefix: str,
    kinds: Sequence[str],
) -> None:
    """Add the units that are a whole block or a whole layer."""
    wanted = [kind for kind in ("attention", "mlp", "layer") if kind in kinds]
    if not wanted:
        return
    for norms in (layer["attention_norms"], layer["mlp_norms"]):
        if norms["pre"] is None or norms.get("residual_is_normed"):
            message = f"{plan['family']}: a norm stands in the residual stream of layer {index}: "
            message += "without its blocks a layer would still change what passes through"
            raise UnsupportedError(message)
    mine = [tensor for tensor in build.shapes if tensor.startswith(f"{prefix}.")]
    ends = {"attention": layer["attention"]["out"], "mlp": layer["mlp"]["down"]}
    of = {
        kind: [t for t in mine if t.startswith(f"{end.rpartition('.')[0]}.")]
        for kind, end in ends.items()
    }
    for kind, norms in (("attention", layer["attention_norms"]), ("mlp", layer["mlp_norms"])):
        for norm in (norms["pre"], norms.get("post")):
            of[kind] += [t for t in mine if norm and t.startswith(f"{norm['module']}.")]
    of["layer"] = mine
    for kind in wanted:
        parts = [Slice(t, 0, (0,) * build.shapes[t][0], "whole") for t in of[kind]]
        build.add(f"layers.{index}.{kind}", kind, 1, parts, index)


def _hidden(
    build: Builder, plan: Mapping[str, Any], linears: Mapping[str, Mapping[str, Any]]
) -> Norms:
    if plan["family"] not in ("llama", "mistral", "qwen2", "qwen3"):
        message = f"{plan['family']}: its residual stream cannot become narrower: "
        message += "what its norms or its embedding do depends on the width in another way than "
        message += "that of an RMS norm, so no choice of weights keeps the function"
        raise UnsupportedError(message)
    table = plan["embeddings"][0]
    width = table["cols"]
    parts = [Slice.regular(f"{table['module']}.weight", 1, width, 1, "out")]
    for name, linear in linears.items():
        if linear["role"] in ("qkv", "gate_up", "head"):
            parts.append(Slice.regular(f"{name}.weight", 1, width, 1, "in"))
        else:
            parts.append(Slice.regular(f"{name}.weight", 0, width, 1, "out"))
            parts.append(Slice.regular(f"{name}.bias", 0, width, 1, "out"))
    gains = [
        name
        for name in plan["tensors"]
        if build.shapes.get(name) == (width,)
        and name.removesuffix(".weight").endswith("norm")
        and not name.endswith((".q_norm.weight", ".k_norm.weight"))
    ]
    parts += [Slice.regular(name, 0, width, 1, "norm") for name in gains]
    build.add("hidden", "hidden", width, parts, None)
    return Norms(frozenset(gains))
