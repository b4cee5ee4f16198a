"""OpenVINO's CPU plug-in with models exported by optimum-intel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benches.peers.engines.base import Engine, Format, Session, Unavailable, file_bytes, installed


class OpenVINO(Engine):
    """The stateful model under an inference request.

    openvino-genai runs the same graph; its pipeline chooses tokens itself, so the request is driven
    here with the trace. Like that pipeline, `open` cuts the graph before the head down to the last
    token: as exported, a prompt of 512 tokens would compute 512 rows of logits.
    """

    name = "openvino"
    packages = ("openvino",)
    formats = (
        Format("int4", 4, "symmetric groups of 32, embedding and head 8 bits"),
        Format("int8", 8, "one symmetric scale a row"),
        Format("f16", 16, "computes in whatever the plug-in prefers here"),
    )
    timed = "one request a step, logits of the last token copied to Python"

    def prepare(self, source: Path, form: str, target: Path) -> None:
        """Export with optimum-intel."""
        try:
            installed("optimum-intel")
        except Unavailable as reason:
            message = f"making the model: {reason}"
            raise Unavailable(message) from None
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        options: dict[str, Any] = {"load_in_8bit": False}
        if form != "f16":
            how = {"bits": 4, "group_size": 32, "ratio": 1.0} if form == "int4" else {"bits": 8}
            options = {"quantization_config": OVWeightQuantizationConfig(sym=True, **how)}
        OVModelForCausalLM.from_pretrained(
            source, export=True, compile=False, **options
        ).save_pretrained(target)
        # An export that leaves the weights as they are says nothing.
        found, before = file_bytes(target, "*.bin"), file_bytes(source, "*.safetensors")
        if form != "f16" and found > 0.75 * before:
            message = f"expected {form} weights, found {found} bytes of {before} in the source"
            raise RuntimeError(message)

    def open(self, model: Path, form: str, threads: int, context: int) -> Session:
        """Compile the graph."""
        import openvino as ov

        del form, context
        core = ov.Core()
        graph = core.read_model(model / "openvino_model.xml")
        _keep_last_row(graph)
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(graph, "CPU", options).create_infer_request()
        return _Session(request, file_bytes(model, "openvino_model.bin"))


def _keep_last_row(graph: Any) -> None:
    """Let the head see the last token alone."""
    from openvino import opset13 as ops

    node = graph.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if not node.inputs():
            message = "the graph has no MatMul before its logits"
            raise RuntimeError(message)
        node = node.input_value(0).get_node()
    end = 2**31 - 1
    hidden = node.input_value(0)
    last = ops.slice(hidden, start=[-1], stop=[end], step=[1], axes=[1])
    node.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()


class _Session(Session):
    def __init__(self, request: Any, weight_bytes: int) -> None:
        self.weight_bytes = weight_bytes
        self._request = request
        self._names = {name for port in request.model_inputs for name in port.names}
        self._length = 0

    def reset(self) -> None:
        self._request.reset_state()
        self._length = 0

    def prompt(self, ids: list[int]) -> None:
        self._forward(ids)

    def generate(self, ids: list[int]) -> None:
        for index in ids:
            self._forward([index])

    def _forward(self, ids: list[int]) -> None:
        import numpy as np

        start, self._length = self._length, self._length + len(ids)
        values = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, self._length), dtype=np.int64),
            "position_ids": np.arange(start, self._length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self._request.infer({name: at for name, at in values.items() if name in self._names})
        self._request.get_tensor("logits").data.copy()
