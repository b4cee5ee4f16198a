"""PyTorch eager mode with transformers' models: what most people run first."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from benches.peers.engines.base import Engine, Format, Session


class TorchEager(Engine):
    """`AutoModelForCausalLM` in a loop, not compiled."""

    name = "torch"
    packages = ("torch", "transformers")
    formats = (
        Format(
            "int8 dynamic",
            8,
            "quantize_dynamic over the linears, made from f32 while loading; one scale a batch",
        ),
        Format("bf16", 16, ""),
        Format("f32", 32, ""),
    )
    timed = "one model call a step, logits of the last token, cache grown by transformers"

    def needs_conversion(self, form: str) -> bool:
        """Every format is made while loading."""
        del form
        return False

    def prepare(self, source: Path, form: str, target: Path) -> None:
        """Never called."""
        raise NotImplementedError

    def open(self, model: Path, form: str, threads: int, context: int) -> Session:
        """Load the Hugging Face folder and quantize it if the format says so."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        dtype = torch.bfloat16 if form == "bf16" else torch.float32
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        if form == "int8 dynamic":
            # Counted before: a packed weight does not tell its bytes.
            linears = sum(
                module.weight.numel()
                for module in network.modules()
                if isinstance(module, torch.nn.Linear)
            )
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # deprecated in favour of torchao, still the fast one
                network = torch.ao.quantization.quantize_dynamic(
                    network, {torch.nn.Linear}, dtype=torch.qint8, inplace=True
                )
        else:
            linears = 0
        del context
        rest = sum(p.numel() * p.element_size() for p in network.parameters())
        return _Session(network, linears + rest)


class _Session(Session):
    def __init__(self, network: Any, weight_bytes: int) -> None:
        self.weight_bytes = weight_bytes
        self._network = network
        self._cache: Any = None

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def prompt(self, ids: list[int]) -> None:
        import torch

        with torch.inference_mode():
            self._forward(torch.tensor([ids]))

    def generate(self, ids: list[int]) -> None:
        import torch

        with torch.inference_mode():
            for step in torch.tensor([ids]).split(1, dim=1):
                self._forward(step)

    def _forward(self, ids: Any) -> None:
        self._network(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
