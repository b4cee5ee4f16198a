"""Token pruning from the command line."""

import json

import pytest

PROMPT = "the cat sat on the mat, hello world 123; a small model runs fast on the CPU " * 5


def test_run_prunes_the_prompt(run, run_json, tiny_folder):
    arguments = ["run", tiny_folder, "-p", PROMPT, "-n", 4]
    plain = run_json(*arguments)["metrics"]
    assert len(set(plain["layer_tokens"])) == 1
    outcome = run(*arguments, "--prune-tokens", 0.5, "--prune-by", "received")
    assert outcome.code == 0
    count = plain["layer_tokens"][0]
    assert f"({(count + 1) // 2} of {count} left in the last layers)" in outcome.err
    metrics = run_json(*arguments, "--prune-tokens", 0)["metrics"]
    assert metrics["layer_tokens"] == plain["layer_tokens"]


def test_bench_and_eval_take_it(run_json, tiny_folder, tmp_path):
    bench = ["bench", tiny_folder, "-p", 64, "-n", 0, "-r", 1, "-q"]
    assert run_json(*bench)["results"][0]["token_policy"] is None
    policy = run_json(*bench, "--prune-tokens", 0.25)["results"][0]["token_policy"]
    assert (policy["ratio"], policy["criterion"]) == (0.25, "start")
    (tmp_path / "a.txt").write_text(PROMPT * 3)
    check = ["eval", tiny_folder, "--text", tmp_path / "a.txt", "-c", 200, "--prompt-tokens", 150]
    plain = run_json(*check, "-q")
    pruned = run_json(*check, "-q", "--prune-tokens", 0.9, "--prune-by", "random")
    assert pruned["predicted_tokens"] == plain["predicted_tokens"]
    assert pruned["loss"] != plain["loss"]


@pytest.mark.parametrize("share", ["1", "-0.1", "nan", "1.5", "x"])
def test_a_share_that_is_none(run, tiny_folder, share):
    outcome = run("run", tiny_folder, "-p", "x", "--prune-tokens", share)
    assert outcome.code == 2
    assert "--prune-tokens" in outcome.err


def test_eval_of_text_without_prompts_is_refused(run, tiny_folder, tmp_path):
    (tmp_path / "a.txt").write_text(PROMPT)
    outcome = run("eval", tiny_folder, "--text", tmp_path / "a.txt", "--prune-tokens", 0.3)
    assert outcome.code == 2
    assert "--prompt-tokens of at least 64" in outcome.err


def test_the_method_is_listed(run):
    listed = json.loads(run("methods", "--json").out)["methods"]
    entry = next(entry for entry in listed if entry["name"] == "agile_quant")
    assert entry["kind"] == "token reduction"
    assert "arXiv 2312.05693" in entry["paper"]
    assert entry["defaults"]["beta"] == 0.2
