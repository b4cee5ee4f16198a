"""The configuration's section: what is written is read back, by us and by the package."""

import copy

import pytest

from nybble.errors import FormatError, UnsupportedError
from nybble.formats.compressed_tensors import Module, QuantizedModules, quantization_config
from nybble.quant import Scheme

W4 = Scheme(4, 32, False, 8, "group")
WHOLE = Scheme(4, 32, False, 8, "group", whole_zeros=True)
ROW = Scheme(4, None, False, 8, "group")
W8 = Scheme(8, 32, True, 16, "group")
MODULES = [
    Module("model.embed_tokens", "Embedding", W8),
    Module("model.positions", "Embedding", None),
    Module("model.layers.0.q_proj", "Linear", W4),
    Module("model.layers.0.down_proj", "Linear", ROW),
    Module("model.layers.1.q_proj", "Linear", W4),
    Module("model.layers.1.k_proj", "Linear", WHOLE),
    Module("model.layers.1.down_proj", "Linear", None),
    Module("lm_head", "Linear", W8),
]


def test_every_module_gets_its_own_scheme_back():
    read = QuantizedModules(quantization_config(MODULES, ["tied"]))
    for module in MODULES:
        scheme = module.scheme
        if scheme == ROW:  # with one scale a row of weights, that is one scale a token
            scheme = Scheme(4, None, False, 8, "token")
        assert read.scheme(module.name, module.kind) == scheme, module.name
    assert read.scheme("tied", "Linear") is None
    assert read.scheme("model.norm", "RMSNorm") is None


def test_the_format_is_written_for_all_and_for_each():
    section = quantization_config(MODULES)
    assert section["format"] == "pack-quantized"
    assert all(group["format"] == "pack-quantized" for group in section["config_groups"].values())
    first = section["config_groups"]["group_0"]
    assert first["targets"] == ["Linear"]
    assert first["input_activations"]["dynamic"] is True
    assert section["ignore"] == ["model.positions", "model.layers.1.down_proj"]


def test_the_package_accepts_it():
    peer = pytest.importorskip(
        "compressed_tensors.quantization", reason="needs compressed-tensors (the test extra)"
    )
    config = peer.QuantizationConfig.model_validate(quantization_config(MODULES))
    weights = config.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 32, False)


def change(path, value):
    section = copy.deepcopy(quantization_config(MODULES))
    *parents, last = path
    place = section
    for key in parents:
        place = place[key]
    place[last] = value
    return section


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("quant_method",), "gptq", UnsupportedError),
        (("config_groups",), [], FormatError),
        (("ignore",), "lm_head", FormatError),
        (GROUP, 3, FormatError),
        ((*GROUP, "format"), "../../code.py:Class", UnsupportedError),
        ((*GROUP, "targets"), None, FormatError),
        ((*GROUP, "weights"), None, FormatError),
        ((*GROUP, "weights", "num_bits"), 3, UnsupportedError),
        ((*GROUP, "weights", "type"), "float", UnsupportedError),
        ((*GROUP, "weights", "strategy"), "block", UnsupportedError),
        ((*GROUP, "weights", "group_size"), 48, UnsupportedError),
        ((*GROUP, "input_activations"), "yes", FormatError),
        ((*GROUP, "input_activations", "num_bits"), 6, UnsupportedError),
    ],
)
def test_what_is_not_read_is_refused_by_name(path, value, error):
    with pytest.raises(error, match=r"config\.json"):
        QuantizedModules(change(path, value))
