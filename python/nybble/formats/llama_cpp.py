"""A model as llama.cpp describes it: the keys of a GGUF file, and its tensors' names and order.

llama.cpp has one set of sizes for the layers of most families. Llamas whose layers differ it reads
as ``deci``, the name of the first such models that it knew: there every layer says how many heads
and neurons it has, and has biases where there are some. A layer but the first may be without
attention; one without neurons it skips as a whole, so there must be some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.errors import UnsupportedError

__all__ = ["FAMILIES", "add_keys", "architecture", "stored"]

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""What llama.cpp calls the values of ``model_type`` that can be written."""

_HALVES = ("llama", "deci")  # whose rotated heads are stored interleaved

Layers = Sequence[Mapping[str, Any]]


def architecture(config: Mapping[str, Any], layers: Layers | None) -> str:
    """Return what llama.cpp calls a model.

    Parameters
    ----------
    config
        Its configuration.
    layers
        The shapes of its layers where they differ (:func:`nybble.formats.ragged.structure_of`).

    Raises
    ------
    UnsupportedError
        When the format has no way to say it; the first layer that does not fit is named.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        message = f"{kind}: writing a GGUF file is not supported "
        message += f"(supported: {', '.join(FAMILIES)})"
        raise UnsupportedError(message)
    window = config.get("sliding_window")
    if window and (kind != "qwen2" or config.get("use_sliding_window")):
        message = f"{kind}: sliding_window {window}: llama.cpp would attend to all tokens"
        raise UnsupportedError(message)
    _rope(config)
    for index, layer in enumerate(layers or ()):
        queries = layer.get("queries_per_kv")
        if queries is not None and len(set(queries)) > 1:
            message = f"layer {index}: its key heads have {', '.join(map(str, queries))} query "
            message += "heads: a GGUF file can only say that all have as many (prune units kv)"
            raise UnsupportedError(message)
        if not layer["intermediate_size"]:
            message = f"layer {index}: it has no neurons: llama.cpp would skip its attention, too"
            raise UnsupportedError(message)
        if not index and not layer["num_attention_heads"]:
            message = "layer 0: it has no heads: llama.cpp wants some in the first layer"
            raise UnsupportedError(message)
        if FAMILIES[kind] != "llama":
            sizes = f"{layer['num_attention_heads']} heads and {layer['intermediate_size']} neurons"
            message = f"layer {index}: {sizes}: llama.cpp reads layers of different shapes in "
            message += f"llamas alone, found a {kind}"
            raise UnsupportedError(message)
    return "deci" if layers else FAMILIES[kind]


def _rope(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the base of the rotary frequencies, and the factor of their linear scaling."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear"):
        message = f"rope scaling {kind!r:.60}: only none and linear are written to GGUF files"
        raise UnsupportedError(message)
    theta = config.get("rope_theta") or found.get("rope_theta") or 1e4
    return float(theta), float(found.get("factor", 1.0)) if kind == "linear" else 1.0


def add_keys(writer: Any, config: Mapping[str, Any], layers: Layers | None = None) -> None:
    """Add the architecture's keys to a file; those of the vocabulary are apart.

    Parameters
    ----------
    writer
        A ``gguf.GGUFWriter``.
    config
        The model's configuration.
    layers
        As of :func:`architecture`.
    """
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    inner = config["intermediate_size"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    if layers:
        heads = [layer["num_attention_heads"] for layer in layers]
        kv_heads = [layer["num_key_value_heads"] for layer in layers]
        inner = [layer["intermediate_size"] for layer in layers]
    theta, factor = _rope(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads if kv_heads is None else kv_heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(theta)
    if factor != 1:
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{writer.arch}.rope.scaling.factor", factor)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config["vocab_size"])


def stored(
    arch: str, name: str, values: npt.NDArray[np.float32], head_dim: int
) -> npt.NDArray[np.float32]:
    """Return a tensor's values in the order in which the file keeps them.

    llama.cpp rotates neighbouring rows of a Llama's query and key heads, transformers the two
    halves of a head.

    Parameters
    ----------
    arch
        What llama.cpp calls the model.
    name
        The tensor's name in transformers.
    values
        Its values.
    head_dim
        Width of a head.
    """
    if arch not in _HALVES or ".self_attn.q_proj." not in name.replace("k_proj", "q_proj"):
        return values
    halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
