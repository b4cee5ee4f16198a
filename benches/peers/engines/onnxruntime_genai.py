"""ONNX Runtime GenAI: MatMulNBits kernels under a generation loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benches.peers.engines.base import Engine, Format, Session, file_bytes

_OPTIONS = {
    # Level 4 rounds activations to 8 bits, as the 8-bit kernels of all others here do.
    "int4": ("int4", "accuracy_level=4", "block_size=32"),
    "int8": ("int8", "accuracy_level=4", "block_size=32"),
}


class OnnxRuntimeGenAI(Engine):
    """`Generator.append_tokens`, fed with the trace."""

    name = "onnxruntime-genai"
    packages = ("onnxruntime-genai", "onnxruntime")
    formats = (
        Format("int4", 4, "blocks of 32, symmetric, 4-bit head, activations 8 bits"),
        Format("int8", 8, "blocks of 32, activations 8 bits"),
    )
    timed = "append_tokens and the last token's logits copied to Python"

    def prepare(self, source: Path, form: str, target: Path) -> None:
        """Run its model builder."""
        precision, *extra = _OPTIONS[form]
        cache = target / "cache"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(source), "-o", str(target), "-c", str(cache)]
        command += ["-p", precision, "-e", "cpu"]
        # Logits of the last token are all that a prompt needs; every other engine here stops there.
        command += ["--extra_options", "prune_lm_head=true", *extra]
        subprocess.run(command, check=True)

    def open(self, model: Path, form: str, threads: int, context: int) -> Session:
        """Load the built folder with so many threads."""
        import onnxruntime_genai as og

        del form
        config = og.Config(str(model))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        return _Session(og.Model(config), model, context)


class _Session(Session):
    def __init__(self, model: Any, folder: Path, context: int) -> None:
        self.weight_bytes = file_bytes(folder, "*.onnx", "*.onnx.data")
        self._model, self._context = model, context
        self._generator: Any = None

    def reset(self) -> None:
        import onnxruntime_genai as og

        parameters = og.GeneratorParams(self._model)
        # One place more than is used: at its end the generator calls itself done.
        parameters.set_search_options(max_length=self._context + 1)
        self._generator = og.Generator(self._model, parameters)

    def prompt(self, ids: list[int]) -> None:
        self._generator.append_tokens(ids)
        self._generator.get_logits()

    def generate(self, ids: list[int]) -> None:
        for index in ids:
            self._generator.append_tokens([index])
            self._generator.get_logits()
