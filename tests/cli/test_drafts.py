"""``--draft``, ``nybble index`` and ``nybble bench --draft``."""

import json

import pytest

RUN = ["-p", "the cat sat on the mat", "-n", "40", "-t", "2"]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"category": "writing", "turns": ["the cat sat", "and again"]},
        {"category": "coding", "turns": ["the dog"]},
        {"category": "qa", "turns": ["what is a cat"]},
        {"category": "qa", "turns": ["what is a dog"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_text_does_not_depend_on_drafts(run_json, compressed_folder, tmp_path):
    plain = run_json("run", compressed_folder, *RUN, "--draft", "off")
    assert plain["metrics"]["draft"] is None
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat")
    index = tmp_path / "text.index"
    made = run_json("index", text, "--model", compressed_folder, "--out", index)
    assert made["tokens"] > 3
    assert made["bytes"] == index.stat().st_size
    for arguments in (
        [],
        ["--draft", "recycle:paper"],
        ["--draft", "recycle", "--draft-index", index],
        ["--draft", "ngram", "--draft-model", compressed_folder],
    ):
        found = run_json("run", compressed_folder, *RUN, *arguments)
        assert found["tokens"] == plain["tokens"]
        assert found["metrics"]["draft"]["mean_accepted"] is None or len(found["tokens"]) > 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--draft", "warp"],
        ["--draft", ""],
        ["--draft", "off", "--draft-index", "x"],
    ],
)
def test_drafts_that_mean_nothing_are_mistakes_in_the_command(run, tiny_folder, arguments):
    outcome = run("run", tiny_folder, *RUN, *arguments)
    assert outcome.code == 2
    assert "--draft" in outcome.err


def test_indexing_says_what_is_wrong(run, tiny_folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for text, word in ((empty, "token"), (tmp_path / "absent.txt", "absent.txt")):
        outcome = run("index", text, "-m", tiny_folder, "-o", tmp_path / "out")
        assert outcome.code == 1
        assert word in outcome.err
    assert run("index", empty, "-o", "x").code == 2
    assert not (tmp_path / "out").exists()


def test_bench_compares_with_plain_decoding(run_json, run, compressed_folder, questions):
    bench = ["bench", compressed_folder, "--prompts", questions, "-n", "24", "-t", "2"]
    results = run_json(*bench, "--draft", "recycle:6,none,auto")["results"]
    assert [(r["draft"], r["task"]) for r in results] == [
        (draft, task)
        for draft in ("none", "recycle:6", "auto")
        for task in ("multi-turn", "qa", "overall")
    ]
    for record in results:
        assert record["answers"] == {"multi-turn": 3, "qa": 2, "overall": 5}[record["task"]]
        speed = record["tokens_per_second"] / record["plain_tokens_per_second"]
        assert record["speedup"] == pytest.approx(speed)
        given = sum(n * count for n, count in enumerate(record["tokens_by_step"], 1))
        assert given == record["tokens"] or record["draft"] == "none"
        if record["draft"] == "none":
            assert (record["speedup"], record["mean_accepted"]) == (1, 1)
        else:
            assert record["accepted_tokens"] <= record["drafted_tokens"]
    table = run(*bench, "--draft", "ngram", "--per-task", "1", "-o", "md", "-q")
    assert table.code == 0
    assert len(table.out.splitlines()) == 2 + 2 * 3


def test_bench_refuses_what_it_cannot_measure(run, tiny_folder, questions, tmp_path):
    assert run("bench", tiny_folder, "--draft", "ngram").code == 2
    assert run("bench", tiny_folder, "--prompts", questions).code == 2
    assert run("bench", tiny_folder, "--prompts", questions, "--draft", "warp").code == 2
    assert run("bench", tiny_folder, "--prompts", questions, "--draft", "none", "-q").code == 1
    for line in ("[]", '{"category": 3, "turns": ["x"]}', '{"category": "qa", "turns": []}', ""):
        questions.write_text(line + "\n")
        outcome = run("bench", tiny_folder, "--prompts", questions, "--draft", "ngram", "-q")
        assert outcome.code == 1
        assert questions.name in outcome.err
    outcome = run("bench", tiny_folder, "--prompts", tmp_path / "no", "--draft", "ngram", "-q")
    assert outcome.code == 1
