"""The models: one with real weights, and the shapes of larger ones with random weights.

Speed does not depend on the values of dense weights, so a shape stands in for a model that is not
at hand. Everything becomes a Hugging Face folder in bf16, which every engine's converter reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_SEED = 1
_DEVIATION = 0.02  # as models are initialized; keeps activations finite
#: Values made at once: the memory needed is some times 4 bytes of it.
_BLOCK = 1 << 23


@dataclass(frozen=True)
class Shape:
    """The numbers that make up a Llama or a Qwen2.

    Parameters
    ----------
    family
        ``llama`` or ``qwen2``, which has biases at q, k and v.
    vocab, hidden, inner, layers, heads, kv_heads
        Widths and counts.
    tied
        Whether the head is the embedding.
    head_dim
        ``hidden / heads`` without it.
    theta
        Base of the rotary embedding.
    """

    family: str
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    head_dim: int = 0
    theta: float = 10000.0

    def config(self) -> dict[str, Any]:
        """Return what ``config.json`` holds."""
        return {
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim or self.hidden // self.heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors' names and shapes."""
        width = self.head_dim or self.hidden // self.heads
        query, key = self.heads * width, self.kv_heads * width
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            found["lm_head.weight"] = (self.vocab, self.hidden)
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            found |= {
                f"{name}.self_attn.q_proj.weight": (query, self.hidden),
                f"{name}.self_attn.k_proj.weight": (key, self.hidden),
                f"{name}.self_attn.v_proj.weight": (key, self.hidden),
                f"{name}.self_attn.o_proj.weight": (self.hidden, query),
                f"{name}.mlp.gate_proj.weight": (self.inner, self.hidden),
                f"{name}.mlp.up_proj.weight": (self.inner, self.hidden),
                f"{name}.mlp.down_proj.weight": (self.hidden, self.inner),
                f"{name}.input_layernorm.weight": (self.hidden,),
                f"{name}.post_attention_layernorm.weight": (self.hidden,),
            }
            if self.family == "qwen2":
                found |= {
                    f"{name}.self_attn.q_proj.bias": (query,),
                    f"{name}.self_attn.k_proj.bias": (key,),
                    f"{name}.self_attn.v_proj.bias": (key,),
                }
        return found


#: Random weights. Llama 3.2's stretching of the rotary embedding is left out: it costs no time at
#: these lengths, and every converter has its own way to write it down.
SHAPES = {
    "tiny": Shape("llama", 512, 256, 512, 2, 4, 2, tied=False),
    "tinyllama": Shape("llama", 32000, 2048, 5632, 22, 32, 4, tied=False),
    "qwen2.5-0.5b": Shape("qwen2", 151936, 896, 4864, 24, 14, 2, tied=True, theta=1e6),
    "llama-3.2-3b": Shape(
        "llama", 128256, 3072, 8192, 28, 24, 8, tied=True, head_dim=128, theta=5e5
    ),
}
#: Real weights, by the names of `nybble pull`.
REAL = {"smollm2": "smollm2-135m-instruct"}


def make(name: str, work: Path) -> Path:
    """Return a Hugging Face folder of the model, made under `work` if it is not there yet.

    Parameters
    ----------
    name
        Of `REAL`, of `SHAPES`, or the path of a Hugging Face folder, which is returned as it is.
    work
        Folder for what is made.

    Raises
    ------
    ValueError
        If there is no such model.
    """
    if name not in SHAPES and name not in REAL:
        folder = Path(name)
        if not (folder / "config.json").is_file():
            known = ", ".join([*REAL, *SHAPES])
            message = f"{name}: expected a folder with a config.json, or one of {known}"
            raise ValueError(message)
        return folder
    target = work / name / "hf"
    if target.exists():
        return target
    pulled = _pulled(REAL[name]) if name in REAL else None
    if pulled is not None and pulled.is_dir():
        return pulled
    partial = target.with_name("hf.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if pulled is not None:
        _unpack(pulled, partial)
    else:
        _random(SHAPES[name], partial)
    partial.rename(target)
    return target


def _pulled(name: str) -> Path:
    from nybble.errors import NybbleError
    from nybble.hub import resolve

    try:
        return resolve(name)
    except NybbleError as error:
        raise ValueError(str(error)) from None


def _random(shape: Shape, folder: Path) -> None:
    """Write a model of this shape, block by block: no tensor is ever in memory whole.

    One file, also for 6 GB: every reader maps it, and none of them minds.
    """
    from nybble import _nybble

    rng = np.random.default_rng(_SEED)
    found = shape.tensors()
    entries = [(name, "BF16", list(dims)) for name, dims in found.items()]
    writer = _nybble.SafeTensorsWriter(str(folder / "model.safetensors"), entries)
    for name, dims in found.items():
        count = int(np.prod(dims))
        for start in range(0, count, _BLOCK):
            length = min(_BLOCK, count - start)
            if name.endswith("norm.weight"):
                values = np.ones(length, dtype=np.float32)
            else:
                values = rng.standard_normal(length, dtype=np.float32) * np.float32(_DEVIATION)
            writer.write_at(name, 2 * start, _bf16(values))
    writer.finish()
    _write_json(folder / "config.json", shape.config())
    _write_tokenizer(folder)


def _unpack(source: Path, folder: Path) -> None:
    """Write a pulled GGUF model as a Hugging Face folder in bf16, the type it was published in."""
    from nybble import _nybble
    from nybble.compress.files import rebuild_companions

    checkpoint = _nybble.Checkpoint.open(str(source))
    found = checkpoint.tensors()
    entries = [(tensor, "BF16", list(dims)) for tensor, (_, dims) in found.items()]
    writer = _nybble.SafeTensorsWriter(str(folder / "model.safetensors"), entries)
    for tensor in found:
        writer.write(tensor, _bf16(checkpoint.read(tensor).reshape(-1)))
    writer.finish()
    config = json.loads(checkpoint.config())
    _write_json(folder / "config.json", {**config, "torch_dtype": "bfloat16"})
    rebuild_companions(checkpoint.gguf_metadata(), config, str(source), folder)


def _bf16(values: npt.NDArray[np.float32]) -> bytes:
    """Round to bf16 (to nearest, ties to even)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def tensors(folder: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Read the tensors of a Hugging Face folder, one after the other, as floats."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        data = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + length)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = data[begin:end]
            if entry["dtype"] == "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                kind = {"F16": np.float16, "F32": np.float32}[entry["dtype"]]
                values = raw.view(kind).astype(np.float32)
            yield name, values.reshape(entry["shape"])


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes: converters want one, and nothing here uses it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    texts = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {text: index for index, text in enumerate(texts)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
