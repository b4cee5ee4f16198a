"""Single weights: the authors' formulas written out plainly, and the same masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import _nybble
from nybble.calibrate.inverse_factor import inverse_factor
from nybble.calibrate.stats import InputStats
from nybble.errors import ArgumentError, FormatError
from nybble.prune import Gblm, Magnitude, RandomWeights, SparseGpt, Wanda


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(rows=12, cols=32, tokens=200, seed=0):
    draw = np.random.default_rng(seed)
    mix = draw.standard_normal((cols, cols)) * np.exp(draw.standard_normal(cols))
    inputs = (draw.standard_normal((tokens, cols)) @ mix).astype(np.float32)
    stats = InputStats("linear", cols, ("moments", "gram"))
    stats.update(inputs)
    return numbers(rows, cols, seed=seed + 1), inputs, stats


def by_row(scores, share):
    """The authors' rows: sort, and take out that many from the left."""
    keep = np.ones(scores.shape, dtype=bool)
    order = np.argsort(scores, axis=1, kind="stable")
    count = int(scores.shape[1] * share)
    np.put_along_axis(keep, order[:, :count], False, axis=1)
    return keep


def by_neighbours(scores, drop, of):
    keep = np.ones(scores.shape, dtype=bool)
    for start in range(0, scores.shape[1], of):
        part = scores[:, start : start + of]
        order = np.argsort(part, axis=1, kind="stable")[:, :drop]
        np.put_along_axis(keep[:, start : start + of], order, False, axis=1)
    return keep


PATTERNS = [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 3, 4), ("6:8", 2, 8)]


def masks(method, weights, stats, fisher=None):
    after, stays = method.prune("linear", weights, stats, fisher, 2)
    assert np.array_equal(after == 0, ~stays)
    return stays


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7])
def test_wandas_masks(share):
    weights, inputs, stats = layer()
    scores = np.abs(weights) * np.linalg.norm(inputs.astype(float), axis=0)
    assert np.array_equal(masks(Wanda(share), weights, stats), by_row(scores, share))


@pytest.mark.parametrize(("pattern", "drop", "of"), PATTERNS)
def test_masks_of_neighbours(pattern, drop, of):
    weights, inputs, stats = layer()
    size = np.linalg.norm(inputs.astype(float), axis=0)
    wanted = by_neighbours(np.abs(weights) * size, drop, of)
    found = masks(Wanda(pattern=pattern), weights, stats)
    assert np.array_equal(found, wanted)
    found = masks(Magnitude(pattern=pattern), weights, None)
    assert np.array_equal(found, by_neighbours(np.abs(weights), drop, of))
    for method in (SparseGpt(pattern=pattern, block=16), RandomWeights(pattern=pattern)):
        kept = masks(method, weights, stats).reshape(len(weights), -1, of).sum(axis=2)
        assert (kept == of - drop).all()


@pytest.mark.parametrize("activations", [True, False])
def test_gblms_masks(activations):
    weights, inputs, stats = layer()
    samples = numbers(10, *weights.shape, seed=5)
    grown = np.sqrt(np.square(samples.astype(float)).sum(axis=0))
    size = np.linalg.norm(inputs.astype(float), axis=0) if activations else 0.0
    scores = np.abs(weights) * (100 * grown + size)
    fisher = np.square(samples).sum(axis=0)
    method = Gblm(0.5, activations=activations)
    assert np.array_equal(masks(method, weights, stats, fisher), by_row(scores, 0.5))


def test_gradients_of_opposite_sign_do_not_cancel():
    weights = np.array([[1.0, 1.0, 1.0, 1.0]], dtype=np.float32)
    samples = np.array([[[5.0, 1.0, 1.0, 1.0]], [[-5.0, 1.0, 1.0, 1.0]]], dtype=np.float32)
    fisher = np.square(samples).sum(axis=0)
    stays = masks(Gblm(0.5, activations=False), weights, None, fisher)
    assert stays[0, 0]
    assert stays.sum() == 2


def test_magnitudes_masks_are_of_the_whole_matrix():
    weights, _, _ = layer()
    order = np.argsort(np.abs(weights), axis=None, kind="stable")
    wanted = np.ones(weights.size, dtype=bool)
    wanted[order[: int(0.6 * weights.size)]] = False
    assert np.array_equal(masks(Magnitude(0.6), weights, None).reshape(-1), wanted)


def test_chance_is_a_share_of_each_row():
    weights, _, _ = layer()
    stays = masks(RandomWeights(0.25), weights, None)
    assert (stays.sum(axis=1) == 24).all()
    assert np.array_equal(stays, masks(RandomWeights(0.25), weights, None))
    assert not np.array_equal(stays, masks(RandomWeights(0.25, seed=1), weights, None))


def plain_sparsegpt(weights, factor, block, share=None, neighbours=None):
    """SparseGPT's published loop, one array operation after another in float32."""
    w, keep = weights.copy(), np.ones(weights.shape, dtype=bool)
    cols = w.shape[1]
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        diagonal = np.diagonal(factor)[start:stop]
        if share is not None:
            scores = w[:, start:stop] * w[:, start:stop] / (diagonal * diagonal)
            order = np.argsort(scores, axis=None, kind="stable")[: int(scores.size * share)]
            mask = np.ones(scores.size, dtype=bool)
            mask[order] = False
            keep[:, start:stop] = mask.reshape(scores.shape)
        for i in range(start, stop):
            if neighbours is not None and i % neighbours[1] == 0:
                drop, of = neighbours
                near = np.diagonal(factor)[i : i + of]
                scores = w[:, i : i + of] * w[:, i : i + of] / (near * near)
                order = np.argsort(scores, axis=1, kind="stable")[:, :drop]
                np.put_along_axis(keep[:, i : i + of], order, False, axis=1)
            error = np.where(keep[:, i], np.float32(0), w[:, i] / factor[i, i])
            w[:, i] = np.where(keep[:, i], w[:, i], np.float32(0))
            w[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return w, keep


@pytest.mark.parametrize("block", [8, 16, 32, 128])
@pytest.mark.parametrize("how", [{"share": 0.5}, {"share": 0.3}, {"neighbours": (2, 4)}])
def test_sparsegpts_sweep_is_the_published_loop(block, how):
    weights, _, stats = layer(rows=13)
    factor, _ = inverse_factor(stats.gram / stats.count, 0.01)
    after, keep = _nybble.sparsegpt(weights, factor, block=block, threads=2, **how)
    wanted, stays = plain_sparsegpt(weights, factor, block, **how)
    assert np.array_equal(keep.view(bool), stays)
    assert np.array_equal(after, wanted)


def test_sparsegpt_makes_up_for_what_goes():
    weights, inputs, stats = layer(rows=24, cols=64, tokens=400)

    def lost(after):
        return np.square(inputs @ (after - weights).T).sum()

    by_size, _ = Wanda(0.5).prune("linear", weights, stats, None, 2)
    after, stays = SparseGpt(0.5, block=32).prune("linear", weights, stats, None, 2)
    assert stays.mean() == pytest.approx(0.5)
    assert lost(after) < 0.8 * lost(by_size)


def test_one_weight_goes_as_the_optimal_brain_surgeon_has_it():
    """In the first column there is nothing before: the sweep is OBS's closed form."""
    weights, inputs, stats = layer(rows=1, cols=8)
    gram = stats.gram / stats.count
    factor, _ = inverse_factor(gram, 1e-9)
    inverse = np.linalg.inv(gram)
    weights[0, 0] = 1e-3  # goes first
    after, keep = _nybble.sparsegpt(weights, factor, share=1 / 8, block=8, threads=1)
    assert keep[0].tolist() == [0] + [1] * 7
    wanted = weights[0] - weights[0, 0] / inverse[0, 0] * inverse[0]
    np.testing.assert_allclose(after[0], wanted, rtol=1e-3, atol=1e-6)
    assert np.square(inputs @ (after - weights)[0]).sum() > 0


def test_inputs_that_are_always_zero_lose_their_weights():
    weights, inputs, _ = layer()
    inputs[:, [3, 7]] = 0
    stats = InputStats("linear", 32, ("gram", "moments"))
    stats.update(inputs)
    for method in (Wanda(0.5), SparseGpt(0.5)):
        after, stays = method.prune("linear", weights, stats, None, 2)
        assert np.isfinite(after).all()
        assert not stays[:, [3, 7]].any()


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_selection_is_a_stable_sort(seed, rows, cols, data):
    draw = np.random.default_rng(seed)
    scores = draw.integers(-3, 4, (rows, cols)).astype(np.float32)  # with ties
    drop = data.draw(st.integers(0, cols))
    keep = _nybble.select(scores, drop, "row", 2).view(bool)
    assert np.array_equal(keep, by_row(scores, (drop + 0.5) / cols if drop < cols else 1.0))
    drop = data.draw(st.integers(0, scores.size))
    keep = _nybble.select(scores, drop, "all", 2).view(bool).reshape(-1)
    wanted = np.ones(scores.size, dtype=bool)
    wanted[np.argsort(scores, axis=None, kind="stable")[:drop]] = False
    assert np.array_equal(keep, wanted)
    divisors = [n for n in range(1, cols + 1) if cols % n == 0]
    of = data.draw(st.sampled_from(divisors))
    drop = data.draw(st.integers(0, of))
    keep = _nybble.select(scores, drop, of, 2).view(bool)
    assert np.array_equal(keep, by_neighbours(scores, drop, of))


def test_what_is_out_of_range_is_refused():
    weights, _, stats = layer(cols=30)
    for method in (Wanda(pattern="2:4"), SparseGpt(pattern="2:4")):
        with pytest.raises(ArgumentError, match="multiple of 4"):
            method.prune("linear", weights, stats, None, 1)
    fisher = np.full(weights.shape, np.nan, dtype=np.float32)
    with pytest.raises(FormatError, match="finite"):
        Gblm(0.5).prune("linear", weights, stats, fisher, 1)
    good = np.eye(4, dtype=np.float32)
    with pytest.raises(ArgumentError, match="among"):
        _nybble.select(good, 1, "column")
    with pytest.raises(ArgumentError, match="drop"):
        _nybble.select(good, 5, "row")
    with pytest.raises(ArgumentError, match="share or neighbours"):
        _nybble.sparsegpt(good, good)
    with pytest.raises(ArgumentError, match="share"):
        _nybble.sparsegpt(good, good, share=2.0)
