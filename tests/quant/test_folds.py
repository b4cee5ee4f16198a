"""Factors of channels: TRIP, AWQ, SmoothQuant."""

import numpy as np
import pytest

from nybble.calibrate.stats import InputStats
from nybble.errors import ConfigError
from nybble.quant import FOLDS, Awq, Rtn, Scheme, SmoothQuant, Trip
from nybble.quant.fold import Pair, rounded_by_range


def stats_of(inputs, needs=("gram", "sample", "magnitudes")):
    stats = InputStats("x", inputs.shape[1], needs)
    stats.update(inputs.astype(np.float32))
    return stats


def norm_pair(cols):
    return Pair("norm", "norm", np.arange(cols), ("linear",), np.arange(cols), 0)


def test_names():
    assert list(FOLDS) == ["awq", "smoothquant", "trip"]
    assert FOLDS.lookup("trip") is Trip


def test_trip_gives_wide_channels_the_greater_exponents():
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, (500, 40))
    inputs[:, 7] *= 8
    inputs[:, 9] *= 4
    factors = Trip().factors(norm_pair(40), [], stats_of(inputs), Scheme(strategy="tensor"))
    # The widest channel needs all of K = 3, one half as wide one less; the commonest counts as 1.
    assert factors[7] == 8
    assert factors[9] == 4
    assert (np.delete(factors, [7, 9]) == 1).all()


def test_trip_minimises_the_error_of_its_own_rounding():
    rng = np.random.default_rng(1)
    inputs = (rng.standard_normal((300, 12)) * np.exp(rng.standard_normal(12))).astype(np.float32)
    pair, stats = norm_pair(12), stats_of(inputs)
    factors = Trip(exponents=2).factors(pair, [], stats, Scheme(strategy="tensor"))
    step = np.abs(inputs).max() / 127 / 4

    def error(channel, exponent):
        width = step * 2**exponent
        x = stats.sample[:, channel]
        return np.square(x - np.clip(np.round(x / width), -127, 127) * width).sum()

    best = np.array([min(range(3), key=lambda a: error(c, a)) for c in range(12)])
    shift = set(best - np.log2(factors))
    assert len(shift) == 1  # the same but for a common factor
    assert np.array_equal(np.log2(factors), np.round(np.log2(factors)))


def test_tokens_with_steps_of_their_own_count_alike_however_large_they_are():
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((300, 32)) * np.exp(rng.standard_normal(32))
    sizes = np.exp2(rng.integers(-3, 4, (300, 1)))  # exact
    sizes[7] = 1024
    weights = [rng.standard_normal((20, 32)).astype(np.float32)]
    pair = norm_pair(32)
    for strategy, same in (("token", True), ("group", True), ("tensor", False)):
        scheme = Scheme(8, 32, symmetric=True, activations=4, strategy=strategy)
        plain, sized = (
            Trip().factors(pair, weights, stats_of(some), scheme)
            for some in (inputs, inputs * sizes)
        )
        assert np.array_equal(plain, sized) == same


def test_trip_leaves_alone_what_weights_would_pay_for():
    rng = np.random.default_rng(7)
    inputs = rng.uniform(-1, 1, (500, 64))
    inputs[:, ::3] *= 2
    weights = [rng.standard_normal((50, 64)).astype(np.float32)]
    pair, stats = norm_pair(64), stats_of(inputs)
    alone = Trip().factors(pair, [], stats, Scheme(4, 64))
    assert (alone != 1).any()
    # With 8-bit inputs the 4-bit weights are what is lost; with 8-bit weights and 4-bit inputs that
    # have one far outlier it is the inputs.
    assert (Trip().factors(pair, weights, stats, Scheme(4, 64, activations=8)) == 1).all()
    inputs[:, 5] *= 30
    scheme = Scheme(8, 64, symmetric=True, activations=4)
    assert Trip().factors(pair, weights, stats_of(inputs), scheme)[5] == 8


def test_trip_is_for_inputs_whose_rounding_costs_something():
    rng = np.random.default_rng(8)
    inputs = rng.uniform(-1, 1, (500, 64))
    inputs[:, 5] *= 8
    weights = [rng.standard_normal((50, 64)).astype(np.float32)]
    weights[0][:, 5] /= 8  # what a fold would do for rounding to nearest
    pair, stats = norm_pair(64), stats_of(inputs)
    eight, four = (Scheme(4, 64, activations=bits) for bits in (8, 4))
    assert (Trip(share=0).factors(pair, weights, stats, eight) != 1).any()
    assert (Trip().factors(pair, weights, stats, eight) == 1).all()
    assert (Trip().factors(pair, weights, stats, four) != 1).any()


def test_shared_channels_get_one_factor():
    # Two query heads read one value head of three channels.
    columns = np.array([0, 1, 2, 0, 1, 2])
    pair = Pair("value", "v", np.arange(3), ("o",), columns, 1)
    inputs = np.random.default_rng(2).uniform(-1, 1, (200, 6))
    inputs[:, 4] *= 20
    weights = [np.random.default_rng(3).standard_normal((8, 6)).astype(np.float32)]
    for fold in (Trip(), SmoothQuant(), Awq()):
        factors = fold.factors(pair, weights, stats_of(inputs), Scheme(4, None))
        assert factors.shape == (3,)
        assert factors[1] == factors.max()
    merged = pair.merged(np.arange(6.0), np.maximum)
    assert merged.tolist() == [3, 4, 5]
    assert pair.merged(np.arange(6.0), np.add).tolist() == [3, 5, 7]


def test_smoothquant_is_the_papers_formula():
    inputs = np.array([[4.0, -9.0, 0.0]])
    weights = [np.array([[1.0, 1.0, 3.0]], np.float32), np.array([[-4.0, 0.5, 1.0]], np.float32)]
    factors = SmoothQuant(0.5).factors(norm_pair(3), weights, stats_of(inputs), Scheme(8))
    np.testing.assert_allclose(factors, [1.0, 3.0, 1.0])  # sqrt(4/4), sqrt(9/1), never used
    factors = SmoothQuant(1.0).factors(norm_pair(3), weights, stats_of(inputs), Scheme(8))
    np.testing.assert_allclose(factors, [4.0, 9.0, 1.0])


def test_awq_never_loses_and_gains_where_few_channels_matter():
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((800, 64))
    inputs[:, ::16] *= 30
    weight = rng.standard_normal((96, 64)).astype(np.float32)
    scheme = Scheme(4, 64, symmetric=False)
    factors = Awq().factors(norm_pair(64), [weight], stats_of(inputs), scheme)
    plain = Rtn().quantize(weight, scheme).dequantize()
    scaled = Rtn().quantize((weight * factors).astype(np.float32), scheme).dequantize() / factors
    lost = [np.square(inputs @ (w - weight).T).sum() for w in (plain, scaled)]
    assert lost[1] < 0.5 * lost[0]
    signs = np.sign(weight)  # all channels alike
    even = Awq().factors(norm_pair(64), [signs], stats_of(np.ones((9, 64))), scheme)
    np.testing.assert_allclose(even, 1.0)


def test_awq_evens_out_columns_of_different_sizes():
    rng = np.random.default_rng(5)
    sizes = np.exp(rng.uniform(-1, 1, 64))
    weight = (rng.uniform(-1, 1, (96, 64)) * sizes).astype(np.float32)
    scheme = Scheme(4, 64, symmetric=False)
    inputs = stats_of(rng.standard_normal((800, 64)))
    factors = Awq().factors(norm_pair(64), [weight], inputs, scheme)
    assert np.corrcoef(np.log(factors), np.log(sizes))[0, 1] < -0.9
    back = rounded_by_range((weight * factors).astype(np.float32), scheme) / factors
    plain = rounded_by_range(weight, scheme)
    assert np.square(back - weight).sum() < 0.7 * np.square(plain - weight).sum()


def test_inputs_of_zero_leave_everything_as_it_is():
    stats = stats_of(np.zeros((5, 8)))
    weights = [np.ones((3, 8), np.float32)]
    for fold in (Trip(), SmoothQuant(), Awq()):
        np.testing.assert_allclose(fold.factors(norm_pair(8), weights, stats, Scheme(4, None)), 1)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [(Trip, {"exponents": 0}), (SmoothQuant, {"alpha": 2}), (Awq, {"steps": 2.5})],
)
def test_settings_out_of_range_are_named(kind, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)
