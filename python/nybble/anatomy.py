"""What a model's files consist of, read from their headers: no weight is loaded.

:func:`describe` takes a Hugging Face folder, compressed or not, or a GGUF file. Weights are counted
in *layouts*: how they are stored, ``int4 g32 asym`` (4-bit integers, 32 weights a scale, with zero
points), ``BF16``, ``Q4_1``. The bytes of a layout include its scales and zero points, so bits per
weight are what the disk pays.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Part", "describe", "parts", "quantization", "scheme"]

#: Elements stored together and the bytes they take, by type.
_BLOCKS = {
    "BOOL": (1, 1),
    "I8": (1, 1),
    "U8": (1, 1),
    "F16": (1, 2),
    "BF16": (1, 2),
    "I16": (1, 2),
    "U16": (1, 2),
    "F32": (1, 4),
    "I32": (1, 4),
    "U32": (1, 4),
    "F64": (1, 8),
    "I64": (1, 8),
    "U64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}

_PACKED = ".weight_packed"
#: Tensors that belong to a packed weight.
_BESIDE = (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")


@dataclass(frozen=True)
class Part:
    """One weight: a plain tensor, or a packed one with its scales.

    Parameters
    ----------
    name
        Name of the weight, ``model.layers.0.mlp.up_proj.weight``.
    layout
        How it is stored.
    shape
        Its own shape, whatever the packing.
    size
        Bytes of everything that belongs to it.
    """

    name: str
    layout: str
    shape: tuple[int, ...]
    size: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        count = 1
        for length in self.shape:
            count *= length
        return count


def parts(tensors: Mapping[str, tuple[str, list[int]]], plan: Mapping[str, Any]) -> list[Part]:
    """Group a checkpoint's tensors into weights.

    Parameters
    ----------
    tensors
        Type and shape of each, as ``Checkpoint.tensors`` gives them.
    plan
        The model's linears and embeddings, as ``Checkpoint.plan`` gives them.
    """
    modules = {m["module"]: (m["rows"], m["cols"]) for m in [*plan["linears"], *plan["embeddings"]]}
    found = []
    for name, (dtype, shape) in tensors.items():
        module = name.removesuffix(_PACKED)
        if module != name:
            found.append(_packed(module, modules.get(module), tensors))
        elif not any(
            name.endswith(end) and name.removesuffix(end) + _PACKED in tensors for end in _BESIDE
        ):
            found.append(Part(name, dtype, tuple(shape), _size(dtype, shape)))
    return found


def _packed(
    module: str, shape: tuple[int, int] | None, tensors: Mapping[str, tuple[str, list[int]]]
) -> Part:
    dtype, words = tensors[module + _PACKED]
    size = _size(dtype, words)
    for end in _BESIDE:
        if module + end in tensors:
            size += _size(*tensors[module + end])
    if shape is None:  # a module the model does not use
        return Part(f"{module}.weight", "packed", tuple(words), size)
    rows, cols = shape
    # Words hold 32 bits; 8-bit codes need a word for 4 columns, 4-bit ones for 8.
    bits = 8 if words[-1] * 4 >= cols else 4
    scales = tensors.get(module + ".weight_scale", ("", [rows, 1]))[1]
    groups = scales[-1] if len(scales) > 1 else 1
    group = f"g{-(-cols // groups)}" if groups > 1 else "channel"
    sign = "asym" if module + ".weight_zero_point" in tensors else "sym"
    return Part(f"{module}.weight", f"int{bits} {group} {sign}", (rows, cols), size)


def _size(dtype: str, shape: Iterable[int]) -> int:
    block, size = _BLOCKS.get(dtype, (1, 0))
    count = 1
    for length in shape:
        count *= length
    return count // block * size


def quantization(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of a ``quantization_config`` in short."""
    section = config.get("quantization_config")
    groups = section.get("config_groups") if isinstance(section, Mapping) else None
    found = []
    for name, entry in groups.items() if isinstance(groups, Mapping) else ():
        weights, inputs = entry.get("weights") or {}, entry.get("input_activations")
        found.append(
            {
                "name": name,
                "targets": list(entry.get("targets") or ()),
                "weight_bits": weights.get("num_bits"),
                "group": weights.get("group_size"),
                "strategy": weights.get("strategy"),
                "symmetric": weights.get("symmetric"),
                "activation_bits": (inputs or {}).get("num_bits", 16),
                "activation_strategy": (inputs or {}).get("strategy"),
            }
        )
    return found


def scheme(config: Mapping[str, Any], found: Iterable[Part]) -> str:
    """Name how most weights of a model are held: ``W4A8 g32 asym``, ``BF16``, ``Q4_1``."""
    counts: dict[str, int] = {}
    for part in found:
        if len(part.shape) > 1:
            counts[part.layout] = counts.get(part.layout, 0) + part.weights
    if not counts:
        return "unknown"
    layout = max(counts, key=lambda name: counts[name])
    if not layout.startswith("int"):
        return layout
    kind, _, rest = layout.partition(" ")
    # An embedding is looked up: it has no inputs to speak of, whatever bits it shares with linears.
    inputs = max(
        (
            group["activation_bits"]
            for group in quantization(config)
            if f"int{group['weight_bits']}" == kind and group["targets"] != ["Embedding"]
        ),
        default=16,
    )
    return f"W{kind.removeprefix('int')}A{inputs} {rest}"


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a model folder or a GGUF file.

    Returns
    -------
    dict
        Plain values, ready for JSON; ``tensors`` lists every weight.

    Raises
    ------
    NybbleError
        If it cannot be read, or is of a family that is not known.
    """
    from nybble import _nybble

    place = Path(path)
    checkpoint = _nybble.Checkpoint.open(str(place))
    config = json.loads(checkpoint.config())
    plan = json.loads(checkpoint.plan())
    found = parts(checkpoint.tensors(), plan)
    layouts: dict[str, dict[str, Any]] = {}
    for part in found:
        entry = layouts.setdefault(part.layout, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += part.weights
        entry["bytes"] += part.size
    for entry in layouts.values():
        entry["bits_per_weight"] = entry["bytes"] * 8 / max(entry["weights"], 1)
    weights = sum(part.weights for part in found)
    size = sum(part.size for part in found)
    own = config.get("nybble")
    # A vision tower inside a model with a text tower has its sizes in a section of their own.
    tower = config.get("vision_config") if plan["kind"] == "encoder" else None
    sizes = tower if isinstance(tower, dict) else config
    return {
        "path": str(place),
        "kind": checkpoint.kind,
        "reads": "images" if plan["kind"] == "encoder" else "text",
        "family": plan["family"],
        "scheme": scheme(config, found),
        "layers": len(plan["layers"]),
        "hidden": _first(sizes, "hidden_size", "n_embd"),
        "heads": _first(sizes, "num_attention_heads", "n_head"),
        "kv_heads": _first(sizes, "num_key_value_heads", "num_attention_heads", "n_head"),
        "vocab": _first(config, "vocab_size"),
        "context": _first(config, "max_position_embeddings", "n_positions", "n_ctx", "seq_length"),
        "tied_head": bool(plan["tied"]),
        "parameters": weights,
        "tensor_bytes": size,
        "bits_per_weight": size * 8 / max(weights, 1),
        "disk_bytes": _disk_bytes(place),
        "layouts": dict(sorted(layouts.items(), key=lambda item: -item[1]["bytes"])),
        "quantization": quantization(config),
        "nybble": own if isinstance(own, dict) else None,
        "tokenizer": None if plan["kind"] == "encoder" else _tokenizer(place, checkpoint.kind),
        "tensors": [
            {
                "name": part.name,
                "layout": part.layout,
                "shape": list(part.shape),
                "bytes": part.size,
            }
            for part in found
        ],
    }


def _disk_bytes(place: Path) -> int:
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.iterdir() if file.is_file())


def _tokenizer(place: Path, kind: str) -> dict[str, Any] | None:
    """Describe the tokenizer; ``error`` says why there is none that can be used."""
    from nybble import _nybble
    from nybble.errors import NybbleError
    from nybble.runtime import tokenizer as tokenizers

    try:
        if kind == "gguf":
            metadata = _nybble.Checkpoint.open(str(place)).gguf_metadata()
            tokenizer = tokenizers.from_gguf(metadata, str(place))
        else:
            tokenizer = tokenizers.from_folder(place)
    except NybbleError as error:
        return {"error": str(error)}
    return {
        "vocab": tokenizer.vocab_size,
        "end_tokens": [tokenizer.token(index) for index in tokenizer.end_ids],
        "chat_templates": sorted(tokenizer.templates),
    }
