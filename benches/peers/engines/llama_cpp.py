"""llama.cpp through its C interface out of a prebuilt wheel: what `llama-bench` times.

`xllamacpp` and `llama-cpp-python` both carry llama.cpp whole and export its C functions. The
structures that carry options grow with every release, so none is described here: the library fills
in its defaults (`llama_*_default_params`) in a buffer larger than any of them, and only fields at
the front, unchanged for years, are set, and read back where the library lets one.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from benches.peers.engines.base import Engine, Format, Session, Unavailable, installed

#: Types of a format's linears, and of its head.
_TYPES = {
    "Q4_0": ("Q4_0", "Q6_K"),
    "Q4_0, 4-bit head": ("Q4_0", "Q4_0"),
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q8_0": ("Q8_0", "Q8_0"),
    "BF16": ("BF16", "BF16"),
}
#: What takes the place of a type in blocks of 256 where rows do not divide into them.
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


class LlamaCpp(Engine):
    """`llama_decode` on batches of the trace."""

    name = "llama.cpp"
    packages = ("xllamacpp",)
    formats = (
        Format("Q4_0", 4, "blocks of 32, symmetric, head Q6_K, or Q8_0 where rows do not divide"),
        Format("Q4_0, 4-bit head", 4, "the same, embedding and head Q4_0 (--pure)"),
        Format("Q4_K_M", 4, "Q4_K and Q6_K; where rows do not divide by 256, Q5_0 and Q8_0"),
        Format("Q8_0", 8, "blocks of 32, symmetric"),
        Format("BF16", 16, ""),
    )
    timed = "llama_decode a step, logits of the last token in its own memory"

    def available(self) -> str:
        """Return the version of the wheel that brings the library."""
        return _library_file()[1]

    def prepare(self, source: Path, form: str, target: Path) -> None:
        """Write a file with the types `llama-quantize` would choose, by the library's quantizers.

        The wheels leave out that program and its C function, not the quantizers it calls.
        """
        try:
            from benches.peers.gguf_writer import write
        except ImportError as error:
            message = f"making the model: {error}"
            raise Unavailable(message) from None
        library = _load()

        def pick(name: str, cols: int, layers: int, tied: bool) -> str:
            return _pick(form, name, cols, layers, tied)

        def quantize(values: Any, number: int, row_bytes: int) -> Any:
            return _quantize(library, values, number, row_bytes)

        write(source, target / "model.gguf", pick, quantize)

    def open(self, model: Path, form: str, threads: int, context: int) -> Session:
        """Load the file and make a context."""
        del form
        return _Session(_load(), model / "model.gguf", threads, context)


def _pick(form: str, name: str, cols: int, layers: int, tied: bool) -> str:
    """Return the type `llama-quantize` gives a matrix."""
    kind, head = _TYPES[form]
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = head
    elif form == "Q4_K_M" and name.endswith(("attn_v.weight", "ffn_down.weight")):
        # The first and last eighth of the layers, and every third between.
        layer, eighth = int(name.split(".")[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            kind = "Q6_K"
    return _FALLBACK[kind] if kind in _FALLBACK and cols % 256 else kind


def _quantize(library: Any, values: Any, number: int, row_bytes: int) -> Any:
    """Quantize rows of floats into rows of bytes."""
    import numpy as np

    rows, cols = values.shape
    out = np.empty((rows, row_bytes), dtype=np.uint8)
    written = library.ggml_quantize_chunk(
        number, values.ctypes.data, out.ctypes.data, 0, rows, cols, None
    )
    if written != out.nbytes:
        message = f"ggml_quantize_chunk: expected {out.nbytes} bytes, found {written}"
        raise RuntimeError(message)
    return out


def _library_file() -> tuple[Path, str]:
    """Find a wheel with the library in it, and the wheel's version."""
    for package, module, pattern in (
        ("xllamacpp", "xllamacpp", "xllamacpp*.so"),
        ("llama-cpp-python", "llama_cpp", "lib/libllama.*"),
    ):
        try:
            version = installed(package)
        except Unavailable:
            continue
        # Found, not imported: the import may set up things of its own.
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(folder).glob(pattern)):
                return file, f"{package} {version}"
    message = "neither xllamacpp nor llama-cpp-python is installed"
    raise Unavailable(message)


class _Parameters(ctypes.Structure):
    """Room for any of the option structures; what is behind the real one is never read."""

    _fields_ = (("numbers", ctypes.c_int32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_pointer, _int, _text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
_long = ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (_int, _pointer, _pointer, _long, _long, _long, _pointer),
    ),
    "llama_model_load_from_file": (_pointer, (_text, _Parameters)),
    "llama_model_size": (ctypes.c_uint64, (_pointer,)),
    "llama_init_from_model": (_pointer, (_pointer, _Parameters)),
    "llama_n_ctx": (ctypes.c_uint32, (_pointer,)),
    "llama_n_ubatch": (ctypes.c_uint32, (_pointer,)),
    "llama_set_n_threads": (None, (_pointer, _int, _int)),
    "llama_n_threads": (_int, (_pointer,)),
    "llama_get_memory": (_pointer, (_pointer,)),
    "llama_memory_clear": (None, (_pointer, ctypes.c_bool)),
    "llama_batch_get_one": (_Batch, (ctypes.POINTER(ctypes.c_int32), _int)),
    "llama_decode": (_int, (_pointer, _Batch)),
    "llama_synchronize": (None, (_pointer,)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_pointer, _int)),
}


def _load() -> Any:
    library = ctypes.CDLL(str(_library_file()[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            message = f"the library does not export {name}"
            raise Unavailable(message) from None
        function.restype, function.argtypes = result, list(arguments)
    library.llama_backend_init()
    return library


class _Session(Session):
    def __init__(self, library: Any, file: Path, threads: int, context: int) -> None:
        self._library = library
        model = library.llama_model_load_from_file(
            str(file).encode(), library.llama_model_default_params()
        )
        if not model:
            message = f"{file}: the library does not load it"
            raise RuntimeError(message)
        self.weight_bytes = int(library.llama_model_size(model))
        parameters = library.llama_context_default_params()
        parameters.numbers[0] = context  # n_ctx, the first field
        self._context = library.llama_init_from_model(model, parameters)
        if not self._context:
            message = f"{file}: no context of {context} tokens"
            raise RuntimeError(message)
        library.llama_set_n_threads(self._context, threads, threads)
        found = library.llama_n_ctx(self._context), library.llama_n_threads(self._context)
        if found[0] < context or found[1] != threads:
            message = f"expected {context} tokens and {threads} threads, found {found}"
            raise RuntimeError(message)

    def reset(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def prompt(self, ids: list[int]) -> None:
        self._decode((ctypes.c_int32 * len(ids))(*ids), len(ids))

    def generate(self, ids: list[int]) -> None:
        for index in ids:
            self._decode((ctypes.c_int32 * 1)(index), 1)

    def _decode(self, tokens: Any, count: int) -> None:
        library, context = self._library, self._context
        status = library.llama_decode(context, library.llama_batch_get_one(tokens, count))
        if status != 0:
            message = f"llama_decode: expected status 0, found {status}"
            raise RuntimeError(message)
        library.llama_synchronize(context)
        if not library.llama_get_logits_ith(context, -1):
            message = "llama_decode left no logits"
            raise RuntimeError(message)
