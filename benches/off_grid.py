"""Take a model's weights off the grid they were quantized to, and leave what it computes.

A published 4-bit file holds weights that lie exactly on a 4-bit grid. Quantizing them again to 4
bits is nearly free and says nothing about a method. This tool multiplies channels by random factors
and divides them out again where they are read, which is exact but for float rounding:

* the gain of a norm, channel by channel, and the columns of the linears that read it (q, k, v;
  gate, up);
* the rows of ``up`` and the columns of ``down``;
* the rows of ``v`` (and its bias) and the columns of ``o`` of every query head that reads that
  value head.

Factors are log-uniform in [0.75, 1.33] from a fixed seed. The embedding is left as it is: it is
tied, or read by an addition, so no such pair exists for it.

Usage::

    python benches/off_grid.py SOURCE OUT [--seed 0]

``SOURCE`` is a GGUF file or a Hugging Face folder of a Llama-like model (Llama, Mistral, SmolLM2,
Qwen2, Qwen3); ``OUT`` becomes a Hugging Face folder in float32. Needs torch and transformers. The
largest change of a logit is printed and must be rounding noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble import _nybble
from nybble.compress.files import copy_companions, rebuild_companions

LOWEST, HIGHEST = 0.75, 1.33


def load(checkpoint: _nybble.Checkpoint) -> Any:
    """Build the model in float32 from the tensors nybble reads."""
    config = json.loads(checkpoint.config())
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="sdpa"
    )
    weights = {
        name: torch.from_numpy(checkpoint.read(name)).reshape(shape)
        for name, (_, shape) in checkpoint.tensors().items()
    }
    missing, _ = model.load_state_dict(weights, strict=False)
    if absent := [name for name in missing if name != "lm_head.weight"]:
        message = f"the file lacks {absent}"
        raise SystemExit(message)
    model.tie_weights()
    return model.eval()


def factors(n: int, generator: torch.Generator) -> torch.Tensor:
    """Log-uniform factors in [LOWEST, HIGHEST]."""
    low, high = torch.tensor([LOWEST, HIGHEST], dtype=torch.float64).log()
    return (torch.rand(n, generator=generator, dtype=torch.float64) * (high - low) + low).exp()


def times(parameter: torch.nn.Parameter, factor: torch.Tensor) -> None:
    """Multiply in place, rounding once."""
    parameter.copy_((parameter.double() * factor).float())


@torch.no_grad()
def rescale(model: Any, seed: int) -> None:
    """Rescale every block of a Llama-like model in place."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            f = factors(norm.weight.numel(), generator)
            times(norm.weight, f)
            for reader in readers:
                times(reader.weight, 1 / f)
        f = factors(mlp.up_proj.out_features, generator)
        times(mlp.up_proj.weight, f[:, None])
        if mlp.up_proj.bias is not None:
            times(mlp.up_proj.bias, f)
        times(mlp.down_proj.weight, 1 / f)
        f = factors(attention.v_proj.out_features, generator)
        times(attention.v_proj.weight, f[:, None])
        if attention.v_proj.bias is not None:
            times(attention.v_proj.bias, f)
        shared = f.reshape(kv_heads, -1).repeat_interleave(heads // kv_heads, dim=0).flatten()
        times(attention.o_proj.weight, 1 / shared)


def off_grid(source: Path, out: Path, seed: int = 0) -> float:
    """Write the rescaled model; return the largest change of a logit, relative to the largest."""
    checkpoint = _nybble.Checkpoint.open(str(source))
    model = load(checkpoint)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, 64), generator=draw)
    with torch.no_grad():
        before = model(ids).logits
        rescale(model, seed)
        change = ((model(ids).logits - before).abs().max() / before.abs().max()).item()
    if not change < 1e-4:
        message = f"the function changed by {change:.2e} of the largest logit: nothing is written"
        raise SystemExit(message)
    model.save_pretrained(out)
    if checkpoint.kind == "gguf":
        config = json.loads(checkpoint.config())
        rebuild_companions(checkpoint.gguf_metadata(), config, str(source), out)
    else:
        copy_companions(source, out)
    return change


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Rescale channels without changing the function.")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    change = off_grid(arguments.source, arguments.out, arguments.seed)
    print(f"largest change of a logit: {change:.2e} of the largest logit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
