"""Writes the good files that fuzzing starts from into `corpus/` (numpy, safetensors, gguf)."""

import struct
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import save

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Write one or two files a target."""
    for target in ("safetensors", "gguf", "json", "dequantize", "matrix", "datastore"):
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int8)}
    (CORPUS / "safetensors" / "small").write_bytes(save(tensors, {"format": "pt"}))
    (CORPUS / "safetensors" / "empty").write_bytes(save({}))

    writer = GGUFWriter(CORPUS / "gguf" / "small", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("scale", 0.5)
    writer.add_bool("flag", val=True)
    writer.add_array("tokens", ["<s>", "", "x"])
    writer.add_array("types", [1, 2, 3])
    writer.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("h", np.arange(8, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    text = '{"type": "llama", "sizes": [1, -2, 2.5e3, null], "nested": {"a": {"b": "\\u00e9"}}}'
    (CORPUS / "json" / "small").write_text(text, encoding="utf-8")
    (CORPUS / "json" / "deep").write_text("[" * 70 + "]" * 70, encoding="utf-8")
    golden = Path(__file__).parent.parent / "nybble" / "tests" / "golden"
    # The numbers are the places of the types in `Dtype::ALL`.
    for number, name in ((2, "F16"), (13, "Q4_0"), (15, "Q5_0"), (18, "Q4_K"), (20, "Q6_K")):
        blocks = (golden / f"{name}.blocks").read_bytes()[:420]
        (CORPUS / "dequantize" / name).write_bytes(bytes([number]) + blocks)

    # What speculation keeps: two numbers, then words. Fuzzing does not look at checksums.
    def kept(magic: bytes, numbers: tuple[int, int], words: list[int]) -> bytes:
        head = magic + struct.pack("<IIQQQ", 1, 2, 0, *numbers)
        return head + struct.pack(f"<{len(words)}I", *words)

    rows = [token % 10 if token % 5 else 0xFFFFFFFF for token in range(20)]
    (CORPUS / "matrix" / "small").write_bytes(kept(b"nybbleAM", (10, 2), [*rows, 1, 2, 3]))
    tokens = [1, 2, 3, 2, 1, 4, 3, 2, 1, 5]
    order = sorted(range(len(tokens)), key=lambda at: tokens[at:])
    (CORPUS / "datastore" / "small").write_bytes(kept(b"nybbleDS", (10, 10), tokens + order))


if __name__ == "__main__":
    main()
