"""A conversation with a model: the tokens it has seen and its key-value cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError, TokenError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble import _nybble

__all__ = ["Session", "token_array"]


def token_array(ids: object, vocab: int) -> npt.NDArray[np.uint32]:
    """Return token ids as the extension takes them.

    Parameters
    ----------
    ids
        Integers: a sequence, or an array of one dimension (or of shape ``[1, n]``).
    vocab
        Size of the vocabulary.

    Raises
    ------
    ArgumentError
        When they are no integers, or an array of more dimensions.
    TokenError
        When one of them is not in the vocabulary.
    """
    import numpy as np

    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        message = f"ids: expected integers, found {type(ids).__name__}"
        raise ArgumentError(message)
    given = ids if isinstance(ids, np.ndarray) else list(ids)
    try:
        array = np.asarray(given)
    except ValueError:  # rows of different lengths
        array = np.asarray(0.5)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        message = (
            f"ids: expected a sequence of integers, found {array.dtype} of shape {array.shape}"
        )
        raise ArgumentError(message)
    wrong = (array < 0) | (array >= vocab)
    if wrong.any():
        position = int(wrong.argmax())
        token = array[position]
        message = f"token id {token} at position {position} is outside the vocabulary of {vocab}"
        raise TokenError(message)
    return np.ascontiguousarray(array, dtype=np.uint32)


class Session:
    """Tokens a model has computed: a longer text with the same beginning costs only its rest.

    Made by :meth:`LanguageModel.session`. Not to be used by two threads at once.
    """

    def __init__(self, raw: _nybble.Session, vocab: int) -> None:
        self.raw = raw
        self.vocab = vocab

    @property
    def tokens(self) -> list[int]:
        """The tokens in the cache."""
        tokens: list[int] = self.raw.tokens().tolist()
        return tokens

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def layer_tokens(self) -> list[int]:
        """How many tokens' keys and values each layer holds.

        Fewer than ``len(session)`` behind layers where tokens of a prompt were dropped.
        """
        return self.raw.layer_tokens()

    @property
    def kv_bytes(self) -> int:
        """Bytes of these keys and values."""
        return self.raw.kv_bytes()

    def truncate(self, n: int) -> int:
        """Forget everything from token `n` on; return how many tokens are left.

        Those are fewer than `n` where it lies inside a prompt whose tokens were reduced: which of
        them stayed depended on those that would go, so the whole prompt goes (of one longer than
        2048 tokens, the part that was computed together).
        """
        if not 0 <= n <= len(self.raw):
            message = f"n: expected a number from 0 to {len(self.raw)}, found {n}"
            raise ArgumentError(message)
        return self.raw.truncate(n)

    def forward(
        self,
        ids: Sequence[int] | npt.NDArray[Any],
        want: str = "last",
        *,
        prompt: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Compute `ids` after the tokens in the cache.

        Parameters
        ----------
        ids
            The tokens.
        want
            Which rows of logits to return: ``"last"``, ``"all"`` or ``"none"``.
        prompt
            Whether `ids` are a prompt, whose tokens the session's policy may reduce (see
            :mod:`nybble.tokens`). Then there are no logits of all of them, if it drops any.
        """
        return self.raw.forward(token_array(ids, self.vocab), want, prompt)

    def rewind(self, prompt: Sequence[int]) -> list[int]:
        """Keep the beginning that `prompt` shares with the cache; return the rest of `prompt`.

        At least one token is left over, because logits come from computing one; of a prompt whose
        tokens were reduced, all of them, unless the whole of it is shared.
        """
        known = self.tokens
        most = max(min(len(known), len(prompt) - 1), 0)
        shared = next((i for i in range(most) if known[i] != prompt[i]), most)
        return list(prompt[self.raw.truncate(shared) :])
