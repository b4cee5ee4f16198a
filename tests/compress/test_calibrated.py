"""Compression with calibration: what is written, what is reported, and what is resumed."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import nybble
from families import make, prompts
from nybble.calibrate.layer import Layer
from nybble.compress import compress
from nybble.compress.recipe import read, shipped
from nybble.errors import ArgumentError, ConfigError, FormatError
from tiny import byte_level_tokenizer, write_llama, write_tokenizer

# Seconds alone; whole compressions with torch, on a machine that others may be using.
pytestmark = pytest.mark.timeout(180)

TEXT = "the cat sat on the mat. a small model runs fast on the CPU. hello world 123\n"
SMALL = {"tokens": 512, "context": 64}
GPTQ = {"weights": {"method": "gptq", "group": 32}, "calibration": SMALL}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 100)
    return path


def windows(tokenizer, count=4, size=48):
    ids = tokenizer.encode(TEXT * 40).ids
    return [ids[i * size : (i + 1) * size] for i in range(count)]


def logits(folder, rows):
    model = nybble.load(folder, threads=1)
    return np.concatenate([model.forward(row) for row in rows])


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_makes_a_model_that_runs(tiny_folder, text, tmp_path, name):
    recipe = read(name)
    needs = bool(recipe.needs_calibration())
    settings = {"calibration": text, "calibration_tokens": 1024} if needs else {}
    report = compress(tiny_folder, tmp_path / "out", recipe=recipe, threads=2, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert np.isfinite(nybble.load(tmp_path / "out", threads=1).forward([1, 2, 3])).all()
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (stored["calibration"] is not None) == needs
    assert read(tmp_path / "out" / "recipe.yaml") == recipe.with_options(
        calibration_tokens=settings.get("calibration_tokens")
    )
    assert report.calibration == stored["calibration"]


def test_gptq_is_nearer_to_the_original_than_rounding_to_nearest(tiny_folder, text, tmp_path):
    rows = windows(byte_level_tokenizer())
    wanted = logits(tiny_folder, rows)
    lost = {}
    for method in ("rtn", "gptq"):
        recipe = {"weights": {"method": method, "group": 32}, "activations": {"bits": 16}}
        settings = {"calibration": text} if method == "gptq" else {}
        compress(tiny_folder, tmp_path / method, recipe=recipe, **settings)
        lost[method] = np.square(logits(tmp_path / method, rows) - wanted).mean()
    assert lost["gptq"] < 0.6 * lost["rtn"]


@pytest.mark.parametrize(
    "recipe",
    [
        {"weights": {"bits": 4, "method": "gptq"}},
        {"weights": {"bits": 4, "method": {"name": "gptq", "true_sequential": False}}},
        {"weights": {"bits": 4}, "activations": {"bits": 8, "strategy": "tensor"}},
    ],
    ids=["stages", "layers", "static"],
)
def test_the_next_layer_reads_what_the_rounded_one_gives(
    tiny_folder, text, tmp_path, monkeypatch, recipe
):
    original = Layer.outputs
    layers = []

    def outputs(self, hidden):
        before = [states.clone() for states in hidden]
        original(self, hidden)
        for window, _, wanted in self.trace(before):
            torch.testing.assert_close(hidden[window], wanted)
        layers.append(self.prefix)

    monkeypatch.setattr(Layer, "outputs", outputs)
    compress(tiny_folder, tmp_path / "out", recipe=recipe, calibration=text, progress=False)
    assert len(layers) == nybble.load(tmp_path / "out").info["layers"]


def test_the_report_says_what_was_looked_at(tiny_folder, text, tmp_path):
    report = compress(tiny_folder, tmp_path / "out", recipe=GPTQ, calibration=[text], seed=5)
    facts = report.calibration
    assert (facts["tokens"], facts["context"], facts["windows"], facts["seed"]) == (512, 64, 8, 5)
    assert list(facts["files"]) == ["text.txt"]
    assert re.fullmatch("[0-9a-f]{64}", facts["sha256"])
    other = compress(tiny_folder, tmp_path / "two", recipe=GPTQ, calibration=text, seed=6)
    assert other.calibration["sha256"] != facts["sha256"]
    assert other.calibration["files"] == facts["files"]
    for tensor in report.tensors:
        linear = tensor.role in ("qkv", "out", "gate_up", "down")
        assert (tensor.output_error is not None) == linear
        if linear:
            assert 0 < tensor.output_error < 0.05
            assert 0 < tensor.error < 0.2


@pytest.mark.parametrize("bits", [8, 4])
def test_static_scales_are_stored_and_run(tiny_folder, text, tmp_path, bits):
    from safetensors.numpy import load_file

    from nybble.formats.compressed_tensors import QuantizedModules

    lost = {}
    rows = windows(byte_level_tokenizer())
    wanted = logits(tiny_folder, rows)
    for strategy in ("token", "tensor"):
        recipe = {
            "weights": {"bits": 8},
            "activations": {"bits": bits, "strategy": strategy, "roles": {"out": 16}},
        }
        calibrated = {} if strategy == "token" else {"calibration": text, "calibration_tokens": 512}
        compress(tiny_folder, tmp_path / strategy, recipe=recipe, **calibrated)
        difference = logits(tmp_path / strategy, rows) - wanted
        lost[strategy] = np.square(difference).sum() / np.square(wanted).sum()
    assert lost["token"] != lost["tensor"] < (0.01 if bits == 8 else 0.3)
    tensors = load_file(tmp_path / "tensor" / "model.safetensors")
    steps = {name: value for name, value in tensors.items() if name.endswith("input_scale")}
    # q, k, v; gate, up; down: the output projection reads floats here.
    assert len(steps) == 6 * len([name for name in tensors if name.endswith("o_proj.weight_scale")])
    of = {name.split(".")[-2]: float(value[0]) for name, value in steps.items()}
    assert of["q_proj"] == of["k_proj"] == of["v_proj"] != of["up_proj"] == of["gate_proj"]
    config = json.loads((tmp_path / "tensor" / "config.json").read_text())
    modules = QuantizedModules(config["quantization_config"])
    assert modules.scheme("model.layers.0.mlp.down_proj", "Linear").static
    assert not modules.scheme("model.layers.0.self_attn.o_proj", "Linear").static


def test_the_stored_scale_is_what_the_run_time_rounds_with(tiny_folder, text, tmp_path):
    # A scale a thousand times too large leaves no codes but 0: all that layers add is lost.
    from safetensors.numpy import load_file, save_file

    recipe = {"weights": {"bits": 8}, "activations": {"strategy": "tensor", "dynamic": False}}
    compress(tiny_folder, tmp_path / "out", recipe=recipe, calibration=text)
    file = tmp_path / "out" / "model.safetensors"
    before = logits(tmp_path / "out", [[1, 2, 3, 4]])
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("input_scale"):
            tensors[name] = 1000 * tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    after = logits(tmp_path / "out", [[1, 2, 3, 4]])
    last = logits(tmp_path / "out", [[4]])
    assert np.abs(after - before).max() > 0.01
    # Without attention a token's logits do not depend on those before it.
    np.testing.assert_allclose(after[-1], last[-1], atol=1e-5)


def test_fallbacks_are_reported(tiny_folder, tmp_path):
    # Fewer tokens than channels, undamped: second moments without an inverse.
    short = tmp_path / "short.txt"
    short.write_text(TEXT)
    method = {"name": "gptq", "damping": 0}
    recipe = {
        "weights": {"method": method, "group": 32},
        "activations": {"bits": 16},
        "calibration": {"tokens": 900, "context": 20},
    }
    report = compress(tiny_folder, tmp_path / "out", recipe=recipe, calibration=short)
    found = report.calibration["tokens"]
    assert found < 900
    assert (
        f"calibration: {found} tokens of the 900 asked for: the text fills no more windows of 20"
        in report.notes
    )
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    notes = [t["note"] for t in stored["tensors"] if t["role"] == "down"]
    assert all(re.search(r"damping 0\.\d+: the inputs are dependent", note) for note in notes)
    assert np.isfinite(nybble.load(tmp_path / "out", threads=1).forward([1, 2, 3])).all()


def test_the_same_run_gives_the_same_bytes(tiny_folder, text, tmp_path):
    recipe = {**GPTQ, "folds": ["trip"]}
    for name, threads in (("a", 1), ("b", 2)):
        compress(tiny_folder, tmp_path / name, recipe=recipe, calibration=text, threads=threads)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert one == two


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "opt", "bloom", "gpt2"])
def test_a_folded_model_is_as_near_to_the_original_as_one_that_is_not(family, tmp_path, text):
    model = make(family)
    source = tmp_path / "source"
    model.save_pretrained(source)
    write_tokenizer_of(source, model.config.vocab_size)
    # 8 bits, so that the rounding is small; what is compared is the folded float model.
    recipe = {
        "weights": {"bits": 8, "group": 32},
        "calibration": {"tokens": 256, "context": 32},
        "folds": [{"name": "trip", "exponents": 4}],
    }
    compress(source, tmp_path / "out", recipe=recipe, calibration=text)
    compress(source, tmp_path / "plain", recipe={"weights": {"bits": 8, "group": 32}})
    ids = prompts(40)[0]
    wanted = model(torch.tensor([ids])).logits[0].detach().numpy()
    size = np.abs(wanted).max()
    lost = {
        name: np.abs(nybble.load(tmp_path / name, threads=1).forward(ids) - wanted).max()
        for name in ("out", "plain")
    }
    assert lost["out"] <= max(3 * lost["plain"], 0.02 * size)


def write_tokenizer_of(folder, vocab):
    """Write a tokenizer whose ids stay below a small vocabulary: one token a letter."""
    import tokenizers

    letters = {chr(32 + i): i for i in range(min(vocab, 95))}
    model = tokenizers.models.WordLevel({**letters, "\n": 95}, unk_token=" ")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )


def test_a_folded_float_model_has_the_originals_logits_bit_for_bit(tiny_folder, text, tmp_path):
    # Everything but one linear stays in float, in float32 as far as the format allows; that one is
    # rounded to 8 bits in both, so the rest must agree exactly after powers of two.
    from nybble.calibrate.layers import Walk
    from nybble.calibrate.stats import InputStats
    from nybble.compress.source import Source
    from nybble.quant import Scheme, Trip
    from nybble.quant.fold import pairs, rescale

    source = Source(tiny_folder)
    shapes = {name: shape for name, (_, shape) in source.tensors.items()}
    walk = Walk(source.config, source.plan(), shapes, source.tensor)
    rows = np.array(windows(byte_level_tokenizer()))
    hidden = walk.embed(rows)
    changed = {}
    for index in range(len(walk)):
        layer = walk.layer(index)
        stats = [InputStats("x", layer.weight(s[0]).shape[1], ["sample"]) for s in layer.stages]
        for window, inputs, output in layer.trace(hidden):
            for stage, values in enumerate(inputs):
                stats[stage].update(values)
            hidden[window] = output
        for pair in pairs(layer.parts, layer)[0]:
            factors = Trip(exponents=6).factors(pair, [], stats[pair.stage], Scheme())
            assert (factors != 1).any()
            for name in rescale(layer, pair, factors):
                changed[name] = torch.from_numpy(layer.tensor(name).copy())
        walk.drop(index)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        before = model(torch.from_numpy(rows)).logits
        state = model.state_dict()
        assert changed.keys() <= state.keys()
        for name, value in changed.items():
            state[name].copy_(value)
        assert torch.equal(model(torch.from_numpy(rows)).logits, before)


def divergence(wanted, found):
    def logarithms(values):
        return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))

    wanted, found = logarithms(wanted), logarithms(found)
    return float((np.exp(wanted) * (wanted - found)).sum(axis=-1).mean())


def test_a_tuned_model_predicts_more_as_the_original_does(tiny_folder, text, tmp_path, monkeypatch):
    tuning = {"name": "scales", "tokens": 2048, "context": 64, "rate": 0.003}
    recipe = {**GPTQ, "folds": ["trip"], "tuning": tuning}
    compress(tiny_folder, tmp_path / "plain", recipe={**recipe, "tuning": None}, calibration=text)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nybble.compress.pipeline._write_weights", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_folder, tmp_path / "tuned", recipe=recipe, calibration=text)
    monkeypatch.undo()
    # The steps that were found are kept.
    monkeypatch.setattr("nybble.quant.scale_tuning.ScaleTuning.fit", stop)
    report = compress(tiny_folder, tmp_path / "tuned", recipe=recipe, calibration=text)
    assert report.calibration["tuning"]["tokens"] == 2048
    assert any("tuning: 32 steps; divergence" in note for note in report.notes)
    rows = windows(byte_level_tokenizer())
    wanted = logits(tiny_folder, rows)
    lost = {name: divergence(wanted, logits(tmp_path / name, rows)) for name in ("plain", "tuned")}
    assert lost["tuned"] < 0.8 * lost["plain"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("fold", [None, "trip"])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, text, monkeypatch, fold):
    source = write_llama(tmp_path / "source", layers=4)
    write_tokenizer(source)
    recipe = {**GPTQ, "weights": {**GPTQ["weights"], "method": {"name": "gptq", "propagate": 0.5}}}
    recipe["folds"] = [fold] if fold else []
    compress(source, tmp_path / "whole", recipe=recipe, calibration=text)
    seen = []
    original = Layer.outputs

    def count(self, hidden):
        seen.append(self.prefix)
        if len(seen) == 3:
            raise KeyboardInterrupt
        original(self, hidden)

    monkeypatch.setattr(Layer, "outputs", count)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", recipe=recipe, calibration=text)
    assert not (tmp_path / "out").exists()
    kept = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.calibration-")]
    assert len(kept) == 1
    compress(source, tmp_path / "out", recipe=recipe, calibration=text)
    assert seen == [f"model.layers.{i}" for i in (0, 1, 2, 2, 3)]
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert one == two
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_another_recipe_or_text_starts_anew(tmp_path, text, monkeypatch, tiny_folder):
    def stop(self, hidden):
        if self.prefix.endswith(".1"):
            raise KeyboardInterrupt
        original(self, hidden)

    original = Layer.outputs
    monkeypatch.setattr(Layer, "outputs", stop)
    for seed in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_folder, tmp_path / "out", recipe=GPTQ, calibration=text, seed=seed)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    compress(tiny_folder, tmp_path / "out", recipe=GPTQ, calibration=text, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_cache_is_not_used(tmp_path, text, monkeypatch, tiny_folder):
    def stop(self, hidden):
        if self.prefix.endswith(".1"):
            raise KeyboardInterrupt
        original(self, hidden)

    original = Layer.outputs
    monkeypatch.setattr(Layer, "outputs", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_folder, tmp_path / "out", recipe=GPTQ, calibration=text)
    monkeypatch.undo()
    (states,) = tmp_path.glob(".out.calibration-*/states-*")
    states.write_bytes(states.read_bytes()[:200])
    compress(tiny_folder, tmp_path / "out", recipe=GPTQ, calibration=text)
    compress(tiny_folder, tmp_path / "clean", recipe=GPTQ, calibration=text)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "clean"))
    assert one == two


def test_text_and_recipe_belong_together(tiny_folder, text, tmp_path):
    with pytest.raises(ConfigError, match=r"weights\.method looks at text: .*--calibration"):
        compress(tiny_folder, tmp_path / "out", recipe=GPTQ)
    with pytest.raises(ConfigError, match="folds looks at text"):
        compress(tiny_folder, tmp_path / "out", recipe={"folds": ["trip"]})
    with pytest.raises(ArgumentError, match="nothing in the recipe looks at it"):
        compress(tiny_folder, tmp_path / "out", calibration=text)
    assert list(tmp_path.iterdir()) == []


def test_bad_text_leaves_nothing(tiny_folder, tmp_path):
    bad = tmp_path / "bad.txt"
    for content, error in ((b"", ArgumentError), (b"\xff\xfe" * 900, FormatError)):
        bad.write_bytes(content)
        with pytest.raises(error, match=r"bad\.txt"):
            compress(tiny_folder, tmp_path / "out", recipe=GPTQ, calibration=bad)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_activations_that_are_not_finite_name_the_linear(tmp_path, text):
    from safetensors.numpy import load_file, save_file

    source = write_llama(tmp_path / "source")
    write_tokenizer(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][7] = np.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.gate_proj: expected finite .* channel"):
        compress(source, tmp_path / "out", recipe=GPTQ, calibration=text)
    assert not (tmp_path / "out").exists()


def test_ignored_linears_stay_float_and_are_not_folded(tiny_folder, text, tmp_path):
    recipe = {**GPTQ, "folds": ["trip"], "ignore": ["*.down_proj", "*layers.1.*q_proj"]}
    report = compress(tiny_folder, tmp_path / "out", recipe=recipe, calibration=text)
    schemes = {tensor.name: tensor.scheme for tensor in report.tensors}
    assert schemes["model.layers.0.mlp.down_proj.weight"] == "bf16"
    assert "fold: model.layers.0.mlp.down_proj stays in float: its inputs keep their scale" in (
        report.notes
    )
    rows = windows(byte_level_tokenizer())
    wanted = logits(tiny_folder, rows)
    difference = logits(tmp_path / "out", rows) - wanted
    assert np.square(difference).mean() < 0.05 * np.square(wanted).mean()


def test_gguf_files_are_calibrated_as_well(tiny_folder, text, tmp_path):
    pytest.importorskip("gguf")
    from tiny import write_gguf

    write_gguf(tmp_path / "tiny.gguf", tiny_folder)
    compress(tmp_path / "tiny.gguf", tmp_path / "out", recipe=GPTQ, calibration=text)
    compress(tiny_folder, tmp_path / "same", recipe=GPTQ, calibration=text)
    rows = windows(byte_level_tokenizer())
    np.testing.assert_allclose(
        logits(tmp_path / "out", rows), logits(tmp_path / "same", rows), atol=1e-3
    )
