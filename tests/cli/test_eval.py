"""``nybble eval``: several models side by side, questions, a reference, and what is refused.

The perplexity of one model on a text is in ``tests/eval/test_perplexity.py``.
"""

import json

import pytest

import nybble
from nybble.eval import accuracy, agreement, perplexity
from nybble.eval.compare import compare, short_names
from nybble.eval.tasks import find

TEXT = "the cat sat on the mat, hello world 123; a small model runs fast on the CPU ✓ " * 20
ROWS = [
    {"question": f"What is the {thing}?", "choices": ["the mat", "a small model"], "answer": i % 2}
    for i, thing in enumerate(["cat", "mat", "CPU", "world", "model"])
]


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """A folder as ``NYBBLE_DATA`` names it, with a text and the questions of one task."""
    folder = tmp_path / "data"
    (folder / "text").mkdir(parents=True)
    (folder / "qa").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "qa" / "piqa_valid.jsonl").write_text(rows)
    (folder / "text" / "own.txt").write_text(TEXT)
    monkeypatch.setenv("NYBBLE_DATA", str(folder))
    return folder


@pytest.fixture
def text(data):
    return data / "text" / "own.txt"


@pytest.fixture
def questions(data):
    return data / "qa" / "piqa_valid.jsonl"


def test_questions_alone(run_json, run, tiny, tiny_folder):
    value = run_json("eval", tiny_folder, "--task", "piqa", "-q")
    (result,) = value["tasks"]
    expected = accuracy(tiny, "piqa")
    for name in ("task", "items", "acc", "acc_stderr", "acc_norm", "chance", "truncated", "tokens"):
        assert result[name] == getattr(expected, name)
    assert "perplexity" not in value
    table = run("eval", tiny_folder, "--task", "piqa", "-q").out
    for part in ("piqa", f"acc {100 * expected.acc:.1f} ±", "acc_norm", "chance 50.0 %", "5 quest"):
        assert part in table


def test_questions_of_a_file_and_a_text(run_json, tiny_folder, tiny, questions, text):
    value = run_json(
        *("eval", tiny_folder, "--task", "arc_easy", "--data", questions, "--limit", 3),
        *("--text", text, "-c", 64),
    )
    assert value["tasks"][0]["items"] == 3
    assert value["tasks"][0]["task"] == "arc_easy"
    assert value["loss"] == perplexity(tiny, TEXT, context=64).loss


def test_a_reference(run, run_json, tiny, tiny_folder, compressed_folder, text):
    arguments = "eval", compressed_folder, "--reference", tiny_folder, "--text", text, "-c", 64
    value = run_json(*arguments)
    expected = agreement(nybble.load(compressed_folder), tiny, TEXT, context=64)
    assert value["agreement"]["kl"] == expected.kl
    assert value["agreement"]["top1"] == expected.top1
    assert value["reference"] == str(tiny_folder)
    assert value["loss"] == expected.model.loss
    table = run(*arguments, "-q").out
    for part in (f"{expected.kl:.5f} ±", "the largest", "same top token", "nats a token beside"):
        assert part in table


def test_comparing_is_measuring_each(run_json, tiny, tiny_folder, compressed_folder, text):
    value = run_json(
        *("eval", "--compare", tiny_folder, compressed_folder, "--text", text, "-c", 64),
        *("--task", "piqa"),
    )
    first, second = value["models"]
    w4 = nybble.load(compressed_folder)
    expected = agreement(w4, tiny, TEXT, context=64)
    assert first["perplexity"]["loss"] == perplexity(tiny, TEXT, context=64).loss
    assert first["agreement"] is None
    assert second["perplexity"]["loss"] == expected.model.loss
    assert second["agreement"]["kl"] == expected.kl
    assert [model["accuracy"][0]["acc"] for model in value["models"]] == [
        accuracy(tiny, "piqa").acc,
        accuracy(w4, "piqa").acc,
    ]
    assert value["reference"] == str(tiny_folder)
    assert second["bits_per_weight"] < first["bits_per_weight"] == 32
    files = [file.stat().st_size for file in compressed_folder.iterdir()]
    assert second["bytes_on_disk"] == sum(files)


def test_the_table_of_several(run, tiny_folder, compressed_folder, text):
    outcome = run(
        *("eval", "--compare", compressed_folder, tiny_folder, tiny_folder, "--text", text),
        *("-c", 64, "--reference", tiny_folder, "--task", "piqa", "--limit", 4),
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "model" in lines[0]
    for column in (
        "size",
        "bits/weight",
        "perplexity",
        "bits/byte",
        "KL",
        "same top",
        "piqa acc",
        "speed",
    ):
        assert column in lines[0]
    named = [line for line in lines if "reference" in line]
    assert len(named) == 2  # the same folder twice
    assert "w4a8" in lines[2]
    assert "own.txt" in outcome.out
    assert "Questions: piqa 4." in outcome.out
    for label in ("w4a8 agreement:", "llama piqa:"):
        assert label in outcome.err


def test_models_with_different_tokenizers(run, run_json, tiny_folder, tmp_path, text):
    """Bits per byte compare, predictions do not: only a reference that is named is an error."""
    from tiny import write_llama, write_tokenizer

    other = write_llama(tmp_path / "other", vocab=300)
    write_tokenizer(other)
    arguments = "eval", "--compare", tiny_folder, other, "--text", text, "-c", 64
    outcome = run(*arguments)
    assert outcome.code == 0
    assert "different vocabularies" in outcome.err
    assert "bits/byte" in outcome.out
    assert "KL" not in outcome.out
    assert all(model["agreement"] is None for model in run_json(*arguments)["models"])
    outcome = run(*arguments, "--reference", tiny_folder, "-q")
    assert outcome.code == 1
    assert "expected the vocabulary of" in outcome.err


def test_without_a_text_the_known_one(run, tiny_folder, compressed_folder, data, monkeypatch):
    arguments = "eval", "--compare", tiny_folder, compressed_folder, "-c", 64
    outcome = run(*arguments)
    assert outcome.code == 1
    assert "wikitext2_raw_valid.jsonl.gz: no such file" in outcome.err
    monkeypatch.delenv("NYBBLE_DATA")
    outcome = run(*arguments)
    assert outcome.code == 2
    assert "nothing to measure" in outcome.err


def test_the_plot(run, tiny_folder, compressed_folder, text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (the eval extra)")
    arguments = ["eval", "--compare", tiny_folder, compressed_folder, "-c", 64, "--text", text]
    file = tmp_path / "a.png"
    outcome = run(*arguments, "--task", "piqa", "--plot", file)
    assert outcome.code == 0, outcome.err
    assert file.read_bytes().startswith(b"\x89PNG")
    assert f"plot: {file}" in outcome.err
    drawing = tmp_path / "a.svg"
    assert run(*arguments, "--plot", drawing, "-q").code == 0
    assert "<svg" in drawing.read_text()
    (tmp_path / "folder.png").mkdir()
    for wrong, says in (
        ("a.xyz", "a.xyz: expected one of the endings"),
        ("a", "found ''"),
        ("none/a.png", "none: no such folder"),
        ("folder.png", "folder.png: Is a directory"),
    ):
        outcome = run(*arguments, "--plot", tmp_path / wrong, "-q")
        assert outcome.code == 1
        assert says in outcome.err
        assert bool(outcome.out) == (wrong == "folder.png")  # told before anything is measured


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["{m}", "{m}", "--text", "{t}"], "several models need --compare"),
        (["{m}", "--compare", "--text", "{t}"], "there is only one model"),
        (["{m}", "--plot", "a.png", "--text", "{t}"], "there is only one model"),
        (["{m}"], "nothing to measure"),
        (["{m}", "--reference", "{m}", "--task", "piqa"], "compares predictions on a text"),
        (["{m}", "--data", "{t}", "--text", "{t}"], "exactly one --task"),
        (["{m}", "--task", "piqa", "--task", "siqa", "--data", "{t}"], "exactly one --task"),
        (["{m}", "--task", "piqa", "--limit", "0"], "--limit"),
        (["{m}", "--text", "{t}", "--prompt-tokens", "0"], "--prompt-tokens"),
        (["--compare"], "MODEL"),
    ],
)
def test_a_wrong_command_line(run, tiny_folder, text, options, says):
    arguments = [part.format(m=tiny_folder, t=text) for part in options]
    outcome = run("eval", *arguments)
    assert outcome.code == 2
    assert says in " ".join(outcome.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "pika"], "unknown task 'pika'; did you mean piqa"),
        (["--task", "hellaswag"], "no file is known for it"),
        (["--task", "boolq"], "boolq_valid.jsonl: no such file"),
        (["--task", "boolq", "--data", "{q}"], "line 1: passage: expected a text"),
        (["--text", "{t}", "--prompt-tokens", "64", "-c", "64"], "prompt_tokens: expected 1 to 63"),
        (["--text", "{t}", "--reference", "none"], "none"),
    ],
)
def test_failures_are_one_line(run, tiny_folder, text, questions, options, says):
    outcome = run("eval", tiny_folder, "-q", *(o.format(t=text, q=questions) for o in options))
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    assert says in outcome.err


def test_questions_that_were_cut_are_told(run, run_json, tmp_path, questions):
    from tiny import write_llama, write_tokenizer

    folder = write_llama(tmp_path / "short", context=16)
    write_tokenizer(folder)
    assert run_json("eval", folder, "--task", "piqa")["tasks"][0]["truncated"] == 5
    assert "5 questions, 5 of them cut on the left" in run("eval", folder, "--task", "piqa").out
    outcome = run("eval", "--compare", folder, folder, "--task", "piqa", "-q")
    assert "10 questions were cut on the left" in outcome.out


def test_all_is_looked_at_before_anything_is_measured(run, tiny_folder, text):
    arguments = "eval", "--compare", tiny_folder, tiny_folder, "--text", text
    for more in ([text.parent / "none"], ["--task", "siqa", "--data", text]):
        outcome = run(*arguments, *more)
        assert outcome.code == 1
        assert len(outcome.err.splitlines()) == 1  # no bar has begun


def test_models_are_in_memory_one_at_a_time(monkeypatch, tiny_folder, compressed_folder, questions):
    """Two only while predictions are compared."""
    import weakref

    from nybble.eval import compare as module

    alive, most = weakref.WeakSet(), []
    load = module.load_language

    def watched(*arguments, **options):
        model = load(*arguments, **options)
        alive.add(model)
        most.append(len(alive))
        return model

    monkeypatch.setattr(module, "load_language", watched)
    paths = [tiny_folder, compressed_folder, tiny_folder, compressed_folder]
    compare(paths, tasks=[(find("piqa"), questions)])
    assert most == [1, 1, 1, 1]
    most.clear()
    compare(paths, text=TEXT, reference=tiny_folder, context=64)
    assert most == [1, 1, 2, 1, 1, 2]


def test_the_reference_keeps_its_own_cache(tiny_folder):
    """The folder beside itself shows what the cache's type does."""
    itself, other = (
        compare([tiny_folder], text=TEXT, reference=tiny_folder, context=64, kv=kv)[0]
        for kv in (None, "int8")
    )
    assert itself.agreement is None
    assert 0 < other.agreement.kl < 0.1
    assert other.agreement.reference.loss == itself.perplexity.loss


def test_short_names(tmp_path):
    paths = [tmp_path / name for name in ("a/model", "b/model", "b/other")]
    assert short_names(paths[1:]) == ["model", "other"]
    assert short_names(paths) == ["a/model", "b/model", "b/other"]
    assert short_names([paths[0], paths[0]]) == ["model", "model"]


def test_the_sparsity_that_costs_so_much(run, run_json, tiny_folder, text):
    options = ("eval", tiny_folder, "--text", text, "-c", 32, "--max-tokens", 200, "-q")
    value = run_json(*options, "--ppl-sparsity", 3, "--sparsity-method", "cats")
    assert value["method"] == "cats"
    assert value["perplexity"] <= 1.03 * value["dense_perplexity"]
    assert len(value["tried"]) == 7
    shown = run(*options, "--ppl-sparsity", 3).out
    assert "PPL-3% sparsity" in shown
    assert "by chess" in shown
    for wrong, words in [
        (("--sparsity-method", "chss"), "did you mean chess"),
        (("--task", "piqa"), "--ppl-sparsity"),
    ]:
        outcome = run(*options, "--ppl-sparsity", 1, *wrong)
        assert outcome.code != 0
        assert words in outcome.err
