"""The passes over a model's layers in which weights change.

Both give tensors as they are done, so that they can be written and forgotten: at no time are there
two copies of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.calibrate.layer import Layer
from nybble.calibrate.stats import InputStats, product
from nybble.errors import FormatError
from nybble.prune.base import Sparse, Structured
from nybble.prune.evidence import Subject
from nybble.prune.graph import UnitGraph
from nybble.prune.plan import Cut, Plan

__all__ = ["Changes", "compensate", "sparsify"]

# Tokens that tell a linear's error: with all that are kept it took a tenth of Wanda's time.
_ERROR_ROWS = 256

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass
class Changes:
    """What a pass leaves besides tensors.

    Parameters
    ----------
    errors
        By linear: relative squared error of its outputs on some of the calibration inputs.
    biases
        By layer: which of ``o_proj`` and ``down_proj`` have gained a bias.
    masks
        By tensor: which weights stay.
    """

    errors: dict[str, float] = field(default_factory=dict)
    biases: dict[int, list[str]] = field(default_factory=dict)
    masks: dict[str, Bools] = field(default_factory=dict)


def compensate(
    subject: Subject,
    windows: npt.NDArray[Any],
    graph: UnitGraph,
    plan: Plan,
    method: Structured,
    changes: Changes,
    advance: Callable[[], object] = lambda: None,
) -> Iterator[tuple[str, Floats]]:
    """Compensate linears that lose inputs; give their tensors, cut.

    Parameters
    ----------
    subject
        The model before the cut.
    windows
        Token ids ``[windows, context]``, or images (:meth:`nybble.calibrate.layers.Walk.embed`).
    graph, plan
        Its units, and which stay.
    method
        Says how.
    changes
        Filled.
    advance
        Called after each layer.
    """
    walk = subject.walk()
    hidden = walk.embed(windows)
    cut = Cut(graph, plan)
    axes = graph.kept_axes(plan.keep)
    needs = method.compensator.needs | {"sample"}
    for index in range(len(walk)):
        layer = walk.layer(index)
        dense = _dense(layer, hidden, needs) if method.propagate == "dense" else None
        for stage in (1, 3):
            (linear,) = layer.stages[stage]
            stats = _see(layer, stage, hidden, needs) if dense is None else dense[stage]
            name, weight = f"{linear}.weight", layer.weight(linear)
            stored = layer.tensor(name)
            assert stored is not None
            axis = 0 if _transposed(subject, linear) else 1
            stays = axes.get(name, {}).get(axis, np.ones(weight.shape[1], dtype=bool))
            if stays.all():
                continue
            before = np.array(weight)
            after, bias = method.compensator.fix(before, stays, stats)
            if not np.isfinite(after).all():
                message = f"{linear}: expected finite weights after compensation, found others"
                raise FormatError(message)
            changes.errors[linear] = _error(before, after, bias, stats)
            if dense is None:
                weight[...] = after
                fixed: Floats = stored
            else:
                fixed = after.T if axis == 0 else after
            yield name, cut.cut(name, fixed)
            if bias is not None:
                old = layer.tensor(f"{linear}.bias")
                if old is None:
                    leaf = linear.rpartition(".")[2]
                    changes.biases.setdefault(index, []).append(leaf)
                total = bias if old is None else old + bias
                if dense is None:
                    layer.set_bias(linear, total)
                yield f"{linear}.bias", total.astype(np.float32)
        if dense is None and index + 1 < len(walk):
            layer.outputs(hidden)
        del layer
        walk.drop(index)
        advance()


def sparsify(
    subject: Subject,
    windows: npt.NDArray[Any] | None,
    graph: UnitGraph,
    method: Sparse,
    fisher: Mapping[str, Floats],
    changes: Changes,
    advance: Callable[[], object] = lambda: None,
) -> Iterator[tuple[str, Floats]]:
    """Take single weights out of the layers' linears; give their tensors.

    Parameters
    ----------
    subject
        The model.
    windows
        Token ids ``[windows, context]`` or images, if the method looks at what linears read.
    graph
        The model's tensors.
    method
        Says which.
    fisher
        Sums of squared gradients, if it looks at those.
    changes
        Filled.
    advance
        Called after each layer.
    """
    for found in _stages(subject, windows, method, advance):
        for linear, (values, stats) in found.items():
            name = f"{linear}.weight"
            transposed = _transposed(subject, linear)
            squares = fisher.get(name)
            if squares is not None and transposed:
                squares = squares.T
            before = np.array(values)
            if not np.isfinite(before).all():
                message = (
                    f"{name}: expected finite weights, found {before[~np.isfinite(before)][0]}"
                )
                raise FormatError(message)
            after, stays = method.prune(linear, before, stats, squares, subject.threads)
            values[...] = after
            if stats is not None:
                changes.errors[linear] = _error(before, after, None, stats)
            changes.masks[name] = np.ascontiguousarray(stays.T if transposed else stays)
            yield name, np.ascontiguousarray(after.T if transposed else after)


def _stages(
    subject: Subject,
    windows: npt.NDArray[Any] | None,
    method: Sparse,
    advance: Callable[[], object],
) -> Iterator[dict[str, tuple[Floats, InputStats | None]]]:
    """Give the linears that read the same, and what they read, in the order of the forward pass.

    What is written into them is what the later ones see. The authors of Wanda and SparseGPT take
    what all of a layer's linears read before any of them changes; that costs a second run of each
    layer, and knows less of the pruned model.
    """
    if windows is None or not method.needs:
        for layer in subject.parts["layers"]:
            attention, mlp = layer["attention"], layer["mlp"]
            gate = [mlp["gate"]] if mlp["gate"] else []
            names = [*attention["qkv"], attention["out"], *gate, mlp["up"], mlp["down"]]
            found: dict[str, tuple[Floats, InputStats | None]] = {}
            for name in names:
                values = subject.weight(f"{name}.weight")
                found[name] = (values.T if _transposed(subject, name) else values, None)
            yield found
            advance()
        return
    walk = subject.walk()
    hidden = walk.embed(windows)
    needs = method.needs | {"sample"}
    for index in range(len(walk)):
        layer = walk.layer(index)
        for stage, names in enumerate(layer.stages):
            stats = _see(layer, stage, hidden, needs)
            yield {name: (layer.weight(name), stats) for name in names}
        if index + 1 < len(walk):
            layer.outputs(hidden)
        layer.forget()
        del layer
        walk.drop(index)
        advance()


def _see(layer: Layer, stage: int, hidden: list[Any], needs: Collection[str]) -> InputStats:
    name = layer.stages[stage][0]
    stats = InputStats(name, layer.weight(name).shape[1], needs)
    for _, inputs in layer.inputs(stage, hidden):
        stats.update(inputs)
    return stats


def _dense(layer: Layer, hidden: list[Any], needs: Collection[str]) -> dict[int, InputStats]:
    """Run the layer as it is; return what its last linears read."""
    stats = {}
    for stage in (1, 3):
        name = layer.stages[stage][0]
        stats[stage] = InputStats(name, layer.weight(name).shape[1], needs)
    for window, inputs, output in layer.trace(hidden):
        for stage, of in stats.items():
            of.update(inputs[stage])
        hidden[window] = output
    return stats


def _transposed(subject: Subject, linear: str) -> bool:
    return any(
        entry["module"] == linear and entry["transposed"] for entry in subject.parts["linears"]
    )


def _error(before: Floats, after: Floats, bias: Floats | None, stats: InputStats) -> float:
    sample = stats.sample
    sample = sample[:: max(1, len(sample) // _ERROR_ROWS)]
    wanted, change = product(sample, before.T), product(sample, (after - before).T)
    if bias is not None:
        change += bias
    size = float(np.square(wanted).sum(dtype=np.float64))
    return float(np.square(change).sum(dtype=np.float64)) / size if size > 0 else 0.0
