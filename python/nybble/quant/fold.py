"""Rescaling channels without changing what a layer computes.

Where a layer's part (the producer) gives channels that linears (the consumers) multiply with their
columns, a channel may be divided by a factor at the producer and multiplied by it in the consumers'
columns: the function is the same, but what is rounded is not. Methods differ in the factors alone;
where such pairs exist, and what has to be multiplied, is found here for every family from the parts
a layer has:

* ``norm``: the gain (and the bias) of a norm, and the linears that read it: queries, keys, values;
  gate and up. Not where the normed values are the residual as well, nor where a norm has no
  weights.
* ``value``: the rows (and bias) of values, and the output projection: attention only averages
  values. One factor for a channel of a key/value head, shared by the query heads that read it.
* ``mlp``: the rows (and bias) of up, and down, where what is between is linear in up (a gated
  block) or scales with it (ReLU). GELU does neither.

With powers of two every product is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from nybble.errors import ConfigError
from nybble.quant.base import Floats, Scheme

if TYPE_CHECKING:
    from nybble.calibrate.stats import InputStats

__all__ = ["KINDS", "Fold", "LayerTensors", "Pair", "pairs", "rescale", "rounded_by_range"]

KINDS = ("norm", "value", "mlp")
"""Kinds of pairs, see the module."""

Ints = npt.NDArray[np.int64]


class LayerTensors(Protocol):
    """A layer whose weights may be changed in place: :class:`nybble.calibrate.layer.Layer`."""

    def tensor(self, name: str) -> Floats | None:
        """Return a parameter as it is stored, ``None`` where there is none of that name."""

    def weight(self, linear: str) -> Floats:
        """Return a linear's weight ``[rows, cols]``."""


@dataclass(frozen=True)
class Pair:
    """A producer of channels and the linears that read them.

    Parameters
    ----------
    kind
        One of :data:`KINDS`.
    producer
        Path of a norm or a linear.
    rows
        The producer's output of each factor ``[factors]``.
    consumers
        Paths of the linears.
    columns
        The factor of each of their columns ``[cols]``.
    stage
        Which of the layer's stages the consumers are.
    plus_one
        Whether the producer is a norm that stores its gain less one.
    """

    kind: str
    producer: str
    rows: Ints
    consumers: tuple[str, ...]
    columns: Ints
    stage: int
    plus_one: bool = False

    def merged(self, values: npt.NDArray[Any], how: np.ufunc) -> npt.NDArray[Any]:
        """Return one value a factor out of one a column: the maximum or the sum of the columns'."""
        start = -np.inf if how is np.maximum else 0.0
        out = np.full(len(self.rows), start)
        how.at(out, self.columns, values)
        return out


def pairs(parts: Mapping[str, Any], layer: LayerTensors) -> tuple[list[Pair], list[str]]:
    """Return the pairs of a layer, and in words what cannot be one.

    Parameters
    ----------
    parts
        The layer's entry in :meth:`nybble._nybble.Checkpoint.plan`.
    layer
        Its weights, for their sizes.
    """
    attention, mlp = parts["attention"], parts["mlp"]
    found, notes = [], []
    readers = []
    if attention is not None:
        readers.append((parts["attention_norms"], tuple(attention["qkv"]), 0))
    if mlp is not None:
        gate_up = tuple(name for name in (mlp["gate"], mlp["up"]) if name)
        readers.append((parts["mlp_norms"], gate_up, 2))
    for norms, consumers, stage in readers:
        where = "attention" if stage == 0 else "the feed-forward block"
        norm = norms["pre"]
        if norm is None:
            notes.append(f"no norm stands before {where}: its inputs keep their scale")
        elif not norm["affine"]:
            notes.append(f"the norm before {where} has no weights: its outputs keep their scale")
        elif norms["residual_is_normed"]:
            notes.append(
                f"the norm before {where} feeds the residual: its outputs keep their scale"
            )
        else:
            all_of = np.arange(layer.weight(consumers[0]).shape[1])
            plus_one = bool(norm["plus_one"])
            found.append(Pair("norm", norm["module"], all_of, consumers, all_of, stage, plus_one))
    if attention is not None:
        found.append(_values(attention))
    if mlp is None:
        pass
    elif mlp["gate"] or mlp["activation"] == "relu":
        inner = np.arange(layer.weight(mlp["down"]).shape[1])
        found.append(Pair("mlp", mlp["up"], inner, (mlp["down"],), inner, 3))
    else:
        notes.append("GELU stands between up and down: the inputs of down keep their scale")
    return sorted(found, key=lambda pair: pair.stage), notes


def _values(attention: Mapping[str, Any]) -> Pair:
    heads, kv_heads, dim = (attention[key] for key in ("heads", "kv_heads", "head_dim"))
    channels = np.arange(kv_heads * dim)
    rows = {
        "separate": channels,
        "stacked": 2 * kv_heads * dim + channels,  # [q, k, v][head][dim]
        "per_head": channels // dim * 3 * dim + 2 * dim + channels % dim,  # [head][q, k, v][dim]
    }[attention["layout"]]
    query = np.arange(heads * dim)
    ends = attention["groups"] or range(0, heads + 1, heads // kv_heads)
    read = np.repeat(np.arange(kv_heads), np.diff(ends))  # by each query head
    columns = read[query // dim] * dim + query % dim
    return Pair("value", attention["qkv"][-1], rows, (attention["out"],), columns, 1)


def rescale(layer: LayerTensors, pair: Pair, factors: npt.NDArray[Any]) -> list[str]:
    """Divide the producer's channels by factors and multiply the consumers' columns with them.

    Parameters
    ----------
    layer
        The weights, changed in place.
    pair
        Which of them.
    factors
        Positive numbers ``[factors]``.

    Returns
    -------
    list of str
        Names of the tensors that were changed.
    """
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        message = f"{pair.producer}: expected factors above 0, found {factors.min()}"
        raise ConfigError(message)
    factors = factors.astype(np.float32)
    name = f"{pair.producer}.weight"
    if pair.kind == "norm":
        gain = layer.tensor(name)
        assert gain is not None  # an affine norm has one
        gain[...] = (gain + 1) / factors - 1 if pair.plus_one else gain / factors
    else:
        layer.weight(pair.producer)[pair.rows] /= factors[:, None]
    changed = [name]
    if (bias := layer.tensor(f"{pair.producer}.bias")) is not None:
        bias[pair.rows] /= factors
        changed.append(f"{pair.producer}.bias")
    for consumer in pair.consumers:
        weight = layer.weight(consumer)
        weight *= factors[pair.columns]
        changed.append(f"{consumer}.weight")
    return changed


class Fold(ABC):
    """A way to choose the factors. Subclasses are frozen dataclasses of a paper's settings."""

    kinds: ClassVar[tuple[str, ...]] = KINDS
    """The kinds of pairs that are rescaled."""
    rounds_inputs: ClassVar[bool] = True
    """Whether it is about rounding activations, and pointless where they stay in float."""

    @property
    def needs(self) -> frozenset[str]:
        """What calibration has to collect of the consumers' inputs."""
        return frozenset()

    @abstractmethod
    def factors(
        self, pair: Pair, weights: Sequence[Floats], inputs: InputStats, scheme: Scheme
    ) -> npt.NDArray[Any]:
        """Choose the factors ``[factors]`` of a pair.

        Parameters
        ----------
        pair
            What is rescaled.
        weights
            The consumers' weights ``[rows, cols]``.
        inputs
            Statistics of their inputs.
        scheme
            How the consumers are going to be rounded.
        """


def rounded_by_range(weights: Floats, scheme: Scheme) -> Floats:
    """Return weights rounded by the plain range of their groups."""
    rows, cols = weights.shape
    groups = weights.reshape(rows, scheme.groups(cols), -1)
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        scale = np.abs(groups).max(axis=-1, keepdims=True) / (top // 2)
        scale[scale == 0] = 1
        low: Any = -(top // 2 + 1)
        codes = np.clip(np.round(groups / scale), low, top // 2)
        return np.asarray(codes * scale, dtype=np.float32).reshape(rows, cols)
    low = np.minimum(groups.min(axis=-1, keepdims=True), 0)
    scale = (np.maximum(groups.max(axis=-1, keepdims=True), 0) - low) / top
    scale[scale == 0] = 1
    codes = np.round((groups - low) / scale)
    return np.asarray(codes * scale + low, dtype=np.float32).reshape(rows, cols)
