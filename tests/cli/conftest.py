"""What the tests of the command line share."""

import json
import os
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest

import nybble
from nybble.cli.app import main
from tiny import CHAT_TEMPLATE

Outcome = namedtuple("Outcome", "code out err")


@pytest.fixture(scope="session")
def compressed_folder(tiny_folder, tmp_path_factory):
    """The tiny model with 4-bit weights and 8-bit activations; do not change it."""
    out = tmp_path_factory.mktemp("compressed") / "w4a8"
    nybble.compress(tiny_folder, out, progress=False, threads=2)
    return out


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test sees or fills the user's cache, and none asks the network."""
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("NYBBLE_OFFLINE", "1")


@pytest.fixture
def run(capsys):
    """Run a command line in this process; gives exit code, stdout and stderr."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def run_json(run):
    """Run a command line that must succeed and print one JSON object."""

    def call(*arguments):
        outcome = run(*arguments, "--json")
        assert outcome.code == 0, outcome.err
        value = json.loads(outcome.out)
        assert isinstance(value, dict)
        return value

    return call


@pytest.fixture
def start():
    """Start a command line as a process of its own, with pipes; what is left is killed."""
    running = []

    def call(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "nybble", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        running.append(process)
        return process

    yield call
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """A random Llama as a GGUF file in F16 with a byte-level tokenizer; do not change it."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    from tiny import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    data = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab_size()
    names = [tokenizer.id_to_token(index) for index in range(vocab)]
    hidden, inner, heads, layers = 64, 96, 4, 2
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types([3 if name.startswith("<|") else 1 for name in names])
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    def matrix(name, rows, cols):
        values = rng.standard_normal((rows, cols)) / np.sqrt(cols)
        writer.add_tensor(name, values.astype(np.float16))

    matrix("token_embd.weight", vocab, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    for layer in range(layers):
        name = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{name}.{norm}.weight", np.ones(hidden, dtype=np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{name}.{part}.weight", hidden, hidden)
        matrix(f"{name}.ffn_gate.weight", inner, hidden)
        matrix(f"{name}.ffn_up.weight", inner, hidden)
        matrix(f"{name}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
