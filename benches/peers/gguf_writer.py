"""A Hugging Face folder of a Llama or Qwen2 as a GGUF file, without a vocabulary.

llama.cpp's own converter is part of its source tree and of no wheel. The benchmark feeds token ids,
so the file says that it has no vocabulary, which the format provides for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from benches.peers.shapes import tensors

from nybble.formats.llama_cpp import add_keys
from nybble.formats.llama_cpp import stored as reordered


def write(
    source: Path,
    file: Path,
    pick: Callable[[str, int, int, bool], str],
    quantize: Callable[[Any, int, int], Any],
) -> None:
    """Write `file` from the folder `source`.

    Parameters
    ----------
    source
        A Hugging Face folder.
    file
        The file to write.
    pick
        From a matrix' name, its columns, the model's layers and whether the head is the embedding,
        makes the name of its type.
    quantize
        From rows of floats, the number of a type and the bytes of a row, makes rows of bytes.

    Raises
    ------
    ValueError
        If the model is of another family.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    if family not in ("llama", "qwen2"):
        message = f"{source}: expected a llama or qwen2, found {family}"
        raise ValueError(message)
    writer = gguf.GGUFWriter(str(file), family, use_temp_file=True)  # else all of it is in memory
    add_keys(writer, config)
    writer.add_tokenizer_model("no_vocab")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tied = bool(config.get("tie_word_embeddings"))
    arch = gguf.MODEL_ARCH.LLAMA if family == "llama" else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, values in tensors(source):
        if tied and name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            message = f"{source}: {name}: no such tensor in a {family}"
            raise ValueError(message)
        values = reordered(family, name, values, head_dim)
        if values.ndim == 1:
            writer.add_tensor(stored, values.astype(np.float32))
            continue
        cols = values.shape[1]
        kind = gguf.GGMLQuantizationType[pick(stored, cols, config["num_hidden_layers"], tied)]
        if kind == gguf.GGMLQuantizationType.BF16:
            rows = gguf.quantize(values, kind)
        else:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            rows = quantize(np.ascontiguousarray(values), int(kind), cols // block * size)
        writer.add_tensor(stored, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
