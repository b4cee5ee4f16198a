"""A plan: which units stay and which weights are zero, and how a model is made to follow it.

Masking keeps shapes and writes zeros; cutting takes what a mask would have zeroed out of the
tensors. Both are the same function of the inputs, which tests hold them to. A plan is stored as
data, ``plan.json`` and ``plan.safetensors``; names in it are looked up in the model at hand and
nowhere else, and a plan that was made for other shapes is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.errors import (
    ArgumentError,
    ConfigError,
    FormatError,
    MissingFileError,
    UnsupportedError,
)
from nybble.prune.graph import LayerParts, UnitGraph
from nybble.registry import unknown
from nybble.runtime.files import read_json

if TYPE_CHECKING:
    import torch

__all__ = ["Cut", "Plan", "apply_masks", "structure"]

VERSION = 1
_MAX_JSON = 64 << 20
_JSON, _TENSORS = "plan.json", "plan.safetensors"

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """What pruning decided.

    Parameters
    ----------
    model
        :attr:`nybble.prune.graph.UnitGraph.digest` of the model it is for.
    keep
        The units that stay, rising indices by the names of their groups. A group that is not named
        stays whole.
    masks
        For single weights, by tensor: ``True`` where one stays. Kept as such, since a weight that
        stays may be zero.
    provenance
        How it came about: method, settings, calibration text, asked and achieved.
    """

    model: str
    keep: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    masks: Mapping[str, Bools] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def check(self, graph: UnitGraph) -> None:
        """Make sure that it is a plan for a model.

        Raises
        ------
        ArgumentError
            When it was made for tensors of other names or shapes, or names what is not there.
        """
        if self.model != graph.digest:
            message = f"plan: expected one for a model of these shapes ({graph.digest[:12]}), "
            message += f"found one for another ({self.model[:12]})"
            raise ArgumentError(message)
        graph.complete(self.keep)
        for name, mask in self.masks.items():
            if name not in graph.shapes:
                raise ArgumentError(unknown("tensor in the plan's masks", name, graph.shapes))
            if mask.shape != graph.shapes[name]:
                message = f"plan: {name}: expected a mask of shape {list(graph.shapes[name])}, "
                message += f"found {list(mask.shape)}"
                raise ArgumentError(message)

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` and ``plan.safetensors`` into a folder, which is made."""
        from nybble import _nybble

        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, tuple[str, npt.NDArray[Any]]] = {}
        for name, kept in self.keep.items():
            arrays[f"keep.{name}"] = ("I64", np.ascontiguousarray(kept, dtype="<i8"))
        for name, mask in self.masks.items():
            arrays[f"mask.{name}"] = ("U8", np.packbits(mask.reshape(-1)))
        entries = [(name, dtype, values.shape) for name, (dtype, values) in arrays.items()]
        writer = _nybble.SafeTensorsWriter(str(folder / _TENSORS), entries)
        for name, (_, values) in arrays.items():
            writer.write(name, values.data)
        writer.finish()
        facts = {
            "plan_version": VERSION,
            "model": self.model,
            "keep": sorted(self.keep),
            "masks": {name: list(mask.shape) for name, mask in self.masks.items()},
            "provenance": dict(self.provenance),
        }
        text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
        (folder / _JSON).write_text(text, encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Plan:
        """Read a plan back.

        Raises
        ------
        FormatError
            When the files contradict each other, or are not such files.
        ConfigError
            When it is of another version.
        """
        facts = read_json(folder / _JSON, _MAX_JSON)
        if facts.get("plan_version") != VERSION:
            message = f"{folder / _JSON}: expected plan_version {VERSION}, "
            message += f"found {facts.get('plan_version')!r:.40}"
            raise ConfigError(message)
        keep, masks = facts.get("keep"), facts.get("masks")
        model, provenance = facts.get("model"), facts.get("provenance")
        if (
            not isinstance(model, str)
            or not isinstance(provenance, dict)
            or not isinstance(keep, list)
            or not isinstance(masks, dict)
            or not all(isinstance(name, str) for name in keep)
            or not all(_is_shape(shape) for shape in masks.values())
        ):
            message = f"{folder / _JSON}: expected model, keep, masks and provenance of a plan"
            raise FormatError(message)
        arrays = _arrays(folder / _TENSORS)
        found = {name: _array(arrays, f"keep.{name}", "int64", None, folder) for name in keep}
        bits = {}
        for name, shape in masks.items():
            count = int(np.prod(shape, dtype=object))
            packed = _array(arrays, f"mask.{name}", "uint8", -(-count // 8), folder)
            bits[name] = np.unpackbits(packed, count=count).astype(bool).reshape(shape)
        return Plan(model, found, bits, provenance)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(length, int) and not isinstance(length, bool) and length >= 0 for length in value
    )


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        message = "reading a plan needs safetensors: pip install 'nybble[compress]'"
        raise UnsupportedError(message) from None
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise MissingFileError(error.errno, error.strerror, str(path)) from None
    except SafetensorError as error:
        message = f"{path}: expected a safetensors file: {error}"
        raise FormatError(message) from None


def _array(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, dtype: str, size: int | None, folder: Path
) -> npt.NDArray[Any]:
    values = arrays.get(name)
    if (
        values is None
        or values.dtype != dtype
        or values.ndim != 1
        or values.size != (values.size if size is None else size)
    ):
        wanted = f"a vector of {dtype}" if size is None else f"{size} of {dtype}"
        found = "nothing" if values is None else f"{values.dtype} {list(values.shape)}"
        message = f"{folder / _TENSORS}: {name}: expected {wanted}, found {found}"
        raise FormatError(message)
    return values


class Cut:
    """Follows a plan, tensor by tensor.

    Parameters
    ----------
    graph
        The model's units.
    plan
        The plan, which is checked.
    """

    def __init__(self, graph: UnitGraph, plan: Plan) -> None:
        plan.check(graph)
        self.graph = graph
        self.plan = plan
        self._axes = graph.kept_axes(plan.keep)
        hidden = plan.keep.get("hidden")
        width = graph.groups["hidden"].size if hidden is not None else 1
        self.widening = 1.0 if hidden is None else width / max(len(hidden), 1)
        """The residual stream's width before over that after."""

    def gone(self, name: str) -> bool:
        """Say whether nothing of a tensor is left."""
        return any(not stays.any() for stays in self._axes.get(name, {}).values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape after the cut."""
        axes = self._axes.get(name, {})
        return tuple(
            int(axes[axis].sum()) if axis in axes else length
            for axis, length in enumerate(self.graph.shapes[name])
        )

    def mask(self, name: str, values: Floats) -> None:
        """Write zeros over what is removed of a tensor, in place."""
        for axis, stays in self._axes.get(name, {}).items():
            np.moveaxis(values, axis, 0)[~stays] = 0
        if name in self.plan.masks:
            values[~self.plan.masks[name]] = 0

    def cut(self, name: str, values: Floats) -> Floats:
        """Return what stays of a tensor; single weights that a mask removes are zeros in it."""
        out = np.asarray(values)
        if name in self.plan.masks:
            out = np.where(self.plan.masks[name], out, np.float32(0))
        for axis, stays in self._axes.get(name, {}).items():
            out = np.compress(stays, out, axis=axis)
        if self.widening != 1 and name in self.graph.norms.gains:
            factor = np.float32(self.widening**0.5)
            plus = np.float32(self.graph.norms.plus_one)
            out = (out + plus) * factor - plus
        return np.ascontiguousarray(out)


def apply_masks(module: torch.nn.Module, graph: UnitGraph, plan: Plan) -> None:
    """Write a plan's zeros into a torch module's parameters, and into what its norms have counted.

    Parameters
    ----------
    module
        A module whose tensors on the CPU have the names of the graph's.
    graph
        Its units.
    plan
        The plan.
    """
    cut = Cut(graph, plan)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in graph.shapes:
            cut.mask(name, tensor.data.numpy())


def structure(
    graph: UnitGraph, plan: Plan, biases: Mapping[int, list[str]] | None = None
) -> list[dict[str, Any]]:
    """Return the shape of each layer that stays, as ``config.json`` has it.

    Parameters
    ----------
    graph
        The model's units.
    plan
        The plan.
    biases
        By the layer's number before the cut, which of ``o_proj`` and ``down_proj`` have gained one.
    """
    keep = graph.complete(plan.keep)
    out = []
    for index, layer in enumerate(graph.layers):
        name = f"layers.{index}"
        if _is_gone(keep, f"{name}.layer"):
            continue
        queries = _queries(layer, keep, name)
        inner = len(keep.get(f"{name}.neuron", range(layer.inner)))
        if _is_gone(keep, f"{name}.attention"):
            queries = []
        entry: dict[str, Any] = {
            "num_attention_heads": sum(queries),
            "num_key_value_heads": len(queries),
            "intermediate_size": 0 if _is_gone(keep, f"{name}.mlp") else inner,
        }
        if len(set(queries)) > 1:
            entry["queries_per_kv"] = queries
        if biases and biases.get(index):
            entry["biases"] = list(biases[index])
        out.append(entry)
    return out


def _is_gone(keep: Mapping[str, npt.NDArray[np.int64]], name: str) -> bool:
    return name in keep and not len(keep[name])


def _queries(layer: LayerParts, keep: Mapping[str, npt.NDArray[np.int64]], name: str) -> list[int]:
    """Return the query heads of each key and value head that stays."""
    queries = list(layer.queries)
    if f"{name}.kv" in keep:
        return [queries[head] for head in keep[f"{name}.kv"]]
    if f"{name}.head" in keep:
        of = np.repeat(np.arange(len(queries)), queries)
        counts = np.bincount(of[keep[f"{name}.head"]], minlength=len(queries))
        return [int(count) for count in counts if count]
    return queries
