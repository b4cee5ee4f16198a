"""Load a model of either kind: one that writes text, or one that reads images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError, NybbleError
from nybble.runtime.files import MAX_CONFIG, read_json
from nybble.runtime.generation import count

if TYPE_CHECKING:
    from nybble.runtime.model import LanguageModel
    from nybble.sparsity import Thresholds
    from nybble.speculate.settings import DraftLike
    from nybble.tokens import TokenMethod, TokenPolicy

__all__ = ["NybbleForCausalLM", "from_pretrained", "load", "load_language"]


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    *,
    kv: str | None = None,
    mmap: bool = True,
    **options: Any,
) -> Any:
    """Load a model: a :class:`LanguageModel`, or for an image encoder's folder an image encoder.

    Parameters
    ----------
    path
        A Hugging Face folder, compressed or not, or a GGUF file.
    threads, kv, mmap
        As for :func:`load_language`.
    **options
        The other parameters of :func:`load_language`; of these a model that reads images has
        ``tokens``, with a meaning of its own: see ``ImageEncoder.from_pretrained``.

    Returns
    -------
    LanguageModel or ImageEncoder
        :class:`nybble.runtime.encoder.ImageEncoder` when ``model_type`` in ``config.json`` names a
        family of image encoders. Where the type must be known beforehand, call
        :func:`load_language` or ``ImageEncoder.from_pretrained``.

    Raises
    ------
    NybbleError
        Every failure is one of its subclasses, see :mod:`nybble.errors`.
    """
    if not _reads_images(Path(path).expanduser()):
        return load_language(path, threads, kv=kv, mmap=mmap, **options)
    tokens = options.pop("tokens", None)
    if options:
        message = f"{sorted(options)[0]}: expected nothing for an image encoder: it writes no text"
        raise ArgumentError(message)
    from nybble.runtime.encoder import ImageEncoder

    return ImageEncoder.from_pretrained(path, threads, kv=kv, mmap=mmap, tokens=tokens)


def _reads_images(place: Path) -> bool:
    """Whether a configuration is of an image encoder; what is wrong with it shows later."""
    from nybble import _nybble

    with contextlib.suppress(NybbleError):
        config = read_json(place / "config.json", MAX_CONFIG, missing={})
        return config.get("model_type") in _nybble.encoder_types()
    return False


def load_language(
    path: str | os.PathLike[str],
    threads: int | None = None,
    *,
    context: int | None = None,
    kv: str | None = None,
    mmap: bool = True,
    tokens: TokenPolicy | TokenMethod | Mapping[str, Any] | str | None = None,
    draft: DraftLike = "auto",
    sparsity: Sequence[Thresholds] | str | None = None,
) -> LanguageModel:
    """Load a model that writes text.

    Parameters
    ----------
    path
        A Hugging Face folder, compressed or not, or a GGUF file.
    threads
        Threads to use; by default ``NYBBLE_THREADS`` or the CPUs this process may use.
    context
        Most tokens of a text, if fewer than the model was made for.
    kv
        How keys and values are kept: ``"f16"`` or ``"f32"``, or ``"int8"`` with a scale for each
        position and head, which halves ``"f16"``'s memory again. By default ``"f16"`` for quantized
        models, else ``"f32"``.
    mmap
        Whether the weights are mapped (their memory is shared and given back) or read.
    tokens
        Which tokens of prompts are reduced: a :class:`nybble.tokens.TokenPolicy`, a method, or a
        mapping with the settings of either (see :func:`nybble.tokens.settings`). By default what
        the folder says; ``"off"`` for none.
    draft
        How to speculate; it changes the speed, never the tokens. ``"auto"`` where and as far as it
        pays by measured times, ``"off"`` never; sources (``"recycle,ngram"``), a mapping, or
        :class:`nybble.speculate.Drafts` choose how.
    sparsity
        What is taken for zero: for each layer a :class:`nybble.sparsity.Thresholds`. By default
        what the folder says; ``"off"`` for nothing.

    Raises
    ------
    NybbleError
        Every failure is one of its subclasses, see :mod:`nybble.errors`.
    """
    from nybble import _nybble
    from nybble.runtime.model import LanguageModel
    from nybble.speculate import parse
    from nybble.tokens import to_json

    place = Path(path).expanduser()
    if threads is not None:
        threads = count("threads", threads)
    if context is not None:
        context = count("context", context)
    raw = _nybble.Model.open(place, threads, context, kv, mmap, to_json(tokens))
    parse(draft)  # what it names is opened when it is needed; what means nothing fails here
    return LanguageModel(raw, place, draft, sparsity)


from_pretrained = load


class NybbleForCausalLM:
    """The name transformers' users look for."""

    @staticmethod
    def from_pretrained(path: str | os.PathLike[str], **options: Any) -> LanguageModel:
        """Load a model; see :func:`load_language`."""
        return load_language(path, **options)
