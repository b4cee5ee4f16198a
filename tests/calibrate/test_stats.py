"""Statistics of inputs."""

import numpy as np
import pytest

from nybble.calibrate.stats import InputStats
from nybble.errors import FormatError


def test_sums_over_windows_are_those_of_all_tokens():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((50, 6)).astype(np.float32)
    reference = inputs + rng.standard_normal((50, 6)).astype(np.float32)
    stats = InputStats("l", 6, ["gram", "reference", "sample", "magnitudes"])
    for start in range(0, 50, 20):
        stats.update(inputs[start : start + 20], reference[start : start + 20])
    assert stats.count == 50
    np.testing.assert_allclose(stats.gram, inputs.T @ inputs, rtol=1e-5)
    np.testing.assert_allclose(stats.drift, (reference - inputs).T @ inputs, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(stats.low, inputs.min(0))
    np.testing.assert_array_equal(stats.largest, np.abs(inputs).max(0))
    np.testing.assert_allclose(stats.mean, np.abs(inputs).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(stats.sample, inputs)


def test_what_nobody_needs_takes_no_memory():
    stats = InputStats("l", 4096)
    stats.update(np.ones((3, 4096), np.float32))
    assert stats.gram.size == stats.drift.size == stats.absolute.size == 0
    assert stats.largest.max() == 1


def test_a_sample_stays_small():
    stats = InputStats("l", 3, ["sample"])
    for window in range(200):
        stats.update(np.full((500, 3), window, np.float32))
    assert 256 <= len(stats.sample) <= 1024
    assert stats.sample.min() < 20
    assert stats.sample.max() > 180


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_inputs_that_are_not_finite_are_named(bad):
    inputs = np.ones((4, 8), np.float32)
    inputs[2, 5] = bad
    with pytest.raises(FormatError, match=r"layers\.3\.down: expected finite .* channel 5"):
        InputStats("layers.3.down", 8, ["gram"]).update(inputs)
