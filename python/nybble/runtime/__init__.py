"""The run-time: load a folder or a GGUF file, encode text, generate, stream, chat; encode images.

Nothing here imports torch. ``load`` is in :mod:`nybble.runtime.loading`, ``LanguageModel`` in
:mod:`nybble.runtime.model`, ``ImageEncoder`` in :mod:`nybble.runtime.encoder`, the tokenizer (with
the rebuilding of one from GGUF metadata) in :mod:`nybble.runtime.tokenizer`, chat templates in
:mod:`nybble.runtime.chat`. Modules are loaded on first use, so that importing this package costs
next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble.runtime.encoder import Encoding, ImageEncoder
    from nybble.runtime.generation import Generation, Stream
    from nybble.runtime.loading import NybbleForCausalLM, from_pretrained, load, load_language
    from nybble.runtime.model import LanguageModel
    from nybble.runtime.session import Session
    from nybble.runtime.tokenizer import Tokenizer

__all__ = [
    "Encoding",
    "Generation",
    "ImageEncoder",
    "LanguageModel",
    "NybbleForCausalLM",
    "Session",
    "Stream",
    "Tokenizer",
    "from_pretrained",
    "load",
    "load_language",
]

_HOME = {
    "Encoding": "nybble.runtime.encoder",
    "ImageEncoder": "nybble.runtime.encoder",
    "Generation": "nybble.runtime.generation",
    "LanguageModel": "nybble.runtime.model",
    "NybbleForCausalLM": "nybble.runtime.loading",
    "Session": "nybble.runtime.session",
    "Stream": "nybble.runtime.generation",
    "Tokenizer": "nybble.runtime.tokenizer",
    "from_pretrained": "nybble.runtime.loading",
    "load": "nybble.runtime.loading",
    "load_language": "nybble.runtime.loading",
}


def __getattr__(name: str) -> object:
    """Load the module that has `name`."""
    home = _HOME.get(name)
    if home is None:
        message = f"module 'nybble.runtime' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """List what can be asked for, loaded or not."""
    return sorted(__all__)
