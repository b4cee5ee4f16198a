"""Tiny random models of every family, made by transformers from seeded configurations."""

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 131
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **ENDS,
}
GEMMA = {**GATED, "num_hidden_layers": 7, "head_dim": 32, "sliding_window": 16}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    **ENDS,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, **ENDS}


def rope(kind, **settings):
    """Rotary parameters in the form of transformers 5."""
    return {"rope_type": kind, "rope_theta": 10000.0, **settings}


FAMILIES = {
    "llama": lambda: LlamaConfig(**GATED),
    "llama-biased-tied-wide": lambda: LlamaConfig(
        **GATED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=24
    ),
    "llama-llama3": lambda: LlamaConfig(
        **GATED,
        rope_parameters=rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-linear": lambda: LlamaConfig(**GATED, rope_parameters=rope("linear", factor=2.0)),
    "llama-dynamic": lambda: LlamaConfig(**GATED, rope_parameters=rope("dynamic", factor=4.0)),
    "llama-yarn": lambda: LlamaConfig(
        **GATED,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=128),
    ),
    "llama-longrope": lambda: LlamaConfig(
        **GATED,
        rope_parameters=rope(
            "longrope",
            short_factor=[1.0 + i / 4 for i in range(8)],
            long_factor=[1.0 + i / 4 for i in range(8)],
            factor=2.0,
            original_max_position_embeddings=256,
        ),
    ),
    "mistral-window": lambda: MistralConfig(**GATED, head_dim=32, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**GATED),
    "qwen2-window": lambda: Qwen2Config(
        **GATED, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**GATED, head_dim=32),
    "gemma3": lambda: Gemma3TextConfig(
        **GEMMA, query_pre_attn_scalar=24, final_logit_softcapping=5.0
    ),
    "gemma3-linear": lambda: Gemma3TextConfig(
        **GEMMA,
        query_pre_attn_scalar=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "opt": lambda: OPTConfig(**OPT),
    "opt-post-norm-narrow": lambda: OPTConfig(
        **OPT, do_layer_norm_before=False, word_embed_proj_dim=40
    ),
    "opt-bare": lambda: OPTConfig(
        **OPT,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        activation_function="gelu",
        tie_word_embeddings=False,
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=3, n_head=4, **ENDS),
    "bloom-6-heads": lambda: BloomConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        n_layer=2,
        n_head=6,
        apply_residual_connection_post_layernorm=True,
        **ENDS,
    ),
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2-by-depth": lambda: GPT2Config(
        **GPT2, n_inner=80, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False
    ),
}


def make(name, seed=0):
    """Make a model whose every weight matters: no norm or bias is at its neutral value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def prompts(*lengths, seed=1):
    """Random prompts of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in lengths]


def reference_logits(model, ids):
    """The logits of transformers, ``[n, vocab]``."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def reference_tokens(model, ids, count):
    """Greedy tokens of transformers."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def distance(found, wanted):
    """Largest difference over the largest value."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
