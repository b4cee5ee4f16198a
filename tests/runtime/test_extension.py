"""The extension's other parts: files, rounding, the machine."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import nybble
from nybble import _nybble
from nybble.errors import ArgumentError, FileError, FormatError, MissingFileError, UnsupportedError
from tiny import SPECIAL, write_gguf, write_llama


def test_writing_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    entries = [("a", "F32", [2, 3]), ("b", "I32", [4]), ("c", "F16", []), ("d", "U8", [0, 5])]
    writer = _nybble.SafeTensorsWriter(str(path), entries)
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.write_at("a", 12, a[1])
    writer.write_at("a", 0, memoryview(a[0].tobytes()))
    writer.write("b", np.arange(8, dtype=np.int32)[::2])
    writer.write("c", np.float16(1.5))
    writer.write("d", b"")
    writer.finish()
    read = load_file(path)
    assert np.array_equal(read["a"], a)
    assert read["b"].tolist() == [0, 2, 4, 6]
    assert read["c"] == np.float16(1.5)
    assert read["d"].shape == (0, 5)
    with pytest.raises(ArgumentError, match="finished"):
        writer.write("a", a)


def test_files_that_are_not_finished_go(tmp_path):
    path = tmp_path / "x.safetensors"
    writer = _nybble.SafeTensorsWriter(str(path), [("a", "F32", [2])])
    for data in (np.zeros(3, dtype=np.float32), b"abc", bytearray(9)):
        with pytest.raises(ArgumentError, match="8 bytes"):
            writer.write("a", data)
    with pytest.raises(ArgumentError):
        writer.write("b", b"")
    with pytest.raises(ArgumentError):
        writer.write_at("a", 8, b"x")
    with pytest.raises(ArgumentError):
        writer.write_at("a", sys.maxsize, b"x")
    with pytest.raises(ArgumentError, match="bytes written"):
        writer.finish()
    del writer
    assert not path.exists()
    with pytest.raises(UnsupportedError, match="F12"):
        _nybble.SafeTensorsWriter(str(path), [("a", "F12", [2])])
    with pytest.raises((ArgumentError, FormatError)):
        _nybble.SafeTensorsWriter(str(path), [("a", "F32", [1 << 62, 1 << 62])])
    with pytest.raises(MissingFileError, match="nowhere"):
        _nybble.SafeTensorsWriter(str(tmp_path / "nowhere" / "x"), [])


def test_staged_folders(tmp_path):
    final = tmp_path / "out"
    with _nybble.StagedFolder(str(final)) as stage:
        inside = os.path.join(stage.path, "config.json")  # noqa: PTH118
        with open(inside, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write("{}")
        assert not final.exists()
        stage.commit()
    assert (final / "config.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ArgumentError, match="done with"):
        stage.commit()
    with pytest.raises((ArgumentError, FileError)):
        _nybble.StagedFolder(str(final))
    with _nybble.StagedFolder(str(final), overwrite=True) as stage:
        pass
    assert (final / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_no_folder(tmp_path):
    def fail():
        with _nybble.StagedFolder(str(tmp_path / "out")):
            message = "on purpose"
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bits", "kind"),
    [(4, "middle"), (4, "whole"), (4, "sixteenths"), (8, "middle"), (8, "whole")],
)
def test_rounding(bits, kind):
    weights = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    codes, scales, zeros = _nybble.rtn(weights, bits, 32, kind)
    assert codes.shape == (5, 96)
    assert codes.dtype == np.uint8
    assert codes.max() < 1 << bits
    assert scales.shape == (5, 3)
    assert (zeros is None) == (kind == "middle")
    unit = {"middle": 1, "whole": 1, "sixteenths": 16}[kind]
    assert zeros is None or np.array_equal(zeros * unit, np.round(zeros * unit))
    middle = np.full((5, 3), 1 << (bits - 1)) if zeros is None else zeros
    back = np.repeat(scales, 32, 1) * (codes.astype(np.float32) - np.repeat(middle, 32, 1))
    assert np.abs(back - weights).max() < (0.5 if bits == 4 else 0.03)


def test_rounding_arrays_in_any_order():
    weights = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    wide = np.zeros((6, 128), dtype=np.float32)
    wide[:, ::2] = weights
    wanted = _nybble.rtn(weights, 4, 32, "whole")
    for other in (np.asfortranarray(weights), weights.T.copy().T, wide[:, ::2]):
        found = _nybble.rtn(other, 4, 32, "whole")
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_rounding_what_cannot_be_rounded():
    weights = np.ones((4, 32), dtype=np.float32)
    for bits in (0, 3, 16):
        with pytest.raises(ArgumentError, match="bits"):
            _nybble.rtn(weights, bits, 32, "middle")
    with pytest.raises(ArgumentError, match="finite"):
        _nybble.rtn(weights * np.nan, 4, 32, "middle")
    with pytest.raises(ArgumentError, match="threads"):
        _nybble.rtn(weights, 4, 32, "middle", 0)
    with pytest.raises(ArgumentError, match="zeros"):
        _nybble.rtn(weights, 4, 32, "quarters")
    with pytest.raises(ArgumentError, match="sixteenths"):
        _nybble.rtn(weights, 8, 32, "sixteenths")
    with pytest.raises(TypeError):
        _nybble.rtn(weights.astype(np.float64), 4, 32, "middle")
    codes, scales, _ = _nybble.rtn(np.zeros((0, 32), dtype=np.float32), 4, 32, "middle")
    assert codes.shape == (0, 32)
    assert scales.shape == (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.mark.parametrize("mmap", [True, False])
def test_reading_a_checkpoint(folder, mmap):
    checkpoint = _nybble.Checkpoint.open(str(folder), mmap)
    assert checkpoint.kind == "folder"
    assert json.loads(checkpoint.config())["model_type"] == "llama"
    stored = load_file(folder / "model.safetensors")
    tensors = checkpoint.tensors()
    assert {name: (kind, tuple(shape)) for name, (kind, shape) in tensors.items()} == {
        name: ("F32", array.shape) for name, array in stored.items()
    }
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(checkpoint.read(name), stored[name])
    assert np.array_equal(checkpoint.read(name, 3, 7), stored[name][3:7])
    assert checkpoint.read(name, 3, 3).shape == (0, 96)
    assert checkpoint.raw(name) == stored[name].tobytes()
    norm = "model.norm.weight"
    assert np.array_equal(checkpoint.read(norm), stored[norm][None])
    assert checkpoint.read(norm, 1).shape == (0, 64)
    assert checkpoint.gguf_metadata() == {}
    for start, stop in ((5, 3), (0, 65), (66, None)):
        with pytest.raises(ArgumentError, match="range"):
            checkpoint.read(name, start, stop)
    for call in (checkpoint.read, checkpoint.raw):
        with pytest.raises(FormatError, match="nothing"):
            call("nothing.of.the.kind")


def test_the_plan(folder):
    plan = json.loads(_nybble.Checkpoint.open(str(folder)).plan())
    assert plan["family"] == "llama"
    assert not plan["tied"]
    assert set(plan["tensors"]) == set(_nybble.Checkpoint.open(str(folder)).tensors())
    assert len(plan["tensors"]) == len(set(plan["tensors"]))
    linears = {linear["module"]: linear for linear in plan["linears"]}
    assert len(linears) == 15
    assert linears["model.layers.1.mlp.down_proj"] == {
        "module": "model.layers.1.mlp.down_proj",
        "rows": 64,
        "cols": 96,
        "bias": False,
        "transposed": False,
        "role": "down",
    }
    assert linears["lm_head"]["role"] == "head"
    assert len(plan["layers"]) == 2
    parts = plan["layers"][1]
    assert parts["attention"] == {
        "heads": 4,
        "kv_heads": 2,
        "groups": None,
        "head_dim": 16,
        "layout": "separate",
        "qkv": [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"],
        "out": "model.layers.1.self_attn.o_proj",
    }
    assert parts["mlp"]["activation"] == "silu"
    assert parts["mlp_norms"] == {
        "pre": {
            "module": "model.layers.1.post_attention_layernorm",
            "affine": True,
            "plus_one": False,
        },
        "post": None,
        "residual_is_normed": False,
    }
    assert plan["embeddings"] == [{"module": "model.embed_tokens", "rows": 290, "cols": 64}]


def test_a_gguf_file(tiny, tiny_folder, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    write_gguf(path, tiny_folder)
    checkpoint = _nybble.Checkpoint.open(str(path))
    assert checkpoint.kind == "gguf"
    metadata = checkpoint.gguf_metadata()
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.tokens"][:3] == SPECIAL
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    stored = load_file(tiny_folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(checkpoint.read(name), stored[name])
    with pytest.raises(UnsupportedError, match="another order"):
        checkpoint.raw(name)
    assert checkpoint.raw("lm_head.weight") == stored["lm_head.weight"].tobytes()
    model = nybble.load(path, threads=2)
    ids = [5, 6, 7, 8]
    assert np.array_equal(model.forward(ids), tiny.forward(ids))
    messages = [{"role": "user", "content": "the cat <|im_end|>"}]
    assert model.tokenizer.chat(messages) == tiny.tokenizer.chat(messages)
    assert model.end_ids == tiny.end_ids
    assert model.chat(messages, 8).tokens == tiny.chat(messages, 8).tokens


def test_the_machine():
    found = json.loads(_nybble.doctor())
    assert found["isa"]["scalar"] == {"detected": True, "allowed": True}
    assert found["isa"][found["best"]]["allowed"]
    assert found["threads_default"] >= 1
    assert any(name.startswith("w4a8/") for name in found["kernels"])
    assert _nybble.version() == found["version"]
    assert _nybble.read_bandwidth(1, 64) > 1e8
    for threads, megabytes in ((0, 64), (1, 0), (1, 1 << 40)):
        with pytest.raises(ArgumentError):
            _nybble.read_bandwidth(threads, megabytes)


@pytest.mark.parametrize(("isa", "fine"), [("scalar", True), ("avx9", False)])
def test_the_tier_can_be_lowered(isa, fine):
    code = "import json; from nybble import _nybble; print(json.loads(_nybble.doctor())['best'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "NYBBLE_ISA": isa},
    )
    if fine:
        assert run.stdout.strip() == isa
    else:
        assert "ArgumentError" in run.stderr
        assert "NYBBLE_ISA" in run.stderr


@pytest.mark.timeout(900)  # mypy reads all of NumPy, on machines that may be busy
def test_the_stub_tells_the_truth():
    pytest.importorskip("mypy")
    run = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "nybble._nybble"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
