"""Steps of activations that are found beforehand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.calibrate.stats import InputStats
from nybble.quant.static import static_scale


def stats_of(*windows):
    stats = InputStats("x", windows[0].shape[1], ["sample"])
    for window in windows:
        stats.update(window.astype(np.float32))
    return stats


def lost(values, step, bits):
    top = 2 ** (bits - 1) - 1
    return np.square(np.clip(np.round(values / step), -top, top) * step - values).sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_a_grid_keep_their_step(bits):
    top = 2 ** (bits - 1) - 1
    values = np.arange(-top, top + 1)[None] * 0.25
    assert static_scale(stats_of(values), bits) == 0.25


def test_one_large_value_is_clipped_where_that_makes_the_rest_finer():
    values = np.random.default_rng(0).uniform(-1, 1, (64, 32))
    values[3, 5] = 2.5
    step = static_scale(stats_of(values), 4)
    assert 0.1 < step < 0.25
    assert lost(values, step, 4) < 0.5 * lost(values, 2.5 / 7, 4)


def test_the_range_is_that_of_all_windows():
    one, two = np.ones((8, 32)), np.full((8, 32), -127.0)
    assert static_scale(stats_of(one, two), 8) == 1.0


@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.floats(1e-3, 1e3))
def test_never_worse_than_the_range(seed, bits, size):
    values = size * np.random.default_rng(seed).standard_normal((50, 8)).astype(np.float32)
    step = static_scale(stats_of(values), bits)
    widest = np.abs(values).max() / (2 ** (bits - 1) - 1)
    assert 0 < step <= widest * (1 + 1e-6)
    assert lost(values, step, bits) <= lost(values, widest, bits) * (1 + 1e-4)


def test_inputs_that_are_all_zero_still_have_a_step():
    step = static_scale(stats_of(np.zeros((4, 8))), 8)
    assert np.float32(step) == step == np.finfo(np.float32).tiny
