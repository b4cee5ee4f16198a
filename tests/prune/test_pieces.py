"""Criteria, allocators and compensators against closed forms."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import make, prompts
from nybble import _nybble
from nybble.calibrate.stats import InputStats
from nybble.errors import ArgumentError, FormatError
from nybble.prune import Cfsp, Flap, Lens, LlmPruner, Subject, transformer
from nybble.prune.allocate import (
    Additive,
    Global,
    Limits,
    Sigmoid,
    Table,
    Uniform,
    best,
    by_shares,
    erk,
)
from nybble.prune.base import neighbours, standardised
from nybble.prune.block_similarity import BlockInfluence
from nybble.prune.cfsp import Contribution
from nybble.prune.compensate import Bias, LeastSquares, Nothing
from nybble.prune.evidence import Evidence
from nybble.prune.flap import Fluctuation
from nybble.prune.graph import Group, Slice
from nybble.prune.llm_pruner import Taylor
from nybble.prune.magnitude_units import Magnitude
from nybble.prune.random_units import Chance


def group(name="g", size=4, kind="neuron", cost=1, layer=0, tensors=("down",), width=1):
    """Units that a linear reads, and perhaps others give."""
    slices = [Slice.regular(f"{tensors[0]}.weight", 1, size, width, "in")]
    slices += [Slice.regular(f"{name}.weight", 0, size, width, "out") for name in tensors[1:]]
    return Group(name, kind, size, tuple(slices), layer, None, cost)


def seen(inputs, *needs, windows=3):
    stats = InputStats("down", inputs.shape[1], needs)
    for part in np.array_split(inputs.astype(np.float32), min(windows, len(inputs))):
        stats.update(part)
    return stats


def numbers(*shape, seed=0, mean=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) + mean).astype(np.float32)


def evidence(weights, **more):
    return Evidence(lambda name: weights[name], **more)


@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(-1e3, 1e3))
@settings(max_examples=40, deadline=None)
def test_moments_are_those_of_all_tokens(seed, tokens, mean):
    inputs = numbers(tokens, 5, seed=seed, mean=mean)
    stats = seen(inputs, "moments", windows=4)
    exact = inputs.astype(np.float64)
    np.testing.assert_allclose(stats.average, exact.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(stats.variance, exact.var(axis=0), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(stats.size, np.linalg.norm(exact, axis=0), rtol=1e-9)


def test_flaps_score_is_the_error_that_its_bias_leaves():
    inputs, weights = numbers(500, 6, mean=2.0), numbers(3, 6, seed=1)
    stats = seen(inputs, "moments")
    scores = Fluctuation("wifv").score(
        group(size=6), evidence({"down.weight": weights}, inputs={"down": stats})
    )
    for gone in range(6):
        stays = np.arange(6) != gone
        fixed, bias = Bias().fix(weights, stays, stats)
        assert not fixed[:, gone].any()
        change = inputs @ fixed.T + bias - inputs @ weights.T
        np.testing.assert_allclose(np.square(change).sum(axis=1).mean(), scores[gone], rtol=1e-4)


def test_metrics_of_fluctuation():
    inputs, weights = numbers(50, 4, mean=1.0), numbers(3, 4, seed=1)
    given = evidence({"down.weight": weights}, inputs={"down": seen(inputs, "moments")})
    np.testing.assert_allclose(
        Fluctuation("ifv").score(group(), given), inputs.var(axis=0), rtol=1e-5
    )
    product = np.abs(weights).mean(axis=0) * np.linalg.norm(inputs, axis=0)
    np.testing.assert_allclose(Fluctuation("wifn").score(group(), given), product, rtol=1e-5)
    # Heads of two channels: standardised channels, squared before in attention, in the mean.
    raw = inputs.var(axis=0) * np.square(weights).sum(axis=0)
    heads = Flap().criterion.score(group(size=2, kind="kv", width=2), given)
    wanted = standardised(np.square(raw.astype(np.float64))).reshape(2, 2).mean(axis=1)
    np.testing.assert_allclose(heads, wanted, rtol=1e-4)
    neurons = Flap().criterion.score(group(), given)
    np.testing.assert_allclose(neurons, standardised(raw.astype(np.float64)), rtol=1e-4)


def test_taylor_is_the_change_of_a_linear_loss():
    weights = {"down.weight": numbers(3, 4), "up.weight": numbers(4, 5, seed=1)}
    slope = {name: numbers(*value.shape, seed=7) for name, value in weights.items()}
    square = {name: np.square(value) for name, value in slope.items()}
    units = group(tensors=("down", "up"))
    given = evidence(weights, gradient=slope, fisher=square)
    first = {name: weights[name] * slope[name] for name in weights}
    down, up = first["down.weight"], first["up.weight"]
    score = Taylor("first", "sum").score(units, given)
    np.testing.assert_allclose(score, np.abs(down).sum(0) + np.abs(up).sum(1), rtol=1e-5)
    score = Taylor("vector", "max").score(units, given)
    np.testing.assert_allclose(score, np.maximum(abs(down.sum(0)), abs(up.sum(1))), rtol=1e-5)
    score = Taylor("second", "first").score(units, given)
    np.testing.assert_allclose(score, np.square(down).sum(0), rtol=1e-5)
    score = Taylor("mixed", "prod").score(units, given)
    mixed = [np.abs(value - np.square(value) / 2) for value in (down, up)]
    np.testing.assert_allclose(score, mixed[0].sum(0) * mixed[1].sum(1), rtol=1e-5)
    score = Taylor("vector", "mean").score(units, given)
    np.testing.assert_allclose(score, (abs(down.sum(0)) + abs(up.sum(1))) / 2, rtol=1e-5)


def test_magnitude_and_contribution_of_units():
    weights = {"down.weight": numbers(3, 4), "up.weight": numbers(4, 5, seed=1)}
    units = group(tensors=("down", "up"))
    down, up = weights["down.weight"], weights["up.weight"]
    wanted = np.sqrt(np.square(down).sum(0) + np.square(up).sum(1))
    np.testing.assert_allclose(Magnitude().score(units, evidence(weights)), wanted, rtol=1e-5)
    inputs = numbers(40, 4, seed=2)
    given = evidence(weights, inputs={"down": seen(inputs, "moments")})
    a = np.sqrt(np.square(inputs).mean(axis=0))
    fine = np.abs(down) * a
    wanted = a * (fine.mean(0) / fine.sum() + np.abs(up).mean(1) / np.abs(up).sum())
    np.testing.assert_allclose(Contribution().score(units, given), wanted, rtol=1e-5)


def test_chance_is_decided_by_the_name_and_the_seed():
    given = evidence({})
    first = Chance(1).score(group("a"), given)
    assert np.array_equal(first, Chance(1).score(group("a"), given))
    assert not np.array_equal(first, Chance(2).score(group("a"), given))
    assert not np.array_equal(first, Chance(1).score(group("b"), given))


def test_a_fit_is_least_squares_and_better_than_nothing():
    draw = np.random.default_rng(0)
    inputs = (draw.standard_normal((400, 8)) @ draw.standard_normal((8, 8))).astype(np.float32)
    weights = numbers(5, 8, seed=1)
    stats = seen(inputs, "gram")
    stays = np.array([1, 0, 1, 1, 0, 1, 1, 1], dtype=bool)
    fixed, bias = LeastSquares(1e-9).fix(weights, stays, stats)
    assert bias is None
    assert not fixed[:, ~stays].any()
    exact = np.linalg.lstsq(inputs[:, stays].astype(float), inputs @ weights.T, rcond=None)[0].T
    np.testing.assert_allclose(fixed[:, stays], exact, atol=2e-4)

    def lost(new):
        return np.square(inputs @ new.T - inputs @ weights.T).sum()

    plain, _ = Nothing().fix(weights, stays, stats)
    assert lost(fixed) < 0.7 * lost(plain)
    damped, _ = LeastSquares(0.01).fix(weights, stays, stats)
    assert lost(fixed) <= lost(damped) < lost(plain)
    # The optimal brain surgeon's removal of columns comes to the same.
    inverse = np.linalg.inv(inputs.T.astype(float) @ inputs)
    block = np.linalg.inv(inverse[np.ix_(~stays, ~stays)])
    removed = weights - weights[:, ~stays] @ block @ inverse[~stays]
    np.testing.assert_allclose(fixed[:, stays], removed[:, stays], atol=2e-4)


def test_inputs_that_repeat_each_other_do_not_stop_a_fit():
    inputs = np.repeat(numbers(50, 1), 4, axis=1)
    weights = numbers(3, 4, seed=1)
    stays = np.array([True, True, False, True])
    fixed, _ = LeastSquares(1e-6).fix(weights, stays, seen(inputs, "gram"))
    np.testing.assert_allclose(fixed.sum(axis=1), weights.sum(axis=1), rtol=1e-3)


NONE = evidence({})


def removed(groups, kept):
    total = sum(g.size * g.cost for g in groups)
    return sum((g.size - len(kept[g.name])) * g.cost for g in groups) / total


@given(
    st.integers(0, 2**32),
    st.floats(0, 0.85),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([Uniform(), Global()]),
)
@settings(max_examples=60, deadline=None)
def test_budgets_are_met_in_steps(seed, share, step, rule):
    draw = np.random.default_rng(seed)
    groups = [group(f"n{i}", 96, cost=3, layer=i) for i in range(5)]
    groups += [group(f"k{i}", 4, "kv", cost=150, layer=i) for i in range(5)]
    scores = {g.name: draw.standard_normal(g.size) for g in groups}
    limits = Limits({"neuron": step}, 0.1)
    if share > limits.removable(groups):
        with pytest.raises(ArgumentError, match="empty"):
            rule.keep(groups, scores, share, limits, NONE)
        return
    kept = rule.keep(groups, scores, share, limits, NONE)
    total = sum(g.size * g.cost for g in groups)
    # As near as one step of the coarsest kind, unless floors were met on the way.
    if share < 0.5:
        assert abs(removed(groups, kept) - share) <= max(150, 3 * step) / total + 1e-9
    for g in groups:
        size = len(kept[g.name])
        assert size >= 1
        assert size == g.size or g.kind != "neuron" or size % step == 0
        low = np.sort(scores[g.name])[g.size - size :]
        assert np.array_equal(np.sort(scores[g.name][kept[g.name]]), low)


def test_a_global_ranking_is_one_list():
    draw = np.random.default_rng(0)
    groups = [group(f"n{i}", 20, cost=1, layer=i) for i in range(4)]
    scores = {g.name: draw.standard_normal(20) + i for i, g in enumerate(groups)}
    kept = Global().keep(groups, scores, 0.3, Limits(floor=0.05), NONE)
    everything = np.sort(np.concatenate([scores[g.name] for g in groups]))
    limit = everything[24]
    for g in groups:
        assert np.array_equal(kept[g.name], np.flatnonzero(scores[g.name] >= limit))


def test_ties_go_by_count():
    assert best(np.ones(5), 2).tolist() == [3, 4]
    kept = Uniform().keep([group()], {"g": np.zeros(4)}, 0.5, Limits(), NONE)
    assert len(kept["g"]) == 2


def test_layers_that_turn_more_keep_more():
    importance = np.array([0.3, 0.1, 0.05, 0.1])
    shares = Sigmoid(1.0).shares(importance, 0.3, 0.9)
    assert shares.mean() == pytest.approx(0.3)
    assert shares.argmin() == 0
    assert shares.argmax() == 2
    kept = 1 - Sigmoid(0.5).shares(importance, 0.3, 0.9)
    z = (importance - importance.mean()) / importance.std()
    wanted = 1 / (1 + np.exp(-0.5 * z))
    np.testing.assert_allclose(kept, wanted * 0.7 / wanted.mean())
    np.testing.assert_allclose(Sigmoid(0.0).shares(importance, 0.3, 0.9), 0.3)
    steep = Sigmoid(50.0).shares(importance, 0.3, 0.9)  # flattened until it can be
    assert steep.mean() == pytest.approx(0.3)
    assert (steep >= 0).all()
    assert (steep <= 0.9 + 1e-9).all()


def test_offsets_add_up_to_nothing_and_are_the_papers():
    cosines = np.array([0.5, 0.9, 0.95, 0.85])
    offsets = Additive(0.02).offsets(cosines)
    assert offsets.sum() == pytest.approx(0)
    assert np.abs(offsets).max() == pytest.approx(0.02)
    assert offsets.argmin() == 0  # turns most, loses least
    groups = [group(f"n{i}", 100, layer=i) for i in range(4)]
    scores = {g.name: np.arange(100.0) for g in groups}
    given = Evidence(lambda name: np.zeros(0), cosines=cosines)
    kept = Additive(0.02).keep(groups, scores, 0.3, Limits(), given)
    assert removed(groups, kept) == pytest.approx(0.3, abs=0.003)
    assert len(kept["n0"]) == 72


def test_what_has_gone_stays_gone_and_counts():
    groups = [group("a", 10), group("b", 10)]
    scores = {"a": np.arange(10.0), "b": np.arange(10.0)}
    left = {"a": np.array([0, 1, 2, 3]), "b": np.arange(10)}
    kept = by_shares(groups, scores, {"a": 0.4, "b": 0.4}, Limits(), left)
    # Six of a are out already, two more than its share: b keeps two more.
    assert kept["a"].tolist() == [0, 1, 2, 3]
    assert kept["b"].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]


def test_shares_may_be_given():
    groups = [group("a", 10), group("b", 10)]
    scores = {"a": np.arange(10.0), "b": np.arange(10.0)}
    kept = Table({"a": 0.4}).keep(groups, scores, 0.0, Limits(), NONE)
    assert (len(kept["a"]), len(kept["b"])) == (6, 10)


def test_erks_densities():
    shapes = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (64, 32, 3, 3), "d": (10, 64)}
    found = erk(shapes, 0.1)
    assert [round(found[name], 3) for name in "abcd"] == [0.566, 0.115, 0.054, 1.0]
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    total = sum(found[name] * sizes[name] for name in shapes)
    assert total == pytest.approx(0.1 * sum(sizes.values()))
    assert set(erk(shapes, 1.0).values()) == {1.0}
    with pytest.raises(ArgumentError, match="density"):
        erk(shapes, 0.0)


def test_patterns():
    assert neighbours("2:4") == (2, 4)
    assert neighbours("6:8") == (2, 8)
    assert neighbours("unstructured") is None
    for bad in ("4:4", "0:4", "2-4", "a:b", "1:65", 7):
        with pytest.raises(ArgumentError, match="2:4"):
            neighbours(bad)


def test_outer_layers_are_left_alone():
    groups = [group(f"n{i}", layer=i) for i in range(32)]
    inside = LlmPruner().select(groups, 32)
    assert [g.layer for g in inside] == list(range(4, 30))
    assert len(LlmPruner(first=0, last=1).select(groups, 32)) == 32
    with pytest.raises(ArgumentError, match="attention"):
        Cfsp(attention="kv")


@pytest.fixture
def lens(tmp_path):
    """A lens on a tiny model, and the model."""
    model = make("llama-biased-tied-wide")
    model.save_pretrained(tmp_path / "model")
    checkpoint = _nybble.Checkpoint.open(str(tmp_path / "model"))
    shapes = {name: tuple(shape) for name, (_, shape) in checkpoint.tensors().items()}
    parts = json.loads(checkpoint.plan())
    subject = Subject(json.loads(checkpoint.config()), parts, shapes, checkpoint.read)
    graph = transformer(parts, shapes, ("kv", "neuron"))
    return Lens(subject, graph, np.array(prompts(20, 20, 20))), model


def test_a_lens_sees_what_torch_sees(lens):
    looking, model = lens
    needs = {"moments", "blocks", "gradient", "fisher"}
    found = looking.evidence(needs)
    name = "model.layers.1.mlp.down_proj.weight"
    squares, total, states = 0, 0, []
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    hook = down.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    turned = []
    layer = model.get_submodule("model.layers.0")
    other = layer.register_forward_hook(
        lambda _, args, out: turned.append(
            torch.cosine_similarity(args[0], out if torch.is_tensor(out) else out[0], dim=-1)
        )
    )
    for window in looking.windows:
        ids = torch.from_numpy(window[None])
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        squares = squares + down.weight.grad**2
        total = total + down.weight.grad
    hook.remove()
    other.remove()
    np.testing.assert_allclose(found.fisher[name], squares, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found.gradient[name], total / 3, rtol=1e-3, atol=1e-6)
    # Gradients of samples cancel in their mean, not in the sum of their squares.
    assert (found.fisher[name] >= 3 * np.square(found.gradient[name]) * 0.999).all()
    read = torch.cat(states, dim=1)[0].numpy()
    stats = found.inputs["model.layers.1.mlp.down_proj"]
    np.testing.assert_allclose(stats.variance, read.var(axis=0), rtol=1e-3, atol=1e-7)
    cosine = float(torch.cat(turned, dim=1).mean().detach())
    assert found.cosines[0] == pytest.approx(cosine, rel=1e-4)
    block = Group("layers.0.layer", "layer", 1, (), 0)
    assert BlockInfluence().score(block, found)[0] == pytest.approx(1 - cosine, rel=1e-3)
    walked = looking.evidence({"blocks", "moments"})
    np.testing.assert_allclose(walked.cosines, found.cosines, rtol=1e-5)
    np.testing.assert_allclose(walked.angles, found.angles, rtol=1e-5)


def test_a_lens_sees_the_model_that_is_left(lens):
    looking, model = lens
    keep = {"layers.0.neuron": np.arange(0, 96, 2)}
    found = looking.evidence({"gradient"}, keep)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not found.weight(name)[:, 1::2].any()
    with torch.no_grad():
        model.get_parameter(name)[:, 1::2] = 0
        for part in ("gate_proj", "up_proj"):
            for leaf in ("weight", "bias"):
                model.get_parameter(f"model.layers.0.mlp.{part}.{leaf}")[1::2] = 0
    total = 0
    for window in looking.windows:
        ids = torch.from_numpy(window[None])
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        total = total + model.get_parameter("model.layers.2.mlp.up_proj.weight").grad / 3
    wanted = found.gradient["model.layers.2.mlp.up_proj.weight"]
    np.testing.assert_allclose(wanted, total, rtol=1e-3, atol=1e-6)


def test_what_a_lens_cannot_see_is_said(lens):
    looking, _ = lens
    with pytest.raises(ArgumentError, match="did you mean gradient"):
        looking.evidence({"gradients"})
    blind = Lens(looking.subject, looking.graph)
    assert blind.evidence(set()).weight("model.norm.weight").shape == (64,)
    with pytest.raises(ArgumentError, match="expected text"):
        blind.evidence({"moments"})
    scores = {"model.layers.0.mlp.down_proj.weight": np.full((64, 96), np.inf)}
    broken = Evidence(lambda name: scores.get(name, looking.subject.weight(name)))
    broken.inputs = looking.evidence({"moments"}).inputs
    with pytest.raises(FormatError, match=r"layers\.0\.neuron"):
        Flap().criterion.scores([looking.graph.groups["layers.0.neuron"]], broken)
