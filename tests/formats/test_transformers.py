"""Our folders through compressed-tensors and transformers, and theirs through us."""

import json

import numpy as np
import pytest

import nybble
from nybble.formats.compressed_tensors import QuantizedModules

torch = pytest.importorskip("torch", reason="needs torch (the compress extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the compress extra)")
peer = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (the test extra)")

pytestmark = [
    pytest.mark.timeout(300),
    # Their loader looks for CUDA and announces changes of its own interface.
    pytest.mark.filterwarnings("ignore"),
]

FLOAT_TABLES = {"embedding": {"bits": 16}, "head": {"bits": 16}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from families import make

    folder = tmp_path_factory.mktemp("source") / "llama"
    make("llama-biased-tied-wide").save_pretrained(folder)
    return folder


def compress(source, out, **recipe):
    nybble.compress(source, out, recipe=recipe, progress=False)
    return out


def decompressed(folder):
    """The weights of a folder as the package unpacks them, module by module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    read = QuantizedModules(section)
    tensors = load_file(folder / "model.safetensors")
    plain = {name: value for name, value in tensors.items() if ".weight_" not in name}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part != "weight_packed":
            continue
        kind = "Embedding" if "embed" in module else "Linear"
        ours = read.scheme(module, kind)
        group = next(
            value
            for value in section["config_groups"].values()
            if module in value["targets"] or kind in value["targets"]
        )
        scheme = QuantizationScheme.model_validate(group)
        assert scheme.weights.num_bits == ours.bits
        mine = {part: tensors[f"{module}.{part}"] for part in ("weight_packed", "weight_shape")}
        mine["weight_scale"] = tensors[f"{module}.weight_scale"].float()
        if not ours.symmetric:
            mine["weight_zero_point"] = tensors[f"{module}.weight_zero_point"]
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        plain[f"{module}.weight"] = compressor.decompress(mine, scheme)["weight"]
    return plain


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "zeros", [{"symmetric": True}, {"symmetric": False}, {"symmetric": False, "zeros": "whole"}]
)
def test_the_package_unpacks_the_same_weights(source, tmp_path, bits, zeros):
    weights = {"bits": bits, **zeros}
    out = compress(source, tmp_path / "out", weights=weights, activations={"bits": 16})
    plain = decompressed(out)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(source)
    ).float()
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    ids = list(range(3, 33))
    found, wanted = nybble.load(out, kv="f32").forward(ids), logits(model, ids)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_loads_symmetric_linears(source, tmp_path, bits, group):
    weights = {"bits": bits, "symmetric": True, "group": group}
    recipe = {"weights": weights, "activations": {"bits": 16}, **FLOAT_TABLES}
    out = compress(source, tmp_path / "out", **recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = list(range(3, 33))
    wanted = logits(model, ids)  # the first pass unpacks the weights
    plain = decompressed(out)
    found = dict(model.named_parameters())
    for name, value in plain.items():
        assert torch.equal(found[name].data, value.float()), name
    ours = nybble.load(out, kv="f32").forward(ids)
    assert np.abs(ours - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_transformers_loads_zero_points_in_sixteenths(source, tmp_path):
    recipe = {"weights": {"symmetric": False}, "activations": {"bits": 16}, **FLOAT_TABLES}
    out = compress(source, tmp_path / "out", **recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = list(range(3, 33))
    found, wanted = nybble.load(out, kv="f32").forward(ids), logits(model, ids)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("strategy", ["group", "token"])
def test_transformers_loads_rounded_activations(source, tmp_path, strategy):
    out = compress(
        source,
        tmp_path / "out",
        weights={"bits": 8, "symmetric": True},
        activations={"bits": 8, "strategy": strategy},
        ignore=["lm_head"],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = list(range(3, 33))
    wanted = logits(model, ids)
    ours = nybble.load(out, kv="f32").forward(ids)
    # Their scale is max / 127.5, ours max / 127: equal schemes, but not equal noise.
    assert np.abs(ours - wanted).mean() < 0.1 * np.abs(wanted).mean()


def test_transformers_loads_zero_points_when_told_to_dequantize(source, tmp_path):
    weights = {"symmetric": False, "zeros": "whole"}
    recipe = {"weights": weights, "activations": {"bits": 16}, **FLOAT_TABLES}
    out = compress(source, tmp_path / "out", **recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out,
        dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    ids = list(range(3, 33))
    found, wanted = nybble.load(out, kv="f32").forward(ids), logits(model, ids)
    # It multiplies in float16.
    assert np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_the_package_compressed_runs_here(source, tmp_path, bits, symmetric):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    scheme = {
        "targets": ["Linear"],
        "weights": {**weights, "strategy": "group", "group_size": 32},
        "format": "pack-quantized",
    }
    config = QuantizationConfig.model_validate(
        {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"], "format": "pack-quantized"}
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        args = module.quantization_scheme.weights
        groups = module.weight.data.unflatten(-1, (-1, 32))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        module.weight_scale.data.copy_(scale.half())  # as precise as tiles hold them
        module.weight_zero_point.data.copy_(zero)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    out = tmp_path / "theirs"
    model.save_pretrained(out)
    compressor.update_config(str(out))
    ids = list(range(3, 33))
    wanted = logits(model, ids)  # unpacks it again
    found = nybble.load(out, kv="f32").forward(ids)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def rounded(bits, group):
    """What a linear's inputs become, as a hook."""

    def hook(_, inputs):
        (x,) = inputs
        largest = 7 if bits == 4 else 127
        groups = x.unflatten(-1, (-1, group or x.shape[-1]))
        scale = groups.abs().amax(-1, keepdim=True) / largest
        return (((groups / scale).round() * scale).flatten(-2),)

    return hook


@pytest.mark.parametrize(
    ("activations", "group"),
    [
        ({"bits": 8}, 32),
        ({"bits": 8}, None),
        ({"bits": 4}, 32),
        ({"bits": 4, "strategy": "token"}, None),
        ({"bits": 8, "roles": {"down": 4, "out": 4}}, 32),
        ({"bits": 4, "roles": {"qkv": 16}}, 32),
    ],
)
def test_inputs_are_rounded_as_the_folder_says(source, tmp_path, activations, group):
    recipe = {"weights": {"bits": 4, "group": group}, "activations": activations, **FLOAT_TABLES}
    out = compress(source, tmp_path / "out", **recipe)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(source)
    ).float()
    model.load_state_dict(decompressed(out), strict=False)
    model.tie_weights()
    read = QuantizedModules(json.loads((out / "config.json").read_text())["quantization_config"])
    bits = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (scheme := read.scheme(name, "Linear")):
            bits[name.rpartition(".")[2]] = scheme.activations
            if scheme.activations < 16:
                module.register_forward_pre_hook(rounded(scheme.activations, group))
    roles = activations.get("roles", {})
    assert bits["down_proj"] == roles.get("down", activations["bits"])
    assert bits["q_proj"] == roles.get("qkv", activations["bits"])
    ids = list(range(3, 33))
    found, wanted = nybble.load(out, kv="f32").forward(ids), logits(model, ids)
    # A value half way between two codes may fall to either side; the next layer then sees a step.
    difference = np.abs(found - wanted) / np.abs(wanted).max()
    assert np.median(difference) < (1e-4 if set(bits.values()) <= {8, 16} else 1e-2)
    assert difference.max() < 0.2


def test_softmax_of_powers_of_two(source, tmp_path):
    """Against torch's own attention with its weights rounded; values are 8-bit codes there."""
    recipe = {"weights": {"bits": 16}, "embedding": {"bits": 16}, "head": {"bits": 16}}
    plain = compress(source, tmp_path / "plain", **recipe, floats="bf16")
    out = compress(source, tmp_path / "out", **recipe, floats="bf16", softmax="log2")
    section = json.loads((out / "config.json").read_text())["nybble"]
    assert section["run"] == {"softmax": "log2"}
    assert "run" not in json.loads((plain / "config.json").read_text())["nybble"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    )
    ids = list(range(3, 33))
    exact = logits(model, ids)
    softmax = torch.nn.functional.softmax

    def powers(*args, **kwargs):
        exponent = (-softmax(*args, **kwargs).log2()).round()
        return torch.where(exponent > 15, torch.zeros_like(exponent), (-exponent).exp2())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", powers)
        wanted = logits(model, ids)
    found = nybble.load(out, kv="f32").forward(ids)
    top = np.abs(wanted).max()
    assert np.abs(wanted - exact).max() > 0.02 * top  # the rounding is there to be seen
    assert np.median(np.abs(found - wanted)) < 5e-3 * top
    assert np.abs(nybble.load(plain, kv="f32").forward(ids) - exact).max() < 1e-4 * top
