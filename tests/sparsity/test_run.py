"""Thresholds at work: beside transformers with the same ones, and in folders."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nybble
from nybble import _nybble
from nybble.calibrate.text import draw
from nybble.compress import compress
from nybble.compress.masked import mask
from nybble.errors import ArgumentError, FormatError, UnsupportedError
from nybble.eval import ppl_sparsity
from nybble.eval.losses import compare_logits
from nybble.sparsity import METHODS, Cats, Thresholds, find, observe
from plain import ids
from tiny import write_llama, write_tokenizer

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

from families import distance, reference_logits  # noqa: E402
from families import make as make_family  # noqa: E402

pytestmark = pytest.mark.timeout(180)


def cut(x, threshold):
    return torch.where(x.abs() <= threshold, 0.0, x)


def off_values(limits):
    """Move thresholds off the values they were found on, which two programs compute to 1e-7."""
    inputs = {name: value * 1.0007 for name, value in limits.inputs.items()}
    neurons = None if limits.neurons is None else limits.neurons * np.float32(1.0007)
    return Thresholds(neurons, inputs, limits.active)


def masked(model, thresholds):
    """Put thresholds into a transformers Llama by hooks."""

    def input_hook(threshold):
        return lambda _, args: (cut(args[0], threshold),)

    for layer, limits in zip(model.model.layers, thresholds, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        at = {
            "q": [attention.q_proj],
            "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "out": [attention.o_proj],
            "gate_up": [mlp.gate_proj, mlp.up_proj],
            "down": [mlp.down_proj],
        }
        for name, threshold in limits.inputs.items():
            for linear in at[name]:
                linear.register_forward_pre_hook(input_hook(threshold))
        if limits.neurons is not None:
            act, limit = mlp.act_fn, torch.from_numpy(limits.neurons)
            mlp.act_fn = torch.nn.Module()
            mlp.act_fn.forward = lambda x, act=act, limit=limit: cut(act(x), limit)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "cats", "sparsity": 0.6},
        {"name": "chess", "sparsity": 0.5},
        {"name": "chess", "sparsity": 0.3, "attention": 0.4},
        {"name": "teal", "sparsity": 0.4},
    ],
)
def test_logits_are_those_of_the_masked_model(settings, tmp_path):
    reference = make_family("llama")
    reference.save_pretrained(tmp_path)
    model = nybble.load(tmp_path, 2)
    vocab = model.vocab_size
    windows = np.random.default_rng(0).integers(0, vocab, (4, 48))
    thresholds = [
        off_values(METHODS.make(settings, "sparsity").fit(seen))
        for seen in observe(model.raw, windows)
    ]
    dense = model.forward(windows[0])
    model.sparsify(thresholds)
    masked(reference, thresholds)
    for window in windows:
        found = model.forward(window)
        wanted = reference_logits(reference, window.tolist())
        assert distance(found, wanted) < 1e-4
    # Token by token: the same bits.
    session = model.session()
    single = np.concatenate([session.forward([token], "all") for token in window])
    assert np.array_equal(single, found)
    model.sparsify("off")
    assert np.array_equal(model.forward(windows[0]), dense)


@pytest.mark.parametrize(
    ("family", "inputs", "neurons"),
    [
        ("llama", {"qkv": 0.6, "out": 0.1, "gate_up": 0.6, "down": 0.1}, 0.1),
        ("llama", {"q": 0.9, "qkv": 0.5}, None),
        ("gemma3", {"out": 0.1}, 0.1),
        ("opt", {"qkv": 0.6, "down": 0.05}, None),
        ("opt", {}, 0.1),
        ("gpt2", {"qkv": 0.6, "out": 0.01}, 0.02),
        ("bloom", {}, 0.05),
    ],
)
def test_masks_are_those_of_the_run_time(family, inputs, neurons, tmp_path):
    reference = make_family(family)
    reference.save_pretrained(tmp_path)
    model = nybble.load(tmp_path, 1)
    seen = observe(model.raw, np.random.default_rng(0).integers(0, model.vocab_size, (1, 48)))
    limits = [
        Thresholds(None if neurons is None else np.full(s.act.shape[1], neurons, "f4"), inputs)
        for s in seen
    ]
    tokens = np.arange(40)
    dense = model.forward(tokens)
    model.sparsify(limits, probe=False)
    found = model.forward(tokens)
    assert distance(found, dense) > 1e-3
    parts = json.loads(_nybble.Checkpoint.open(str(tmp_path)).plan())["layers"]
    mask(torch, reference, parts, limits)
    assert distance(found, reference_logits(reference, tokens.tolist())) < 1e-4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    place = tmp_path_factory.mktemp("sparse")
    folder = write_llama(place / "llama", hidden=64, inner=160, seed=3)
    write_tokenizer(folder)
    text = place / "text.txt"
    text.write_text("the cat sat on the mat. a small model runs fast on the CPU. hello 123\n" * 80)
    return folder, text


@pytest.fixture(scope="module")
def sparse_folder(source, tmp_path_factory):
    folder, text = source
    out = tmp_path_factory.mktemp("out") / "chess"
    recipe = {
        "sparsity": {"name": "chess", "sparsity": 0.7},
        "calibration": {"tokens": 512, "context": 64},
    }
    report = compress(folder, out, recipe=recipe, calibration=text, threads=2)
    assert any("neurons are 0" in note for note in report.notes)
    return out


def test_a_folder_has_its_thresholds(sparse_folder):
    config = json.loads((sparse_folder / "config.json").read_text())
    said = config["nybble"]["run"]["sparsity"]
    assert said == {"name": "chess", "sparsity": 0.7}
    arrays = load_file(sparse_folder / "sparsity.safetensors")
    assert arrays["layers.1.neurons"].shape == (160,)
    assert arrays["active"] == pytest.approx([0.3, 0.3], abs=0.01)
    model = nybble.load(sparse_folder, 2)
    dense = nybble.load(sparse_folder, 2, sparsity="off")
    tokens = ids(40)
    assert np.abs(model.forward(tokens) - dense.forward(tokens)).max() > 1e-3
    stored = model.raw.sparsity().thresholds()
    again = nybble.load(sparse_folder, 2, sparsity=[Thresholds(n, active=a) for n, _, a in stored])
    assert np.array_equal(again.forward(tokens), model.forward(tokens))


def test_what_is_tuned_is_what_runs(source, sparse_folder, tmp_path):
    """Thresholds are those of the model as rounded, and at work from the first step on."""
    folder, text = source
    recipe = {
        "sparsity": {"name": "chess", "sparsity": 0.7},
        "calibration": {"tokens": 512, "context": 64},
        "tuning": {"name": "scales", "tokens": 64, "context": 64},
    }
    report = compress(folder, tmp_path / "tuned", recipe=recipe, calibration=text, threads=2)
    before = load_file(sparse_folder / "sparsity.safetensors")
    after = load_file(tmp_path / "tuned" / "sparsity.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    scales = "model.layers.0.mlp.up_proj.weight_scale"
    untuned, tuned = (
        load_file(place / "model.safetensors")[scales]
        for place in (sparse_folder, tmp_path / "tuned")
    )
    assert not np.array_equal(untuned, tuned)
    # The only step sees the divergence of the sparse model from the original.
    original = nybble.load(folder, 2)
    window = draw([text], original.tokenizer, tokens=64, context=64, seed=1).windows[0]
    wanted = original.forward(window)
    divergences = [
        compare_logits(wanted, model.forward(window), window).divergence.mean()
        for model in (nybble.load(sparse_folder, 2), nybble.load(sparse_folder, 2, sparsity="off"))
    ]
    (note,) = (note for note in report.notes if note.startswith("tuning"))
    said = float(note.partition("original ")[2].split()[0])
    assert said == pytest.approx(divergences[0], rel=0.02, abs=1e-4)
    assert abs(said - divergences[1]) > 2 * abs(said - divergences[0])


@pytest.mark.parametrize("draft", ["off", "recycle,ngram"])
def test_skipping_changes_no_bit(sparse_folder, draft):
    """Whatever the probe finds, tokens and logits are the same."""
    stored = nybble.load(sparse_folder, 2).raw.sparsity().thresholds()
    thresholds = [Thresholds(n, active=a) for n, _, a in stored]
    tokens = ids(30)
    found = []
    for dense_seconds, speedup, layers in ((1e-9, None, 0), (1.0, 1.019, 0), (1.0, 1.02, 2)):
        model = nybble.load(sparse_folder, 2, sparsity="off", draft=draft)
        model.sparsify(thresholds, probe=False)
        neurons = {"dense": dense_seconds, "sparse": [[0.1, 0.01], [0.7, 0.02]]}
        known = {"neurons": neurons, "inputs": [None] * 5, "speedup": speedup}
        assert json.loads(model._sparsity.probe(model.raw, json.dumps(known))) == known
        assert model._sparsity.sparse_layers() == layers
        assert (model._sparsity.bytes() > 0) == (layers > 0)
        result = model.generate(tokens, 40, ignore_end=True)
        session = model.session()
        logits = [session.forward([token]) for token in tokens]
        assert np.array_equal(np.concatenate(logits), model.forward(tokens))
        metrics = result.metrics["sparsity"]
        assert metrics["sparse_layers"] == layers
        assert metrics["measured_speedup"] == speedup
        if layers and draft == "off":
            assert metrics["sparse_blocks"] == 2 * 39
            assert 0.4 < metrics["inactive_neurons"] < 0.95
        found.append((result.tokens, np.concatenate(logits)))
    for tokens, logits in found[1:]:
        assert tokens == found[0][0]
        assert np.array_equal(logits, found[0][1])


def test_what_pays_is_tried_on_whole_tokens(sparse_folder):
    """What was measured decides, and is known of these thresholds the next time."""
    model = nybble.load(sparse_folder, 2, sparsity="off", draft="off", context=20)
    stored = nybble.load(sparse_folder, 2).raw.sparsity().thresholds()
    model.sparsify([Thresholds(n, active=a) for n, _, a in stored], probe=False)
    times = {"neurons": {"dense": 1.0, "sparse": [[0.1, 0.01], [0.7, 0.02]]}, "inputs": [None] * 5}
    speedup = json.loads(model._sparsity.probe(model.raw, json.dumps(times)))["speedup"]
    assert speedup > 0
    assert model._sparsity.sparse_layers() == (2 if speedup >= 1.02 else 0)
    metrics = model.generate(ids(5), 4, ignore_end=True).metrics["sparsity"]
    assert metrics["measured_speedup"] == speedup


def test_times_are_kept(sparse_folder, tmp_path, monkeypatch):
    from nybble.sparsity import runtime
    from nybble.speculate import times

    def loads(text):
        """What a probe found, on a machine so quiet that it could tell."""
        return {**json.loads(text), "scattered": False}

    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    monkeypatch.setattr(runtime, "json", SimpleNamespace(loads=loads, dumps=json.dumps))

    model = nybble.load(sparse_folder, 2)
    file = times.path(model.info, "skipping")
    kept = times.stored(file)
    assert kept["inputs"] == [None] * 5
    assert kept["neurons"]["dense"] > 0
    assert [share for share, _ in kept["neurons"]["sparse"]] == [0.1, 0.3, 0.5, 0.7]
    # Of other inputs the times are added, and those of neurons stay.
    model.sparsify([Thresholds(inputs={"out": 0.1, "down": 0.1})] * model.info["layers"])
    more = times.stored(file)
    assert more["neurons"] == kept["neurons"]
    assert [times is not None for times in more["inputs"]] == [False, False, True, False, True]
    # What tokens gain is kept by thresholds.
    gains = [times.stored(place) for place in file.parent.iterdir() if place != file]
    assert len(gains) == 2
    assert all(list(gain) == ["speedup"] for gain in gains)
    model.sparsify([Thresholds(inputs={"out": 0.1})] * model.info["layers"])
    assert times.stored(file) == more
    for damaged in ('{"neurons": "fast"}', "[1, 2]", "{"):
        file.write_text(damaged)
        nybble.load(sparse_folder, 2)
        assert times.stored(file)["neurons"]["dense"] > 0


def test_what_was_too_scattered_is_not_kept(sparse_folder, tmp_path, monkeypatch):
    from nybble.sparsity import runtime
    from nybble.speculate import times

    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    model = nybble.load(sparse_folder, 2, sparsity="off", draft="off")
    neurons = {"dense": 1.0, "sparse": [[0.1, 0.01], [0.7, 0.02]]}
    parts = {"neurons": neurons, "inputs": [None] * 5}

    class Measured:
        """Thresholds of which a probe finds what it is told to."""

        def __init__(self, neurons=0.5, **found):
            self.found = {**parts, **found}
            self.neurons = np.full(3, neurons, np.float32)

        def probe(self, model, known=None):
            return json.dumps(self.found)

        def thresholds(self):
            return [(self.neurons, {}, 0.5)]

    file = times.path(model.info, "skipping")
    runtime.probe(model.raw, model.info, Measured(speedup=0.9, scattered=True))
    assert [place.name for place in file.parent.iterdir()] == [file.name]
    assert times.stored(file) == parts
    runtime.probe(model.raw, model.info, Measured(speedup=0.9))
    (kept,) = (times.stored(place) for place in file.parent.iterdir() if place != file)
    assert kept == {"speedup": 0.9}
    # Of other thresholds it is kept beside that, and of the same ones in its place.
    runtime.probe(model.raw, model.info, Measured(neurons=0.25, speedup=1.2))
    runtime.probe(model.raw, model.info, Measured(speedup=None))
    gains = [times.stored(place) for place in file.parent.iterdir() if place != file]
    assert sorted(gains, key=str) == [{"speedup": 1.2}, {"speedup": None}]
    # Nor is it believed where it comes from elsewhere; metrics say what the new measurement was.
    stored = nybble.load(sparse_folder, 2).raw.sparsity().thresholds()
    model.sparsify([Thresholds(n, active=a) for n, _, a in stored], probe=False)
    known = json.dumps({**parts, "speedup": 77.0, "scattered": True})
    again = json.loads(model._sparsity.probe(model.raw, known))
    assert again["speedup"] != 77
    metrics = model.generate(ids(5), 4, ignore_end=True).metrics["sparsity"]
    assert metrics["scattered"] == again.get("scattered", False)


INPUT_SETS = [
    {"qkv": 0.4, "out": 0.05, "gate_up": 0.4, "down": 0.1},
    {"q": 0.6, "qkv": 0.2},
    {"down": 0.1},
]


@pytest.mark.parametrize("inputs", INPUT_SETS, ids=lambda inputs: "+".join(inputs))
def test_skipping_columns_changes_no_bit(sparse_folder, inputs):
    """Inputs below a threshold are 0, whether their columns are multiplied by it or left out."""
    tokens = ids(30)
    found = []
    for dense_seconds, layers in ((1e-9, 0), (1.0, 2)):
        model = nybble.load(sparse_folder, 2, sparsity="off", draft="off")
        model.sparsify([Thresholds(inputs=inputs)] * model.info["layers"], probe=False)
        times = {"dense": dense_seconds, "sparse": [[0.1, 0.01], [0.99, 0.02]]}
        known = {"neurons": None, "inputs": [times] * 5, "speedup": 1.5}
        kept = json.loads(model._sparsity.probe(model.raw, json.dumps(known)))
        named = [name in inputs for name in ("q", "qkv", "out", "gate_up", "down")]
        assert [times is not None for times in kept["inputs"]] == named
        assert model._sparsity.sparse_linears() == layers * len(inputs)
        assert (model._sparsity.bytes() > 0) == (layers > 0)
        result = model.generate(tokens, 20, ignore_end=True)
        assert result.metrics["sparsity"]["skipped_linears"] == layers * len(inputs) * 19
        session = model.session()
        logits = np.concatenate([session.forward([token]) for token in tokens])
        assert np.array_equal(logits, model.forward(tokens))
        found.append((result.tokens, logits))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])
    dense = nybble.load(sparse_folder, 2, sparsity="off").forward(tokens)
    assert np.abs(found[0][1] - dense).max() > 1e-3


def test_wrong_thresholds_are_named(sparse_folder, tmp_path):
    model = nybble.load(sparse_folder, 2)
    good = [Thresholds(np.zeros(160, np.float32)) for _ in range(2)]
    for wrong, words in [
        (good[:1], "model's 2 layers, found 1"),
        ([good[0], Thresholds(np.zeros(96, np.float32))], r"layers\.1\.neurons: expected 160"),
        ([good[0], Thresholds(np.full(160, -1, np.float32))], "at least 0, found -1"),
        ([good[0], Thresholds(np.full(160, np.nan, np.float32))], "found NaN"),
        ([good[0], Thresholds(inputs={"out": -0.5})], r"layers\.1\.inputs"),
        ([good[0], Thresholds(inputs={"qvk": 0.5})], "did you mean qkv"),
        ([good[0], Thresholds(active=1.5)], "active"),
        ("on", "thresholds or 'off'"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            model.sparsify(wrong)
    for change, words in [
        (lambda arrays: arrays.pop("active"), "active"),
        (lambda arrays: arrays.update({"active": np.ones(3, np.float32)}), "2 layers"),
        (lambda arrays: arrays.pop("layers.0.inputs"), "layers.0.inputs"),
        (lambda arrays: arrays["layers.0.neurons"].fill(np.nan), "layers.0.neurons"),
        (
            lambda arrays: arrays.update({"layers.1.neurons": np.ones(96, np.float32)}),
            "160 values, found 96",
        ),
        (lambda arrays: arrays.update({"layers.1.inputs": np.ones(5, np.int32)}), "F32"),
    ]:
        folder = tmp_path / "broken"
        shutil.copytree(sparse_folder, folder)
        arrays = load_file(folder / "sparsity.safetensors")
        change(arrays)
        save_file(arrays, folder / "sparsity.safetensors")
        with pytest.raises(FormatError, match=words):
            nybble.load(folder)
        shutil.rmtree(folder)
    folder = tmp_path / "absent"
    shutil.copytree(sparse_folder, folder)
    (folder / "sparsity.safetensors").unlink()
    with pytest.raises(FormatError, match=r"sparsity\.safetensors"):
        nybble.load(folder)


def test_what_a_family_cannot_cut_is_refused(tmp_path):
    make_family("bloom").save_pretrained(tmp_path)
    model = nybble.load(tmp_path, 1)
    layers = model.info["layers"]
    with pytest.raises(UnsupportedError, match="queries alone"):
        model.sparsify([Thresholds(inputs={"q": 0.1})] * layers)
    # Without a gate neurons are cut by the activation function's values.
    windows = np.random.default_rng(1).integers(0, model.vocab_size, (2, 32))
    thresholds = [
        METHODS.make("cats", "sparsity").fit(seen) for seen in observe(model.raw, windows)
    ]
    dense = model.forward(windows[0])
    model.sparsify(thresholds)
    assert np.abs(model.forward(windows[0]) - dense).max() > 0


@pytest.mark.parametrize("name", ["cats", "chess", "teal"])
def test_a_layer_without_effect_is_cut_first(source, tmp_path, name):
    """One layer's feed-forward block adds nothing: it takes all that it may, for every method."""
    folder = tmp_path / "idle"
    shutil.copytree(source[0], folder)
    arrays = load_file(folder / "model.safetensors")
    for part in ("mlp.down_proj", "self_attn.o_proj"):
        arrays[f"model.layers.1.{part}.weight"][...] = 0
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    model = nybble.load(folder, 2)
    windows = np.random.default_rng(0).integers(3, 290, (4, 64))
    settings = {"name": name, "sparsity": 0.5}
    even = find(METHODS.make(settings, "sparsity"), model.raw, windows)
    greedy = find(METHODS.make({**settings, "allocate": "greedy"}, "sparsity"), model.raw, windows)
    seen = observe(model.raw, windows)
    for share, layer, limits in zip((0.3, 0.7), seen, greedy, strict=True):
        expected = METHODS.make({"name": name, "sparsity": share}, "sparsity").fit(layer)
        assert limits.inputs == pytest.approx(expected.inputs, rel=1e-2)
        assert limits.active == pytest.approx(expected.active, abs=1e-3)
    tokens = windows[0]
    dense = model.forward(tokens)
    errors = []
    for thresholds in (even, greedy):
        model.sparsify(thresholds, probe=False)
        errors.append(float(np.abs(model.forward(tokens) - dense).mean()))
    assert errors[1] < errors[0]
    # Nothing to spread.
    none = find(Cats(0.0, "greedy"), model.raw, windows)
    assert all(not layer.neurons.any() for layer in none)


def test_the_search_stays_within_the_price(source, tmp_path):
    folder, text = source
    model = nybble.load(folder, 2)
    windows = np.random.default_rng(0).integers(3, 290, (4, 64))
    found = ppl_sparsity(model, text, windows, 2.0, context=64, max_tokens=512, steps=5)
    assert found.method == "chess"
    assert len(found.tried) == 5
    assert found.perplexity <= found.dense_perplexity * 1.02
    for sparsity, value in found.tried:
        assert (value <= found.dense_perplexity * 1.02) == (sparsity <= found.sparsity)
    with pytest.raises(ArgumentError, match="percent"):
        ppl_sparsity(model, text, windows, 0)
