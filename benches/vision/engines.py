"""One image encoder in every engine: made, opened, run. See :mod:`benches.vision.speed`.

As a program it is one engine's process: it opens what its arguments say and answers JSON lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Run = Callable[[Floats], Any]

_CALIBRATION = 8


@dataclass(frozen=True)
class Arm:
    """An engine and how it computes.

    Parameters
    ----------
    engine, form
        Its names.
    packages
        What has to be installed; the first one's version is shown.
    tokens
        With patches left out: the method.
    """

    engine: str
    form: str
    packages: tuple[str, ...]
    tokens: str | None = None

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.engine} {self.form}" + (f" {self.tokens}" if self.tokens else "")


ARMS = (
    Arm("nybble", "f32", ("nybble",)),
    Arm("nybble", "w8a8", ("nybble",)),
    Arm("nybble", "w7a7", ("nybble",)),
    Arm("nybble", "w4a8", ("nybble",)),
    Arm("nybble", "w8a8", ("nybble",), "random"),
    Arm("nybble", "w8a8", ("nybble",), "zero_tprune"),
    Arm("nybble", "w8a8", ("nybble",), "tome"),
    Arm("torch", "f32", ("torch", "transformers")),
    Arm("torch", "bf16", ("torch", "transformers")),
    Arm("onnxruntime", "f32", ("onnxruntime",)),
    Arm("onnxruntime", "int8", ("onnxruntime",)),
    Arm("openvino", "f32", ("openvino",)),
    Arm("openvino", "bf16", ("openvino",)),
    Arm("openvino", "int8", ("openvino", "nncf")),
)


def schedule(model: Any, size: int, method: str, reduction: float) -> dict[str, Any]:
    """Return a schedule that saves that share of the arithmetic.

    It prunes in two layers: an early one, for what leaves there saves most, and the middle one, for
    attention knows more by then. ToMe merges in all layers, as many in each.
    """
    depth = int(model.info["layers"])
    patches = (size // model.info["patch"][0]) ** 2
    layers = [depth // 6, depth // 2]
    dense = model.macs(size)

    def made(gone: float) -> dict[str, Any]:
        if method == "tome":
            every = list(range(depth))
            return {"name": method, "layers": every, "r": round(gone * patches / 4)}
        settings: dict[str, Any] = {"name": method, "layers": layers, "keep": 1 - gone}
        if method == "zero_tprune":
            settings |= {"similar": patches // 20}
        return settings

    low, high = 0.0, 0.9
    for _ in range(30):
        middle = (low + high) / 2
        saved = 1 - model.macs(size, tokens=made(middle)) / dense
        low, high = (middle, high) if saved < reduction else (low, middle)
    return made(high)


def prepare(
    arm: Arm, source: Path, work: Path, pixels: dict[int, Floats], sizes: Sequence[int]
) -> None:
    """Make what an engine opens, where it is not there yet.

    Parameters
    ----------
    arm
        The engine.
    source
        The Hugging Face folder in float32.
    work
        Where models go.
    pixels
        Prepared images by size, to calibrate with.
    sizes
        Those that are wanted.
    """
    if arm.engine == "nybble" and arm.form != "f32":
        target = work / f"nybble-{arm.form}"
        if not target.exists():
            from nybble.compress import compress

            compress(source, target, recipe=arm.form, progress=False)
    if arm.engine == "onnxruntime":
        for size in sizes:
            _onnx(source, work / f"onnx-f32-{size}.onnx", size)
            small = work / f"onnx-int8-{size}.onnx"
            if arm.form == "int8" and not small.exists():
                from onnxruntime.quantization import QuantType, quantize_dynamic

                quantize_dynamic(
                    work / f"onnx-f32-{size}.onnx",
                    small,
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    op_types_to_quantize=["MatMul", "Gemm"],
                    # Activations are unsigned there; 7-bit weights, or AVX2's 16-bit sums overflow.
                    reduce_range=True,
                )
    if arm.engine == "openvino":
        for size in sizes:
            target = work / f"openvino-{'int8' if arm.form == 'int8' else 'f32'}-{size}.xml"
            if target.exists():
                continue
            import openvino as ov

            _onnx(source, work / f"onnx-f32-{size}.onnx", size)
            model = ov.convert_model(work / f"onnx-f32-{size}.onnx")
            if arm.form == "int8":
                import nncf

                images = [image[None] for image in pixels[size][:_CALIBRATION]]
                model = nncf.quantize(
                    model,
                    nncf.Dataset(images),
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=len(images),
                )
            ov.save_model(model, target, compress_to_fp16=False)


def _onnx(source: Path, target: Path, size: int) -> None:
    """Export the encoder for images of a size, any number of them."""
    if target.exists():
        return
    import torch

    model = _torch(source)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.model(pixels).last_hidden_state
            return states

    torch.onnx.export(
        Tokens().eval(),
        (torch.zeros(1, 3, size, size),),
        str(target),
        input_names=["pixels"],
        output_names=["tokens"],
        dynamic_axes={"pixels": {0: "images"}, "tokens": {0: "images"}},
        opset_version=17,
        dynamo=False,
    )


def _torch(source: Path) -> Any:
    from transformers import Dinov2Model

    return Dinov2Model.from_pretrained(source).eval()


def opened(
    arm: Arm, source: Path, work: Path, threads: int, reduction: float
) -> Callable[[int], Run]:
    """Return what makes a function of an image size that encodes images."""
    if arm.engine == "nybble":
        import nybble

        model = nybble.load(source if arm.form == "f32" else work / f"nybble-{arm.form}", threads)

        def ours(size: int) -> Run:
            tokens: Any = "off"
            if arm.tokens is not None:
                tokens = schedule(model, size, arm.tokens, reduction)
            return lambda pixels: model.encode(pixels, tokens=tokens)

        return ours
    if arm.engine == "torch":
        import torch

        torch.set_num_threads(threads)
        kind = torch.bfloat16 if arm.form == "bf16" else torch.float32
        eager = _torch(source).to(kind)

        def run(pixels: Floats) -> Any:
            with torch.inference_mode():
                return eager(torch.from_numpy(pixels).to(kind)).last_hidden_state.float().numpy()

        return lambda _: run
    if arm.engine == "onnxruntime":
        import onnxruntime

        def session(size: int) -> Run:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            made = onnxruntime.InferenceSession(
                str(work / f"onnx-{arm.form}-{size}.onnx"),
                options,
                providers=["CPUExecutionProvider"],
            )
            return lambda pixels: made.run(None, {"pixels": pixels})[0]

        return session
    import openvino as ov

    core = ov.Core()

    def compiled(size: int) -> Run:
        file = work / f"openvino-{'int8' if arm.form == 'int8' else 'f32'}-{size}.xml"
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if arm.form == "bf16" else "f32",
        }
        request = core.compile_model(core.read_model(file), "CPU", options).create_infer_request()
        return lambda pixels: request.infer([pixels]).to_tuple()[0]

    return compiled


def _serve(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Open and answer: prepare, and then a time for each question."""
    task = json.loads(arguments[0])
    arm = next(arm for arm in ARMS if arm.name == task["arm"])
    source, work = Path(task["source"]), Path(task["work"])
    with np.load(task["pixels"]) as file:
        pixels = {int(name): file[name] for name in file.files}
    prepare(arm, source, work, pixels, task["sizes"])
    make = opened(arm, source, work, task["threads"], task["reduction"])
    runs: dict[int, Run] = {}
    yield {"ready": True}
    for line in sys.stdin:
        question = json.loads(line)
        size, count = question["size"], question["batch"]
        if size not in runs:
            runs[size] = make(size)
        images = np.ascontiguousarray(pixels[size][:count])
        if question["warm"]:
            done = runs[size](images)
            tokens = np.asarray(getattr(done, "tokens", done))
            yield {"shape": list(tokens.shape), "norm": float(np.linalg.norm(tokens[0, 0]))}
            continue
        start = time.perf_counter_ns()
        done = runs[size](images)
        nanoseconds = time.perf_counter_ns() - start
        # Ours says more than the other engines' arrays do.
        choosing = getattr(done, "choosing_seconds", None)
        yield {"nanoseconds": nanoseconds, "choosing": choosing and round(choosing * 1e9)}


def main() -> int:
    """Run the process of one engine."""
    # Libraries print on stdout what they like; answers go where it led.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for answer in _serve(sys.argv[1:]):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except Exception as error:  # any failure of a peer is its result
        answers.write(json.dumps({"reason": f"{type(error).__name__}: {error}"[:500]}) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
