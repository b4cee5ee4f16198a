"""Units of every family: a model with units masked is the model with them cut."""

import json

import numpy as np
import pytest
import torch

from families import GATED, make, prompts, reference_logits
from nybble import _nybble
from nybble.errors import ArgumentError, ConfigError, FormatError, UnsupportedError
from nybble.formats.ragged import reshape
from nybble.prune.graph import transformer
from nybble.prune.plan import Cut, Plan, apply_masks, structure

CUTTABLE = ["llama", "llama-biased-tied-wide", "mistral-window", "qwen2", "qwen3", "gemma3"]


@pytest.fixture
def saved(tmp_path):
    """Return a function that makes a family's random model and says what it consists of."""

    def save(name):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        checkpoint = _nybble.Checkpoint.open(str(tmp_path / name))
        shapes = {name: shape for name, (_, shape) in checkpoint.tensors().items()}
        return model, json.loads(checkpoint.plan()), shapes

    return save


def random_keep(graph, draw, *, share=0.6):
    """Some units of each group, at least one, and not of all groups."""
    keep = {}
    for group in graph.groups.values():
        if group.follows is None and draw.random() < 0.8:
            count = max(1, int(share * group.size))
            keep[group.name] = np.sort(draw.choice(group.size, count, replace=False))
    return keep


def cut_model(model, graph, plan):
    """transformers' model of the layers' own shapes, with what a cut leaves."""
    cut = Cut(graph, plan)
    layers = structure(graph, plan)
    config = type(model.config).from_dict({**model.config.to_dict()})
    config.num_hidden_layers = len(layers)
    config.hidden_size = cut.shape("model.embed_tokens.weight")[1]
    config.rms_norm_eps = config.rms_norm_eps * cut.widening
    left = [i for i in range(len(graph.layers)) if plan.keep.get(f"layers.{i}.layer") is None]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in left]
    small = type(model)._from_config(config, attn_implementation="eager").float().eval()
    reshape(small, layers)
    state = model.state_dict()
    number = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(left)}
    filled = {}
    for name in graph.shapes:
        if cut.gone(name):
            continue
        prefix = next((p for p in number if name.startswith(p)), "")
        filled[number.get(prefix, "") + name.removeprefix(prefix)] = torch.from_numpy(
            cut.cut(name, state[name].numpy())
        )
    wanted = {name for name, _ in small.named_parameters()}
    assert wanted == set(filled)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            assert parameter.shape == filled[name].shape, name
            parameter.copy_(filled[name])
    return small


def close(found, wanted):
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("family", CUTTABLE)
@pytest.mark.parametrize("kinds", [("kv", "neuron"), ("head", "neuron")], ids="-".join)
def test_masked_is_cut(saved, family, kinds):
    model, parts, shapes = saved(family)
    graph = transformer(parts, shapes, kinds)
    draw = np.random.default_rng(0)
    (ids,) = prompts(24)
    for _ in range(3):
        plan = Plan(graph.digest, random_keep(graph, draw))
        small = cut_model(model, graph, plan)
        masked = make(family)
        apply_masks(masked, graph, plan)
        close(reference_logits(small, ids), reference_logits(masked, ids))
        total = sum(parameter.numel() for parameter in small.parameters())
        assert total == graph.parameters_left(plan.keep)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["attention", "mlp", "layer"])
def test_blocks_and_layers_can_go(saved, family, kind):
    model, parts, shapes = saved(family)
    graph = transformer(parts, shapes, (kind,))
    gone = [f"layers.{index}.{kind}" for index in (0, 2)]
    plan = Plan(graph.digest, {name: np.array([], dtype=np.int64) for name in gone})
    small = cut_model(model, graph, plan)
    masked = make(family)
    apply_masks(masked, graph, plan)
    (ids,) = prompts(24)
    close(reference_logits(small, ids), reference_logits(masked, ids))
    assert len(structure(graph, plan)) == len(graph.layers) - (2 if kind == "layer" else 0)
    # A cache counts the tokens although a layer has no attention.
    if kind == "attention":
        cached = small.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
        plain = small.generate(
            torch.tensor([ids]), max_new_tokens=5, do_sample=False, use_cache=False
        )
        assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", ["llama", "llama-biased-tied-wide", "qwen3"])
def test_a_narrower_residual_stream_is_the_masked_one(saved, family):
    model, parts, shapes = saved(family)
    graph = transformer(parts, shapes, ("hidden",))
    keep = {"hidden": np.sort(np.random.default_rng(0).choice(64, 40, replace=False))}
    plan = Plan(graph.digest, keep)
    small = cut_model(model, graph, plan)
    masked = make(family)
    apply_masks(masked, graph, plan)
    (ids,) = prompts(24)
    close(reference_logits(small, ids), reference_logits(masked, ids))


def test_families_that_would_become_another_function_are_refused(saved):
    for family, kinds, words in (
        ("bloom", ("kv",), "bias of a head's attention"),
        ("opt", ("hidden",), "residual stream"),
        ("gemma3", ("hidden",), "residual stream"),
        ("opt-post-norm-narrow", ("layer",), "norm stands in the residual"),
    ):
        _, parts, shapes = saved(family)
        with pytest.raises(UnsupportedError, match=words):
            transformer(parts, shapes, kinds)


@pytest.mark.parametrize("family", ["opt", "gpt2", "bloom"])
def test_units_of_other_families_are_masked_together(saved, family):
    """A neuron whose inputs are zero gives what its bias does; masked it gives nothing at all."""
    _, parts, shapes = saved(family)
    kinds = ("neuron",) if family == "bloom" else ("kv", "neuron")
    graph = transformer(parts, shapes, kinds)
    draw = np.random.default_rng(0)
    plan = Plan(graph.digest, random_keep(graph, draw))
    masked = make(family)
    apply_masks(masked, graph, plan)
    state = masked.state_dict()
    for name, axes in graph.kept_axes(plan.keep).items():
        for axis, stays in axes.items():
            values = np.moveaxis(state[name].numpy(), axis, 0)
            assert not values[~stays].any()
            assert values[stays].any()
    # What the units gave is what changes: putting other numbers into their producers does not.
    (ids,) = prompts(16)
    wanted = reference_logits(masked, ids)
    for name, axes in graph.kept_axes(plan.keep).items():
        group = next(g for g in graph.groups.values() if any(s.tensor == name for s in g.slices))
        role = next(s.role for s in group.slices if s.tensor == name)
        if role == "out":
            for axis, stays in axes.items():
                np.moveaxis(state[name].numpy(), axis, 0)[~stays] = 3.0
    close(reference_logits(masked, ids), wanted)


def test_costs_are_what_a_unit_has(saved):
    _, parts, shapes = saved("llama")
    graph = transformer(parts, shapes, ("kv", "neuron"))
    hidden, dim = GATED["hidden_size"], GATED["hidden_size"] // GATED["num_attention_heads"]
    assert graph.groups["layers.0.neuron"].cost == 3 * hidden
    assert graph.groups["layers.0.kv"].cost == (2 * 2 + 2) * dim * hidden
    everything = graph.parameters()
    left = graph.parameters_left({"layers.1.neuron": np.arange(90), "layers.0.kv": np.array([1])})
    assert everything - left == 6 * 3 * hidden + 6 * dim * hidden


def test_plans_are_stored_and_refused_by_other_models(saved, tmp_path):
    _, parts, shapes = saved("llama")
    graph = transformer(parts, shapes, ("head", "neuron"))
    draw = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj.weight"
    masks = {name: draw.random(graph.shapes[name]) < 0.5}
    plan = Plan(graph.digest, random_keep(graph, draw), masks, {"method": "none", "ratio": 0.4})
    plan.save(tmp_path / "plan")
    back = Plan.load(tmp_path / "plan")
    assert back.model == plan.model
    assert back.provenance == plan.provenance
    assert back.keep.keys() == plan.keep.keys()
    assert all(np.array_equal(back.keep[k], plan.keep[k]) for k in plan.keep)
    assert np.array_equal(back.masks[name], masks[name])
    back.check(graph)
    _, parts, shapes = saved("qwen2")
    with pytest.raises(ArgumentError, match="another"):
        back.check(transformer(parts, shapes, ("head", "neuron")))


def test_plans_that_say_what_is_not_so_are_refused(saved, tmp_path):
    _, parts, shapes = saved("llama")
    graph = transformer(parts, shapes, ("kv", "neuron"))
    for keep in ({"layers.0.nerve": [0]}, {"layers.0.kv": [2]}, {"layers.0.kv": [1, 0]}):
        with pytest.raises(ArgumentError, match=r"layers\.0"):
            Plan(graph.digest, {k: np.array(v) for k, v in keep.items()}).check(graph)
    mask = {"model.norm.weight": np.ones(3, dtype=bool)}
    with pytest.raises(ArgumentError, match="shape"):
        Plan(graph.digest, {}, mask).check(graph)
    with pytest.raises(ArgumentError, match="kv or head"):
        transformer(parts, shapes, ("kv", "head"))
    with pytest.raises(ArgumentError, match="did you mean neuron"):
        transformer(parts, shapes, ("neurone",))
    plan = Plan(graph.digest, {"layers.0.kv": np.array([1])})
    plan.save(tmp_path / "plan")
    facts = json.loads((tmp_path / "plan" / "plan.json").read_text())
    for change, error in (
        ({"plan_version": 2}, ConfigError),
        ({"keep": ["layers.1.kv"]}, FormatError),
        ({"keep": {"a": 1}}, FormatError),
        ({"masks": {"model.norm.weight": [64]}}, FormatError),
        ({"masks": {"model.norm.weight": [-64]}}, FormatError),
        ({"model": 7}, FormatError),
    ):
        (tmp_path / "plan" / "plan.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(error, match="plan"):
            Plan.load(tmp_path / "plan")
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(facts))
    whole = (tmp_path / "plan" / "plan.safetensors").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "plan" / "plan.safetensors").write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"plan\.safetensors"):
            Plan.load(tmp_path / "plan")
