"""Pruning a transformers model through hooks keeps what the run-time keeps."""

import numpy as np
import pytest
import torch

import nybble
from nybble import tokens
from nybble.errors import ArgumentError, UnsupportedError
from nybble.tokens import AttentionReceived, EViT, RandomPatches, ToMe, ZeroTPrune
from vision.encoders import make, save

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

METHODS = {
    "random": RandomPatches(layers=(0, 1), keep=0.6),
    "received": AttentionReceived(layers=(0, 1), keep=(0.75, 0.5)),
    "class-row": EViT(layers=(0, 1), keep=0.6, fuse=False),
    "zero": ZeroTPrune(layers=(0, 1), keep=(0.8, 0.7), similar=4),
}


def pixels(images, seed=0):
    return np.random.default_rng(seed).standard_normal((images, 3, 24, 24)).astype(np.float32)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "family", ["vit", "deit", "dinov2-registers", "clip-tower", "siglip-tower"]
)
def test_the_same_patches_stay_as_in_the_run_time(name, family, tmp_path):
    if family == "siglip-tower" and name == "class-row":
        pytest.skip("SigLIP has no class token")
    model = save(family, tmp_path)
    values = pixels(3)
    wanted = nybble.load(tmp_path, threads=2).encode(values, tokens=METHODS[name])
    with torch.no_grad():
        dense = model(pixel_values=torch.from_numpy(values), output_hidden_states=True)
        with tokens.apply(model, METHODS[name]) as kept:
            found = model(pixel_values=torch.from_numpy(values), output_hidden_states=True)
            first = kept.places
        after = model(pixel_values=torch.from_numpy(values), output_hidden_states=True)
    assert np.array_equal(first, wanted.places)
    states = found.hidden_states[-1]
    assert states.shape[:2] == wanted.tokens.shape[:2]
    assert states.shape[1] < dense.hidden_states[-1].shape[1]
    if found.get("logits") is not None:
        assert np.allclose(found.logits.numpy(), wanted.logits, atol=1e-3)
    # Behind the block the model is as it was.
    assert torch.equal(after.hidden_states[-1], dense.hidden_states[-1])


def test_what_hooks_cannot_do(tmp_path):
    model = make("vit")
    for method in (EViT((0, 1)), ToMe((0, 1), 4)):
        with pytest.raises(UnsupportedError, match="merging"), tokens.apply(model, method):
            pass
    with (
        pytest.raises(ArgumentError, match="layers below 3"),
        tokens.apply(model, AttentionReceived((1, 3), 0.5)),
    ):
        pass
    with pytest.raises(ArgumentError, match="zero_tprune"), tokens.apply(model, "zero-tprune"):
        pass
    with (
        pytest.raises(UnsupportedError, match="siglip"),
        tokens.apply(torch.nn.Linear(2, 2), "random"),
    ):
        pass


def test_an_error_leaves_no_hooks_behind():
    model = make("vit")
    values = torch.from_numpy(pixels(1))
    name = "stop"
    before = model.config._attn_implementation
    dense = model(pixel_values=values).logits
    with pytest.raises(RuntimeError, match="stop"), tokens.apply(model, METHODS["zero"]):
        raise RuntimeError(name)
    assert model.config._attn_implementation == before
    assert torch.equal(model(pixel_values=values).logits, dense)
