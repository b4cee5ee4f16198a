"""What methods of activation sparsity are made of: values seen in calibration, and thresholds.

The values come from nybble's own runtime and the very weights that will run, rounded ones included,
so a folder of any kind can be calibrated, without torch.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.errors import ArgumentError
from nybble.registry import unknown

if TYPE_CHECKING:
    from nybble import _nybble

__all__ = [
    "INPUTS",
    "Seen",
    "SparsityMethod",
    "Thresholds",
    "allocation",
    "observe",
    "share",
    "write",
]

INPUTS = ("q", "qkv", "out", "gate_up", "down")
"""The inputs that may have a threshold: of queries alone, of queries, keys and values, of the
attention's output projection, of gate and up, and of down."""

FILE = "sparsity.safetensors"
"""The file of a model folder that has the thresholds."""

_CHUNK = 256  # tokens observed at once
_MEMORY = 1 << 30  # bytes of values kept

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Thresholds:
    """What is taken for zero in a layer.

    Parameters
    ----------
    neurons
        For each neuron of the feed-forward block the largest magnitude of the activation function's
        value that counts as 0, ``[inner]``; ``None`` for no thresholds.
    inputs
        The same for single values of an input, by the names in :data:`INPUTS`; what is not named
        has none.
    active
        Share of the neurons that calibration saw above their thresholds.
    """

    neurons: Floats | None = None
    inputs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    active: float = 1.0

    def raw(self) -> tuple[Floats | None, list[float], float]:
        """Return it as the extension takes it."""
        for name in self.inputs:
            if name not in INPUTS:
                raise ArgumentError(unknown("input of a threshold", name, INPUTS))
        neurons = None if self.neurons is None else np.ascontiguousarray(self.neurons, np.float32)
        return neurons, [float(self.inputs.get(name, 0.0)) for name in INPUTS], float(self.active)


@dataclass
class Seen:
    """What calibration saw of a layer.

    Parameters
    ----------
    act
        The activation function's values ``[tokens, inner]``, of some tokens.
    up
        With a gate, what these are multiplied by ``[tokens, inner]``.
    up_mean
        Mean magnitudes of that, over all tokens ``[inner]``; ones without a gate.
    inputs
        What ``qkv``, ``out`` and ``gate_up`` read ``[tokens, width]``.
    """

    act: Floats
    up: Floats | None
    up_mean: npt.NDArray[np.float64]
    inputs: dict[str, Floats]

    @property
    def inner(self) -> Floats:
        """What ``down`` reads ``[tokens, inner]``."""
        return self.act if self.up is None else self.act * self.up


class SparsityMethod(ABC):
    """A paper's way to find thresholds. Subclasses are frozen dataclasses of its settings."""

    sparsity: float
    allocate: str

    @abstractmethod
    def fit(self, seen: Seen) -> Thresholds:
        """Return the thresholds of a layer."""


def observe(
    model: _nybble.Model, windows: npt.NDArray[np.integer[Any]], tokens: int = 1024
) -> list[Seen]:
    """Run a model over text and keep what its layers compute.

    Parameters
    ----------
    model
        The extension's model.
    windows
        Token ids ``[windows, context]``.
    tokens
        Of how many tokens values are kept, evenly spread; fewer where they would take more than
        1 GiB. Means are over all of them.
    """
    keep: list[dict[str, list[Floats]]] = []
    total: list[npt.NDArray[np.float64]] = []
    step, count = 0, 0
    for chunk, session in _chunks(model, windows):
        layers = session.observe(chunk)
        if not step:
            row = sum(part.shape[1] * 4 for layer in layers for part in layer.values())
            wanted = max(min(tokens, _MEMORY // row), 64)
            step = max(1, math.ceil(windows.size / wanted))
            keep = [{name: [] for name in layer} for layer in layers]
            total = [np.zeros(layer["act"].shape[1]) for layer in layers]
        for kept, mean, layer in zip(keep, total, layers, strict=True):
            if "up" in layer:
                mean += np.abs(layer["up"]).sum(axis=0, dtype=np.float64)
            for name, values in layer.items():
                kept[name].append(values[-count % step :: step].copy())
        count += len(chunk)
    found = []
    for kept, mean in zip(keep, total, strict=True):
        inputs = {name: np.concatenate(parts) for name, parts in kept.items()}
        up = inputs.pop("up", None)
        found.append(
            Seen(
                act=inputs.pop("act"),
                up=up,
                up_mean=np.ones_like(mean) if up is None else mean / max(count, 1),
                inputs=inputs,
            )
        )
    return found


def _chunks(
    model: _nybble.Model, windows: npt.NDArray[np.integer[Any]]
) -> Iterator[tuple[npt.NDArray[np.uint32], _nybble.Session]]:
    for window in windows:
        session = model.session(dense=True)
        for start in range(0, len(window), _CHUNK):
            yield np.ascontiguousarray(window[start : start + _CHUNK], dtype=np.uint32), session


def quantile(values: npt.NDArray[Any], k: float) -> float:
    """Return the smallest value ``t`` with a share of at least `k` of `values` at or below it."""
    flat = np.ravel(values)
    if k <= 0 or not flat.size:
        return 0.0
    place = min(flat.size, math.ceil(k * flat.size)) - 1
    return float(np.partition(flat, place)[place])


def share(name: str, value: object) -> None:
    """Refuse what is not a share of at least 0 and below 1.

    Raises
    ------
    ArgumentError
        When it is not; the setting is named.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not 0 <= value < 1:  # type: ignore[arg-type, operator]
        message = (
            f"sparsity.{name}: expected a share of at least 0 and below 1, found {value!r:.60}"
        )
        raise ArgumentError(message)


def allocation(value: object) -> None:
    """Refuse what names no way to spread a model's sparsity over its layers.

    Raises
    ------
    ArgumentError
        When it is neither ``uniform`` nor ``greedy``.
    """
    known = ("uniform", "greedy")
    if value not in known:
        raise ArgumentError("sparsity.allocate: " + unknown("allocation", value, known))


def write(folder: Path, thresholds: Sequence[Thresholds]) -> None:
    """Write thresholds beside the weights of a folder.

    Parameters
    ----------
    folder
        The model folder; that its configuration says so is the caller's part.
    thresholds
        Those of each layer.
    """
    from nybble import _nybble

    arrays: dict[str, Floats] = {}
    for index, layer in enumerate(thresholds):
        neurons, inputs, _ = layer.raw()
        if neurons is not None:
            arrays[f"layers.{index}.neurons"] = neurons
        arrays[f"layers.{index}.inputs"] = np.array(inputs, dtype="<f4")
    arrays["active"] = np.array([layer.active for layer in thresholds], dtype="<f4")
    entries = [(name, "F32", values.shape) for name, values in arrays.items()]
    writer = _nybble.SafeTensorsWriter(str(folder / FILE), entries)
    for name, values in arrays.items():
        writer.write(name, np.ascontiguousarray(values, dtype="<f4").data)
    writer.finish()
