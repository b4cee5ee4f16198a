"""Writes the golden files beside it: random blocks of each type, as the `gguf` package reads them.

Run it with a Python that has `gguf` and `numpy`; its output is the same every time. Codes are
random bits; scales are random 16-bit floats that are finite (both signs, subnormals among them).
"""

from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

HERE = Path(__file__).parent

# Type: byte offsets of the 16-bit floats in a block.
SCALES = {
    "F32": [],
    "F16": [0],
    "BF16": [],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def halves(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` finite 16-bit floats as bytes, a quarter of them subnormal."""
    exponent = rng.integers(0, 31, count, dtype=np.uint16)  # 31 would be infinite
    exponent[rng.random(count) < 0.25] = 0
    bits = rng.integers(0, 2, count, dtype=np.uint16) << 15
    bits |= exponent << 10 | rng.integers(0, 1024, count, dtype=np.uint16)
    return bits.astype("<u2").view(np.uint8).reshape(count, 2)


def main() -> None:
    """Write `<type>.blocks` and `<type>.f32` for each type."""
    for seed, (name, scales) in enumerate(SCALES.items()):
        rng = np.random.default_rng(seed)
        dtype = GGMLQuantizationType[name]
        block, size = GGML_QUANT_SIZES[dtype]
        count = 1024 // block if block == 256 else 512 // block
        blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
        for at in scales:
            blocks[:, at : at + 2] = halves(rng, count)
        if name in {"F32", "BF16"}:
            # Any bits but those of infinities and NaNs: clear one bit of an all-ones exponent.
            top = blocks.view(f"<u{size}")
            full = 0x7F80 << (8 * size - 16)
            one = 0x4000 << (8 * size - 16)
            top[(top & full) == full] &= top.dtype.type(~one & (2 ** (8 * size) - 1))
        values = dequantize(blocks.reshape(1, -1), dtype).astype("<f4").ravel()
        assert np.isfinite(values).all(), name
        assert values.size == count * block, name
        (HERE / f"{name}.blocks").write_bytes(blocks.tobytes())
        (HERE / f"{name}.f32").write_bytes(values.tobytes())


if __name__ == "__main__":
    main()
