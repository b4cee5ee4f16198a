"""Tuning of scales and gains: gradients, what it is for, and what it leaves alone."""

import copy

import numpy as np
import pytest
import torch

from families import make, prompts
from nybble.errors import ConfigError, FormatError
from nybble.quant import Rtn, ScaleTuning, Scheme
from nybble.quant.trainable import Linear, descend, trainable


def rounded(scheme, rows=6, cols=64, seed=0):
    weights = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    return Rtn().quantize(weights, scheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_a_linear_of_integers_is_one_of_floats(symmetric, group):
    scheme = Scheme(4, group, symmetric, 16)
    integers = rounded(scheme)
    module = trainable(torch, Linear(integers, scheme))
    module.bias = torch.arange(6.0)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = module(x)
    weight = torch.from_numpy(integers.dequantize()).requires_grad_()
    wanted = x @ weight.T + torch.arange(6.0)
    torch.testing.assert_close(out, wanted)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(wanted, x, pull, retain_graph=True)
    (of_weight,) = torch.autograd.grad(wanted, weight, pull)
    (out * pull).sum().backward()
    torch.testing.assert_close(x.grad, gradient)
    # A relative change of a scale moves each weight of its group by the weight itself.
    groups = integers.scales.shape[1]
    of_change = (of_weight * weight).reshape(6, groups, -1).sum(dim=-1)
    torch.testing.assert_close(module.change.grad, of_change, rtol=1e-4, atol=1e-4)
    # A step of a zero point moves them all by the scale, the other way.
    if scheme.zeros == "sixteenths":
        steps = torch.from_numpy(integers.scales)
        of_shift = -of_weight.reshape(6, groups, -1).sum(dim=-1) * steps
        torch.testing.assert_close(module.shift.grad, of_shift, rtol=1e-4, atol=1e-4)
    else:
        assert module.shift is None


@pytest.mark.parametrize(
    ("scheme", "scale", "wanted"),
    [
        (Scheme(8, 32, True, 4, "token"), None, [7.0, 3.0, -7.0, 0.0]),
        (Scheme(8, 32, True, 4, "group"), None, [7.0, 3.0, -7.2, 0.0]),
        (Scheme(8, 32, True, 4, "tensor"), 0.5, [3.5, 3.0, -3.5, 0.5]),
    ],
)
def test_activations_are_rounded_as_while_running(scheme, scale, wanted):
    integers = Rtn().quantize(np.eye(64, dtype=np.float32), scheme)
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 1], x[0, 33], x[0, 34] = 7.0, 3.1, -7.2, 0.4
    if scheme.strategy == "token":
        x[0, 33] = -7.0
    out = trainable(torch, Linear(integers, scheme, scale))(x)[0, [0, 1, 33, 34]]
    np.testing.assert_allclose(out.detach().numpy(), wanted, rtol=1e-2, atol=1e-6)


def test_the_gradient_is_that_of_the_divergence():
    original, model = make("llama"), make("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02
    ids = torch.tensor([prompts(40)[0]])
    norm = model.model.norm.weight
    found = descend(torch, original, model, ids)
    gradient, norm.grad = norm.grad, None
    head = model.lm_head.weight.detach()
    with torch.no_grad():
        wanted = (original.base_model(ids).last_hidden_state[0] @ head.T).log_softmax(-1)
    likely = model(ids).logits[0].log_softmax(-1)
    divergence = torch.nn.functional.kl_div(likely, wanted, log_target=True, reduction="batchmean")
    divergence.backward()
    assert found == pytest.approx(divergence.item(), rel=1e-4)
    torch.testing.assert_close(gradient, norm.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.timeout(180)  # trains, on machines that may be busy
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", Scheme(4, 32, False, 16)),
        ("llama", Scheme(4, 32, False, 16, whole_zeros=True)),
        ("qwen2", Scheme(4, None, True, 16)),
        ("opt", Scheme(4, None, True, 16)),
        ("gpt2", Scheme(4, None, True, 16)),
    ],
)
def test_predictions_come_nearer_and_integers_stay(family, scheme):
    original = make(family)
    model = copy.deepcopy(original)
    names = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name
    ]
    linears = {}
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight.detach().numpy()
        weight = weight.T if type(module).__name__ == "Conv1D" else weight
        linears[name] = Linear(Rtn().quantize(np.ascontiguousarray(weight), scheme), scheme)
    gains = [n for n, p in model.named_parameters() if p.dim() == 1 and n.endswith("norm.weight")]
    before = {name: model.get_parameter(name).clone() for name in gains}
    rng = np.random.default_rng(0)
    few = rng.integers(0, 90, (4, 24))
    windows = np.concatenate([few] * 10)
    tuned = ScaleTuning(rate=3e-3, zero_rate=5e-3).fit(
        torch, original, model, linears, gains, windows, progress=False
    )
    assert np.mean(tuned.divergences[-4:]) < 0.9 * np.mean(tuned.divergences[:4])
    assert tuned.scales.keys() == linears.keys()
    assert tuned.gains.keys() == set(gains)
    for name, scales in tuned.scales.items():
        old = linears[name].integers.scales
        assert scales.shape == old.shape
        assert not np.array_equal(scales, old)
        assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
        np.testing.assert_allclose(scales, old, rtol=0.15)
    assert tuned.zeros.keys() == (linears.keys() if scheme.zeros == "sixteenths" else set())
    for name, zeros in tuned.zeros.items():
        old = linears[name].integers.zeros
        assert not np.array_equal(zeros, old)
        assert np.array_equal(zeros * 16, np.round(zeros * 16))
        np.testing.assert_allclose(zeros, old, atol=0.25)
    for name in gains:  # the model has its own again
        assert torch.equal(model.get_parameter(name), before[name])


def test_predictions_that_are_not_finite_are_refused():
    original, model = make("llama"), make("llama")
    with torch.no_grad():
        original.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FormatError, match=r"step 1: .* not finite"):
        ScaleTuning().fit(
            torch,
            original,
            model,
            {},
            ["model.norm.weight"],
            np.zeros((2, 8), np.int64),
            progress=False,
        )


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"context": 1}, {"rate": -1}, {"rate": "high"}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=f"scales: {next(iter(wrong))}"):
        ScaleTuning(**wrong)
