"""Small integers side by side in 32-bit words, as ``pack-quantized`` files hold them.

Element ``i`` of a row stands at bit ``i * bits`` of the row, low bits first; a row ends at a word's
end and what is left of its last word is 0. Zero points are packed the same way along the first
dimension: the words of one group hold the zero points of successive rows.

Everything here is the unsigned code itself. (The format's own description says "signed value plus
2^(bits-1)", which is the same number.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.errors import ArgumentError

__all__ = ["pack", "pack_zeros", "rows_per_word", "unpack", "unpack_zeros", "words"]

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]


def rows_per_word(bits: int) -> int:
    """Return the number of codes in a word."""
    if bits not in (4, 8):
        message = f"bits: expected 4 or 8, found {bits}"
        raise ArgumentError(message)
    return 32 // bits


def words(codes: int, bits: int) -> int:
    """Return the number of words that hold `codes` codes."""
    return -(-codes // rows_per_word(bits))


def pack(codes: Codes, bits: int) -> Words:
    """Pack codes ``[rows, cols]`` into words ``[rows, words(cols)]``."""
    per_word = rows_per_word(bits)
    rows, cols = codes.shape
    if bits == 4 and codes.size and int(codes.max()) > 15:
        message = f"codes: expected 4-bit codes, found {int(codes.max())}"
        raise ArgumentError(message)
    if spare := -cols % per_word:
        codes = np.pad(codes, ((0, 0), (0, spare)))
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    packed: Words = np.ascontiguousarray(codes).view("<i4").reshape(rows, -1)
    return packed


def unpack(packed: Words, bits: int, cols: int) -> Codes:
    """Return the codes ``[rows, cols]`` of :func:`pack`'s words."""
    if packed.ndim != 2 or packed.shape[1] != words(cols, bits):
        message = f"packed: expected {words(cols, bits)} words a row, found shape {packed.shape}"
        raise ArgumentError(message)
    codes = np.ascontiguousarray(packed, dtype="<i4").view(np.uint8).reshape(len(packed), -1)
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(packed), -1)
    return np.ascontiguousarray(codes[:, :cols])


def pack_zeros(zeros: Codes, bits: int) -> Words:
    """Pack zero points ``[rows, groups]`` into words ``[words(rows), groups]``."""
    return np.ascontiguousarray(pack(np.ascontiguousarray(zeros.T), bits).T)


def unpack_zeros(packed: Words, bits: int, rows: int) -> Codes:
    """Return the zero points ``[rows, groups]`` of :func:`pack_zeros`'s words."""
    return np.ascontiguousarray(unpack(np.ascontiguousarray(packed.T), bits, rows).T)
