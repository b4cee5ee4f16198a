"""Every family computes what transformers computes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import nybble
from families import FAMILIES, distance, make, prompts, reference_logits, reference_tokens

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]
BOUND = 1e-4


def greedy(model, ids, count):
    """Greedy tokens of nybble."""
    return list(model.raw.session().generate(np.array(ids, dtype=np.uint32), count))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    ours = nybble.load(tmp_path, threads=2)
    for ids in prompts(1, 7, 200):
        wanted = reference_logits(model, ids)
        found = ours.forward(ids)
        assert found.dtype == np.float32
        assert distance(found, wanted) < BOUND
        assert greedy(ours, ids, 64) == reference_tokens(model, ids, 64)
        # In pieces: the same bits.
        session = ours.session()
        pieces = [session.forward(ids[i : i + 33], "all") for i in range(0, len(ids), 33)]
        assert np.array_equal(np.concatenate(pieces), found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_several_shards(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    (ids,) = prompts(20)
    found = nybble.load(tmp_path, threads=2).forward(ids)
    assert distance(found, reference_logits(model, ids)) < BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "opt", "bloom", "gpt2"])
def test_half_precision_weights(name, dtype, tmp_path):
    make(name).to(dtype).save_pretrained(tmp_path)
    # Loaded anew: casting the model back would leave its rotary frequencies rounded as well.
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = nybble.load(tmp_path, threads=2)
    assert set(ours.info["weight_bytes"]) == {"f16" if dtype == torch.float16 else "bf16"}
    for ids in prompts(1, 40):
        assert distance(ours.forward(ids), reference_logits(rounded, ids)) < BOUND


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "gpt2"])
def test_a_model_saved_without_its_head(name, tmp_path):
    """`AutoModel` saves shorter names; with tied weights nothing else is missing."""
    model = make("llama-biased-tied-wide" if name == "llama" else name)
    model.base_model.save_pretrained(tmp_path)
    (ids,) = prompts(9)
    found = nybble.load(tmp_path, threads=1).forward(ids)
    assert distance(found, reference_logits(model, ids)) < BOUND


def test_the_text_model_inside_a_multimodal_gemma(tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    model = make("gemma3")
    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    (ids,) = prompts(9)
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {prefix + k.removeprefix("model."): v for k, v in tensors.items()}
        renamed["vision_tower.embeddings.weight"] = torch.zeros(3, 3)
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        found = nybble.load(tmp_path, threads=1).forward(ids)
        assert distance(found, reference_logits(model, ids)) < BOUND
