"""The engines that are measured; a new one is a file here and a line below."""

from benches.peers.engines.base import Engine, Format, Session, Unavailable
from benches.peers.engines.ctranslate2 import CTranslate2
from benches.peers.engines.llama_cpp import LlamaCpp
from benches.peers.engines.nybble import Nybble
from benches.peers.engines.onnxruntime_genai import OnnxRuntimeGenAI
from benches.peers.engines.openvino import OpenVINO
from benches.peers.engines.torch_eager import TorchEager

__all__ = ["ENGINES", "Engine", "Format", "Session", "Unavailable"]

#: In the order of the tables.
ENGINES: dict[str, type[Engine]] = {
    "nybble": Nybble,
    "llama.cpp": LlamaCpp,
    "onnxruntime-genai": OnnxRuntimeGenAI,
    "openvino": OpenVINO,
    "ctranslate2": CTranslate2,
    "torch": TorchEager,
}
