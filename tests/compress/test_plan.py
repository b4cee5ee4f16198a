"""What becomes of each tensor."""

import pytest

from nybble.compress import plan
from nybble.compress.recipe import read
from nybble.errors import ConfigError
from nybble.quant import Scheme


def model(cols=64, tied=True, stored="F32"):
    linears = [
        {
            "module": "h.0.q",
            "rows": 32,
            "cols": 64,
            "bias": True,
            "transposed": False,
            "role": "qkv",
        },
        {
            "module": "h.0.d",
            "rows": 64,
            "cols": cols,
            "bias": False,
            "transposed": True,
            "role": "down",
        },
    ]
    tensors = {
        "wte.weight": (stored, [99, 64]),
        "wpe.weight": (stored, [40, 64]),
        "h.0.q.weight": (stored, [32, 64]),
        "h.0.q.bias": (stored, [32]),
        "h.0.d.weight": (stored, [cols, 64]),
        "norm.weight": (stored, [64]),
        "inv_freq": ("F32", [8]),
    }
    if not tied:
        head = {"module": "lm_head", "rows": 99, "cols": 64, "bias": False}
        linears.append({**head, "transposed": False, "role": "head"})
        tensors["lm_head.weight"] = (stored, [99, 64])
    embeddings = [
        {"module": "wte", "rows": 99, "cols": 64},
        {"module": "wpe", "rows": 40, "cols": 64},
    ]
    names = [name for name in tensors if name != "inv_freq"]
    described = {"family": "f", "linears": linears, "embeddings": embeddings, "tied": tied}
    return {**described, "tensors": names}, tensors


def made(recipe=None, kind="folder", **settings):
    return plan.make(*model(**settings), read(recipe), kind)


def test_every_tensor_has_one_place():
    work = made()
    items = {item.name: item for item in work.items}
    assert items["wte"].scheme == Scheme(8, 32, True, 8, "group")
    assert items["h.0.q"].scheme == Scheme(4, 32, False, 8, "group")
    assert items["h.0.d"].transposed
    assert items["h.0.d"].shape == (64, 64)
    assert items["wpe.weight"].dtype == "BF16"
    assert items["norm.weight"].dtype == items["h.0.q.bias"].dtype == "F32"
    assert work.left_out == ("inv_freq",)
    config = work.quantization_config()
    assert config["ignore"] == ["wpe", "lm_head"]
    names = [entry[0] for item in work.items for entry in item.entries()]
    assert len(names) == len(set(names))
    assert ("h.0.q.weight_zero_point", "F16", (32, 2)) in items["h.0.q"].entries()


def test_a_group_that_does_not_divide_is_reported():
    items = {item.name: item for item in made(cols=72).items}
    assert items["h.0.d"].scheme.group is None
    assert "72 columns" in items["h.0.d"].note
    items = {item.name: item for item in made({"weights": {"group": 128}}, cols=128).items}
    assert items["h.0.d"].scheme.group == 128
    assert items["h.0.q"].scheme.group == 64


@pytest.mark.parametrize(
    ("stored", "kind", "floats", "dtype"),
    [
        ("F32", "folder", "auto", "BF16"),
        ("F32", "gguf", "auto", "F16"),
        ("Q4_1", "gguf", "auto", "F16"),
        ("F16", "folder", "auto", "F16"),
        ("BF16", "gguf", "auto", "BF16"),
        ("BF16", "folder", "f16", "F16"),
        ("F32", "folder", "f16", "F16"),
    ],
)
def test_types_of_what_stays_float(stored, kind, floats, dtype):
    work = made({"weights": {"bits": 16}, "floats": floats}, kind, stored=stored)
    assert {item.dtype for item in work.items if len(item.shape) > 1} == {dtype}
    assert work.quantization_config() is None
    assert [item.shape for item in work.items if item.name == "h.0.d.weight"] == [(64, 64)]


def test_ignored_modules_stay_float():
    work = made({"ignore": ["h.*.q"]})
    assert work.quantization_config()["ignore"] == ["wpe", "h.0.q", "lm_head"]
    assert {item.name for item in work.items} >= {"h.0.q.weight", "h.0.d"}
    # A tied head is the embedding's matrix.
    assert "wte.weight" in {item.name for item in made({"ignore": ["lm_head"]}).items}
    items = {item.name for item in made({"ignore": ["re:lm_.*"]}, tied=False).items}
    assert {"wte", "lm_head.weight"} <= items


@pytest.mark.parametrize("pattern", ["h.0.qq", "re:h[", "norm"])
def test_a_pattern_that_fits_nothing_is_an_error(pattern):
    with pytest.raises(ConfigError, match="ignore"):
        made({"ignore": [pattern]})


def test_every_contradiction_is_listed():
    described, tensors = model()
    del tensors["norm.weight"]
    tensors["h.0.q.weight"] = ("F32", [32, 63])
    with pytest.raises(ConfigError) as caught:
        plan.make(described, tensors, read(None), "folder")
    for word in ("norm.weight", "none", "h.0.q.weight", "[32, 64]", "[32, 63]"):
        assert word in str(caught.value)


def test_files_keep_modules_together():
    work = made(tied=False)
    assert work.shards(10**9) == [list(work.items)]
    shards = work.shards(4000)
    assert [item for shard in shards for item in shard] == list(work.items)
    for shard in shards:
        assert len(shard) == 1 or sum(item.size for item in shard) <= 4000
