"""``nybble prune``."""

import json

from nybble.cli.app import main


def test_a_model_is_pruned_by_a_command(tiny_folder, tmp_path, capsys):
    command = ["prune", str(tiny_folder), "-o", str(tmp_path / "out"), "--quiet"]
    code = main([*command, "--method", "random_units", "--ratio", "0.2", "--json"])
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["prune"]["method"] == "random_units"
    assert printed["out"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").exists()
    code = main([*command, "--overwrite", "--method", "magnitude", "--pattern", "2:4"])
    assert code == 0
    assert "zeros in place" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out" / "plan.json").exists()


def test_kinds_of_units_are_chosen(tiny_folder, tmp_path, capsys):
    command = ["prune", str(tiny_folder), "-o", str(tmp_path / "out"), "--quiet", "--json"]
    units = ["--units", "hidden", "--units", "neuron"]
    assert main([*command, "--method", "random_units", "--ratio", "0.5", *units]) == 0
    settings = json.loads(capsys.readouterr().out)["prune"]["settings"]
    assert (settings["attention"], settings["mlp"], settings["hidden"]) == ("none", True, True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 32
    for wrong in (["--units", "nerve"], ["--units", "kv", "--units", "head"]):
        assert main([*command, "--method", "random_units", "--overwrite", *wrong]) == 2
        assert "--units" in capsys.readouterr().err


def test_mistakes_are_told(tiny_folder, tmp_path, capsys):
    command = ["prune", str(tiny_folder), "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--ratio", "1.5"]) == 2
    assert main([*command, "--method", "flapp"]) != 0
    assert "did you mean flap" in capsys.readouterr().err
    assert main(command) != 0
    assert "--calibration" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
