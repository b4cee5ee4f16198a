"""Models for other programs: GGUF files and plain folders, read back."""

import json

import numpy as np
import pytest
import torch

import nybble
from families import make, prompts, reference_logits
from nybble import _nybble
from nybble.cli.app import main
from nybble.compress import compress
from nybble.compress.export import to_folder, to_gguf
from nybble.errors import ArgumentError, FormatError, UnsupportedError
from nybble.formats.llama_cpp import architecture
from nybble.formats.ragged import structure_of
from tiny import write_llama, write_tokenizer

pytestmark = pytest.mark.timeout(120)

FLOAT = {"weights": {"bits": 16}, "activations": {"bits": 16}, "floats": "f16"}
IDS = [5, 9, 77, 31, 200, 14]
TEXTS = ["the cat sat on the mat", "  42 caf\u00e9s\n\n", "<|im_start|>user\nhi<|im_end|>"]


@pytest.fixture(autouse=True)
def _gguf():
    pytest.importorskip("gguf")


def pruned(folder, out, calibration=(), **settings):
    recipe = {"prune": settings, **FLOAT, "calibration": {"tokens": 256, "context": 64}}
    compress(folder, out, recipe=recipe, calibration=calibration, progress=False)
    return out


def same(found, wanted, bound=1e-4):
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


def logits(path, ids=IDS):
    return nybble.load(path, threads=1).forward(ids)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_type_is_read_back(tiny_folder, tmp_path, kind):
    notes = to_gguf(tiny_folder, tmp_path / "m.gguf", kind, progress=False)
    assert notes == []
    bound = {"f32": 1e-5, "f16": 5e-3, "bf16": 3e-2, "q8_0": 3e-2, "q4_0": 0.5}[kind]
    same(logits(tmp_path / "m.gguf"), logits(tiny_folder), bound)
    found = {
        dtype for dtype, _ in _nybble.Checkpoint.open(str(tmp_path / "m.gguf")).tensors().values()
    }
    assert kind.upper() in found
    model, again = nybble.load(tiny_folder, threads=1), nybble.load(tmp_path / "m.gguf", threads=1)
    for text in TEXTS:
        assert model.tokenizer.encode(text) == again.tokenizer.encode(text)
    assert model.tokenizer.end_ids == again.tokenizer.end_ids
    assert model.tokenizer.templates == again.tokenizer.templates
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("family", ["llama", "llama-biased-tied-wide", "qwen2", "qwen3"])
def test_families_with_layers_of_one_shape(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    state = {name: p.numel() for name, p in model.named_parameters() if ".layers.0." in name}
    half = sum(size for name, size in state.items() if ".mlp." in name) / 2
    settings = {"name": "magnitude_units", "attention": "none", "round_to": 48}
    settings["ratio"] = 0.98 * half / sum(state.values())
    if family == "llama":  # and of one that became narrower
        settings |= {"mlp": False, "hidden": True, "round_to": 32, "floor": 0.4, "ratio": 0.5}
    pruned(tmp_path / "in", tmp_path / "cut", **settings)
    cut = json.loads((tmp_path / "cut" / "config.json").read_text())
    narrower = [cut[key] < config[key] for key in ("hidden_size", "intermediate_size")]
    assert narrower == ([True, False] if family == "llama" else [False, True])
    to_gguf(tmp_path / "cut", tmp_path / "m.gguf", "f32", progress=False)
    to_folder(tmp_path / "cut", tmp_path / "plain")
    wanted = logits(tmp_path / "cut", prompts(8)[0])
    same(logits(tmp_path / "m.gguf", prompts(8)[0]), wanted)
    same(logits(tmp_path / "plain", prompts(8)[0]), wanted, 0)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    same(reference_logits(plain, prompts(8)[0]), wanted)
    assert "nybble" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def ragged(tmp_path, **changes):
    """A Llama of four layers: one whole, one narrow with biases, one without attention."""
    folder = write_llama(tmp_path / "ragged", layers=4)
    write_tokenizer(folder)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    whole = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    layers = [
        whole,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
        | {"biases": ["o_proj", "down_proj"]},
        {**whole, "num_attention_heads": 0, "num_key_value_heads": 0},
        {**whole, **changes},
    ]
    cut, draw = {}, np.random.default_rng(0)
    for name, values in tensors.items():
        layer = next((i for i in (1, 2) if f".layers.{i}." in name), None)
        if layer == 2 and ("attn" in name or "input_layernorm" in name):
            continue
        if layer == 1:
            rows = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "gate_proj": 32, "up_proj": 32}
            cols = {"o_proj": 32, "down_proj": 32}
            part = name.split(".")[-2]
            values = values[: rows.get(part)] if part in rows else values
            values = values[:, : cols[part]] if part in cols else values
            if part in cols:
                bias = draw.standard_normal(values.shape[0]).astype(np.float32)
                cut[name.replace("weight", "bias")] = bias
        cut[name] = np.ascontiguousarray(values)
    config["nybble"] = {"version": 1, "structure": {"layers": layers}}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder, layers


def test_llamas_whose_layers_differ(tmp_path):
    folder, layers = ragged(tmp_path)
    to_gguf(folder, tmp_path / "m.gguf", "f32", progress=False)
    same(logits(tmp_path / "m.gguf"), logits(folder))
    checkpoint = _nybble.Checkpoint.open(str(tmp_path / "m.gguf"))
    found = structure_of(json.loads(checkpoint.config()))
    assert [{"biases": [], **layer} for layer in layers] == found
    assert checkpoint.gguf_metadata()["general.architecture"] == "deci"
    with pytest.raises(UnsupportedError, match="layer 1: 2 heads, 1 key heads, 32 neurons, a bias"):
        to_folder(folder, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "ragged"]
    # Compressed again, it is what the folder itself becomes.
    for source, name in ((folder, "a"), (tmp_path / "m.gguf", "b")):
        compress(source, tmp_path / name, recipe={"weights": {"bits": 8}}, progress=False)
    same(logits(tmp_path / "a"), logits(tmp_path / "b"), 1e-3)


def test_models_of_every_method_that_leaves_whole_groups(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. a small model runs fast on the CPU.\n" * 100)
    for name, more in (("flap", {}), ("refit", {}), ("block_similarity", {"ratio": 0.5})):
        out = pruned(tiny_folder, tmp_path / name, text, **{"name": name, "ratio": 0.3, **more})
        to_gguf(out, tmp_path / f"{name}.gguf", "f16", progress=False)
        same(logits(tmp_path / f"{name}.gguf"), logits(out), 1e-3)


def test_what_the_formats_cannot_say_is_named(tmp_path, tiny_folder):
    folder, _ = ragged(tmp_path, queries_per_kv=[3, 1])
    with pytest.raises(UnsupportedError, match="layer 3: its key heads have 3, 1 query heads"):
        to_gguf(folder, tmp_path / "m.gguf", progress=False)
    config = json.loads((folder / "config.json").read_text())
    layers = structure_of(config)
    for index, key, words in (
        (1, "intermediate_size", "layer 1: it has no neurons"),
        (0, "num_attention_heads", "layer 0: it has no heads"),
    ):
        bad = [{**layer, key: 0} if i == index else layer for i, layer in enumerate(layers)]
        with pytest.raises(UnsupportedError, match=words):
            architecture(config, bad)
    make("qwen2").save_pretrained(tmp_path / "qwen2")
    write_tokenizer(tmp_path / "qwen2")
    cut = pruned(tmp_path / "qwen2", tmp_path / "cut", name="random_units", ratio=0.3)
    with pytest.raises(UnsupportedError, match=r"layer 0: \d heads and \d+ neurons.*found a qwen2"):
        to_gguf(cut, tmp_path / "m.gguf", progress=False)
    for family, words in (("opt", "opt: writing"), ("mistral-window", "sliding_window")):
        make(family).save_pretrained(tmp_path / family)
        with pytest.raises(UnsupportedError, match=words):
            to_gguf(tmp_path / family, tmp_path / "m.gguf", progress=False)
    compress(tiny_folder, tmp_path / "small", progress=False)
    for export in (to_gguf, to_folder):
        with pytest.raises(UnsupportedError, match="quantized"):
            export(tmp_path / "small", tmp_path / "m.gguf")
    with pytest.raises(ArgumentError, match="did you mean q8_0"):
        to_gguf(tiny_folder, tmp_path / "m.gguf", "q8")
    assert not (tmp_path / "m.gguf").exists()
    to_gguf(tiny_folder, tmp_path / "m.gguf", progress=False)
    with pytest.raises(ArgumentError, match="overwrite"):
        to_gguf(tiny_folder, tmp_path / "m.gguf", progress=False)
    with pytest.raises(UnsupportedError, match="found a GGUF file"):
        to_gguf(tmp_path / "m.gguf", tmp_path / "n.gguf", progress=False)
    tokenizer = json.loads((tiny_folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ragged_config = json.loads((folder / "config.json").read_text())
    ragged_config["nybble"]["structure"]["layers"][3].pop("queries_per_kv")
    (folder / "config.json").write_text(json.dumps(ragged_config))
    with pytest.raises(UnsupportedError, match="rule for words"):
        to_gguf(folder, tmp_path / "n.gguf", progress=False)
    assert not list(tmp_path.glob("*.tmp*"))


def test_files_that_lie_about_their_layers_are_refused(tmp_path):
    folder, _ = ragged(tmp_path)
    to_gguf(folder, tmp_path / "m.gguf", "f32", progress=False)
    whole = (tmp_path / "m.gguf").read_bytes()
    key = b"deci.feed_forward_length"
    at = whole.index(key) + len(key)
    assert int.from_bytes(whole[at : at + 4], "little") == 9  # an array
    values = at + 4 + 4 + 8
    for change in ((96).to_bytes(4, "little"), (-1 % 2**32).to_bytes(4, "little")):
        bad = whole[: values + 4] + change + whole[values + 8 :]
        (tmp_path / "bad.gguf").write_bytes(bad)
        with pytest.raises((FormatError, nybble.errors.ConfigError)):
            nybble.load(tmp_path / "bad.gguf")
    blocks = whole.index(b"deci.block_count") + len(b"deci.block_count") + 4
    for count in (3, 5, 2**32 - 1):
        bad = whole[:blocks] + count.to_bytes(4, "little") + whole[blocks + 4 :]
        (tmp_path / "bad.gguf").write_bytes(bad)
        with pytest.raises(FormatError, match=r"head_count|block_count"):
            nybble.load(tmp_path / "bad.gguf")


def test_the_command(tiny_folder, tmp_path, capsys):
    command = ["export", str(tiny_folder), "--quiet"]
    assert main([*command, "-o", str(tmp_path / "m.gguf"), "--type", "q8_0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["format"] == "gguf"
    assert printed["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert main([*command, "-o", str(tmp_path / "plain")]) == 0
    same(logits(tmp_path / "plain"), logits(tiny_folder), 0)
    assert main([*command, "-o", str(tmp_path / "x"), "--to", "onnx"]) == 2
    assert main([*command, "-o", str(tmp_path / "m.gguf")]) == 1
    assert "overwrite" in capsys.readouterr().err
