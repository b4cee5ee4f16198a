"""GGUF files of every family, written as llama.cpp's converters do, give the same logits."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import nybble
from families import distance, make, prompts, reference_logits, reference_tokens

pytestmark = pytest.mark.timeout(300)


def permute(weight, heads):
    """Neighbouring columns in place of halves, as llama.cpp rotates them."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def by_kind(weight, heads):
    """Queries of all heads, then keys, then values."""
    rows = weight.reshape(heads, 3, weight.shape[0] // heads // 3, *weight.shape[1:])
    return rows.swapaxes(0, 1).reshape(weight.shape)


def convert(arch, config, name, weight):
    """What the converter of `arch` does to a tensor."""
    if arch == "llama" and "q_proj" in name:
        return permute(weight, config.num_attention_heads)
    if arch == "llama" and "k_proj" in name:
        return permute(weight, config.num_key_value_heads)
    if arch == "gemma3" and name.endswith("norm.weight"):
        return weight + 1
    if arch == "bloom" and "query_key_value" in name:
        return by_kind(weight, config.n_head)
    if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return weight.T
    return weight


def write(model, arch, path, kind=None, extra=None):
    """Write `model` to `path`; with `kind`, its matrices rounded to that type, in the model too."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    layers = config.num_hidden_layers
    writer.add_block_count(layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if arch in ("gpt2", "bloom"):
        writer.add_context_length(getattr(config, "n_positions", 300))
        writer.add_feed_forward_length(getattr(config, "n_inner", None) or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
        writer.add_value_length(config.head_dim if hasattr(config, "head_dim") else 16)
        parameters = config.rope_parameters
        writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if extra:
        extra(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    for name, parameter in model.named_parameters():
        stored = next(
            found
            for spelling in (name, name.removeprefix("transformer."))
            if (found := names.get_name(spelling, try_suffixes=(".weight", ".bias")))
        )
        weight = np.ascontiguousarray(convert(arch, config, name, parameter.detach().numpy()))
        if kind is None or weight.ndim < 2 or "position" in stored:
            writer.add_tensor(stored, weight)
            continue
        blocks = gguf.quants.quantize(weight, kind)
        writer.add_tensor(stored, blocks, raw_dtype=kind)
        rounded = gguf.quants.dequantize(blocks, kind).reshape(weight.shape)
        undo(arch, config, name, parameter, rounded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def undo(arch, config, name, parameter, converted):
    """Set `parameter` to what `convert`, which only moves elements here, turns into `converted`."""
    place = np.arange(parameter.numel()).reshape(parameter.shape)
    moved = torch.from_numpy(convert(arch, config, name, place).flatten())
    with torch.no_grad():
        parameter.view(-1)[moved] = torch.from_numpy(converted.flatten())


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama", "llama"),
        ("llama-biased-tied-wide", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma3", "gemma3"),
        ("bloom", "bloom"),
        ("bloom-6-heads", "bloom"),
        ("gpt2", "gpt2"),
        ("gpt2-by-depth", "gpt2"),
    ],
)
def test_logits(name, arch, tmp_path):
    model = make(name)
    # What a GGUF file of the family cannot say.
    for key in ("scale_attn_by_inverse_layer_idx", "apply_residual_connection_post_layernorm"):
        if getattr(model.config, key, False):
            setattr(model.config, key, False)
            model = type(model)(model.config).eval()
    if arch == "gemma3":
        model.config.query_pre_attn_scalar = model.config.head_dim
        model = type(model)(model.config).eval()
    path = tmp_path / "model.gguf"
    write(model, arch, path)
    ours = nybble.load(path, threads=2)
    for ids in prompts(1, 70):
        assert distance(ours.forward(ids), reference_logits(model, ids)) < 1e-4
    generated = list(ours.raw.session().generate(np.array(ids, dtype=np.uint32), 16))
    assert generated == reference_tokens(model, ids, 16)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_1, Type.BF16, Type.F16])
@pytest.mark.parametrize(
    ("name", "arch"), [("llama", "llama"), ("bloom", "bloom"), ("gpt2", "gpt2")]
)
def test_blocks(name, arch, kind, tmp_path):
    model = make(name)
    path = tmp_path / "model.gguf"
    write(model, arch, path, kind)
    (ids,) = prompts(30)
    found = nybble.load(path, threads=2).forward(ids)
    assert distance(found, reference_logits(model, ids)) < 1e-4


@pytest.mark.parametrize("name", ["llama-linear", "llama-llama3", "llama-yarn"])
def test_rope_scaling(name, tmp_path):
    model = make(name)
    parameters = model.config.rope_parameters

    def extra(writer):
        if name == "llama-linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(parameters["factor"])
        elif name == "llama-yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(parameters["factor"])
            writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        else:
            plain = 1.0 / 10000.0 ** (np.arange(0, 16, 2, dtype=np.float32) / 16)
            scaled = model.model.rotary_emb.inv_freq.numpy()
            writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))

    path = tmp_path / "model.gguf"
    write(model, "llama", path, extra=extra)
    for ids in prompts(5, 200):
        found = nybble.load(path, threads=2).forward(ids)
        assert distance(found, reference_logits(model, ids)) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_string("general.architecture", "mamba"), "mamba"),
        (lambda w: w.add_uint32("llama.expert_count", 4), "mixture of experts"),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 8), "rope.dimension_count"),
        (lambda w: w.add_string("llama.rope.scaling.type", "warp"), "warp"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.zeros(8, np.float32)), "rope_freqs"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(7, np.float32)), "rope_freqs"),
    ],
)
def test_files_that_cannot_be_read(change, message, tmp_path):
    model = make("llama")
    path = tmp_path / "model.gguf"

    def extra(writer):
        writer.kv_data[0].pop("general.architecture") if message == "mamba" else None
        change(writer)

    write(model, "llama", path, extra=extra)
    with pytest.raises(nybble.NybbleError, match=message):
        nybble.load(path)
