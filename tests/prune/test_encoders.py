"""Image encoders lose neurons and heads: cut, they are the masked ones."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import nybble
from nybble import _nybble
from nybble.compress import compress
from nybble.errors import ConfigError, UnsupportedError
from nybble.formats.ragged import structure_of
from nybble.prune import Cut, Plan, transformer
from vision.encoders import SIZES, save

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

FLOAT = {"weights": {"bits": 16}, "activations": {"bits": 16}, "floats": "f16"}


def pixels(count=3):
    return np.random.default_rng(0).standard_normal((count, 3, 24, 24)).astype(np.float32)


def masked(source, out, plan, kinds):
    """Write a copy of a folder with a plan's zeros in it."""
    checkpoint = _nybble.Checkpoint.open(str(source))
    shapes = {name: tuple(shape) for name, (_, shape) in checkpoint.tensors().items()}
    cut = Cut(transformer(json.loads(checkpoint.plan()), shapes, kinds), plan)
    out.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    tensors = {}
    for name, shape in shapes.items():  # by their names in the class, which are read as well
        tensors[name] = checkpoint.read(name).reshape(shape).copy()
        if name in cut.graph.shapes:
            cut.mask(name, tensors[name])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


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


def test_what_cannot_be_is_refused(tmp_path):
    save("vit", tmp_path / "in")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 50)

    def attempt(prune, words, calibration=()):
        with pytest.raises(UnsupportedError, match=words):
            compress(
                tmp_path / "in",
                tmp_path / "out",
                recipe={"prune": prune, **FLOAT},
                calibration=calibration,
                progress=False,
            )

    attempt("flap", "not supported for image encoders", text)
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
