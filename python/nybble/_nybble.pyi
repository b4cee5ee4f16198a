"""The extension module: nybble's Rust core as Python sees it."""

from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer, Self

__all__ = [
    "Checkpoint",
    "Generator",
    "Model",
    "SafeTensorsWriter",
    "Session",
    "StagedFolder",
    "doctor",
    "gptq",
    "read_bandwidth",
    "rtn",
    "version",
]

_Path: TypeAlias = str | PathLike[str]
_Ids: TypeAlias = npt.NDArray[np.uint32]
_Floats: TypeAlias = npt.NDArray[np.float32]
_Bytes: TypeAlias = npt.NDArray[np.uint8]

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
    def session(self, tokens: str | None = None) -> Session: ...

@final
class Session:
    def forward(self, ids: _Ids, want: str = "last", prompt: bool = False) -> _Floats: ...
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
    ) -> Generator: ...

@final
class Generator:
    @property
    def finish_reason(self) -> str | None: ...
    def metrics(self) -> str: ...
    def __iter__(self) -> Generator: ...
    def __next__(self) -> int: ...

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
def doctor() -> str: ...
def read_bandwidth(threads: int, megabytes: int) -> float: ...
def version() -> str: ...
