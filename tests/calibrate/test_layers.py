"""Models walked through layer by layer, and folds, for every family."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from families import FAMILIES, make, prompts
from nybble.calibrate.layers import Walk
from nybble.errors import ConfigError, UnsupportedError
from nybble.quant.fold import pairs, rescale
from walks import output_of, run_both_ways, walk_of


@pytest.fixture
def opened(tmp_path):
    """Return a function that saves a family's random model and opens it for a walk."""

    def open_family(name):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        return model, walk_of(tmp_path / name)

    return open_family


def last_states(model, walk, ids):
    """What the last layer gives when transformers runs the model."""
    last = model.get_submodule(walk.prefixes[-1])
    return output_of(last, lambda: model(torch.from_numpy(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_is_the_models_forward_pass_and_folds_do_not_change_it(opened, family):
    model, walk = opened(family)
    ids = np.array(prompts(24, 24, 24))
    plain = walk.embed(ids)
    staged = [states.clone() for states in plain]
    folded = [states.clone() for states in plain]
    draw = np.random.default_rng(0)
    count = 0
    for index in range(len(walk)):
        layer = walk.layer(index)
        run_both_ways(layer, plain, staged)
        found, notes = pairs(layer.parts, layer)
        count += len(found)
        assert len(found) + len(notes) == 4
        for pair in found:
            rescale(layer, pair, np.exp2(draw.integers(-3, 4, len(pair.rows))))
        layer.outputs(folded)
        walk.drop(index)
    assert count
    for window in range(3):
        wanted = last_states(model, walk, ids[window : window + 1])
        size = wanted.abs().max()
        assert (plain[window] - wanted).abs().max() <= 1e-5 * size
        assert (staged[window] - wanted).abs().max() <= 1e-5 * size
        # Powers of two are exact; Gemma's gains are stored less one, which rounds.
        if family.startswith("gemma"):
            assert (folded[window] - plain[window]).abs().max() <= 1e-5 * size
        else:
            assert torch.equal(folded[window], plain[window])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "opt-post-norm-narrow"])
def test_norms_run_once_a_window(opened, family):
    _, walk = opened(family)
    staged = walk.embed(np.array(prompts(24, 24, 24)))
    for index in range(len(walk)):
        layer = walk.layer(index)
        runs = {}
        for path, module in layer._module.named_modules():
            if "norm" in path or "ln_" in path:
                runs[path] = 0

                def counted(*args, path=path, original=module.forward, runs=runs):
                    runs[path] += 1
                    return original(*args)

                module.forward = counted
        for stage in range(4):
            for _ in layer.inputs(stage, staged):
                pass
        layer.outputs(staged)
        assert len(runs) >= 2
        inside = ("q_norm", "k_norm")  # of attention, which is tried out on the first window
        for path, count in runs.items():
            assert 3 <= count <= (4 if index == 0 and path.endswith(inside) else 3), path
        walk.drop(index)


def test_what_changes_after_its_stage_is_seen_when_stages_are_forgotten(opened):
    _, walk = opened("llama")
    staged = walk.embed(np.array(prompts(24, 24, 24)))
    layer = walk.layer(0)
    for stage in range(4):
        for _ in layer.inputs(stage, staged):
            pass
    for linears in layer.stages:
        for name in linears:
            layer.weight(name)[...] *= 0.5
    layer.forget()
    wanted = [output.clone() for _, _, output in layer.trace(staged)]
    layer.outputs(staged)
    for window in range(3):
        assert torch.equal(staged[window], wanted[window])


@pytest.mark.parametrize("after", [torch.tanh, lambda x: 1 + x])
def test_attention_that_does_more_than_add_is_run_again(opened, after):
    _, walk = opened("llama")
    plain = walk.embed(np.array(prompts(24, 24, 24)))
    staged = [states.clone() for states in plain]
    layer = walk.layer(0)
    attention = layer._module.self_attn
    original, runs = type(attention).forward, 0

    def forward(*args, **kwargs):
        nonlocal runs
        runs += 1
        output, *rest = original(attention, *args, **kwargs)
        return after(output), *rest

    attention.forward = forward
    wanted = [output for _, _, output in layer.trace(plain)]
    runs = 0
    for stage in range(4):
        for _ in layer.inputs(stage, staged):
            pass
    layer.outputs(staged)
    for window in range(3):
        torch.testing.assert_close(staged[window], wanted[window])
    # A sum is checked on one window; with anything else every window is run twice.
    assert runs == 3 + 3 + (3 if after is torch.tanh else 1)


def test_what_can_be_folded_is_known_for_each_family(opened):
    kinds = {}
    for family in ("llama", "opt", "opt-bare", "opt-post-norm-narrow", "gpt2", "bloom-6-heads"):
        _, walk = opened(family)
        walk.embed(np.array(prompts(8)))
        layer = walk.layer(0)
        kinds[family] = [pair.kind for pair in pairs(layer.parts, layer)[0]]
    assert kinds == {
        "llama": ["norm", "value", "norm", "mlp"],
        "opt": ["norm", "value", "norm", "mlp"],  # ReLU
        "opt-bare": ["value"],  # GELU, and norms without weights
        "opt-post-norm-narrow": ["value", "mlp"],
        "gpt2": ["norm", "value", "norm"],
        "bloom-6-heads": ["value"],  # normed values are the residual
    }


def test_only_one_layer_has_weights_at_a_time(opened):
    _, walk = opened("llama")
    walk.embed(np.array(prompts(8)))

    def real(prefix):
        module = walk._model.get_submodule(prefix)
        return [name for name, value in module.named_parameters() if value.device.type != "meta"]

    assert not any(real(prefix) for prefix in walk.prefixes)
    walk.layer(1)
    assert [bool(real(prefix)) for prefix in walk.prefixes] == [False, True, False]
    walk.drop(1)
    assert not any(real(prefix) for prefix in walk.prefixes)
    assert not real("lm_head")


def test_weights_are_changed_through_their_arrays(opened):
    for family in ("gpt2", "llama"):  # stored with inputs as rows, and as columns
        _, walk = opened(family)
        walk.embed(np.array(prompts(8)))
        layer = walk.layer(0)
        name = layer.stages[1][0]
        rows, cols = layer.weight(name).shape
        layer.weight(name)[1, 2] = 99.0
        stored = layer.tensor(f"{name}.weight")
        assert stored[(2, 1) if family == "gpt2" else (1, 2)] == 99.0
        assert (rows, cols) == (64, 64)


def test_factors_must_be_positive(opened):
    _, walk = opened("llama")
    walk.embed(np.array(prompts(8)))
    layer = walk.layer(0)
    pair = pairs(layer.parts, layer)[0][0]
    with pytest.raises(ConfigError, match="above 0"):
        rescale(layer, pair, np.zeros(len(pair.rows)))


def test_a_missing_torch_names_the_extra(monkeypatch):
    import builtins

    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name="torch")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"torch: pip install 'nybble\[compress\]'"):
        Walk({}, {"layers": []}, {}, lambda *_: None)


def test_a_walk_through_layers_of_different_shapes(tmp_path):
    """Without attention, without a feed-forward block, without both; heads shared unevenly."""
    from nybble.formats.ragged import load
    from tiny import write_llama

    folder = write_llama(tmp_path / "model", layers=4)
    config = json.loads((folder / "config.json").read_text())
    whole = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    layers = [
        {**whole, "num_attention_heads": 3, "queries_per_kv": [2, 1]},
        {**whole, "num_attention_heads": 0, "num_key_value_heads": 0},
        {**whole, "intermediate_size": 0},
        {key: 0 for key in whole},
    ]
    config["nybble"] = {"version": 1, "structure": {"layers": layers}}
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.startswith("model.layers.0.self_attn.q_proj"):
            tensors[name] = tensors[name][:48].copy()
        if name.startswith("model.layers.0.self_attn.o_proj"):
            tensors[name] = tensors[name][:, :48].copy()
        gone = ("1.self_attn", "1.input", "2.mlp", "2.post", "3.")
        if name.removeprefix("model.layers.").startswith(gone):
            del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    walk = walk_of(folder)
    ids = np.array(prompts(24, 24))
    plain = walk.embed(ids)
    staged = [states.clone() for states in plain]
    folded = [states.clone() for states in plain]
    empty = []
    for index in range(len(walk)):
        layer = walk.layer(index)
        empty.append([not names for names in layer.stages])
        run_both_ways(layer, plain, staged)
        draw = np.random.default_rng(index)
        for pair in pairs(layer.parts, layer)[0]:
            rescale(layer, pair, np.exp2(draw.integers(-3, 4, len(pair.rows))))
        layer.outputs(folded)
        walk.drop(index)
    assert empty[0] == [False] * 4
    assert empty[1] == [True, True, False, False]
    assert empty[2] == [False, False, True, True]
    assert empty[3] == [True] * 4
    wanted = last_states(load(folder), walk, ids[:1])
    for states in (plain, staged, folded):
        assert (states[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
