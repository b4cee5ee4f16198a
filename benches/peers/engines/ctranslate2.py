"""CTranslate2: int8 kernels for Transformers, strong in prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benches.peers.engines.base import Engine, Format, Session, file_bytes


class CTranslate2(Engine):
    """The `Generator` of CTranslate2.

    It chooses its tokens itself and has no call for one step over a given token. So the prompt is
    `generate_batch` for one new token, and generation is greedy from a single token on: choosing is
    inside the clock, a share of a percent.
    """

    name = "ctranslate2"
    packages = ("ctranslate2",)
    formats = (Format("int8", 8, "one scale a row, activations rounded to 8 bits while running"),)
    timed = "generate_batch, with its greedy choice of tokens; the context is its own choice"

    def prepare(self, source: Path, form: str, target: Path) -> None:
        """Run the converter for transformers' models."""
        from ctranslate2.converters import TransformersConverter

        converter = TransformersConverter(str(source), low_cpu_mem_usage=True)
        converter.convert(str(target), quantization=form, force=True)

    def open(self, model: Path, form: str, threads: int, context: int) -> Session:
        """Load the converted model."""
        import ctranslate2

        del context
        generator = ctranslate2.Generator(
            str(model),
            device="cpu",
            inter_threads=1,
            intra_threads=threads,
            compute_type=form,
        )
        return _Session(generator, model)


class _Session(Session):
    def __init__(self, generator: Any, folder: Path) -> None:
        self.weight_bytes = file_bytes(folder, "model.bin")
        self._generator = generator
        # Its interface is made of token texts.
        self._vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def reset(self) -> None:
        """Keep nothing: every call starts from an empty context."""

    def prompt(self, ids: list[int]) -> None:
        self._run(ids, 1)

    def generate(self, ids: list[int]) -> None:
        self._run(ids[:1], len(ids))

    def _run(self, ids: list[int], new: int) -> None:
        (result,) = self._generator.generate_batch(
            [[self._vocabulary[index] for index in ids]],
            max_length=new,
            min_length=new,  # else an end token would stop it early
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        if len(result.sequences_ids[0]) != new:
            message = f"expected {new} new tokens, found {len(result.sequences_ids[0])}"
            raise RuntimeError(message)
