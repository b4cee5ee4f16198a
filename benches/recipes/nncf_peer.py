"""OpenVINO's NNCF on the same bits, the same calibration windows and the same evaluation windows.

Usage, with an interpreter that has ``nncf``, ``openvino`` and ``optimum-intel``::

    python -m benches.recipes --models SmolLM2-135M --export     # nybble's: writes windows.npz
    python benches/recipes/nncf_peer.py --model SmolLM2-135M --work WORK --out RECIPES.csv

4-bit weights with zero points, all linears, embedding and head in 8 bits (NNCF's default), floats
computed in float32. Each finished row goes to the CSV that ``benches.recipes`` writes.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

METHODS: dict[str, dict[str, bool]] = {
    "rtn": {},
    "awq + scale estimation": {"awq": True, "scale_estimation": True},
    "gptq": {"gptq": True},
    "gptq + scale estimation": {"gptq": True, "scale_estimation": True},
}


def inputs(window: Any) -> dict[str, Any]:
    """Return what the exported model reads."""
    size = len(window)
    return {
        "input_ids": window[None].astype(np.int64),
        "attention_mask": np.ones((1, size), np.int64),
        "position_ids": np.arange(size, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }


def losses(model: Any, windows: Any, threads: int) -> list[float]:
    """Return the mean loss of each window."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # activations stay in float
        "KV_CACHE_PRECISION": "f32",
    }
    compiled = ov.compile_model(model, "CPU", settings)
    found = []
    for window in windows:
        request = compiled.create_infer_request()
        request.infer(inputs(window))
        logits = request.get_output_tensor(0).data[0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits).sum(axis=-1))
        found.append(float((total - logits[np.arange(len(logits)), window[1:]]).mean()))
    return found


def export(folder: Path, out: Path) -> Path:
    """Write the model in float32 as OpenVINO reads it."""
    file = out / "openvino_model.xml"
    if not file.exists():
        from optimum.intel import OVModelForCausalLM

        OVModelForCausalLM.from_pretrained(
            folder, export=True, load_in_8bit=False, compile=False
        ).save_pretrained(out)
    return file


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Perplexity of NNCF's 4-bit weights.")
    parser.add_argument("--model", required=True, help="the name the table has for it")
    parser.add_argument("--work", type=Path, required=True, help="as of benches.recipes")
    parser.add_argument("--out", type=Path, required=True, help="the CSV; its header is kept")
    parser.add_argument("--group", type=int, default=64, help="group size (%(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="(%(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    import nncf

    work = options.work / options.model
    windows = np.load(work / "windows.npz")
    calibration, evaluation = windows["calibration"], windows["evaluation"]
    core = ov.Core()
    file = export(work / "source", work / "openvino")
    with options.out.open(encoding="utf-8", newline="") as stream:
        columns = csv.DictReader(stream).fieldnames
    assert columns is not None
    for name in ["f32", *options.methods.split(",")]:
        began = time.perf_counter()
        model = core.read_model(file)
        calibrated = name != "f32" and bool(METHODS[name])
        if name != "f32":
            model = nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode.INT4_ASYM,
                group_size=options.group,
                ratio=1.0,
                dataset=nncf.Dataset(list(calibration), inputs) if calibrated else None,
                subset_size=len(calibration),
                **METHODS[name],
            )
        seconds = time.perf_counter() - began
        found = losses(model, evaluation, options.threads)
        mean = float(np.mean(found))
        row = {
            "model": options.model,
            "engine": "NNCF",
            "recipe": name if name == "f32" else f"int4 asymmetric, group {options.group}, {name}",
            "calibration_tokens": calibration.size if calibrated else 0,
            "windows": len(evaluation),
            "context": evaluation.shape[1],
            "perplexity": f"{np.exp(mean):.4f}",
            "stderr": f"{np.exp(mean) * np.std(found, ddof=1) / len(found) ** 0.5:.3f}",
            "seconds": f"{seconds:.0f}",
            "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
            "version": f"{nncf.__version__}, OpenVINO {ov.__version__}",
            "machine": platform.platform(),
            "note": options.note,
        }
        with options.out.open("a", encoding="utf-8", newline="") as stream:
            csv.DictWriter(stream, columns, restval="", lineterminator="\n").writerow(row)
        print(f"{row['recipe']}: {row['perplexity']} ({row['seconds']} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
