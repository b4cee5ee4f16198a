"""``nybble inspect``: sizes and schemes against the files themselves."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from nybble import anatomy


def test_a_float_folder(run_json, tiny_folder):
    value = run_json("inspect", tiny_folder)
    config = json.loads((tiny_folder / "config.json").read_text())
    with safe_open(tiny_folder / "model.safetensors", "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in list(file.keys())]
    weights = sum(int(np.prod(shape)) for shape in shapes)
    assert value["family"] == "llama"
    assert (value["kind"], value["scheme"]) == ("folder", "F32")
    assert value["parameters"] == weights
    assert value["tensor_bytes"] == 4 * weights
    assert value["bits_per_weight"] == 32
    assert (value["layers"], value["heads"], value["kv_heads"]) == (2, 4, 2)
    assert value["context"] == config["max_position_embeddings"]
    assert value["tied_head"] is False
    assert value["quantization"] == []
    assert value["tokenizer"]["chat_templates"] == ["default"]
    assert "tensors" not in value


def test_a_compressed_folder_counts_weights_not_words(run_json, tiny_folder, compressed_folder):
    before = run_json("inspect", tiny_folder)
    after = run_json("inspect", compressed_folder, "--tensors")
    assert after["parameters"] == before["parameters"]
    assert after["scheme"] == "W4A8 g32 asym"
    assert after["tensor_bytes"] == sum(entry["bytes"] for entry in after["tensors"])
    with safe_open(compressed_folder / "model.safetensors", "np") as file:
        stored = sum(file.get_tensor(name).nbytes for name in list(file.keys()))
    assert after["tensor_bytes"] == stored
    layouts = after["layouts"]
    assert set(layouts) == {"int4 g32 asym", "int8 g32 sym", "F32"}
    # 4 bits, a 16-bit scale and a 16-bit zero point for 32 weights, and 16 bytes of shape a matrix.
    assert layouts["int4 g32 asym"]["bits_per_weight"] == pytest.approx(4 + 32 / 32, rel=0.02)
    assert {group["weight_bits"] for group in after["quantization"]} == {4, 8}
    assert after["nybble"]["version"] == 1


def test_a_gguf_file(run_json, tiny_gguf):
    value = run_json("inspect", tiny_gguf)
    assert (value["kind"], value["scheme"]) == ("gguf", "F16")
    assert value["tied_head"] is True
    assert value["disk_bytes"] == tiny_gguf.stat().st_size
    assert value["context"] == 256


def test_the_tables(run, compressed_folder):
    outcome = run("inspect", compressed_folder, "--tensors")
    assert outcome.code == 0, outcome.err
    for word in ("W4A8 g32 asym", "Layouts", "Quantization groups", "Embedding", "chat template"):
        assert word in outcome.out
    assert "model.layers.1.mlp.down_proj.weight" in outcome.out
    assert not any(line != line.rstrip() for line in outcome.out.splitlines())


def test_a_folder_without_tokenizer_is_still_described(run_json, run, tiny_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    assert "error" in run_json("inspect", tmp_path)["tokenizer"]
    assert "none usable" in run("inspect", tmp_path).out


def test_parts_of_odd_shapes():
    plan = {
        "linears": [{"module": "a", "rows": 5, "cols": 7}, {"module": "b", "rows": 3, "cols": 64}],
        "embeddings": [],
    }
    tensors = {
        "a.weight_packed": ("I32", [5, 1]),
        "a.weight_scale": ("F16", [5, 1]),
        "a.weight_shape": ("I64", [2]),
        "b.weight_packed": ("I32", [3, 16]),
        "b.weight_scale": ("F16", [3, 2]),
        "b.weight_shape": ("I64", [2]),
        "b.weight_zero_point": ("I32", [1, 2]),
        "c.weight": ("Q6_K", [2, 256]),
        "d": ("F32", []),
        "lonely.weight_scale": ("F16", [4]),
    }
    a, b, c, d, lonely = anatomy.parts(tensors, plan)
    assert (a.layout, a.shape, a.size) == ("int4 channel sym", (5, 7), 20 + 10 + 16)
    assert (b.layout, b.weights, b.size) == ("int8 g32 asym", 192, 192 + 12 + 16 + 8)
    assert (c.layout, c.size) == ("Q6_K", 420)
    assert (d.weights, d.size) == (1, 4)
    assert lonely.name == "lonely.weight_scale"


def test_the_scheme_s_name_is_that_of_the_linears(tiny_folder, tmp_path):
    import nybble
    from nybble.anatomy import describe

    for weights, name in ((4, "W4A8 g32 asym"), (8, "W8A8 g32 sym")):
        out = tmp_path / str(weights)
        nybble.compress(tiny_folder, out, weights=weights, progress=False)
        assert describe(out)["scheme"] == name
