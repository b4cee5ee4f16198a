"""Lists every tensor of a GGUF file with a weighted sum of the bits of its `f32` values.

The values are those of the `gguf` package. `python real.py model.gguf` writes `model.gguf.golden`;
the Rust test compares when `NYBBLE_TEST_GGUF` names the model.
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


def main() -> None:
    """Write one line `name type shape sum` a tensor."""
    path = Path(sys.argv[1])
    lines = []
    for tensor in GGUFReader(path).tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False).ravel()
        weights = np.arange(values.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        weights |= np.uint64(1)
        total = int((values.view("<u4").astype(np.uint64) * weights).sum(dtype=np.uint64))
        shape = ",".join(str(size) for size in reversed(tensor.shape.tolist()))
        lines.append(f"{tensor.name} {tensor.tensor_type.name} {shape} {total:016x}\n")
    Path(f"{path}.golden").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
