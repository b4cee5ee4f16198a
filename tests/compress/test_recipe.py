"""Recipes: what they say, what they must not, and what options change."""

import pytest
import yaml

from nybble.compress.recipe import Calibration, Recipe, read, shipped
from nybble.errors import ArgumentError, ConfigError
from nybble.quant import Gptq, Rtn, ScaleTuning, Scheme, SmoothQuant, Trip


def test_defaults_are_four_bits_with_zero_points_and_eight_for_the_tables():
    recipe = read(None)
    assert recipe == Recipe()
    assert recipe.linear_scheme("down") == Scheme(4, 32, False, 8, "group")
    assert recipe.matrix_scheme(recipe.embedding) == Scheme(8, 32, True, 8, "group")
    assert isinstance(recipe.weights.quantizer(), Rtn)


@pytest.mark.parametrize(
    ("name", "bits", "group", "inputs"),
    [("w4a16", 4, 32, 16), ("w4a8", 4, 32, 8), ("w7a7", 7, 128, 7), ("w8a8", 8, 32, 8)],
)
def test_shipped_recipes(name, bits, group, inputs):
    assert shipped()[name]
    assert read(name).linear_scheme("down") == Scheme(bits, group, bits > 4, inputs, "group")


def test_a_file_a_mapping_and_what_is_written_back_agree(tmp_path):
    text = """
    weights: {bits: 8, group: null, method: {name: rtn}}
    activations: {strategy: token}
    head: {bits: 4, group: 64, symmetric: false}
    ignore: "re:.*down_proj"
    floats: f16
    """
    (tmp_path / "r.yaml").write_text(text)
    recipe = read(tmp_path / "r.yaml")
    assert recipe == read(str(tmp_path / "r.yaml")) == read(yaml.safe_load(text))
    assert recipe.linear_scheme("down") == Scheme(8, None, True, 8, "token")
    assert recipe.matrix_scheme(recipe.head) == Scheme(4, 64, False, 8, "token")
    assert recipe.matrix_scheme(recipe.embedding) == Scheme(8, None, True, 8, "token")
    (tmp_path / "again.yml").write_text(recipe.to_yaml())
    assert read(tmp_path / "again.yml") == recipe


def test_options_take_the_place_of_what_a_recipe_says():
    recipe = read("w8a8").with_options(weights=4, group=64, activations=16, symmetric=True)
    assert recipe.linear_scheme("down") == Scheme(4, 64, True, 16, "group")
    assert read("w8a8").with_options() == read("w8a8")
    floats = read(None).with_options(weights=16)
    assert floats.linear_scheme("down") is None
    assert floats.matrix_scheme(floats.embedding) is None


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"weigths": {}}, ["'weigths'", "did you mean weights"]),
        ({"weights": {"bit": 4}}, ["key in weights 'bit'", "did you mean bits"]),
        ({"weights": {"bits": 5}}, ["weights.bits", "4, 7, 8, 16", "5"]),
        ({"weights": {"bits": 7, "symmetric": False}}, ["weights.symmetric", "False"]),
        ({"weights": {"bits": True}}, ["weights.bits", "True"]),
        ({"weights": {"bits": 8.0}}, ["weights.bits", "8.0"]),
        ({"weights": {"group": 48}}, ["weights.group", "48"]),
        ({"weights": {"symmetric": 1}}, ["weights.symmetric"]),
        ({"weights": 4}, ["weights", "mapping"]),
        ({"weights": {"method": 4}}, ["weights.method", "name"]),
        ({"weights": {"method": {"name": "rtn", "damp": 1}}}, ["'damp'"]),
        ({"activations": {"bits": 6}}, ["activations.bits", "4, 7, 8, 16"]),
        ({"activations": {"roles": {"dwn": 4}}}, ["role 'dwn'", "did you mean down"]),
        ({"activations": {"roles": {"down": 5}}}, ["activations.roles.down", "5"]),
        ({"activations": {"roles": 4}}, ["activations.roles", "mapping"]),
        ({"weights": {"groups": {"dwn": 64}}}, ["role 'dwn'", "did you mean down"]),
        ({"weights": {"groups": {"down": 48}}}, ["weights.groups.down", "48"]),
        ({"weights": {"groups": 64}}, ["weights.groups", "mapping"]),
        ({"activations": {"strategy": "channel"}}, ["activations.strategy", "tensor"]),
        ({"activations": {"dynamic": 1}}, ["activations.dynamic"]),
        (
            {"activations": {"strategy": "tensor", "dynamic": True}},
            ["strategy tensor and dynamic true", "of a group or a token"],
        ),
        (
            {"activations": {"strategy": "token", "dynamic": False}},
            ["strategy token and dynamic false", "of a tensor"],
        ),
        ({"embedding": {"bits": 2}}, ["bits", "2"]),
        ({"head": {"group": "all"}}, ["group", "all"]),
        ({"ignore": [3]}, ["ignore", "patterns"]),
        ({"floats": "f64"}, ["floats", "auto, bf16, f16"]),
        ({1: 2}, ["'1'"]),
        ({"weights": {"method": {"name": "gptq", "damp": 1}}}, ["gptq 'damp'", "damping"]),
        ({"weights": {"method": {"name": "gptq", "damping": -1}}}, ["damping", "0 to 10"]),
        ({"folds": 3}, ["folds", "list"]),
        ({"folds": [3]}, ["folds", "name"]),
        ({"folds": [{"name": "trip", "exponent": 1}]}, ["'exponent'", "exponents"]),
        ({"folds": ["awq", "smoothquant"]}, ["folds", "one at most", "same channels"]),
        ({"folds": ["trip"], "activations": {"bits": 16}}, ["folds", "activations.bits is 16"]),
        ({"folds": ["awq"], "weights": {"bits": 16}}, ["folds", "weights.bits is 16"]),
        ({"tuning": 3}, ["tuning", "name"]),
        ({"tuning": {"name": "scales", "steps": 1}}, ["'steps'"]),
        ({"tuning": "scales", "weights": {"bits": 16}}, ["tuning", "weights.bits is 16"]),
        ({"calibration": {"tokens": 0}}, ["calibration.tokens", "1 or more"]),
        ({"calibration": {"seed": 1.5}}, ["calibration.seed"]),
        ({"calibration": {"file": "x"}}, ["key in calibration 'file'"]),
    ],
)
def test_what_is_unknown_is_named(recipe, words):
    with pytest.raises(ConfigError) as caught:
        read(recipe)
    for word in words:
        assert word in str(caught.value)


def test_who_needs_calibration():
    assert read(None).needs_calibration() == ""
    assert read({"weights": {"method": "gptq"}}).needs_calibration() == "weights.method"
    assert read({"weights": {"method": "gptq", "bits": 16}}).needs_calibration() == ""
    assert read({"folds": "awq"}).needs_calibration() == "folds"
    assert read({"tuning": "scales"}).needs_calibration() == "tuning"
    assert read({"tuning": {"name": "scales", "rate": 0.01}}).tuner() == ScaleTuning(rate=0.01)
    static = {"strategy": "tensor", "dynamic": False}
    assert read({"activations": static}).needs_calibration() == "activations.strategy"
    assert read({"activations": {**static, "bits": 16}}).needs_calibration() == ""
    assert read({"activations": static, "weights": {"bits": 16}}).needs_calibration() == ""
    agile = read("agile-quant-8")
    assert agile.linear_scheme("down") == Scheme(4, 128, False, 8, "group")
    assert isinstance(agile.weights.quantizer(), Gptq)
    assert isinstance(agile.fold(), Trip)
    assert read("w8a8-smoothquant").fold() == SmoothQuant(0.5)
    assert agile.with_options(seed=7, calibration_tokens=9).calibration == Calibration(9, 1024, 7)
    assert agile.with_options(calibration_images=3).calibration == Calibration(24576, images=3)


def test_unknown_names_and_methods_list_the_near_ones(tmp_path):
    with pytest.raises(ArgumentError, match="did you mean w4a8"):
        read("w4a9")
    with pytest.raises(ConfigError, match=r"recipe: .*did you mean rtn"):
        read({"weights": {"method": "rtnn"}})
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        read(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "weights: [",
        "- 1",
        "weights: {bits: 4, bits: 8}",
        "!!python/object/apply:os.system ['true']",
        "a: &a [*a]",
        "[" * 5000,
        "\0",
    ],
)
def test_files_that_are_no_recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError):
        read(tmp_path / "r.yaml")


def test_an_empty_file_is_the_default_and_a_huge_one_an_error(tmp_path):
    (tmp_path / "r.yaml").write_text("# nothing\n")
    assert read(tmp_path / "r.yaml") == Recipe()
    (tmp_path / "r.yaml").write_text("#" * (1 << 21))
    with pytest.raises(ValueError, match="at most"):
        read(tmp_path / "r.yaml")


def test_groups_go_by_role():
    recipe = read({"weights": {"group": 32, "groups": {"down": 128, "out": None}}})
    found = {role: recipe.linear_scheme(role).group for role in ("qkv", "out", "gate_up", "down")}
    assert found == {"qkv": 32, "out": None, "gate_up": 32, "down": 128}
    assert recipe.linear_scheme("head").group == 32
    assert read(yaml.safe_load(recipe.to_yaml())) == recipe
