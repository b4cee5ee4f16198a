"""Whole folders: contents, values, reports, and what is refused."""

import errno
import itertools
import json
import os
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import nybble
from nybble.compress import files, pipeline
from nybble.compress.recipe import read
from nybble.errors import ArgumentError, ConfigError, FileError, FormatError, UnsupportedError
from nybble.formats.packing import unpack, unpack_zeros
from nybble.quant import IntWeights
from tiny import write_gguf, write_llama, write_tokenizer


def compress(source, out, **settings):
    return nybble.compress(source, out, progress=False, threads=2, **settings)


def dequantized(folder, module, bits):
    """A module's floats, out of the file."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        rows, cols = file.get_tensor(f"{module}.weight_shape").tolist()
        codes = unpack(file.get_tensor(f"{module}.weight_packed"), bits, cols)
        scales = file.get_tensor(f"{module}.weight_scale").astype(np.float32)
        zeros = None
        if f"{module}.weight_zero_point" in file.keys():  # noqa: SIM118
            zeros = file.get_tensor(f"{module}.weight_zero_point").astype(np.float32)
            if zeros.shape == scales.shape:
                zeros += 2 ** (bits - 1)
            else:
                words = file.get_tensor(f"{module}.weight_zero_point")
                zeros = unpack_zeros(words, bits, rows).astype(np.float32)
    return IntWeights(codes, scales, zeros, bits).dequantize()


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_folder_has_everything(tiny_folder, tmp_path):
    out = tmp_path / "out"
    report = compress(tiny_folder, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert leftovers(tmp_path) == []
    config = json.loads((out / "config.json").read_text())
    assert config["nybble"]["version"] == 1
    assert config["dtype"] == "float32"
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert read(out / "recipe.yaml") == read("w4a8")
    stored = json.loads((out / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_json()))
    assert str(tiny_folder.parent) not in (out / "report.json").read_text()
    assert set(report.source_files) == {"model.safetensors", "config.json"}
    assert all(len(digest) == 64 for digest in report.source_files.values())
    size = (out / "model.safetensors").stat().st_size
    assert 0 < size - report.size_after < 20_000  # the header
    assert nybble.load(out).generate("the cat", max_new_tokens=3).text is not None


@pytest.mark.parametrize(
    ("bits", "zeros"),
    [
        *itertools.product(
            [4, 8],
            [{"symmetric": True}, {"symmetric": False}, {"symmetric": False, "zeros": "whole"}],
        ),
        (7, {"symmetric": True}),
    ],
)
@pytest.mark.parametrize("group", [32, 64, None])
def test_the_file_holds_what_the_method_gave(tiny_folder, tmp_path, bits, zeros, group):
    out = tmp_path / "out"
    weights = {"bits": bits, "group": group, **zeros}
    report = compress(tiny_folder, out, recipe={"weights": weights})
    source = load_file(tiny_folder / "model.safetensors")
    errors = {tensor.name: tensor for tensor in report.tensors}
    for module in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        plain = source[f"{module}.weight"]
        back = dequantized(out, module, 8 if bits == 7 else bits)  # stored as codes of 8 bits
        error = float(((plain - back) ** 2).sum() / (plain**2).sum())
        assert error == pytest.approx(errors[module].error, rel=1e-4)
        assert error < {4: 0.03, 7: 4e-4, 8: 1e-4}[bits]
    assert np.array_equal(
        load_file(out / "model.safetensors")["model.norm.weight"], source["model.norm.weight"]
    )


@pytest.mark.parametrize("bad", [0.03, -8.0625, 8.0, np.nan, np.inf])
def test_a_zero_point_that_no_tile_holds_is_refused(tiny_folder, tmp_path, bad):
    out = tmp_path / "out"
    compress(tiny_folder, out)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight_zero_point"
    assert tensors[name].dtype == np.float16
    tensors[name][3, 1] = bad
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(FormatError, match=f"{name}.*multiples of 1/16"):
        nybble.load(out)


def test_blocks_of_rows_give_the_same_file(tiny_folder, tmp_path, monkeypatch):
    compress(tiny_folder, tmp_path / "whole")
    monkeypatch.setattr(pipeline, "_BLOCK", 4 * 64 * 32)
    compress(tiny_folder, tmp_path / "blocks")
    whole, blocks = (tmp_path / name / "model.safetensors" for name in ("whole", "blocks"))
    assert whole.read_bytes() == blocks.read_bytes()


def test_sixteen_bits_are_a_plain_folder(tiny_folder, tmp_path):
    out = tmp_path / "out"
    report = compress(tiny_folder, out, weights=16)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert 15 < report.bits_per_weight < 17
    ids = [1, 5, 9]
    found, wanted = (nybble.load(path).forward(ids) for path in (out, tiny_folder))
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    # What has 16 bits already is copied, bit for bit.
    again = compress(out, tmp_path / "again", weights=16)
    first, second = (path / "model.safetensors" for path in (out, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    assert {tensor.error for tensor in again.tensors} == {0.0}


def test_bfloat16_rounds_to_the_nearest():
    torch = pytest.importorskip("torch", reason="needs torch (the compress extra)")
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:4] = [0.0, 3.0e38, 1.00390625, 1.01171875]  # the last two are ties
    stored, back = pipeline._narrowed(values, "BF16")
    wanted = torch.from_numpy(values).bfloat16()
    assert np.array_equal(back, wanted.float().numpy())
    assert np.array_equal(stored.view(np.int16), wanted.view(torch.int16).numpy())


def test_large_models_are_written_in_several_files(tiny_folder, tmp_path):
    single, several = tmp_path / "single", tmp_path / "several"
    compress(tiny_folder, single)
    pipeline.run(tiny_folder, several, read(None), progress=False, shard=20_000)
    index = json.loads((several / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert not (several / "model.safetensors").exists()
    expected = load_file(single / "model.safetensors")
    found = {}
    for name in names:
        found |= load_file(several / name)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert np.array_equal(nybble.load(single).forward([1, 2]), nybble.load(several).forward([1, 2]))


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(tiny_folder, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf (the test extra)")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_folder)
    report = compress(path, tmp_path / "out")
    assert report.source == "tiny.gguf"
    assert set(report.source_files) == {"tiny.gguf"}
    out, folder = nybble.load(tmp_path / "out"), tmp_path / "folder"
    compress(tiny_folder, folder)
    text = "the cat sat on a model"
    assert out.tokenizer.encode(text) == nybble.load(folder).tokenizer.encode(text)
    assert np.array_equal(out.forward([1, 2, 3]), nybble.load(folder).forward([1, 2, 3]))
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "family",
    [
        "llama-biased-tied-wide",
        "qwen2",
        "gemma3",
        "opt-post-norm-narrow",
        "bloom",
        "gpt2",
        "gpt2-by-depth",
    ],
)
def test_every_family_can_be_compressed(family, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers (the compress extra)")
    import torch

    from families import distance, make, reference_logits

    source = tmp_path / "source"
    model = make(family)
    model.save_pretrained(source)
    report = compress(source, tmp_path / "out", weights=8, activations=16)
    quantized = [tensor for tensor in report.tensors if "8-bit" in tensor.scheme]
    assert {"qkv", "out", "down", "embedding"} <= {tensor.role for tensor in quantized}
    assert all(tensor.error < 1e-3 for tensor in quantized)
    for tensor in quantized:  # the same rounded weights through transformers
        weight = model.get_submodule(tensor.name).weight
        back = torch.from_numpy(dequantized(tmp_path / "out", tensor.name, 8))
        weight.data.copy_(
            back.T if "gpt2" in family and tensor.name.startswith("transformer.h") else back
        )
    for tensor in report.tensors:
        if tensor.scheme == "bf16":
            parameter = model.get_parameter(tensor.name)
            parameter.data.copy_(parameter.data.bfloat16())
    ids = list(range(3, 23))
    found = nybble.load(tmp_path / "out", kv="f32").forward(ids)
    assert distance(found, reference_logits(model, ids)) < 1e-4


def test_an_existing_folder_is_replaced_only_when_asked(tiny_folder, tmp_path):
    out = tmp_path / "out"
    compress(tiny_folder, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FileError, match="out"):
        compress(tiny_folder, out, weights=8)
    assert (out / "model.safetensors").read_bytes() == before
    compress(tiny_folder, out, weights=8, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert leftovers(tmp_path) == []


def test_source_and_output_must_be_apart(tiny_folder, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(tiny_folder, source)
    link = tmp_path / "link"
    link.symlink_to(source)
    for out in (source, link, source / "inside", tmp_path):
        with pytest.raises(ArgumentError, match="out: expected"):
            compress(source, out, overwrite=True)
    assert nybble.load(source)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path, bad, name):
    source = write_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[name].reshape(-1)[7] = bad
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError) as caught:
        compress(source, tmp_path / "out")
    for word in (str(source), name, str(bad), "column 7"):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_float16_that_overflows_is_named(tmp_path):
    source = write_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lm_head.weight: .*F16"):
        compress(source, tmp_path / "out", weights=16, recipe={"floats": "f16"})
    compress(source, tmp_path / "out", weights=16)


def test_a_quantized_source_is_refused(tiny_folder, tmp_path):
    compress(tiny_folder, tmp_path / "first")
    with pytest.raises(UnsupportedError, match="compress the original"):
        compress(tmp_path / "first", tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_config_that_lies_leaves_no_folder(tmp_path):
    source = write_llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] = 97
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="up_proj"):
        compress(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        compress(tmp_path / "absent", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_place_without_permission_is_named(tiny_folder, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="closed"):
        compress(tiny_folder, closed / "out")


def test_a_missing_parent_is_named(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        compress(tiny_folder, tmp_path / "absent" / "out")


def test_a_full_disk_names_the_file_and_leaves_nothing(tiny_folder, tmp_path):
    resource = pytest.importorskip("resource", reason="needs limits on the size of files")
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(FileError, match=r"model\.safetensors") as caught:
            compress(tiny_folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno in (errno.EFBIG, None) or "large" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    calls = 0

    def interrupt(self, item, writer):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(self, item, writer)

    original = pipeline._Writing.write
    monkeypatch.setattr(pipeline._Writing, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_files_of_the_folder_are_copied(tiny_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    (source / "secret.py").write_text("print(1)")
    (source / "added_tokens.json").symlink_to("tokenizer_config.json")
    compress(source, tmp_path / "out")
    assert not (tmp_path / "out" / "secret.py").exists()
    assert not (tmp_path / "out" / "added_tokens.json").is_symlink()
    (tmp_path / "elsewhere").write_text("{}")
    (source / "merges.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"merges\.txt"):
        compress(source, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_links_into_the_hubs_cache_are_files_of_the_folder(tiny_folder, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(tiny_folder.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    compress(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tiny_folder / "tokenizer.json"
    ).read_bytes()


def test_the_package_and_the_function_are_one_name(tiny_folder):
    import nybble.compress as package

    assert callable(package)
    assert nybble.compress is package
    assert package.compress.__doc__.startswith("Compress a model")


def test_progress_goes_to_stderr(tiny_folder, tmp_path, capsys):
    nybble.compress(tiny_folder, tmp_path / "out", threads=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100%" in captured.err


def test_the_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.digest(tmp_path / "a", lambda: False) == known
    assert files.digest(tmp_path / "a", lambda: True) == ""
    with pytest.raises(FileError, match="absent"):
        files.digest(tmp_path / "absent", lambda: False)


def test_a_folder_without_a_tokenizer_can_be_compressed(tmp_path):
    source = write_llama(tmp_path / "source")
    compress(source, tmp_path / "out")
    write_tokenizer(source)
    compress(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "tokenizer.json").exists()
