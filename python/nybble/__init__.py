"""nybble: small transformers, fast on the CPU you have.

>>> import nybble
>>> model = nybble.load("path/to/folder")  # doctest: +SKIP
>>> print(model.generate("Once upon a time", max_new_tokens=40).text)  # doctest: +SKIP

Importing this package loads neither numpy nor torch; each part is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nybble.errors import NybbleError

if TYPE_CHECKING:
    from nybble.compress import compress
    from nybble.runtime import (
        Encoding,
        Generation,
        ImageEncoder,
        LanguageModel,
        NybbleForCausalLM,
        Tokenizer,
        from_pretrained,
        load,
    )

    __version__: str

__all__ = [
    "Encoding",
    "Generation",
    "ImageEncoder",
    "LanguageModel",
    "NybbleError",
    "NybbleForCausalLM",
    "Tokenizer",
    "__version__",
    "compress",
    "from_pretrained",
    "load",
]


def __getattr__(name: str) -> object:
    """Load the part that has `name`."""
    if name == "__version__":
        from nybble import _nybble

        return _nybble.version()
    if name == "compress":
        import importlib

        return importlib.import_module("nybble.compress")  # a package that can be called
    if name in __all__:
        from nybble import runtime

        return getattr(runtime, name)
    message = f"module 'nybble' has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    """List what can be asked for, loaded or not."""
    return sorted(__all__)
