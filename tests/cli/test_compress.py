"""``nybble compress``: from the command line to a folder, and what it refuses."""

import json

import pytest


def test_the_table_ends_it_and_the_folder_runs(run, run_json, tiny_folder, tmp_path):
    out = tmp_path / "not" / "there" / "yet"
    outcome = run("compress", tiny_folder, "--out", out, "-t", 2, "-q")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    for word in ("size", "bits a weight", "error", "time", str(out)):
        assert word in outcome.out
    assert run_json("run", out, "-p", "a", "-n", 2)["generated_tokens"] <= 2


def test_json_is_the_report(run_json, tiny_folder, tmp_path):
    value = run_json("compress", tiny_folder, "--out", tmp_path / "o", "--weights", 8, "-q")
    assert value["out"] == str(tmp_path / "o")
    assert value["settings"]["weights"]["bits"] == 8
    assert 0 < value["size_after"] < value["size_before"]
    assert value["bits_per_weight"] > 8
    assert value["tensors"]
    stored = json.loads((tmp_path / "o" / "report.json").read_text())
    assert stored["size_after"] == value["size_after"]


@pytest.mark.parametrize(
    ("options", "bits", "group", "symmetric", "inputs"),
    [
        ([], 4, 32, False, 8),
        (["--weights", 8, "--activations", 16], 8, 32, True, 16),
        (["--group", 64, "--symmetric"], 4, 64, True, 8),
        (["--weights", 8, "--asymmetric"], 8, 32, False, 8),
        (["--recipe", "w4a16"], 4, 32, False, 16),
        (["--recipe", "w4a16", "--weights", 8], 8, 32, True, 16),
    ],
)
def test_options_reach_the_folder(
    run, tiny_folder, tmp_path, options, bits, group, symmetric, inputs
):
    out = tmp_path / "out"
    outcome = run("compress", tiny_folder, "--out", out, *options, "-q")
    assert outcome.code == 0, outcome.err
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    linear = next(g for g in config["config_groups"].values() if "Linear" in g["targets"])
    weights = linear["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (bits, group)
    assert weights["symmetric"] == symmetric
    assert (linear["input_activations"] or {"num_bits": 16})["num_bits"] == inputs


def test_calibration_reaches_the_report(run, run_json, tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. hello world 123\n" * 400)
    recipe = ["--recipe", "agile-quant-8", "--calibration-tokens", 600, "--seed", 4]
    options = ["compress", tiny_folder, "--out", tmp_path / "o", *recipe, "-q", "-t", 1]
    outcome = run(*options)
    assert outcome.code == 1
    assert "--calibration FILE" in outcome.err
    value = run_json(*options, "--calibration", text, "--calibration", text)
    facts = value["calibration"]
    assert (facts["windows"], facts["context"], facts["seed"]) == (2, 512, 4)
    assert value["settings"]["calibration"]["tokens"] == 600
    outcome = run(*options, "--calibration", tmp_path / "absent", "--overwrite")
    assert outcome.code == 1
    assert "absent" in outcome.err


def test_16_bits_write_a_plain_folder(run, tiny_folder, tmp_path):
    assert run("compress", tiny_folder, "--out", tmp_path / "o", "--weights", 16, "-q").code == 0
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_folder_is_replaced_only_when_asked(run, tiny_folder, tmp_path):
    out = tmp_path / "out"
    assert run("compress", tiny_folder, "--out", out, "-q").code == 0
    before = (out / "model.safetensors").read_bytes()
    refused = run("compress", tiny_folder, "--out", out, "--weights", 8, "-q")
    assert refused.code == 1
    assert str(out) in refused.err
    assert (out / "model.safetensors").read_bytes() == before
    assert run("compress", tiny_folder, "--out", out, "--weights", 8, "--overwrite", "-q").code == 0
    assert (out / "model.safetensors").read_bytes() != before


def test_recipes_that_are_wrong(run, tiny_folder, tmp_path):
    outcome = run("compress", tiny_folder, "--out", tmp_path / "o", "--recipe", "w4a7")
    assert outcome.code == 1
    assert "did you mean" in outcome.err
    recipe = tmp_path / "r.yaml"
    recipe.write_text("weights: {bitz: 4}")
    outcome = run("compress", tiny_folder, "--out", tmp_path / "o", "--recipe", recipe)
    assert outcome.code == 1
    assert "bitz" in outcome.err
    assert not (tmp_path / "o").exists()


def test_a_gguf_file_and_progress_on_stderr(run, tiny_gguf, tmp_path):
    outcome = run("compress", tiny_gguf, "--out", tmp_path / "o")
    assert outcome.code == 0, outcome.err
    assert "compress" in outcome.err or "check" in outcome.err
    assert "%" not in outcome.out.splitlines()[-1]
    assert run("run", tmp_path / "o", "-p", "a", "-n", 1, "-q").code == 0
