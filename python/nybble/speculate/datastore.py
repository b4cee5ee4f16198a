"""Texts to draft from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nybble.errors import ArgumentError

if TYPE_CHECKING:
    from nybble.runtime import LanguageModel

__all__ = ["build"]


def build(model: LanguageModel, texts: Iterable[str], path: str | os.PathLike[str]) -> int:
    """Write the datastore of some texts for the source ``retrieval``; return its tokens.

    The file holds the tokens and their suffix array, 8 bytes a token, and is replaced as a whole.

    Parameters
    ----------
    model
        The model whose tokenizer cuts the texts into tokens; the datastore serves every model of
        the same vocabulary.
    texts
        The texts.
    path
        The file to write.

    Raises
    ------
    ArgumentError
        When the texts have no token.
    """
    import numpy as np

    from nybble import _nybble

    parts = [np.asarray(model.tokenizer.encode(text), dtype=np.uint32) for text in texts]
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
    if not tokens.size:
        message = "texts: expected at least one token, found none"
        raise ArgumentError(message)
    _nybble.build_datastore(path, tokens, model.vocab_size)
    return int(tokens.size)
