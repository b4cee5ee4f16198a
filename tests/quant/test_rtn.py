"""Rounding to nearest through the extension, and the scheme it obeys."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nybble.errors import ArgumentError
from nybble.quant import Rtn, Scheme


def textbook(weights, bits, symmetric):
    """The squared error of the largest magnitude (or the range) spread over all codes."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = min(weights.min(), 0), max(weights.max(), 0)
    scale = np.float32(
        np.float16(max(high, -low) / (middle - 1) if symmetric else (high - low) / top)
    )
    if scale == 0:
        return float((weights.astype(float) ** 2).sum())
    zero = middle if symmetric else np.round(-low / scale)
    codes = np.clip(np.round(weights / scale) + zero, 0, top) - zero
    return float(((weights.astype(float) - codes * float(scale)) ** 2).sum())


def test_a_case_worked_by_hand():
    # The textbook scale 0.1 gives the codes 7, 1, -2. For these the best scale is
    # (7 * 0.7 + 1 * 0.14 + 2 * 0.2) / (49 + 1 + 4) = 0.100741.
    done = Rtn().quantize(np.array([[0.7, 0.14, -0.2]], np.float32), Scheme(4, None, True))
    assert done.codes.tolist() == [[15, 9, 6]]
    assert done.zeros is None
    assert done.scales[0, 0] == np.float32(np.float16(5.44 / 54))
    error, norm = done.squared_error(np.array([[0.7, 0.14, -0.2]], np.float32))
    assert error == pytest.approx(0.00157, rel=1e-2)
    assert norm == pytest.approx(0.5496)


@given(
    weights=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96])),
        elements=st.floats(-8, 8, width=32, allow_subnormal=False),
    ),
    bits=st.sampled_from([4, 7, 8]),
    symmetric=st.booleans(),
    whole=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_never_worse_than_the_textbook(weights, bits, symmetric, whole):
    symmetric = symmetric or bits == 7
    scheme = Scheme(bits, 32, symmetric, whole_zeros=whole)
    done = Rtn().quantize(weights, scheme, threads=2)
    assert np.array_equal(done.scales, done.scales.astype(np.float16))
    groups = weights.reshape(-1, 32)
    bound = sum(textbook(group, bits, symmetric) for group in groups)
    error, _ = done.squared_error(weights)
    assert error <= bound * (1 + 1e-5) + 1e-10
    assert done.codes.max() < 2**bits


def test_a_grid_is_found_again():
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.001, 0.1, (50, 4, 1)).astype(np.float16).astype(np.float32)
    schemes = {
        "middle": Scheme(4, 32, True),
        "whole": Scheme(4, 32, False, whole_zeros=True),
        "sixteenths": Scheme(4, 32, False),
    }
    for kind, scheme in schemes.items():
        assert scheme.zeros == kind
        zeros = 8 if kind == "middle" else rng.integers(0, 16, (50, 4, 1))
        if kind == "sixteenths":
            zeros = zeros + rng.integers(0, 16, (50, 4, 1)) / 16
        weights = ((rng.integers(0, 16, (50, 4, 32)) - zeros) * scales).astype(np.float32)
        weights = weights.reshape(50, 128)
        done = Rtn().quantize(weights, scheme)
        assert np.array_equal(done.dequantize(), weights)


def test_threads_do_not_show():
    weights = np.random.default_rng(1).standard_normal((70, 128)).astype(np.float32)
    one, three = (Rtn().quantize(weights, Scheme(4, 64, False), threads=n) for n in (1, 3))
    assert np.array_equal(one.codes, three.codes)
    assert np.array_equal(one.scales, three.scales)
    assert np.array_equal(one.zeros, three.zeros)


def test_a_weight_that_is_not_a_number_is_named():
    weights = np.zeros((4, 32), np.float32)
    weights[2, 5] = np.nan
    with pytest.raises(ArgumentError, match="row 2, column 5"):
        Rtn().quantize(weights, Scheme())


@pytest.mark.parametrize(
    ("asked", "cols", "fitted"),
    [
        (128, 576, 64),
        (128, 96, 32),
        (32, 172, None),
        (64, 64, 64),
        (None, 100, None),
        (32, 0, None),
    ],
)
def test_a_group_that_does_not_divide_gives_way(asked, cols, fitted):
    scheme = Scheme(4, asked).fitted(cols)
    assert scheme.group == fitted
    assert scheme.groups(cols) == (1 if fitted is None else cols // fitted)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 5},
        {"group": 48},
        {"activations": 2},
        {"strategy": "channel"},
        {"symmetric": False, "bits": 7},
    ],
)
def test_schemes_outside_the_kernels_are_refused(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        Scheme(**settings)
