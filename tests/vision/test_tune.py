"""The search for schedules: cost, choice, and going on after an interruption."""

import json

import numpy as np
import pytest

import nybble
from nybble.errors import ArgumentError, FormatError
from nybble.tokens import PATCH_METHODS, tune
from nybble.tokens.tune import divergence
from vision.encoders import save

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("tune") / "vit"
    place.mkdir()
    save("vit", place)
    return nybble.load(place, threads=2)


def pixels(images, seed=0):
    return np.random.default_rng(seed).standard_normal((images, 3, 24, 24)).astype(np.float32)


@pytest.mark.parametrize("method", PATCH_METHODS)
def test_the_best_of_schedules_of_one_cost(model, method):
    images, tried = pixels(20), []
    best = tune(
        model,
        images,
        method=method,
        reduction=0.3,
        trials=12,
        progress=lambda *step: tried.append(step),
    )
    assert best.tokens["name"] == method
    assert abs(best.macs - 0.7) < 1 / 36
    assert best.macs == model.macs(tokens=best.tokens) / model.macs()
    if method != "random":  # chance depends on an image's place in a call
        again = divergence(model.encode(images, tokens=best.tokens), model.encode(images))
        assert best.divergence == pytest.approx(again, rel=1e-4)
    assert tried[-1][:2] == (12, 12)
    losses = [step[2].divergence for step in tried]
    assert losses == sorted(losses, reverse=True)
    # The same seed draws the same schedules, however many.
    fewer = tune(model, images, method=method, reduction=0.3, trials=4)
    assert fewer.divergence >= best.divergence


def test_divergence_by_hand(model, tmp_path):
    dense = model.encode(pixels(2))
    assert divergence(dense, dense) == 0
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (dense.logits, dense.logits[:, ::-1]))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    other = nybble.runtime.encoder.Encoding(
        dense.tokens, dense.embedding, dense.logits[:, ::-1], dense.grid
    )
    assert divergence(other, dense) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    save("clip", tmp_path)
    bare = nybble.load(tmp_path).encode(pixels(2))
    turned = nybble.runtime.encoder.Encoding(bare.tokens, -bare.embedding, None, bare.grid)
    assert divergence(turned, bare) == pytest.approx(2)


def test_it_goes_on_where_it_was(model, tmp_path, monkeypatch):
    images, state = pixels(6), tmp_path / "trials"
    wanted = tune(model, images, trials=8)

    class StopError(Exception):
        pass

    def stop(done, _total, _best):
        if done == 5:
            raise StopError

    with pytest.raises(StopError):
        tune(model, images, trials=8, state=state, progress=stop)
    lines = state.read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines[1:]] == [0, 1, 2, 3, 4]
    computed = []
    before = model.raw.encode
    encode = type(model).encode
    monkeypatch.setattr(
        type(model), "encode", lambda *a, **k: computed.append(k["tokens"]) or encode(*a, **k)
    )
    assert tune(model, images, trials=8, state=state) == wanted
    assert sum(tokens != "off" for tokens in computed) <= 3
    assert model.raw.encode == before
    # Another search's trials are not taken for this one's.
    for change in ({"seed": 1}, {"reduction": 0.3}, {"method": "evit"}):
        with pytest.raises(FormatError, match="this search"):
            tune(model, images, trials=8, state=state, **change)
    with pytest.raises(FormatError, match="this search"):
        tune(model, pixels(6, seed=1), trials=8, state=state)
    state.write_text("{")
    with pytest.raises(FormatError, match="this search"):
        tune(model, images, trials=8, state=state)


def test_what_cannot_be(model):
    for change in (
        {"reduction": 0.0},
        {"reduction": 1.0},
        {"reduction": float("nan")},
        {"reduction": 0.97},
        {"trials": 0},
        {"method": "zero-tprune"},
    ):
        with pytest.raises(ArgumentError):
            tune(model, pixels(2), **{"trials": 3} | change)
    with pytest.raises(ArgumentError, match="images"):
        tune(model, pixels(0))
