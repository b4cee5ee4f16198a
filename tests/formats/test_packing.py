"""Codes in 32-bit words, against the compressed-tensors package."""

import numpy as np
import pytest

from nybble.errors import ArgumentError
from nybble.formats.packing import pack, pack_zeros, unpack, unpack_zeros, words

SHAPES = [(1, 1), (3, 7), (8, 32), (16, 33), (5, 100), (31, 64)]


def codes(shape, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


def test_the_layout_worked_by_hand():
    row = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9]], np.uint8)
    assert pack(row, 4).view(np.uint32).tolist() == [[0x87654321, 0x9]]
    assert pack(row[:, :5], 8).view(np.uint32).tolist() == [[0x04030201, 0x5]]
    # Down a column: the first group's zero points are 1, 2, 3.
    assert pack_zeros(np.array([[1, 9], [2, 8], [3, 7]], np.uint8), 4).tolist() == [[0x321, 0x789]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_is_the_inverse(shape, bits):
    value = codes(shape, bits)
    packed = pack(value, bits)
    assert packed.dtype == np.int32
    assert packed.shape == (shape[0], words(shape[1], bits))
    assert np.array_equal(unpack(packed, bits, shape[1]), value)
    zeros = pack_zeros(value, bits)
    assert zeros.shape == (words(shape[0], bits), shape[1])
    assert np.array_equal(unpack_zeros(zeros, bits, shape[0]), value)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_compressed_tensors_packs_the_same_words(shape, bits):
    torch = pytest.importorskip("torch", reason="needs torch (the compress extra)")
    peer = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="needs compressed-tensors (the test extra)",
    )
    value = codes(shape, bits, seed=1)
    signed = torch.from_numpy((value.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8))
    for dim, ours, theirs in ((1, pack, unpack), (0, pack_zeros, unpack_zeros)):
        packed = peer.pack_to_int32(signed, bits, packed_dim=dim)
        assert np.array_equal(packed.numpy(), ours(value, bits))
        assert np.array_equal(theirs(packed.numpy(), bits, shape[dim]), value)
        back = peer.unpack_from_int32(
            torch.from_numpy(ours(value, bits)), bits, torch.Size(shape), packed_dim=dim
        )
        assert torch.equal(back, signed)


def test_wrong_sizes_are_errors():
    with pytest.raises(ArgumentError, match="bits"):
        words(4, 3)
    with pytest.raises(ArgumentError, match="4-bit"):
        pack(np.array([[16]], np.uint8), 4)
    with pytest.raises(ArgumentError, match="words a row"):
        unpack(np.zeros((2, 3), np.int32), 4, 32)
