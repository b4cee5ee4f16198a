"""``nybble doctor`` and ``nybble methods``."""

import dataclasses
import subprocess
import sys

import pytest

from nybble.bench import speed
from nybble.cli import doctor, methods


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    monkeypatch.setattr(speed, "BANDWIDTH_MEGABYTES", 8)


def test_everything_is_there(run_json, monkeypatch):
    monkeypatch.setenv("NYBBLE_THREADS", "2")
    value = run_json("doctor")
    assert value["isa"]["scalar"] == {"detected": True, "allowed": True}
    assert value["isa"][value["best"]]["allowed"]
    operations = [kernel.split("/")[0] for kernel in value["kernels"]]
    assert {"w4a8", "w8a8", "f32", "attention"} <= set(operations)
    assert value["threads_default"] == 2
    assert set(value["bandwidth"]) == {"1", "2"}
    assert all(rate > 1e6 for rate in value["bandwidth"].values())
    assert value["environment"]["NYBBLE_THREADS"] == "2"
    assert isinstance(value["problems"], list)


def test_the_tables(run):
    outcome = run("doctor")
    assert outcome.code == 0, outcome.err
    for word in ("Machine", "read bandwidth", "Instruction sets", "scalar", "w4a8", "roblem"):
        assert word in outcome.out


FINE = {
    "isa": {
        "scalar": {"detected": True, "allowed": True},
        "avx2": {"detected": True, "allowed": True},
    },
    "best": "avx2",
    "kernels": ["w4a8/avx2", "f32/avx2"],
    "threads_default": 4,
    "bandwidth": {"1": 20e9, "4": 40e9},
    "environment": {},
    "machine": {
        "architecture": "x86_64",
        "cpus": 4,
        "huge_pages": "madvise",
        "memory": {"total": 16e9, "available": 8e9},
    },
}


def changed(**changes):
    machine = {**FINE["machine"], **changes.pop("machine", {})}
    return {**FINE, "machine": machine, **changes}


def test_a_healthy_machine_has_no_problems():
    assert doctor.problems(FINE) == []


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            changed(
                isa={**FINE["isa"], "avx2": {"detected": True, "allowed": False}}, best="scalar"
            ),
            "NYBBLE_ISA keeps avx2",
        ),
        (
            changed(isa={"scalar": {"detected": True, "allowed": True}}, best="scalar"),
            "portable code, many times slower",
        ),
        (changed(kernels=["w4a8/scalar", "f32/avx2"]), "No avx2 kernel for w4a8"),
        (changed(threads_default=8), "8 threads on 4 CPUs"),
        (changed(threads_default=2), "quota"),
        (changed(bandwidth={"1": 20e9, "10": 10e9}), "other programs"),
        (changed(machine={"huge_pages": "never"}), "huge pages are off"),
        (changed(machine={"memory": {"total": 1e9, "available": 1e8}}), "100 MB of memory"),
    ],
)
def test_problems_are_named(found, says):
    said = doctor.problems(found)
    assert len(said) == 1
    assert says in said[0]


def test_a_lowered_tier_in_a_process_of_its_own():
    program = (
        "import os; os.environ['NYBBLE_ISA'] = 'scalar'\n"
        "from nybble.bench import speed\n"
        "speed.BANDWIDTH_MEGABYTES = 1\n"
        "from nybble.cli.app import main\n"
        "main(['doctor'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "NYBBLE_ISA=scalar" in done.stdout
    assert "best" in next(line for line in done.stdout.splitlines() if line.startswith("scalar"))


def test_an_unknown_tier_is_an_error(start):
    _, err = (process := start("doctor", NYBBLE_ISA="avx9")).communicate(timeout=80)
    assert process.returncode == 1
    assert b"NYBBLE_ISA" in err
    assert b"avx9" in err


def test_methods_and_recipes(run, run_json):
    value = run_json("methods")
    rtn = next(method for method in value["methods"] if method["name"] == "rtn")
    assert rtn["kind"] == "quantization"
    assert rtn["paper"]
    assert rtn["needs"] == []
    gptq = next(method for method in value["methods"] if method["name"] == "gptq")
    assert "2210.17323" in gptq["paper"]
    assert gptq["needs"] == ["calibration text", "torch"]
    assert gptq["defaults"]["damping"] == 0.01
    folds = {method["name"] for method in value["methods"] if method["kind"] == "fold"}
    assert folds == {"awq", "smoothquant", "trip"}
    names = {recipe["name"] for recipe in value["recipes"]}
    assert names >= {"w4a8", "w4a16-gptq", "agile-quant-8"}
    outcome = run("methods")
    assert "rtn" in outcome.out
    assert "w4a8" in outcome.out


def test_a_method_is_described_by_its_class():
    @dataclasses.dataclass(frozen=True)
    class Method:
        """Round well.

        Paper: A fine title, arXiv 1234.56789. It goes on
        about other things.

        Formula: none.
        """

        damping: float = 0.01
        block: int = 128

    assert methods.describe("m", Method, "quantization") == {
        "name": "m",
        "kind": "quantization",
        "summary": "Round well.",
        "paper": "A fine title, arXiv 1234.56789",
        "defaults": {"damping": 0.01, "block": 128},
    }
