"""Turn a llama2.c checkpoint into a Hugging Face folder in float32.

The small story models of llama2.c are true float models: their weights never lay on a 4-bit grid.

Usage::

    python -m benches.recipes.llama2c MODEL.bin TOKENIZER.bin OUT

``MODEL.bin`` is of version 0: seven 32-bit integers, then float32 arrays; ``TOKENIZER.bin`` has a
score and the bytes of each token. Rows of queries and keys stand there as rotary pairs, one beside
the other; Hugging Face models keep the first halves of the pairs before the second ones.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from nybble.compress.files import rebuild_companions

Floats = npt.NDArray[np.float32]
_HEADER = struct.Struct("<7i")
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # kinds of tokens, as GGUF numbers them


def halves(weight: Floats, heads: int) -> Floats:
    """Put the rows of each head in the order of Hugging Face."""
    rows, cols = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, cols)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, cols)


def model(data: bytes) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Return configuration and tensors of a checkpoint."""
    dim, inner, layers, heads, kv_heads, vocab, context = _HEADER.unpack_from(data)
    tied, vocab = vocab > 0, abs(vocab)
    values = np.frombuffer(data, dtype="<f4", offset=_HEADER.size)
    at = 0

    def take(*shape: int) -> Floats:
        nonlocal at
        size = int(np.prod(shape))
        part = values[at : at + size]
        if len(part) != size:
            message = f"expected {at + size} numbers or more, found {len(values)}"
            raise SystemExit(message)
        at += size
        return np.array(part, dtype=np.float32).reshape(shape)

    kv = dim // heads * kv_heads
    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv, dim),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, inner, dim),
        "mlp.down_proj": take(layers, dim, inner),
        "mlp.up_proj": take(layers, inner, dim),
    }
    for name, every in stacked.items():
        for layer, value in enumerate(every):
            of = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            tensors[f"model.layers.{layer}.{name}.weight"] = halves(value, of) if of else value
    tensors["model.norm.weight"] = take(dim)
    if not tied:
        take(context, dim // heads)  # cosines and sines, computed anew by everyone
        tensors["lm_head.weight"] = take(vocab, dim)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return config, tensors


def vocabulary(data: bytes, count: int) -> dict[str, Any]:
    """Return a tokenizer's tokens and scores as a GGUF file would name them."""
    tokens, scores, kinds, at = [], [], [], 4
    for index in range(count):
        score, size = struct.unpack_from("<fi", data, at)
        at += 8 + size
        text = data[at - size : at].decode()
        byte = text.startswith("<0x") and text.endswith(">")
        special = ("<unk>", "<s>", "</s>")
        tokens.append(special[index] if index < 3 else text.replace(" ", "\u2581"))
        scores.append(score)
        kinds.append(
            (_UNKNOWN, _CONTROL, _CONTROL)[index] if index < 3 else _BYTE if byte else _NORMAL
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def convert(checkpoint: Path, tokenizer: Path, out: Path) -> None:
    """Write the folder."""
    config, tensors = model(checkpoint.read_bytes())
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    metadata = vocabulary(tokenizer.read_bytes(), config["vocab_size"])
    rebuild_companions(metadata, config, str(tokenizer), out)


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Convert a llama2.c checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    convert(arguments.checkpoint, arguments.tokenizer, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
