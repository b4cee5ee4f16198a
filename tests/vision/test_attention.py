"""Attention of image encoders on codes of 7 bits: a recipe's key, and what it changes."""

import json

import numpy as np
import pytest

import nybble
from nybble.compress import compress
from nybble.compress.recipe import read
from nybble.errors import ConfigError, UnsupportedError
from nybble.tokens import AttentionReceived, EViT, RandomPatches, ToMe, ZeroTPrune
from vision.encoders import reference, save

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

FLOATS = {"weights": {"bits": 16}, "embedding": {"bits": 16}, "head": {"bits": 16}}
CODES = {**FLOATS, "attention": {"bits": 7}}
#: Largest relative error of the tokens: of random weights, which are harder than trained ones.
BOUND = 0.02


def pixels(images, height=24, width=24):
    shape = (images, 3, height, width)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def distance(found, wanted):
    """The relative error of the whole array."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def section(folder):
    return json.loads((folder / "config.json").read_text())["nybble"].get("run", {})


def set_run(folder, run):
    """Say something else of how a folder is run."""
    config = json.loads((folder / "config.json").read_text())
    config["nybble"] = {"version": 1, "run": run}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "clip", "siglip"])
def test_near_transformers(name, tmp_path):
    model = save(name, tmp_path)
    for height, width in [(24, 24), (32, 20)]:
        wanted = reference(model, pixels(3, height, width))
        set_run(tmp_path, {"attention": {"bits": 7}})
        ours = nybble.load(tmp_path, threads=2)
        found = ours.encode(pixels(3, height, width))
        assert 1e-4 < distance(found.tokens, wanted[0]) < BOUND
        # Images do not see each other, and threads change nothing.
        alone = nybble.load(tmp_path, threads=1).encode(pixels(3, height, width)[1:2])
        assert np.array_equal(alone.tokens[0], found.tokens[1])


@pytest.mark.parametrize(
    "method",
    [
        RandomPatches(layers=(0,), keep=0.6),
        AttentionReceived(layers=(0,), keep=0.5),
        EViT(layers=(0,), keep=0.5),
        ZeroTPrune(layers=(0,), keep=0.7, similar=4),
        ToMe(layers=(0,), r=9),
    ],
)
def test_patches_that_leave(method, tmp_path):
    """The first layer chooses by floats, so the choice is the same, and layers behind it follow."""
    save("vit", tmp_path)
    wanted = nybble.load(tmp_path, threads=2).encode(pixels(2), tokens=method)
    set_run(tmp_path, {"attention": {"bits": 7}})
    found = nybble.load(tmp_path, threads=2).encode(pixels(2), tokens=method)
    assert np.array_equal(found.owners, wanted.owners)
    assert 1e-4 < distance(found.tokens, wanted.tokens) < BOUND


def test_the_key_of_a_recipe(tmp_path):
    save("vit", tmp_path / "source")
    wanted = {"attention": {"bits": 7}}
    for name, recipe, run in [
        ("codes", CODES, wanted),
        ("w7a7", "w7a7", wanted),
        ("w8a8", "w8a8", {}),
        ("floats", {"weights": {"bits": 7}, "activations": {"bits": 7}}, wanted),
        (
            "not",
            {"weights": {"bits": 7}, "activations": {"bits": 7}, "attention": {"bits": 16}},
            {},
        ),
    ]:
        out = tmp_path / name
        compress(tmp_path / "source", out, recipe=recipe, progress=False)
        assert section(out) == run
        assert nybble.load(out, threads=2).encode(pixels(1)).tokens.shape == (1, 37, 48)


def test_floats_elsewhere_change_nothing_else(tmp_path):
    save("vit", tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "codes", recipe=CODES, progress=False)
    compress(tmp_path / "source", tmp_path / "floats", recipe=FLOATS, progress=False)
    codes, floats = (nybble.load(tmp_path / name) for name in ("codes", "floats"))
    found, wanted = codes.encode(pixels(2)), floats.encode(pixels(2))
    assert 1e-4 < distance(found.tokens, wanted.tokens) < BOUND


def test_decoders_refuse_it(tiny_folder, tmp_path):
    with pytest.raises(UnsupportedError, match="image encoders"):
        compress(tiny_folder, tmp_path / "out", recipe=CODES, progress=False)
    assert not (tmp_path / "out").exists()
    # A recipe that leaves it open takes floats.
    compress(tiny_folder, tmp_path / "w7a7", recipe="w7a7", progress=False)
    assert section(tmp_path / "w7a7") == {}
    set_run(tmp_path / "w7a7", {"attention": {"bits": 7}})
    with pytest.raises(UnsupportedError, match="language model"):
        nybble.load(tmp_path / "w7a7")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"attention": {"bits": 8}}, ["attention.bits", "auto, 7, 16", "8"]),
        ({"attention": {"bit": 7}}, ["'bit'", "did you mean bits"]),
        ({"attention": 7}, ["attention", "mapping"]),
        ({"attention": {"bits": 7}, "softmax": "log2"}, ["attention.bits 7", "softmax"]),
    ],
)
def test_recipes_that_cannot_be(recipe, words):
    with pytest.raises(ConfigError) as caught:
        read(recipe)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("run", [{"attention": {"bits": 8}}, {"attention": 7}, {"attention": {}}])
def test_folders_that_cannot_be(run, tmp_path):
    save("vit", tmp_path)
    set_run(tmp_path, run)
    with pytest.raises(ValueError, match="attention"):
        nybble.load(tmp_path)
