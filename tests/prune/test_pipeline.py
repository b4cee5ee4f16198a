"""Pruning as a step of compression: the folder, its report, and every method."""

import json

import numpy as np
import pytest
import torch

import nybble
from families import make, prompts, reference_logits
from nybble import _nybble
from nybble.calibrate.text import draw
from nybble.compress import compress
from nybble.compress.recipe import read
from nybble.errors import ArgumentError, ConfigError, FormatError, UnsupportedError
from nybble.formats.ragged import load, structure_of
from nybble.prune import METHODS, Plan, apply_masks, transformer
from tiny import write_llama, write_tokenizer

pytestmark = pytest.mark.timeout(180)

TEXT = "the cat sat on the mat. a small model runs fast on the CPU. hello world 123\n"
SMALL = {"tokens": 256, "context": 64}
FLOAT = {"weights": {"bits": 16}, "activations": {"bits": 16}, "calibration": SMALL}
FAST = {"adapt_pruner": {"steps": 2}, "block_similarity": {"ratio": 0.5}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 100)
    return path


def shown(name, text):
    settings = {"name": name, "ratio": 0.25, **FAST.get(name, {})}
    method = METHODS.make(settings, "prune")
    return settings, ({"calibration": text} if method.reads_text else {})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_makes_a_folder_that_both_readers_agree_on(tiny_folder, text, tmp_path, name):
    settings, given = shown(name, text)
    recipe = {"prune": settings, **FLOAT}
    report = compress(tiny_folder, tmp_path / "out", recipe=recipe, progress=False, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ids = [5, 9, 77, 31, 200, 14]
    found = nybble.load(tmp_path / "out", threads=1).forward(ids)
    wanted = reference_logits(load(tmp_path / "out"), ids)
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
    stored = json.loads((tmp_path / "out" / "report.json").read_text())["prune"]
    assert stored == report.prune
    achieved = stored["achieved"]
    assert abs(achieved["share_of_layers"] - settings["ratio"]) < 0.13
    assert len(stored["layers"]) == 2
    assert read(tmp_path / "out" / "recipe.yaml").prune == settings


def test_a_cut_and_quantized_model_runs(tiny_folder, text, tmp_path):
    recipe = {"prune": {"name": "flap", "ratio": 0.3}, "calibration": SMALL}
    report = compress(
        tiny_folder, tmp_path / "out", recipe=recipe, calibration=text, progress=False
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = structure_of(config)
    assert len(layers) == 2
    assert all(layer["intermediate_size"] % 32 == 0 for layer in layers)
    model = nybble.load(tmp_path / "out", threads=1)
    assert np.isfinite(model.forward([1, 2, 3])).all()
    schemes = {tensor.role: tensor.scheme for tensor in report.tensors if len(tensor.shape) == 2}
    assert "4" in schemes["down"]
    assert report.prune["achieved"]["share_of_layers"] == pytest.approx(0.3, abs=0.08)
    errors = [error for layer in report.prune["layers"] for error in layer["error"].values()]
    assert errors
    assert all(0 < error < 1 for error in errors)
    plan = Plan.load(tmp_path / "out")
    for index, layer in enumerate(layers):
        kept = len(plan.keep[f"layers.{index}.neuron"])
        assert kept == layer["intermediate_size"]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_calibration_comes_after_the_cut(tiny_folder, text, tmp_path, method):
    recipe = {
        "prune": {"name": "refit", "ratio": 0.3},
        "weights": {"method": method},
        "folds": ["smoothquant"],
        "calibration": SMALL,
    }
    report = compress(
        tiny_folder, tmp_path / "out", recipe=recipe, calibration=text, progress=False
    )
    assert np.isfinite(nybble.load(tmp_path / "out", threads=1).forward([1, 2, 3])).all()
    down = next(t for t in report.tensors if t.name.endswith("layers.1.mlp.down_proj"))
    assert down.shape[1] == report.prune["layers"][1]["intermediate_size"]


def test_a_uniform_cut_is_a_plain_folder(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = {"prune": {"name": "magnitude_units", "ratio": 1 / 3, "attention": "none"}, **FLOAT}
    # Two of three steps of 32 neurons stay: feed-forward blocks have 3/5 of the parameters.
    recipe["prune"]["ratio"] = 0.2
    compress(tiny_folder, tmp_path / "out", recipe=recipe, progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "structure" not in config["nybble"]
    assert config["intermediate_size"] == 64
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = [5, 9, 77]
    found = nybble.load(tmp_path / "out", threads=1).forward(ids)
    np.testing.assert_allclose(found, reference_logits(model, ids), atol=1e-3)


def test_zeros_stay_zeros_where_codes_are_whole(tiny_folder, tmp_path):
    recipe = {
        "prune": {"name": "magnitude", "pattern": "2:4"},
        "weights": {"bits": 4, "zeros": "whole"},
    }
    compress(tiny_folder, tmp_path / "out", recipe=recipe, progress=False)
    from nybble.formats.compressed_tensors import QuantizedModules  # noqa: F401

    sparse = {**recipe, **FLOAT}
    compress(tiny_folder, tmp_path / "float", recipe=sparse, progress=False)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "float" / "model.safetensors")
    packed = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    zero = (weights[f"{name}.weight"] == 0).numpy()
    assert zero.reshape(-1, 4).sum(axis=1).min() >= 2
    words = packed[f"{name}.weight_packed"].numpy().view(np.uint32)
    codes = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(zero.shape)
    points = packed[f"{name}.weight_zero_point"].numpy().view(np.uint32)
    groups = zero.shape[1] // 32
    zeros = points[:, None, :] >> (4 * np.arange(8, dtype=np.uint32))[None, :, None] & 15
    zeros = zeros.reshape(-1, groups)[: zero.shape[0]]
    assert (codes == np.repeat(zeros, 32, axis=1))[zero].all()


def inputs_of(model, windows):
    """What each of a model's linears reads, by name."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows = found.setdefault(name, [])
            keep = lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for window in windows:
            model(torch.from_numpy(window[None]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_each_linear_is_judged_by_what_the_pruned_model_gives_it(tiny_folder, text, tmp_path):
    """Masks from the finished model's own inputs are those it was pruned with."""
    from transformers import AutoModelForCausalLM

    recipe = {"prune": {"name": "wanda", "ratio": 0.5}, **FLOAT}
    compress(tiny_folder, tmp_path / "out", recipe=recipe, calibration=text, progress=False)
    tokenizer = nybble.load(tmp_path / "out", threads=1).tokenizer
    windows = draw([text], tokenizer, **SMALL, seed=0).windows
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tiny_folder, tmp_path / "out")
    )
    weights = {
        name: module.weight.abs() for name, module in dense.named_modules() if "_proj" in name
    }
    share = {}
    for model in (dense, pruned):
        same = total = 0
        inputs = inputs_of(model, windows)
        for name, weight in weights.items():
            scores = weight * inputs[name].norm(dim=0)
            goes = scores <= scores.sort(dim=1).values[:, [weight.shape[1] // 2 - 1]]
            same += (goes == (pruned.get_submodule(name).weight == 0)).sum().item()
            total += goes.numel()
        share[model] = same / total
    assert share[pruned] > 0.999 > share[dense]


def test_layers_can_go(text, tmp_path):
    folder = write_llama(tmp_path / "in", layers=4)
    write_tokenizer(folder)
    recipe = {"prune": {"name": "block_similarity", "ratio": 0.5}, **FLOAT}
    report = compress(folder, tmp_path / "out", recipe=recipe, calibration=text, progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    assert sum(layer["dropped"] for layer in report.prune["layers"]) == 2
    assert report.prune["achieved"]["share_of_layers"] == pytest.approx(0.5)
    assert np.isfinite(nybble.load(tmp_path / "out", threads=1).forward([1, 2, 3])).all()


@pytest.mark.parametrize("family", ["llama-biased-tied-wide", "qwen2", "qwen3", "gemma3", "opt"])
def test_families_are_cut_alike_by_both_readers(family, text, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    settings = {"ratio": 0.2, "attention": "head"}
    if family == "opt":  # layers of one shape: half of the neurons of each
        total = sum(p.numel() for n, p in model.named_parameters() if ".layers.0." in n)
        settings = {"ratio": 48 * (2 * 64 + 1) / total, "attention": "none", "round_to": 48}
    recipe = {"prune": {"name": "magnitude_units", **settings}, **FLOAT}
    compress(tmp_path / "in", tmp_path / "out", recipe=recipe, progress=False)
    (ids,) = prompts(12)
    wanted = reference_logits(load(tmp_path / "out"), ids)
    found = nybble.load(tmp_path / "out", threads=1).forward(ids)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("family", ["llama-biased-tied-wide", "qwen3"])
@pytest.mark.parametrize("name", ["magnitude_units", "llm_pruner"])
def test_the_residual_stream_can_become_narrower(family, name, text, tmp_path):
    """Alone or with neurons: what both readers run is the original with those channels zero."""
    model = make(family)
    model.resize_token_embeddings(290)  # the tokenizer's
    model.save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    checkpoint = _nybble.Checkpoint.open(str(tmp_path / "in"))
    shapes = {name: tuple(shape) for name, (_, shape) in checkpoint.tensors().items()}
    parts = json.loads(checkpoint.plan())
    for mlp, ratio, width in ((False, 0.48, 32), (True, 0.45, None)):
        settings = {"ratio": ratio, "attention": "none", "mlp": mlp, "hidden": True}
        settings |= {"scope": "model", "round_to": 32 if width else 8, "floor": 0.3}
        given = {"calibration": text} if name == "llm_pruner" else {}
        out = tmp_path / f"out-{mlp}"
        recipe = {"prune": {"name": name, **settings}, **FLOAT, "floats": "f16"}
        report = compress(tmp_path / "in", out, recipe=recipe, progress=False, **given)
        assert report.prune["achieved"]["share_of_model"] == pytest.approx(ratio, abs=0.05)
        config = json.loads((out / "config.json").read_text())
        plan = Plan.load(out)
        kept = plan.keep["hidden"]
        assert config["hidden_size"] == len(kept) == (width or len(kept)) < 64
        assert config["rms_norm_eps"] == pytest.approx(model.config.rms_norm_eps * 64 / len(kept))
        kinds = ("neuron", "hidden") if mlp else ("hidden",)
        masked = type(model).from_pretrained(tmp_path / "in", dtype=torch.float32).eval()
        apply_masks(masked, transformer(parts, shapes, kinds), plan)
        ids = prompts(12)[0]
        wanted = reference_logits(masked, ids)
        for found in (
            reference_logits(load(out), ids),
            nybble.load(out, threads=1).forward(ids),
        ):
            # Weights are float16 in the folder and, for norms, scaled before that.
            assert np.abs(found - wanted).max() <= 5e-3 * np.abs(wanted).max()


def test_a_narrower_model_is_quantized(tiny_folder, tmp_path):
    settings = {"name": "random_units", "ratio": 0.5, "hidden": True, "attention": "none"}
    recipe = {"prune": {**settings, "mlp": False, "floor": 0.4}}
    compress(tiny_folder, tmp_path / "out", recipe=recipe, progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 32
    assert "structure" not in config["nybble"]
    assert np.isfinite(nybble.load(tmp_path / "out", threads=1).forward([1, 2, 3])).all()


def test_what_cannot_be_is_refused(tiny_folder, text, tmp_path):
    def attempt(prune, error, words, folder=tiny_folder, calibration=()):
        with pytest.raises(error, match=words):
            compress(
                folder,
                tmp_path / "out",
                recipe={"prune": prune, **FLOAT},
                calibration=calibration,
                progress=False,
            )
        assert not (tmp_path / "out").exists()

    for prune, words in (
        ({"name": "flapp"}, "did you mean flap"),
        ({"name": "flap", "ration": 1}, "did you mean ratio"),
        ({"name": "flap", "ratio": 1.0}, "ratio"),
        ({"name": "flap", "ratio": "half"}, "ratio"),
        ({"name": "flap", "attention": "heads"}, "attention"),
        ({"name": "flap", "attention": "none", "mlp": False}, "units to remove"),
        ({"name": "flap", "metric": "x"}, "metric"),
        ({"name": "flap", "hidden": True}, "hidden"),
        ({"name": "random_units", "hidden": 1}, "hidden"),
        ({"name": "wanda", "pattern": "4:2"}, "2:4"),
        ({"name": "sparsegpt", "damping": 0}, "damping"),
        ({"name": "refit", "damping": -1}, "damping"),
        ({"name": "flap"}, "give a file"),
        (7, "name"),
    ):
        attempt(prune, ConfigError, words)
    attempt({"name": "magnitude_units", "ratio": 0.95}, ArgumentError, "left empty")
    hidden = {"name": "magnitude_units", "attention": "none", "mlp": False, "hidden": True}
    attempt({**hidden, "ratio": 0.9}, ArgumentError, "left empty")
    attempt({"name": "cfsp", "ratio": 0.7}, ArgumentError, "more than", calibration=text)
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    attempt({"name": "flap"}, ArgumentError, "at least 64 tokens", calibration=short)
    attempt({"name": "magnitude", "pattern": "3:7"}, ArgumentError, "multiple of 7")
    bloom = make("bloom")
    bloom.save_pretrained(tmp_path / "bloom")
    attempt({"name": "random_units"}, UnsupportedError, "bloom", folder=tmp_path / "bloom")


def test_activations_and_weights_that_are_not_numbers_are_refused(text, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = write_llama(tmp_path / "in")
    write_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("flap", "wanda", "llm_pruner", "magnitude", "magnitude_units"):
        settings, given = shown(name, text)
        with pytest.raises(FormatError, match="finite"):
            compress(
                folder,
                tmp_path / "out",
                recipe={"prune": settings, **FLOAT},
                progress=False,
                **given,
            )


def test_a_pruned_model_is_not_pruned_again(tiny_folder, text, tmp_path):
    recipe = {"prune": {"name": "flap", "ratio": 0.25}, **FLOAT}
    compress(tiny_folder, tmp_path / "one", recipe=recipe, calibration=text, progress=False)
    with pytest.raises(UnsupportedError, match="prune the original"):
        compress(
            tmp_path / "one", tmp_path / "two", recipe=recipe, calibration=text, progress=False
        )


def test_a_run_that_fails_later_finds_the_pruned_model_again(tiny_folder, tmp_path, monkeypatch):
    from nybble.compress import pipeline
    from nybble.compress.pruned import PrunedModel

    recipe = {"prune": {"name": "random_units", "ratio": 0.2}, **FLOAT}

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_write_weights", fail)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_folder, tmp_path / "out", recipe=recipe, progress=False)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(".out.pruned-")
    monkeypatch.setattr(PrunedModel, "_write", lambda *_, **__: pytest.fail("pruned again"))
    compress(tiny_folder, tmp_path / "out", recipe=recipe, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_gguf_file_is_pruned(tiny_folder, text, tmp_path):
    pytest.importorskip("gguf")
    from tiny import write_gguf

    write_gguf(tmp_path / "model.gguf", tiny_folder)
    recipe = {"prune": {"name": "flap", "ratio": 0.25}, **FLOAT}
    found = []
    for source, name in ((tmp_path / "model.gguf", "a"), (tiny_folder, "b")):
        compress(source, tmp_path / name, recipe=recipe, calibration=text, progress=False)
        found.append(nybble.load(tmp_path / name, threads=1).forward([5, 9, 77]))
    np.testing.assert_allclose(found[0], found[1], atol=0.03 * np.abs(found[1]).max())
