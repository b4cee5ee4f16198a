"""One bad folder, file or call of every known class, through the front door.

The Rust tests sweep truncations and bit flips; these make sure that what a person sees is a named
exception that says which file, which item, what was expected and what was found, quickly, without
memory taken for sizes a file only claims, and that compression leaves no folder behind.
"""

import json
import resource
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nybble
from nybble.errors import (
    ArgumentError,
    ConfigError,
    ContextError,
    FormatError,
    NybbleError,
    TokenError,
    UnsupportedError,
)
from tiny import CHAT_TEMPLATE, write_gguf, write_llama, write_tokenizer


@pytest.fixture
def folder(tmp_path):
    folder = write_llama(tmp_path / "model")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def gguf(folder, tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf package to write a file")
    path = tmp_path / "model.gguf"
    write_gguf(path, folder)
    return path


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path, header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", length or len(text)) + text + body)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuses(path, kind, *words):
    """Loading fails with `kind` and a message with `words`, soon and without much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        nybble.load(path)
    assert isinstance(caught.value, NybbleError)
    # Generous for a busy machine; the point is that nothing is read or allocated by a claimed size.
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def test_class_1_a_length_far_beyond_the_file(folder):
    weights = folder / "model.safetensors"
    header, body = header_of(weights)
    write_header(weights, header, body, length=2**40)
    refuses(folder, FormatError, "model.safetensors", "expected", "found")


def test_class_1_a_count_far_beyond_the_file(gguf):
    data = bytearray(gguf.read_bytes())
    data[8:16] = struct.pack("<Q", 2**60)
    gguf.write_bytes(data)
    refuses(gguf, FormatError, "model.gguf", "expected", "found")


@pytest.mark.parametrize("size", [2**31, 2**32, 2**63, 2**64 - 1])
def test_class_2_sizes_that_overflow(folder, size):
    weights = folder / "model.safetensors"
    header, body = header_of(weights)
    header["model.norm.weight"]["shape"] = [size, size]
    write_header(weights, header, body)
    refuses(folder, FormatError, "model.norm.weight", "expected", "found")


@pytest.mark.parametrize("offsets", [[0, 256], [10**9, 10**9 + 256], [256, 0]])
def test_class_3_offsets_that_overlap_leave_or_run_backwards(folder, offsets):
    weights = folder / "model.safetensors"
    header, body = header_of(weights)
    header["model.norm.weight"]["data_offsets"] = offsets
    write_header(weights, header, body)
    refuses(folder, FormatError, "model.safetensors", "expected", "found")


def test_class_3_bytes_after_the_last_tensor(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"extra")
    refuses(folder, FormatError, "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGUF", b"GGUF" + struct.pack("<I", 99)])
def test_class_4_magic_version_and_truncation(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refuses(path, (FormatError, UnsupportedError), "model.gguf")


def test_class_5_duplicate_names(folder):
    weights = folder / "model.safetensors"
    header, body = header_of(weights)
    entry = json.dumps(header["model.norm.weight"])
    text = json.dumps(header)[:-1] + f', "model.norm.weight": {entry}}}'
    write_header(weights, text.encode(), body)
    refuses(folder, FormatError, "model.norm.weight")


def test_class_6_a_type_that_is_none(folder):
    weights = folder / "model.safetensors"
    header, body = header_of(weights)
    header["model.norm.weight"]["dtype"] = "F33"
    write_header(weights, header, body)
    refuses(folder, (FormatError, UnsupportedError), "model.norm.weight", "F33")


def test_class_7_nesting_without_end(folder):
    (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    refuses(folder, FormatError, "config.json")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_class_8_shards_outside_the_folder(folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, FormatError, "index.json")


def test_class_8_a_link_out_of_the_folder(folder):
    outside = folder.parent / "secret.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    refuses(folder, FormatError, "model.safetensors")


@pytest.mark.parametrize(
    "name", ["os.system", "../llama", "llama/../../x", "path/to/file.py:Class"]
)
def test_class_9_names_in_a_config_are_only_keys(folder, name):
    change_config(folder, model_type=name, auto_map={"AutoModelForCausalLM": "evil.Model"})
    refuses(folder, UnsupportedError, name, "llama")


def test_class_9_formats_in_a_config_are_only_keys(folder):
    change_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "path/to/file.py:Class",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "strategy": "channel"},
                }
            },
        },
    )
    refuses(folder, (UnsupportedError, ConfigError), "path/to/file.py:Class")


def test_class_10_templates_run_in_a_sandbox(folder):
    (folder / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHAT_TEMPLATE
    )
    model = nybble.load(folder)
    with pytest.raises(NybbleError):
        model.chat([{"role": "user", "content": "hi"}], max_new_tokens=1)


def test_class_11_users_cannot_write_control_tokens(folder):
    tokenizer = nybble.load(folder).tokenizer
    control = tokenizer.encode("<|im_end|>", parse_special=True, add_special_tokens=False)
    assert len(control) == 1
    assert control[0] not in tokenizer.encode("<|im_end|>")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_class_12_pickles_are_refused_with_a_hint(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04K\x01.")
    refuses(folder, NybbleError, name, "safetensors")


def test_class_13_a_tokenizer_that_is_damaged(folder):
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": -1}}}')
    with pytest.raises(NybbleError, match="tokenizer"):
        nybble.load(folder).tokenizer.encode("a")


def test_class_14_tokens_outside_the_vocabulary(folder):
    model = nybble.load(folder)
    with pytest.raises(TokenError, match="290"):
        model.forward([1, 290])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -1.0),
        ("top_p", float("nan")),
        ("min_p", 2.0),
        ("top_k", -5),
        ("repeat_penalty", float("inf")),
        ("max_new_tokens", -1),
    ],
)
def test_class_15_numbers_of_a_request(tiny, name, value):
    with pytest.raises(ArgumentError, match=name.removeprefix("max_")):
        tiny.generate("the cat", **{"max_new_tokens": 2, name: value})


def test_class_16_samplers_at_their_edges(tiny):
    for settings in ({"top_k": 1}, {"top_k": 10**6}, {"top_p": 1e-9}, {"min_p": 1.0}):
        answer = tiny.generate("the cat", max_new_tokens=3, temperature=1.0, seed=1, **settings)
        assert len(answer.tokens) <= 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_class_17_scales_that_are_no_scales(folder, bad):
    out = folder.parent / "small"
    nybble.compress(folder, out, progress=False)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 0] = bad
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    refuses(out, NybbleError, "model.layers.1.mlp.up_proj")


def test_class_17_words_that_do_not_fit_their_shape(folder):
    out = folder.parent / "small"
    nybble.compress(folder, out, progress=False)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_packed"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    refuses(out, NybbleError, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, ["num_attention_heads"]),
        ({"hidden_size": 2**40}, ["config.json"]),
        ({"num_hidden_layers": 3}, ["model.layers.2"]),
        ({"vocab_size": 291}, ["embed_tokens", "290", "291"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps"]),
    ],
)
def test_class_18_a_config_that_lies(folder, changes, words):
    change_config(folder, **changes)
    refuses(folder, (ConfigError, FormatError), *words)


def test_class_18_every_problem_is_reported_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    refuses(folder, (ConfigError, FormatError), "model.norm.weight", "lm_head.weight")


def test_class_19_a_model_in_use_is_not_overwritten_in_place(folder):
    out = folder.parent / "small"
    nybble.compress(folder, out, progress=False)
    model = nybble.load(out)
    before = model.forward([1, 2, 3])
    nybble.compress(folder, out, weights=8, overwrite=True, progress=False)
    assert np.array_equal(model.forward([1, 2, 3]), before)


def test_class_20_a_folder_without_a_config_is_unfinished(folder):
    (folder / "config.json").unlink()
    refuses(folder, NybbleError, "config.json")


def test_class_21_sizes_come_from_bytes_that_are_there(folder):
    weights = folder / "model.safetensors"
    header, _ = header_of(weights)
    write_header(weights, header, b"")
    refuses(folder, FormatError, "model.safetensors", "expected", "found")


def test_class_22_prompts_of_no_and_of_too_many_tokens(tiny):
    with pytest.raises(ArgumentError, match="prompt"):
        tiny.generate([], max_new_tokens=1)
    with pytest.raises(ContextError, match="512"):
        tiny.generate([1] * 513, max_new_tokens=1)


def test_class_23_a_pointer_instead_of_weights(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n"
    )
    refuses(folder, FormatError, "model.safetensors", "LFS")


def test_a_failed_compression_leaves_no_folder(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    save_file(tensors, weights)
    before = sorted(folder.parent.iterdir())
    with pytest.raises(NybbleError, match=r"model\.layers\.1\.mlp\.down_proj"):
        nybble.compress(folder, folder.parent / "small", progress=False)
    assert sorted(folder.parent.iterdir()) == before
