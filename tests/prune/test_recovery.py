"""Training after a cut, as part of a recipe."""

import json

import numpy as np
import pytest
import torch

import nybble
from nybble.compress import compress
from nybble.errors import ArgumentError, ConfigError
from nybble.prune import RECOVERIES
from tiny import write_llama, write_tokenizer

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("one_thread")]

TEXT = "the cat sat on the mat. a small model runs fast on the CPU. hello world 123\n"
FLOAT = {
    "weights": {"bits": 16},
    "activations": {"bits": 16},
    "floats": "auto",
    "calibration": {"tokens": 128, "context": 64},
}
BUDGET = {"tokens": 1024, "context": 64}
FAST = {"perp": {"rate": 0.01}, "reconstruction": {"rate": 0.003, "passes": 4}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 100)
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A Llama that knows the text somewhat, so that pruning costs it something."""
    from transformers import AutoModelForCausalLM

    from nybble.runtime.tokenizer import from_folder

    folder = write_llama(tmp_path_factory.mktemp("learned") / "llama", layers=3)
    write_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(from_folder(folder).encode(TEXT * 3))[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def weights(folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return {
        n: v.numpy() if v.dtype == torch.int32 else v.float().numpy() for n, v in tensors.items()
    }


@pytest.mark.parametrize(
    "prune",
    [
        {"name": "magnitude", "ratio": 0.85},
        {"name": "magnitude", "pattern": "1:4"},
        {"name": "magnitude_units", "ratio": 0.55, "attention": "head"},
        {"name": "block_similarity", "ratio": 0.6},
    ],
    ids=lambda p: f"{p['name']}-{p.get('pattern', '')}",
)
@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_losses_fall_and_zeros_stay(learned, text, tmp_path, name, prune):
    plain = {"prune": prune, **FLOAT}
    given = {"calibration": text} if prune["name"] == "block_similarity" else {}
    compress(learned, tmp_path / "cut", recipe=plain, progress=False, **given)
    trained = {"name": name, **BUDGET, **FAST[name]}
    recipe = {"prune": {**prune, "recovery": trained}, **FLOAT}
    report = compress(learned, tmp_path / "out", recipe=recipe, calibration=text, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "out"]
    told = json.loads((tmp_path / "out" / "report.json").read_text())["prune"]["recovery"]
    assert told == report.prune["recovery"]
    assert told["loss"]["after"] < told["loss"]["before"]
    assert told["method"] == name
    assert told["tokens"] >= 1024
    before, after = weights(tmp_path / "cut"), weights(tmp_path / "out")
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert (before[matrix] != after[matrix]).any()
    if prune["name"] == "magnitude":
        for tensor in (n for n in before if ".layers." in n and before[n].ndim == 2):
            assert not after[tensor][before[tensor] == 0].any()
    # What the report says of the loss is what the folder does, up to its 16-bit floats.
    model = nybble.load(tmp_path / "out", threads=1)
    assert np.isfinite(model.forward([1, 2, 3])).all()


def test_a_trained_model_is_quantized_with_its_zeros(learned, text, tmp_path):
    recipe = {
        "prune": {
            "name": "wanda",
            "pattern": "1:8",
            "recovery": {"name": "perp", **BUDGET, "rate": 0.01},
        },
        "weights": {"bits": 8},
        "calibration": {"tokens": 128, "context": 64},
    }
    report = compress(learned, tmp_path / "out", recipe=recipe, calibration=text, progress=False)
    loss = report.prune["recovery"]["loss"]
    assert loss["after"] < loss["before"]
    codes = weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_packed"].view(np.uint8)
    assert ((codes.reshape(-1, 8) == 128).sum(axis=1) >= 7).all()


def test_gpt2s_linears_are_recovered_too(text, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=290, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    trained = {"name": "perp", **BUDGET, "rate": 0.01}
    recipe = {"prune": {"name": "magnitude", "recovery": trained}, **FLOAT}
    report = compress(
        tmp_path / "in", tmp_path / "out", recipe=recipe, calibration=text, progress=False
    )
    loss = report.prune["recovery"]["loss"]
    assert loss["after"] < loss["before"]
    matrix = weights(tmp_path / "out")["transformer.h.0.mlp.c_fc.weight"]
    assert (matrix == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_recoveries_that_cannot_be_are_refused(learned, text, tmp_path):
    def attempt(recovery, error, words, calibration=text):
        recipe = {"prune": {"name": "magnitude", "recovery": recovery}, **FLOAT}
        with pytest.raises(error, match=words):
            compress(
                learned, tmp_path / "out", recipe=recipe, calibration=calibration, progress=False
            )
        assert list(tmp_path.iterdir()) == before

    before = list(tmp_path.iterdir())
    attempt("perb", ConfigError, "did you mean perp")
    attempt({"name": "perp", "rnak": 2}, ConfigError, "did you mean rank")
    attempt({"name": "reconstruction", "tokens": 0}, ConfigError, "tokens")
    attempt({"name": "reconstruction", "passes": 0}, ConfigError, "passes")
    attempt(["perp"], ConfigError, "expected a name")
    attempt("perp", ConfigError, r"prune\.recovery looks at text", calibration=())
    short = tmp_path.parent / "short.txt"
    short.write_text(TEXT * 2)
    attempt({"name": "perp", "context": 64}, ArgumentError, "at least", calibration=short)
