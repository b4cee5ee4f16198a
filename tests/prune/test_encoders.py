"""Image encoders lose neurons and heads: cut, they are the masked ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import nybble
from nybble import _nybble
from nybble.calibrate.images import draw
from nybble.cli.app import main
from nybble.compress import compress
from nybble.compress.pruned import PrunedModel
from nybble.compress.source import Source
from nybble.errors import ArgumentError, ConfigError, UnsupportedError
from nybble.formats.ragged import structure_of
from nybble.prune import METHODS, Cut, Lens, Plan, Subject, transformer
from nybble.prune.flap import Fluctuation
from nybble.runtime.images import ImageProcessor
from vision.encoders import SIZES, reference, save

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

FLOAT = {"weights": {"bits": 16}, "activations": {"bits": 16}, "floats": "f16"}


def pixels(count=3):
    return np.random.default_rng(0).standard_normal((count, 3, 24, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve images that are not all noise."""
    folder = tmp_path_factory.mktemp("images")
    numbers = np.random.default_rng(0)
    for index in range(12):
        coarse = numbers.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((28, 30)).save(folder / f"{index:02}.png")
    return folder


def masked(source, out, plan, kinds, cut_folder=None):
    """Write a copy of a folder with a plan's zeros in it; compensated linears from `cut_folder`."""
    checkpoint = _nybble.Checkpoint.open(str(source))
    parts = json.loads(checkpoint.plan())
    shapes = {name: tuple(shape) for name, (_, shape) in checkpoint.tensors().items()}
    cut = Cut(transformer(parts, shapes, kinds), plan)
    out.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    tensors = {}
    for name, shape in shapes.items():  # by their names in the class, which are read as well
        tensors[name] = checkpoint.read(name).reshape(shape).copy()
        if name in cut.graph.shapes:
            cut.mask(name, tensors[name])
    if cut_folder is not None:
        axes = cut.graph.kept_axes(plan.keep)
        found = load_file(cut_folder / "model.safetensors")
        for layer in cut.graph.layers:
            for linear in (layer.out, layer.down):
                stays = axes.get(f"{linear}.weight", {}).get(1, slice(None))
                tensors[f"{linear}.weight"][:, stays] = found[f"{linear}.weight"]
                tensors[f"{linear}.bias"][:] = found[f"{linear}.bias"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def prune(source, images, **settings):
    """Prune to a folder of float32; return it and what was shown."""
    shown = draw([images], ImageProcessor.from_folder(source), images=8, seed=0)
    method = METHODS.make(settings, "prune")
    model = PrunedModel(Source(source), method, shown, source.parent / "out")
    model.make(progress=False)
    (model.folder / "preprocessor_config.json").write_bytes(
        (source / "preprocessor_config.json").read_bytes()
    )
    return model.folder, shown


def read_by(model, linear, pixels):
    """What a linear of a transformers model reads, tokens as rows."""
    caught = []
    hook = linear.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        model(torch.from_numpy(pixels))
    hook.remove()
    return caught[0].flatten(0, -2).double().numpy()


@pytest.mark.parametrize(
    "name", ["vit", "deit-teacher", "dinov2", "dinov2-registers", "clip", "siglip-classifier"]
)
@pytest.mark.parametrize("uniform", [True, False])
def test_cut_is_masked(name, uniform, tmp_path):
    save(name, tmp_path / "in")
    dino = name.startswith("dinov2")  # four times as many neurons as its width
    settings = {"name": "magnitude_units", "attention": "none"}
    settings |= {"round_to": 96, "ratio": 0.32} if dino else {"round_to": 40, "ratio": 0.22}
    kinds = ("neuron",)
    if not uniform:
        settings |= {"name": "random_units", "attention": "head", "round_to": 8, "ratio": 0.45}
        kinds = ("head", "neuron")
    report = compress(
        tmp_path / "in", tmp_path / "out", recipe={"prune": settings, **FLOAT}, progress=False
    )
    assert report.prune["achieved"]["share_of_layers"] == pytest.approx(settings["ratio"], abs=0.05)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = structure_of(config)
    if uniform and not name.startswith(("dinov2", "siglip")):
        assert layers is None
        assert config.get("vision_config", config)["intermediate_size"] == 40
    else:
        assert len(layers) == SIZES["num_hidden_layers"]
    plan = Plan.load(tmp_path / "out")
    assert plan.keep
    masked(tmp_path / "in", tmp_path / "masked", plan, kinds)
    found = nybble.load(tmp_path / "out", threads=1).encode(pixels())
    wanted = nybble.load(tmp_path / "masked", threads=1).encode(pixels())
    dense = nybble.load(tmp_path / "in", threads=1).encode(pixels())
    for one, other, whole in zip(
        (found.tokens, found.embedding),
        (wanted.tokens, wanted.embedding),
        (dense.tokens, dense.embedding),
        strict=True,
    ):
        size = np.linalg.norm(other)
        assert np.linalg.norm(one - other) <= 5e-3 * size  # float16 in the folder
        assert np.linalg.norm(other - whole) > 0.05 * size
    # An image does not depend on its neighbours although the layers' caches differ.
    alone = nybble.load(tmp_path / "out", threads=2).encode(pixels()[1:2])
    assert np.array_equal(alone.tokens[0], found.tokens[1])


def test_a_pruned_encoder_is_quantized(tmp_path):
    save("vit", tmp_path / "in")
    settings = {"name": "magnitude_units", "attention": "head", "ratio": 0.4, "round_to": 16}
    recipe = {"prune": settings, "weights": {"bits": 8, "group": 32}}
    compress(tmp_path / "in", tmp_path / "out", recipe=recipe, progress=False)
    compress(
        tmp_path / "in",
        tmp_path / "float",
        recipe={"prune": {**settings, "round_to": 32}, **FLOAT},
        progress=False,
    )
    found, wanted = (
        nybble.load(tmp_path / name, threads=1).encode(pixels()).embedding
        for name in ("out", "float")
    )
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    layers = structure_of(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert all(layer["intermediate_size"] % 16 == 0 for layer in layers)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@pytest.mark.parametrize("method", ["flap", "cfsp", "refit"])
def test_chosen_by_images_cut_is_masked(name, method, images, tmp_path):
    save(name, tmp_path / "in")
    settings = {"name": method, "ratio": 0.3, "round_to": 8}
    folder, _ = prune(tmp_path / "in", images, **settings)
    plan = Plan.load(folder)
    kinds = ("neuron",) if method == "cfsp" else ("kv", "neuron")
    masked(tmp_path / "in", tmp_path / "masked", plan, kinds, folder)
    found, wanted, whole = (
        nybble.load(place, threads=1).encode(pixels()).tokens
        for place in (folder, tmp_path / "masked", tmp_path / "in")
    )
    size = np.linalg.norm(wanted)
    assert np.linalg.norm(found - wanted) <= 1e-5 * size
    assert np.linalg.norm(whole - wanted) > 0.01 * size
    report = json.loads((folder / "prune.json").read_text())
    assert report["achieved"]["share_of_layers"] == pytest.approx(0.3, abs=0.05)
    assert (report["calibration"]["images"], report["calibration"]["size"]) == (8, [24, 24])
    errors = [error for layer in report["layers"] for error in layer["error"].values()]
    assert bool(errors) is (method != "cfsp")  # which mends nothing
    assert all(0 < error < 1 for error in errors)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_fluctuation_is_its_formula(name, images, tmp_path):
    model = save(name, tmp_path / "in")
    source = Source(tmp_path / "in")
    shown = draw([images], ImageProcessor.from_folder(source.path), images=8, seed=0)
    shapes = {name: tuple(shape) for name, (_, shape) in source.tensors.items()}
    parts = source.plan()
    graph = transformer(parts, shapes, ("kv", "neuron"))
    lens = Lens(Subject(source.config, parts, shapes, source.tensor), graph, shown.windows)
    scores = Fluctuation()
    found = scores.channels(graph.groups["layers.1.neuron"], lens.evidence(scores.needs))
    down = next(
        module
        for path, module in model.named_modules()
        if path.endswith((".1.mlp.fc2", ".1.output.dense")) and "attention" not in path
    )
    inputs = read_by(model, down, shown.windows)
    weights = down.weight.detach().double().numpy()
    wanted = inputs.var(axis=0) * np.square(weights).sum(axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_bias_is_added_to_the_one_there_is(images, tmp_path):
    model = save("dinov2", tmp_path / "in")
    settings = {"attention": "none", "ratio": 0.3, "round_to": 8}
    folder, shown = prune(tmp_path / "in", images, name="flap", **settings)
    plan, parts = Plan.load(folder), Source(tmp_path / "in").plan()
    tensors = load_file(folder / "model.safetensors")
    for index, layer in enumerate(parts["layers"]):
        down = model.get_submodule(layer["mlp"]["down"])
        gone = np.setdiff1d(np.arange(192), plan.keep[f"layers.{index}.neuron"])
        assert gone.size
        mean = read_by(model, down, shown.windows).mean(axis=0)
        weights, bias = (p.detach().double().numpy() for p in (down.weight, down.bias))
        wanted = bias + weights[:, gone] @ mean[gone]
        np.testing.assert_allclose(tensors[f"{layer['mlp']['down']}.bias"], wanted, atol=1e-4)


def combine(folder):
    """Make heads and neurons combinations of others; return what a fit makes of the linears."""
    checkpoint = _nybble.Checkpoint.open(str(folder))
    names = {name: tuple(shape) for name, (_, shape) in checkpoint.tensors().items()}
    tensors = {name: checkpoint.read(name).reshape(shape).copy() for name, shape in names.items()}
    wanted = {}
    for layer in json.loads(checkpoint.plan())["layers"]:
        q, k, v = (tensors[f"{name}.weight"] for name in layer["attention"]["qkv"])
        for weights in (q, k):  # all heads attend alike
            weights[16:32] = weights[32:] = weights[:16]
        v[32:] = 0.5 * v[:16] - 1.5 * v[16:32]
        out = tensors[f"{layer['attention']['out']}.weight"]
        out[:, 32:] *= 0.05  # what goes first
        fit = [out[:, :16] + 0.5 * out[:, 32:], out[:, 16:32] - 1.5 * out[:, 32:]]
        wanted[layer["attention"]["out"]] = np.concatenate(fit, axis=1)
        up, down = (tensors[f"{layer['mlp'][end]}.weight"] for end in ("up", "down"))
        bias = tensors[f"{layer['mlp']['up']}.bias"]
        bias[:40] = np.abs(bias[:40]) + 0.5  # none is always 0
        up[40:], bias[40:] = 2 * up[:40], 2 * bias[:40]  # through ReLU, twice the others
        down[:, 40:] *= 0.05
        wanted[layer["mlp"]["down"]] = down[:, :40] + 2 * down[:, 40:]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return wanted


@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_what_others_foretell_is_recovered(part, images, tmp_path):
    save("vit-bare", tmp_path / "in")  # ReLU, no biases of queries, keys and values
    wanted = combine(tmp_path / "in")
    heads = part == "heads"
    settings = {"mlp": False, "ratio": 0.17} if heads else {"attention": "none", "ratio": 0.22}
    settings |= {"name": "refit", "round_to": 40, "damping": 1e-10}
    folder, _ = prune(tmp_path / "in", images, **settings)
    plan = Plan.load(folder)
    kind, left = ("kv", 2) if heads else ("neuron", 40)
    for index in range(3):
        assert plan.keep[f"layers.{index}.{kind}"].tolist() == list(range(left))
    tensors = load_file(folder / "model.safetensors")
    for linear, weights in wanted.items():
        if ("attention" in linear) is heads:
            np.testing.assert_allclose(tensors[f"{linear}.weight"], weights, atol=2e-3)
    found, whole = (
        nybble.load(place, threads=1).encode(pixels()).tokens for place in (folder, tmp_path / "in")
    )
    assert np.linalg.norm(found - whole) <= 1e-3 * np.linalg.norm(whole)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_single_weights_go_by_images(method, images, tmp_path):
    save("dinov2", tmp_path / "in")
    folder, _ = prune(tmp_path / "in", images, name=method, pattern="2:4")
    tensors = load_file(folder / "model.safetensors")
    name = "dinov2.encoder.layer.1.mlp.fc2.weight"
    assert ((tensors[name] == 0).reshape(-1, 4).sum(axis=1) == 2).all()
    assert np.isfinite(nybble.load(folder, threads=1).encode(pixels()).tokens).all()


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip-classifier"])
def test_layers_can_go(name, images, tmp_path):
    model = save(name, tmp_path / "in")
    folder, _ = prune(tmp_path / "in", images, name="block_similarity", ratio=0.33)
    plan = Plan.load(folder)
    (gone,) = [i for i in range(3) if not len(plan.keep.get(f"layers.{i}.layer", [0]))]
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    stack[gone].forward = lambda hidden, *_, **__: hidden
    wanted, _, _ = reference(model, pixels())
    found = nybble.load(folder, threads=1).encode(pixels()).tokens
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_images_are_given_by_command(images, tmp_path, capsys):
    save("dinov2", tmp_path / "in")
    command = ["prune", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--quiet"]
    command += ["--ratio", "0.2", "--calibration", str(images)]
    assert main(command) != 0
    assert "expected 64 images to calibrate with, found 12" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--calibration-images", "12", "--seed", "1"]) == 0
    assert "12 images, seed 1" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prune"]["method"] == "refit"
    assert len(report["calibration"]["files"]) == 12
    assert report["prune"]["calibration"] == report["calibration"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prune: {name: flap, ratio: 0.3}\ncalibration: {images: 8}\n")
    command = ["compress", str(tmp_path / "in"), "-o", str(tmp_path / "small"), "--quiet"]
    command += ["--recipe", str(recipe), "--weights", "8"]
    assert main([*command, "--calibration", str(images)]) == 0
    assert "8 images, seed 0" in capsys.readouterr().out
    assert np.isfinite(nybble.load(tmp_path / "small", threads=1).encode(pixels()).tokens).all()


def test_other_things_than_images_are_refused(images, tmp_path, tiny_folder):
    save("vit", tmp_path / "in")
    text, empty = tmp_path / "text.txt", tmp_path / "empty"
    text.write_text("the cat sat on the mat " * 50)
    empty.mkdir()
    (empty / "readme.md").write_text("no images yet")

    def attempt(error, words, source, *given, prune="flap", **more):
        with pytest.raises(error, match=words):
            compress(
                source,
                tmp_path / "out",
                recipe={"prune": prune, **FLOAT, **more},
                calibration=given,
                progress=False,
            )
        assert not list(tmp_path.glob("*out*"))

    encoder = tmp_path / "in"
    attempt(ArgumentError, "empty: .* found 1 files and no image", encoder, empty)
    attempt(ArgumentError, "text.txt: expected images for an image encoder", encoder, text)
    attempt(ArgumentError, "expected 64 images .* found 12", encoder, images)
    attempt(ConfigError, "prune looks at images: give a folder", encoder)
    attempt(ArgumentError, "images were given, but nothing", encoder, images, prune="random_units")
    attempt(
        ArgumentError, "expected text for a language model, found a folder", tiny_folder, images
    )
    picture = images / "00.png"
    attempt(ArgumentError, "language model, found a file that ends in .png", tiny_folder, picture)
    few = {"calibration": {"images": 8}}
    for name in ("llm_pruner", "adapt_pruner", "gblm"):
        attempt(UnsupportedError, f"{name} is not supported", encoder, images, prune=name, **few)
    perp = {"name": "flap", "recovery": "perp"}
    attempt(UnsupportedError, "prune.recovery is not supported for", encoder, images, prune=perp)
    rounded = {"weights": {"bits": 4, "method": "gptq"}}
    attempt(UnsupportedError, "weights.method is not supported for", encoder, images, **rounded)


def test_what_cannot_be_is_refused(tmp_path):
    save("vit", tmp_path / "in")

    def attempt(prune, words):
        with pytest.raises(UnsupportedError, match=words):
            compress(
                tmp_path / "in",
                tmp_path / "out",
                recipe={"prune": prune, **FLOAT},
                progress=False,
            )

    hidden = {"name": "magnitude_units", "attention": "none", "mlp": False, "hidden": True}
    attempt(hidden, "residual stream")
    save("vit", tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    for entry, error, words in (
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, UnsupportedError, "layer 1 of an"),
        ({"intermediate_size": 0}, UnsupportedError, "layer 1 of an image encoder"),
        ({"num_attention_heads": 2, "num_key_value_heads": 3}, ConfigError, "multiple"),
        ({"intermediate_size": 79}, (ConfigError, ValueError), "79"),
    ):
        layers = [{}, entry, {}]
        config["nybble"] = {"version": 1, "structure": {"layers": layers}}
        (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=words):
            nybble.load(tmp_path / "bad", threads=1)
