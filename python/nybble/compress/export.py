"""A model in floats for other programs: llama.cpp's GGUF files, plain Hugging Face folders.

Both have fewer shapes than pruning can leave. What they cannot say is an error that names the first
layer which does not fit; nothing is changed to make it fit. A file or folder appears when it was
written and read back.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nybble import _nybble
from nybble.compress import files
from nybble.compress.source import Source
from nybble.errors import ArgumentError, FileError, FormatError, UnsupportedError
from nybble.formats.llama_cpp import add_keys, architecture, stored
from nybble.formats.llama_cpp_vocabulary import add_vocabulary
from nybble.formats.ragged import structure_of
from nybble.registry import unknown
from nybble.runtime.tokenizer import from_folder

__all__ = ["TYPES", "to_folder", "to_gguf"]

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
"""Types that matrices of a GGUF file can have here; vectors stay float32."""

_BLOCK = 32  # values that share a scale in the quantized ones


def to_folder(source: Path, out: Path, *, overwrite: bool = False) -> None:
    """Write a plain Hugging Face folder, which transformers' own classes load.

    Parameters
    ----------
    source
        A folder of float weights, pruned or not.
    out
        The folder to make.
    overwrite
        Replace `out` if it is a model folder already.

    Raises
    ------
    UnsupportedError
        When layers have different shapes, or `source` is no folder of floats.
    """
    model = _floats(source)
    layers = structure_of(model.config)
    for index, layer in enumerate(layers or ()):
        _fits(model.config, index, layer, (layers or [])[0])
    config = {key: value for key, value in model.config.items() if key != "nybble"}
    with _nybble.StagedFolder(str(out), overwrite) as staged:
        folder = Path(staged.path)
        for file in files.weight_files(source):
            if file.name != "config.json":
                _copy(file, folder / file.name)
        index_file = source / "model.safetensors.index.json"
        if index_file.exists():
            _copy(index_file, folder / index_file.name)
        files.copy_companions(source, folder)
        files.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        _compare(model, folder)
        staged.commit()


def to_gguf(
    source: Path,
    out: Path,
    kind: str = "f16",
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> list[str]:
    """Write a GGUF file; return remarks.

    Of ``q8_0`` expect logits that are off by some hundredths of the largest one, of small models
    at least, and as much with all layers of one shape as without. Of SmolLM2-135M llama.cpp's
    logits (of the last of 48 tokens, 16 texts) differ from those of the ``f16`` file by 3.4 % in
    the median and 8.1 % at most, and by 3.0 and 6.6 % where FLAP took 20 % out of its layers.
    Rounded weights alone, written back as floats, give 1.8 and 1.6 %; the rest is llama.cpp's
    own: it rounds the inputs of such matrices to 8 bits. The divergence is 0.005 nats of both.

    Parameters
    ----------
    source
        A folder of float weights, pruned or not.
    out
        The file to make.
    kind
        One of :data:`TYPES`. Matrices whose rows are no multiple of 32 stay float16 where that is
        needed, and an embedding has 8 bits where others have 4.
    overwrite
        Replace `out` if it is there.
    progress
        Show a progress bar on stderr.

    Raises
    ------
    ArgumentError
        When the type is not known, or `out` is there.
    UnsupportedError
        When the format cannot say the model's shape, or the package ``gguf`` is missing.
    """
    if kind not in TYPES:
        raise ArgumentError(unknown("type", kind, TYPES))
    if out.exists() and not overwrite:
        message = (
            f"{out}: expected nothing of that name, found a file: overwrite it or name another"
        )
        raise ArgumentError(message)
    model = _floats(source)
    try:
        import gguf
    except ImportError:
        message = "writing GGUF files needs gguf: pip install 'nybble[gguf]'"
        raise UnsupportedError(message) from None
    config, layers = model.config, structure_of(model.config)
    arch = architecture(config, layers)
    tokenizer = from_folder(source)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}.gguf")
    remarks: set[str] = set()
    try:
        writer = gguf.GGUFWriter(str(temporary), arch, use_temp_file=True)
        add_keys(writer, config, layers)
        writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(kind)))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer, config["vocab_size"])
        _add_tensors(gguf, writer, model, arch, kind, remarks, progress=progress)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _compare(model, temporary)
        temporary.replace(out)
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(error.filename or out)) from None
    finally:
        temporary.unlink(missing_ok=True)
    return sorted(remarks)


def _file_type(kind: str) -> str:
    return "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"


def _floats(source: Path) -> Source:
    model = Source(source)  # which refuses quantized ones
    if model.kind == "gguf" or model.plan()["kind"] == "encoder":
        found = "a GGUF file" if model.kind == "gguf" else "an image encoder"
        message = f"{source}: expected a folder of a language model, found {found}"
        raise UnsupportedError(message)
    return model


def _fits(config: dict[str, Any], index: int, layer: Any, first: Any) -> None:
    """Refuse a layer that no class of transformers has."""
    kind = config.get("model_type")
    names = {"num_attention_heads": "heads", "num_key_value_heads": "key heads"}
    names["intermediate_size"] = "neurons"
    shape = ", ".join(f"{layer[key]} {name}" for key, name in names.items())
    if layer.get("queries_per_kv"):
        shape += f", {layer['queries_per_kv']} of them to a key head"
    for name in layer.get("biases", ()):
        shape += f", a bias in {name}"
    whole = ", ".join(f"{first[key]} {name}" for key, name in names.items())
    odd = layer.get("biases") or layer.get("queries_per_kv") or any(layer[k] == 0 for k in names)
    if odd or any(layer[key] != first[key] for key in names):
        message = f"layer {index}: {shape}: a plain {kind} has layers of one shape"
        message += f", here {whole} as in layer 0" if index else ""
        message += "; nybble.formats.ragged.load gives transformers the model as it is"
        raise UnsupportedError(message)


def _add_tensors(
    gguf: Any,
    writer: Any,
    model: Source,
    arch: str,
    kind: str,
    remarks: set[str],
    *,
    progress: bool,
) -> None:
    config, plan = model.config, model.plan()
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    which = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(which, config["num_hidden_layers"])
    for name, (_, shape) in tqdm(
        model.tensors.items(), "export", unit="tensor", disable=not progress, dynamic_ncols=True
    ):
        if plan["tied"] and name == "lm_head.weight":
            continue
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if to is None:
            if name.endswith("rotary_emb.inv_freq"):
                continue
            message = f"{model.path}: {name}: llama.cpp's {arch} has no such tensor"
            raise UnsupportedError(message)
        values = stored(arch, name, model.tensor(name).reshape(shape), head_dim)
        used = kind
        if values.ndim == 1:
            used = "f32"
        elif kind in ("q8_0", "q4_0"):
            if shape[-1] % _BLOCK:
                used = "f16"
                remarks.add(f"{name}: f16, since its rows of {shape[-1]} are no multiple of 32")
            elif "embed_tokens" in name or name.startswith("lm_head"):
                used = "q8_0"
        dtype = gguf.GGMLQuantizationType[used.upper()]
        writer.add_tensor(to, gguf.quantize(values, dtype), raw_dtype=dtype)


def _copy(file: Path, target: Path) -> None:
    try:
        shutil.copyfile(file, target)
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(target)) from None


def _compare(model: Source, written: Path) -> None:
    """Make sure that what was written is read back as the same model, row by first row."""
    back = Source(written)
    for name in _used(model):
        shape = list(model.tensors[name][1])
        found = back.tensors.get(name)
        if found is None or list(found[1]) != shape:
            shown = "nothing" if found is None else list(found[1])
            message = f"{written}: {name}: expected a tensor of shape {shape} after writing, "
            message += f"found {shown}"
            raise FormatError(message)
        one, other = (m.tensor(name, 0, 1).reshape(-1) for m in (model, back))
        if not np.allclose(one, other, atol=0.2 * float(np.abs(one).max()) + 1e-6):
            message = f"{written}: {name}: expected the values of {model.path} after writing, "
            message += "found others"
            raise FormatError(message)
    if structure_of(model.config) != structure_of(back.config):
        ours, theirs = structure_of(model.config), structure_of(back.config)
        if _sizes(ours) != _sizes(theirs):
            message = f"{written}: expected the layers' shapes of {model.path} after writing, "
            message += "found others"
            raise FormatError(message)


def _used(model: Source) -> list[str]:
    """Return the tensors that the model needs."""
    plan = model.plan()
    linears = [linear["module"] for linear in (*plan["linears"], *plan["embeddings"])]
    named = {f"{linear}.{leaf}" for linear in linears for leaf in ("weight", "bias")}
    return [name for name in model.tensors if name in named or name in plan["tensors"]]


def _sizes(layers: Any) -> Any:
    return layers and [
        {k: v for k, v in layer.items() if k != "queries_per_kv" and v != []} for layer in layers
    ]
