"""A model from the Hugging Face hub: safetensors, configuration, tokenizer, and nothing else.

The list of files is asked for first, with sizes and hashes, at one commit. Only top-level files
with a name on the list below are then downloaded: no Python, no pickles, no files in subfolders.
After the download sizes, and hashes where the hub states them, must match.
"""

import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from nybble.hub.cache import FileRecord, Pulled, folder_of, hash_file
from nybble.hub.errors import HubUnreachableError, PullError

#: How long the first question may take. A machine without a way to the hub should not make its user
#: wait.
TIMEOUT_SECONDS = 5.0

_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors")
_INDEX = "model.safetensors.index.json"
_OTHERS = frozenset(
    {
        _INDEX,
        "LICENSE",
        "LICENSE.md",
        "LICENSE.txt",
        "NOTICE",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
)


def offline() -> str | None:
    """Return the variable that forbids asking the hub, if one is set."""
    for variable in ("NYBBLE_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").strip().lower() in {"1", "on", "true", "yes"}:
            return variable
    return None


class Repository:
    """A repository of the hub at one commit, with the files that would be taken.

    Parameters
    ----------
    repo
        ``org/name``.

    Raises
    ------
    HubUnreachableError
        If the hub does not answer in time or may not be asked.
    PullError
        If it answers that there is no such repository, that it is closed, or that it has no
        safetensors.
    """

    def __init__(self, repo: str) -> None:
        info = _ask(repo)
        self.repo = repo
        self.commit = str(info.sha)
        self.files: dict[str, tuple[int, str | None]] = {}
        names = [str(sibling.rfilename) for sibling in info.siblings or []]
        # A single file and shards side by side: the single file is the model, the index would be
        # ambiguous.
        single = "model.safetensors" in names
        for sibling in info.siblings or []:
            name = str(sibling.rfilename)
            shard = _WEIGHTS.fullmatch(name) is not None and name != "model.safetensors"
            if single and (shard or name == _INDEX):
                continue
            if name in _OTHERS or _WEIGHTS.fullmatch(name):
                sha256 = sibling.lfs.sha256 if sibling.lfs else None
                self.files[name] = (int(sibling.size or 0), sha256)
        if (
            not any(_WEIGHTS.fullmatch(name) for name in self.files)
            or "config.json" not in self.files
        ):
            others = sorted(
                n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors"))
            )
            msg = (
                f"{repo}: expected config.json and model*.safetensors, "
                f"found {', '.join(others[:6]) or 'no weights at all'}"
            )
            raise PullError(msg)

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(size for size, _ in self.files.values())

    def fetch(self, name: str, staged: Path, *, progress: bool) -> Pulled:
        """Download everything into ``staged``, check it and describe it as the model ``name``."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

        (enable_progress_bars if progress else disable_progress_bars)()
        try:
            for file in self.files:
                hf_hub_download(self.repo, file, revision=self.commit, local_dir=staged)
        except Exception as error:
            # The client raises errors of three libraries here; all mean that the files did not
            # arrive.
            msg = f"{self.repo}: the download from the hub failed: {_first_line(error)}"
            raise HubUnreachableError(msg) from error
        shutil.rmtree(staged / ".cache", ignore_errors=True)  # the client's own bookkeeping
        records = {}
        for file, (size, sha256) in self.files.items():
            path = staged / file
            if path.is_symlink() or not path.is_file():
                msg = f"{self.repo}: {file} did not arrive"
                raise PullError(msg)
            found = path.stat().st_size
            if size and found != size:
                msg = f"{self.repo}: {file}: expected {size} bytes, found {found}"
                raise PullError(msg)
            digest = hash_file(path, progress=progress)
            if sha256 is not None and digest != sha256:
                msg = f"{self.repo}: {file}: expected SHA-256 {sha256}, found {digest}"
                raise PullError(msg)
            records[file] = FileRecord(found, digest)
        return Pulled(
            name=name,
            folder=folder_of(name),
            entry="",
            source="hub",
            origin=f"{self.repo}@{self.commit}",
            files=records,
            cached=False,
        )


def _ask(repo: str) -> Any:
    """Ask the hub for a repository's files.

    In a thread, since a name server that does not answer takes longer than any timeout.
    """
    if variable := offline():
        msg = f"{variable} is set"
        raise HubUnreachableError(msg)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        msg = "the huggingface_hub package is not installed"
        raise HubUnreachableError(msg) from error

    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(HfApi().model_info(repo, files_metadata=True, timeout=TIMEOUT_SECONDS))
        except Exception as error:  # handed to the caller, which sorts it
            outcome.append(error)

    thread = threading.Thread(target=work, name="nybble-hub", daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS + 1.0)
    answer = (
        outcome[0] if outcome else TimeoutError(f"no answer within {TIMEOUT_SECONDS:.0f} seconds")
    )
    if isinstance(answer, GatedRepoError):
        msg = f"{repo} is gated: accept its terms on the hub and set HF_TOKEN"
        raise PullError(msg) from answer
    if isinstance(answer, RepositoryNotFoundError):
        msg = f"{repo}: the hub has no such public repository"
        raise PullError(msg) from answer
    if isinstance(answer, Exception):
        msg = f"the Hugging Face hub cannot be reached ({_first_line(answer)})"
        raise HubUnreachableError(msg) from answer
    return answer


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
