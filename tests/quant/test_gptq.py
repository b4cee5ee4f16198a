"""GPTQ against a plain reference, and what it is for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import _nybble
from nybble.calibrate.inverse_factor import inverse_factor
from nybble.calibrate.stats import InputStats
from nybble.errors import ArgumentError, ConfigError
from nybble.quant import Gptq, Rtn, Scheme


def inputs_of(tokens, cols, seed=0, rank=None):
    """Correlated inputs, a few of them large."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((rank or cols, cols)) / np.sqrt(cols)
    mixing *= np.exp(rng.standard_normal(cols))
    return (rng.standard_normal((tokens, rank or cols)) @ mixing).astype(np.float32)


def stats_of(inputs, reference=None, needs=("gram",)):
    stats = InputStats("x", inputs.shape[1], needs)
    stats.update(inputs, reference)
    return stats


def sweep(weights, scheme, factor, order, scales, zeros):
    """The paper's loop on the grids found by the core, all columns after another, in float32."""
    w = weights[:, order].copy()
    codes = np.zeros(weights.shape, np.uint8)
    top = np.float32(2**scheme.bits - 1)
    for i, column in enumerate(order):
        group = column // (scheme.group or len(order))
        scale = scales[:, group]
        zero = np.float32(2 ** (scheme.bits - 1)) if zeros is None else zeros[:, group]
        with np.errstate(divide="ignore"):
            inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
        code = np.rint(np.clip(w[:, i] * inverse + zero, 0, top))
        codes[:, column] = code
        error = (w[:, i] - scale * (code - zero)) / factor[i, i]
        w[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return codes


@given(
    seed=st.integers(0, 2**31),
    cols=st.sampled_from([32, 64, 96, 160]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_core_equals_a_plain_loop_bit_for_bit(seed, cols, bits, symmetric, act_order):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((19, cols)).astype(np.float32)
    scheme = Scheme(bits, 32, symmetric)
    gram = inputs_of(300, cols, seed).astype(np.float64)
    gram = gram.T @ gram / 300
    diagonal = np.diagonal(gram)
    order = np.argsort(-diagonal) if act_order else np.arange(cols)
    factor, _ = inverse_factor(gram, 0.01, order)
    importance = diagonal.astype(np.float32)
    codes, scales, zeros = _nybble.gptq(
        weights, bits, 32, scheme.zeros, factor, order.astype(np.uint32), importance, 2
    )
    assert np.array_equal(codes, sweep(weights, scheme, factor, order, scales, zeros))


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    gram = inputs_of(200, 12).astype(np.float64)
    gram = gram.T @ gram
    order = np.random.default_rng(1).permutation(12)
    factor, damping = inverse_factor(gram, 0.05, order)
    assert damping == 0.05
    assert np.array_equal(factor, np.triu(factor))
    damped = gram + 0.05 * np.diagonal(gram).mean() * np.eye(12)
    inverse = np.linalg.inv(damped)[np.ix_(order, order)]
    np.testing.assert_allclose(factor.T @ factor, inverse, rtol=1e-3, atol=1e-6 * inverse.max())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_nearer_than_of_rounding_to_nearest(act_order, group, symmetric):
    weights = np.random.default_rng(2).standard_normal((40, 128)).astype(np.float32)
    inputs = inputs_of(1000, 128)
    scheme = Scheme(4, group, symmetric)
    method = Gptq(act_order=act_order)
    swept = method.quantize(weights, scheme, inputs=stats_of(inputs), threads=2)
    nearest = Rtn().quantize(weights, scheme)

    def lost(done):
        return np.square(inputs @ (done.dequantize() - weights).T).sum()

    assert lost(swept) < 0.7 * lost(nearest)
    assert swept.codes.shape == (40, 128)
    assert swept.scales.shape == nearest.scales.shape


def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest():
    weights = np.random.default_rng(3).standard_normal((7, 64)).astype(np.float32)
    stats = stats_of(np.eye(64, dtype=np.float32))
    for act_order in (True, False):
        done = Gptq(act_order=act_order).quantize(weights, Scheme(4, 32), inputs=stats)
        assert np.array_equal(
            done.dequantize(), Rtn().quantize(weights, Scheme(4, 32)).dequantize()
        )


def test_without_inputs_it_rounds_to_nearest():
    weights = np.random.default_rng(4).standard_normal((7, 64)).astype(np.float32)
    done = Gptq().quantize(weights, Scheme())
    assert np.array_equal(done.codes, Rtn().quantize(weights, Scheme()).codes)


def test_the_original_outputs_are_aimed_at():
    # The inputs have drifted: each is 0.8 of what it was, and some noise.
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((30, 64)).astype(np.float32)
    reference = inputs_of(2000, 64)
    inputs = (0.8 * reference + 0.01 * rng.standard_normal((2000, 64))).astype(np.float32)
    stats = stats_of(inputs, reference, ("gram", "reference"))
    wanted = reference @ weights.T

    def lost(propagate):
        done = Gptq(propagate=propagate).quantize(weights, Scheme(8, 32), inputs=stats)
        return np.square(inputs @ done.dequantize().T - wanted).sum() / np.square(wanted).sum()

    assert lost(0.0) == pytest.approx(0.04, rel=0.1)
    assert lost(1.0) < 0.1 * lost(0.5) < 0.1 * lost(0.0)
    assert Gptq(propagate=0.5).needs == {"gram", "reference"}
    assert Gptq().needs == {"gram"}


def test_dead_and_dependent_inputs_are_survived_and_reported():
    weights = np.random.default_rng(6).standard_normal((5, 64)).astype(np.float32)
    dependent = inputs_of(500, 64, rank=3)
    dependent[:, 10:20] = 0
    done = Gptq(damping=0).quantize(weights, Scheme(), inputs=stats_of(dependent))
    assert "damping 0.0001" in done.note or "damping 0.001" in done.note
    assert np.isfinite(done.dequantize()).all()
    assert Gptq().quantize(weights, Scheme(), inputs=stats_of(dependent)).note == ""
    silent = Gptq().quantize(weights, Scheme(), inputs=stats_of(np.zeros((9, 64), np.float32)))
    assert silent.note == "its inputs were all zero"
    assert np.array_equal(silent.codes, Rtn().quantize(weights, Scheme()).codes)


def test_inputs_of_another_width_are_refused():
    weights = np.zeros((4, 64), np.float32)
    with pytest.raises(ArgumentError, match="second moments of 64 channels"):
        Gptq().quantize(weights, Scheme(), inputs=stats_of(inputs_of(10, 32)))
    with pytest.raises(ArgumentError, match="factor"):
        _nybble.gptq(weights, 4, 32, "middle", np.zeros((64, 64), np.float32))
    order = np.zeros(64, np.uint32)
    with pytest.raises(ArgumentError, match="order"):
        _nybble.gptq(weights, 4, 32, "middle", np.eye(64, dtype=np.float32), order)


@pytest.mark.parametrize(
    "wrong",
    [
        {"damping": -1},
        {"damping": "much"},
        {"damping": True},
        {"act_order": 1},
        {"propagate": 1.5},
        {"propagate": float("nan")},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Gptq(**wrong)
