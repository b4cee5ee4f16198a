"""The extension module: nybble's Rust core as Python sees it."""

from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer, Self

__all__ = [
    "AttentionGraph",
    "Checkpoint",
    "Encoder",
    "Generator",
    "Model",
    "SafeTensorsWriter",
    "Session",
    "Sparsity",
    "Speculator",
    "StagedFolder",
    "attention_received",
    "attention_row",
    "best_matches",
    "bipartite",
    "build_datastore",
    "choose_patches",
    "cosines",
    "doctor",
    "emphasise",
    "encoder_types",
    "gptq",
    "informative_heads",
    "pagerank",
    "pagerank_iterations",
    "read_bandwidth",
    "rtn",
    "select",
    "sparsegpt",
    "top_k",
    "version",
]

_Path: TypeAlias = str | PathLike[str]
_Ids: TypeAlias = npt.NDArray[np.uint32]
_Floats: TypeAlias = npt.NDArray[np.float32]
_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Places: TypeAlias = npt.NDArray[np.uintp]

@final
class Model:
    @staticmethod
    def open(
        path: _Path,
        threads: int | None = None,
        context: int | None = None,
        kv: str | None = None,
        mmap: bool = True,
        tokens: str | None = None,
    ) -> Model: ...
    def info(self) -> str: ...
    def session(
        self,
        tokens: str | None = None,
        sparsity: Sparsity | None = None,
        dense: bool = False,
    ) -> Session: ...
    def sparsity(self) -> Sparsity | None: ...

@final
class Sparsity:
    def __new__(
        cls, model: Model, layers: Sequence[tuple[_Floats | None, Sequence[float], float]]
    ) -> Self: ...
    def thresholds(self) -> list[tuple[_Floats | None, list[float], float]]: ...
    def probe(self, model: Model, known: str | None = None) -> str | None: ...
    def sparse_layers(self) -> int: ...
    def sparse_linears(self) -> int: ...
    def bytes(self) -> int: ...

@final
class Session:
    def forward(self, ids: _Ids, want: str = "last", prompt: bool = False) -> _Floats: ...
    def observe(self, ids: _Ids) -> list[dict[str, _Floats]]: ...
    def tokens(self) -> _Ids: ...
    def __len__(self) -> int: ...
    def layer_tokens(self) -> list[int]: ...
    def kv_bytes(self) -> int: ...
    def truncate(self, n: int) -> int: ...
    def generate(
        self,
        prompt: _Ids,
        max_new: int,
        stop: Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int = 0,
        speculator: Speculator | None = None,
    ) -> Generator: ...

@final
class Generator:
    @property
    def finish_reason(self) -> str | None: ...
    def metrics(self) -> str: ...
    def __iter__(self) -> Generator: ...
    def __next__(self) -> int: ...

@final
class Speculator:
    def __new__(cls, model: Model, settings: str) -> Self: ...
    def settings(self) -> str: ...
    def times(self) -> list[tuple[int, float]] | None: ...
    def set_times(self, times: Sequence[tuple[int, float]]) -> None: ...
    def ranks(self, depth: int) -> list[float]: ...
    def save(self, path: _Path) -> None: ...
    def forget(self) -> None: ...

@final
class Checkpoint:
    @staticmethod
    def open(path: _Path, mmap: bool = True) -> Checkpoint: ...
    @property
    def kind(self) -> str: ...
    def config(self) -> str: ...
    def tensors(self) -> dict[str, tuple[str, list[int]]]: ...
    def read(self, name: str, start: int = 0, stop: int | None = None) -> _Floats: ...
    def raw(self, name: str) -> bytes: ...
    def plan(self) -> str: ...
    def gguf_metadata(self) -> dict[str, Any]: ...

@final
class Encoder:
    @staticmethod
    def open(
        path: _Path,
        threads: int | None = None,
        kv: str | None = None,
        mmap: bool = True,
    ) -> Encoder: ...
    def info(self) -> str: ...
    def macs(self, height: int, width: int, tokens: str | None = None) -> int: ...
    def encode(
        self, pixels: _Floats, tokens: str | None = None
    ) -> tuple[_Floats, _Floats, _Floats, tuple[_Ids, _Ids, float] | None]: ...

@final
class AttentionGraph:
    def __new__(cls, attention: _Floats, threads: int | None = None) -> Self: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def pagerank(
        self,
        iterations: int,
        tolerance: float,
        damping: float,
        token: int | None = None,
        factor: float | None = None,
        extrapolate: bool = False,
        threads: int | None = None,
    ) -> tuple[_Floats, list[int]]: ...

@final
class SafeTensorsWriter:
    def __new__(cls, path: _Path, entries: Sequence[tuple[str, str, Sequence[int]]]) -> Self: ...
    def write(self, name: str, data: Buffer) -> None: ...
    def write_at(self, name: str, offset: int, data: Buffer) -> None: ...
    def finish(self) -> None: ...

@final
class StagedFolder:
    def __new__(cls, path: _Path, overwrite: bool = False) -> Self: ...
    @property
    def path(self) -> str: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]: ...

def rtn(
    weights: _Floats,
    bits: int,
    group: int,
    zeros: str,
    threads: int | None = None,
) -> tuple[_Bytes, _Floats, _Floats | None]: ...
def gptq(
    weights: _Floats,
    bits: int,
    group: int,
    zeros: str,
    factor: _Floats,
    order: _Ids | None = None,
    importance: _Floats | None = None,
    threads: int | None = None,
) -> tuple[_Bytes, _Floats, _Floats | None]: ...
def select(
    scores: _Floats, drop: int, among: int | Literal["all", "row"], threads: int | None = None
) -> _Bytes: ...
def sparsegpt(
    weights: _Floats,
    factor: _Floats,
    share: float | None = None,
    neighbours: tuple[int, int] | None = None,
    block: int = 128,
    threads: int | None = None,
) -> tuple[_Floats, _Bytes]: ...
def pagerank(
    attention: _Floats,
    iterations: int,
    tolerance: float,
    damping: float,
    token: int | None = None,
    factor: float | None = None,
    extrapolate: bool = False,
    threads: int | None = None,
) -> tuple[_Floats, list[int]]: ...
def pagerank_iterations(layer: int, depth: int) -> int: ...
def attention_received(attention: _Floats, threads: int | None = None) -> _Floats: ...
def attention_row(attention: _Floats, query: int) -> _Floats: ...
def informative_heads(scores: _Floats, least: float, most: float) -> list[bool]: ...
def emphasise(scores: _Floats, kept: Sequence[bool]) -> _Floats: ...
def cosines(a: _Floats, b: _Floats, threads: int | None = None) -> _Floats: ...
def best_matches(a: _Floats, b: _Floats, threads: int | None = None) -> tuple[_Places, _Floats]: ...
def bipartite(
    features: _Floats, count: int, protected: int = 0, threads: int | None = None
) -> tuple[_Places, _Places]: ...
def top_k(scores: _Floats, k: int) -> _Places: ...
def choose_patches(
    policy: str,
    layer: int,
    depth: int,
    image: int,
    attention: _Floats,
    keys: _Floats,
    learned: int,
) -> list[int] | None: ...
def build_datastore(path: _Path, tokens: _Ids, vocab: int) -> None: ...
def doctor() -> str: ...
def encoder_types() -> list[str]: ...
def read_bandwidth(threads: int, megabytes: int) -> float: ...
def version() -> str: ...
